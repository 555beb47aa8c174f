"""Chunks, masks, encodings and prompts against plain loops over the columns."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from openpi_like.data.dataset import EpisodeDataset
from openpi_like.data.index import open_index
from tests.data.toy import ARM, CART, LENGTHS, PROMPTS


@pytest.fixture(scope="module")
def dataset(toy: Path) -> EpisodeDataset:
    return EpisodeDataset(open_index(toy, "train"), ARM)


def test_masks_end_with_the_episode(dataset: EpisodeDataset) -> None:
    """The second to fourth episode have 1, 12 and 5 steps; the last six frames of them, horizon 5."""
    end = sum(LENGTHS["train"][:4])
    _, mask = dataset.actions(np.arange(end - 7, end))
    assert mask.astype(int).tolist() == [
        [1, 1, 0, 0, 0],  # of the episode with 12 steps
        [1, 0, 0, 0, 0],
        [1, 1, 1, 1, 1],
        [1, 1, 1, 1, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 0, 0, 0, 0],
    ]


def test_states_and_chunks_are_those_of_a_loop(dataset: EpisodeDataset) -> None:
    columns, start = dataset.index.columns, dataset.index.episode_start
    states = dataset.state(np.arange(len(dataset)))
    chunks, mask = dataset.actions(np.arange(len(dataset)))
    frame = 0
    for e, length in enumerate(LENGTHS["train"]):
        for t in range(length):
            at = start[e] + t
            s = columns["observation/state"][at]
            np.testing.assert_array_equal(
                states[frame], np.array([*s[:2], s[3], *columns["observation/joints"][at]], np.float32)
            )
            for a in range(ARM.action_horizon):
                assert mask[frame, a] == (t + a < length)
                inside = start[e] + min(t + a, length - 1)
                np.testing.assert_array_equal(chunks[frame, a], columns["action"][inside])
            frame += 1
    assert frame == len(dataset) == sum(LENGTHS["train"])


def test_encoding_is_the_robots(dataset: EpisodeDataset) -> None:
    """Centimetres to metres, degrees to radians, grippers to 1 = open, the hand relative to the chunk's first state."""
    frames = np.array([3, 50, 50, 109])
    state, chunks, _ = dataset.encoded(frames)
    raw, actions = dataset.state(frames).astype(np.float64), dataset.actions(frames)[0].astype(np.float64)
    expected = np.concatenate([raw[:, :2] / 100, 1 - raw[:, 2:3] / 2, np.deg2rad(raw[:, 3:])], axis=1)
    np.testing.assert_allclose(state, expected, rtol=1e-6, atol=1e-7)
    hand = (actions[..., :2] - raw[:, None, :2]) / 100
    np.testing.assert_allclose(chunks, np.concatenate([hand, (1 - actions[..., 2:]) / 2], axis=2), rtol=1e-6, atol=1e-7)
    np.testing.assert_array_equal(chunks[1], chunks[2])


@pytest.mark.parametrize("stride", [2, 5, 50])
def test_frame_stride_thins_the_frames_not_the_chunks(toy: Path, dataset: EpisodeDataset, stride: int) -> None:
    thinned = EpisodeDataset(dataset.index, ARM, frame_stride=stride)
    kept, at = [], 0
    for length in LENGTHS["train"]:
        kept += list(range(at, at + length, stride))
        at += length
    assert len(thinned) == len(kept)
    for ours, theirs in zip(thinned.actions(np.arange(len(kept))), dataset.actions(np.array(kept)), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_prompts_come_from_the_step_the_episode_or_the_robot(dataset: EpisodeDataset) -> None:
    frames = np.array([0, 7, 8, 30, 109])
    assert dataset.prompts(frames) == [PROMPTS[e % 4] for e in (0, 1, 2, 4, 11)]
    of_episode = EpisodeDataset(dataset.index, dataclasses.replace(ARM, language_key="episode_metadata/file_path"))
    assert of_episode.prompts(frames) == ["é/0", "é/1", "é/2", "é/4", "é/11"]
    assert EpisodeDataset(dataset.index, CART).prompts(frames) == ["roll"] * 5


def test_images_are_read_from_many_threads(dataset: EpisodeDataset) -> None:
    from concurrent.futures import ThreadPoolExecutor

    camera = ARM.cameras[0]
    expected = [dataset.image(i, camera) for i in range(len(dataset))]
    dataset.close()
    with ThreadPoolExecutor(8) as pool:
        for ours, theirs in zip(pool.map(lambda i: dataset.image(i, camera), range(110)), expected, strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_more_shards_than_may_stay_open(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("openpi_like.data.files._OPEN_FILES", 1)
    few = EpisodeDataset(open_index(toy, "train"), ARM)
    images = [few.image(i, ARM.cameras[0]) for i in (0, 60, 109, 0)]
    np.testing.assert_array_equal(images[0], images[3])
