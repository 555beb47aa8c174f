"""Chunks, masks, encodings, prompts and parts of a split, by frame, against plain loops over the columns."""

import dataclasses
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openpi_like.data import files
from openpi_like.data.dataset import EpisodeDataset, open_dataset
from openpi_like.data.index import open_index
from openpi_like.data.schema import DatasetError
from openpi_like.data.selection import Selection
from tests.data.toy import ARM, CART, LENGTHS, PROMPTS
from tests.data.toy_dataset import START, STEPS, TRAIN, by_step, kept_steps


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


@pytest.mark.parametrize("most", [1, 2])
def test_more_shards_than_may_stay_open(toy: Path, monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    """The bound is that of the process, whatever the number of datasets; threads keep what they are reading."""
    from concurrent.futures import ThreadPoolExecutor

    monkeypatch.setattr(files, "OPEN_FILES", most)
    pool, camera = files._OpenFiles(), ARM.cameras[0]
    monkeypatch.setattr(files, "_open_files", pool)
    datasets = [EpisodeDataset(open_index(toy, split), ARM) for split in ("train", "train", "val")]
    frames = [(d, i) for i in range(0, STEPS, 3) for d in datasets if i < len(d)] * 3
    before = len(os.listdir("/proc/self/fd"))
    first = datasets[0].image(0, camera)
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(lambda at: at[0].image(at[1], camera), frames))
    assert len(pool) == most
    assert len(os.listdir("/proc/self/fd")) - before <= most
    for (d, i), image in zip(frames, found, strict=True):
        np.testing.assert_array_equal(image, d.image(i, camera))
    for d in datasets:
        d.close()
    assert len(pool) == 0
    np.testing.assert_array_equal(first, datasets[0].image(0, camera))  # opens the file again


@given(cut=st.integers(0, 100))
@settings(max_examples=25, deadline=None)
def test_parts_by_percent_are_those_of_tfds(toy: Path, tfds: Any, cut: int) -> None:
    """Two parts hold every step once, cut where TFDS cuts."""
    sizes = []
    for split in (f"train[:{cut}%]", f"train[{cut}%:]"):
        instruction = tfds.core.ReadInstruction.from_spec(split)
        (absolute,) = instruction.to_absolute({"train": _Info(len(TRAIN))})
        episodes = TRAIN[absolute.from_ : absolute.to]
        if not episodes:
            with pytest.raises(DatasetError, match=r"is empty: 'train' has 12 episodes"):
                open_dataset(toy, ARM, split)
            continue
        part = open_dataset(toy, ARM, split)
        first = START[absolute.from_ or 0]
        assert kept_steps(part) == list(range(first, first + sum(episodes)))
        assert part.episodes == len(episodes)
        sizes.append(len(part))
    assert sum(sizes) == STEPS


@dataclasses.dataclass(frozen=True)
class _Info:
    num_examples: int


def test_a_part_by_number_with_a_selection(toy: Path, dataset: EpisodeDataset) -> None:
    selection = Selection(success="episode_metadata/success", skip_first=3)
    part = open_dataset(toy, ARM, "train[2:7]", selection=selection)
    assert kept_steps(part) == by_step(lambda e, t: e in (2, 4, 6) and t >= 3)
    assert part.frames_per_episode()[6] == TRAIN[6] - 3
    assert part.prompts(np.array([0, len(part) - 1])) == [PROMPTS[2], PROMPTS[2]]
    np.testing.assert_array_equal(part.actions(np.array([0]))[0], dataset.actions(np.array([START[2] + 3]))[0])


def test_paraphrases_are_drawn_among_those_that_say_something(dataset: EpisodeDataset) -> None:
    """The instruction of every fourth episode is empty; its file's name stands in."""
    robot = dataclasses.replace(ARM, language_alternatives=("episode_metadata/file_path",))
    spoken = EpisodeDataset(dataset.index, robot)
    frames = np.array([START[0], START[0], START[3], START[3]])
    assert spoken.prompts(frames) == [PROMPTS[0], PROMPTS[0], "é/3", "é/3"]
    assert spoken.prompts(frames, np.array([0.49, 0.5, 0.0, 0.99])) == [PROMPTS[0], "é/0", "é/3", "é/3"]
    labelled = EpisodeDataset(dataset.index, robot, selection=Selection(labelled=True))
    assert len(labelled) == STEPS
    # without another there is nothing to draw
    assert dataset.prompts(frames, np.array([0.0, 0.9, 0.0, 0.9])) == [PROMPTS[0], PROMPTS[0], "", ""]


def test_a_dataset_travels_to_another_process(toy: Path) -> None:
    selection = Selection(success="episode_metadata/success")
    dataset = open_dataset(toy, ARM, "train[25%:]", selection=selection)
    other = pickle.loads(pickle.dumps(dataset))
    frames = np.arange(len(dataset))
    assert len(pickle.dumps(dataset)) < 20_000
    assert (len(other), other.removed) == (len(dataset), dataset.removed)
    np.testing.assert_array_equal(other.actions(frames)[0], dataset.actions(frames)[0])
    np.testing.assert_array_equal(other.image(3, ARM.cameras[0]), dataset.image(3, ARM.cameras[0]))


@pytest.mark.parametrize("split", ["train[", "train[5]", "train[5%]", "train[:-1]", "[:5]", "train[:5%][:3]"])
def test_parts_that_cannot_be_read(toy: Path, split: str) -> None:
    with pytest.raises(DatasetError, match=r"expected a name, or a part like 'train\[:95%\]'"):
        open_dataset(toy, ARM, split)


@pytest.mark.parametrize(
    ("split", "beyond"),
    [("train[:101%]", "101%"), ("train[101%:]", "101%"), ("train[:13]", "13"), ("train[99:]", "99")],
)
def test_parts_beyond_the_split(toy: Path, split: str, beyond: str) -> None:
    """More episodes than there are must not pass for all of them."""
    with pytest.raises(DatasetError, match=rf"goes to {beyond}, but 'train' has 12 episodes"):
        open_dataset(toy, ARM, split)


def test_parts_up_to_the_end(toy: Path) -> None:
    for split in ("train[:100%]", "train[0:12]", "train[0%:]"):
        assert len(open_dataset(toy, ARM, split)) == STEPS
