"""Chunks, masks, encodings, prompts and selections against plain loops over the columns."""

import dataclasses
import itertools
import json
import logging
import os
import pickle
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from openpi_like.data import files
from openpi_like.data.damage import check_images
from openpi_like.data.dataset import EpisodeDataset, open_dataset
from openpi_like.data.index import FrameIndex, open_index
from openpi_like.data.schema import DatasetError
from openpi_like.data.selection import Selection
from openpi_like.robots import ActionField, Camera, Gripper, Robot, StateField
from openpi_like.robots.oxe import BRIDGE
from tests.data.toy import ARM, CART, LENGTHS, PROMPTS, change_record, shard

TRAIN = LENGTHS["train"]
START = np.cumsum([0, *TRAIN])
STEPS = sum(TRAIN)


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


# ---- Commands that are derived or combined ---------------------------------------------------------------------------


def with_columns(index: FrameIndex, **columns: np.ndarray) -> FrameIndex:
    return dataclasses.replace(index, columns={**index.columns, **columns})


def acting(*action: ActionField, **changes: Any) -> Robot:
    return dataclasses.replace(ARM, action=action, **changes)


def chunks_of(dataset: EpisodeDataset, episode: int) -> tuple[np.ndarray, np.ndarray]:
    """Chunks and masks of all frames of one episode."""
    counts = dataset.frames_per_episode()
    frames = np.arange(counts[episode]) + counts[:episode].sum()
    return dataset.actions(frames)


@pytest.mark.parametrize("convention", ["trigger", "look_ahead"])
@pytest.mark.parametrize("block", [8, 1 << 16])
def test_grippers_are_derived_within_episodes(
    dataset: EpisodeDataset, monkeypatch: pytest.MonkeyPatch, convention: str, block: int
) -> None:
    """Whatever the size of the blocks that are looked at together; in the dataset's own numbers."""
    monkeypatch.setattr("openpi_like.data.blocks.BLOCK", block)
    gripper = Gripper(open=-1.0, closed=1.0, convention=convention)
    stored = np.random.default_rng(0).choice([-1.0, 0.0, 0.0, 0.0, 1.0], (STEPS, 3)).astype(np.float32)
    index = with_columns(dataset.index, action=stored)
    derived = EpisodeDataset(index, acting(ActionField("gripper", "action", 1, start=2, gripper=gripper)))
    got = derived.actions(np.arange(STEPS))[0][:, 0, 0]
    for a, b in itertools.pairwise(START):
        opens = gripper.opens(stored[a:b, 2].astype(np.float64), np.arange(b - a) == 0)
        np.testing.assert_array_equal(got[a:b], np.where(opens, -1, 1))
    assert derived.robot.encode_actions(got[:1, None], np.zeros(6))[0, 0] in (0.0, 1.0)


def test_commands_from_the_next_step(dataset: EpisodeDataset) -> None:
    """The last step of an episode is no frame, no chunk reaches it, and the episode of one step is gone."""
    move = ActionField("hand", "observation/joints", 2, unit="cm", command="delta", next_step="change")
    goal = ActionField("goal", "observation/joints", 1, start=2, next_step="value")
    derived = EpisodeDataset(dataset.index, acting(move, goal))
    assert derived.removed == {"no whole action left in the episode": len(TRAIN)}
    assert derived.frames_per_episode().tolist() == [n - 1 for n in TRAIN]
    assert (derived.episodes, len(derived)) == (len(TRAIN) - 1, STEPS - len(TRAIN))
    x = dataset.index.columns["observation/joints"]
    for e, length in enumerate(TRAIN):
        chunks, mask = chunks_of(derived, e)
        for t in range(length - 1):
            for a in range(ARM.action_horizon):
                assert mask[t, a] == (t + a + 1 < length)
                at = START[e] + min(t + a, length - 2)
                expected = [*(x[at + 1, :2] - x[at, :2]), x[at + 1, 2]]
                np.testing.assert_allclose(chunks[t, a], expected, rtol=1e-6)


@pytest.mark.parametrize("stride", [2, 3])
def test_control_steps_of_several_steps(dataset: EpisodeDataset, stride: int) -> None:
    """Targets: the last of a control step; changes: their sum; rates: their mean. All of it inside the episode."""
    fields = [
        ActionField(command, "action", 1, start=i, command=command)
        for i, command in enumerate(("absolute", "delta", "velocity"))
    ]
    strided = EpisodeDataset(dataset.index, acting(*fields, stride=stride))
    x = dataset.index.columns["action"]
    assert strided.removed == {"no whole action left in the episode": sum(min(stride - 1, n) for n in TRAIN)}
    for e, length in enumerate(TRAIN):
        chunks, mask = chunks_of(strided, e)
        assert len(chunks) == max(0, length - stride + 1)
        for t in range(len(chunks)):
            for a in range(ARM.action_horizon):
                assert mask[t, a] == (t + (a + 1) * stride <= length)
                begin = START[e] + t + min(a, (length - t) // stride - 1) * stride
                part = x[begin : begin + stride].astype(np.float64)
                expected = [part[-1, 0], part[:, 1].sum(), part[:, 2].mean()]
                np.testing.assert_allclose(chunks[t, a], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("stride", [1, 2, 4])
def test_targets_and_changes_say_the_same_at_any_stride(dataset: EpisodeDataset, stride: int) -> None:
    """Where targets are the sums of changes, those of a strided chunk are too."""
    changes = dataset.index.columns["action"].astype(np.float64)
    targets = np.concatenate([np.cumsum(changes[a:b], axis=0) for a, b in itertools.pairwise(START)])
    index = with_columns(dataset.index, action=changes, targets=targets)
    both = acting(
        ActionField("change", "action", 3, command="delta"), ActionField("target", "targets", 3), stride=stride
    )
    chunks, mask = EpisodeDataset(index, both).actions(np.arange(len(EpisodeDataset(index, both))))
    differences = np.diff(chunks[:, :, 3:], axis=1)
    valid = mask[:, 1:]
    np.testing.assert_allclose(differences[valid], chunks[:, 1:, :3][valid], atol=1e-5)


def test_bridge_actions_are_how_its_state_changes(bridge: Path, tmp_path: Path) -> None:
    """Against a loop over real episodes; and they are closer to what was commanded than differences of angles are."""
    index = open_index(bridge, "train", index_dir=tmp_path)
    dataset = EpisodeDataset(index, BRIDGE)
    state, stored = index.columns["observation/state"].astype(np.float64), index.columns["action"]
    chunks, mask = dataset.actions(np.arange(len(dataset)))
    assert (len(dataset), dataset.removed) == (225, {"no whole action left in the episode": 25})
    assert mask.sum() == 25 * sum(min(8, 9 - t) for t in range(9))
    frame = 0
    for e in range(25):
        for t in range(9):
            now, later = state[10 * e + t], state[10 * e + t + 1]
            turn = Rotation.from_euler("xyz", later[3:6]) * Rotation.from_euler("xyz", now[3:6]).inv()
            np.testing.assert_allclose(chunks[frame, 0, :3], later[:3] - now[:3], atol=1e-7)
            np.testing.assert_allclose(chunks[frame, 0, 3:6], turn.as_euler("xyz"), atol=1e-6)
            opening = stored[10 * e + t : 10 * e + 10, 6]
            reached = opening[(opening > 0.95) | (opening < 0.05)]
            assert chunks[frame, 0, 6] == round(float(reached[0] if len(reached) else opening[0]))
            frame += 1
    later = np.flatnonzero(np.arange(225) % 9 != 0)  # the first command of an episode is none
    rows = dataset.steps(later)
    correlation = [np.corrcoef(chunks[later, 0, d], stored[rows, d])[0, 1] for d in range(6)]
    np.testing.assert_allclose(correlation, [0.892, 0.824, 0.85, 0.954, 0.813, 0.903], atol=2e-3)
    wrapped = (state[rows + 1, 3:6] - state[rows, 3:6] + np.pi) % (2 * np.pi) - np.pi
    assert all(np.corrcoef(wrapped[:, d], stored[rows, 3 + d])[0, 1] < correlation[3 + d] for d in range(3))
    # black frames stand for absent cameras
    absent = Camera("absent", "observation/image_3", min_bytes=BRIDGE.cameras[0].min_bytes)
    assert not dataset.present(np.arange(225), absent).any()
    assert all(dataset.present(np.arange(225), c).all() for c in BRIDGE.cameras)


# ---- Which steps are frames ------------------------------------------------------------------------------------------


def kept_steps(dataset: EpisodeDataset) -> list[int]:
    return dataset.steps(np.arange(len(dataset))).tolist()


def by_step(keep: Any) -> list[int]:
    """Steps for which `keep(episode, step in it)`."""
    return [START[e] + t for e, n in enumerate(TRAIN) for t in range(n) if keep(e, t)]


def test_without_a_selection_frames_take_no_memory(dataset: EpisodeDataset) -> None:
    assert dataset.removed == {}
    parts = (dataset, dataset._values, dataset._frames)
    held = {k: v for part in parts for k, v in vars(part).items() if isinstance(v, np.ndarray)}
    assert {k: len(v) for k, v in held.items()} == {"first": len(TRAIN), "start": len(TRAIN) + 1}
    assert kept_steps(dataset) == list(range(STEPS))


@pytest.mark.parametrize("block", [7, 1 << 16])
@pytest.mark.parametrize(
    ("selection", "keep"),
    [
        (Selection(success="episode_metadata/success"), lambda e, t: e % 2 == 0),
        (Selection(success="episode_metadata/file_path", success_pattern="[03]$"), lambda e, t: e in (0, 3, 10)),
        (Selection(success="is_last"), lambda e, t: t == TRAIN[e] - 1),
        (Selection(labelled=True), lambda e, t: e % 4 != 3),
        (Selection(min_length=5), lambda e, t: TRAIN[e] >= 5),
        (Selection(skip_first=4), lambda e, t: t >= 4),
        (
            Selection(success="episode_metadata/success", labelled=True, min_length=9, skip_first=2),
            lambda e, t: e % 2 == 0 and e % 4 != 3 and TRAIN[e] >= 9 and t >= 2,
        ),
    ],
)
def test_a_selection_keeps_what_it_says(
    dataset: EpisodeDataset, monkeypatch: pytest.MonkeyPatch, block: int, selection: Selection, keep: Any
) -> None:
    monkeypatch.setattr("openpi_like.data.blocks.BLOCK", block)
    selected = EpisodeDataset(dataset.index, ARM, selection=selection)
    assert kept_steps(selected) == by_step(keep)
    assert sum(selected.removed.values()) + len(selected) == STEPS
    counts = [sum(keep(e, t) for t in range(n)) for e, n in enumerate(TRAIN)]
    assert selected.frames_per_episode().tolist() == counts
    assert selected.episodes == sum(n > 0 for n in counts)
    # everything else is that of the step
    steps = np.array(kept_steps(selected))
    frames = np.arange(len(selected))
    np.testing.assert_array_equal(selected.state(frames), dataset.state(steps))
    for ours, theirs in zip(selected.actions(frames), dataset.actions(steps), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert selected.prompts(frames) == dataset.prompts(steps)
    np.testing.assert_array_equal(
        selected.image(len(frames) - 1, ARM.cameras[0]), dataset.image(int(steps[-1]), ARM.cameras[0])
    )
    assert selected.where(0) == dataset.where(int(steps[0]))


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("skip_last", [1, 3, 12])
def test_the_last_steps_are_neither_frames_nor_in_chunks(dataset: EpisodeDataset, stride: int, skip_last: int) -> None:
    """Everything is as if the episodes had ended earlier, also with commands from the next step; values there do not
    count."""
    action = np.array(dataset.index.columns["action"])
    last = by_step(lambda e, t: t >= TRAIN[e] - skip_last)
    action[last] = np.nan
    move = ActionField("hand", "observation/joints", 2, unit="cm", command="delta", next_step="change")
    for robot in (dataclasses.replace(ARM, stride=stride), acting(move, ARM.action[1], stride=stride)):
        tail = stride - 1 + (robot.action[0] is move)
        index = with_columns(dataset.index, action=action)
        selection = Selection(skip_last=skip_last, skip_not_finite=True)
        shorter = EpisodeDataset(index, robot, selection=selection)
        assert kept_steps(shorter) == by_step(lambda e, t: t < TRAIN[e] - skip_last - tail)  # noqa: B023
        whole = EpisodeDataset(dataset.index, robot)
        reason = f"last {skip_last} of the episode"
        assert shorter.removed[reason] == len(whole) - len(shorter)
        assert "not finite" not in shorter.removed
        chunks, mask = shorter.actions(np.arange(len(shorter)))
        frames = np.searchsorted(whole.steps(np.arange(len(whole))), kept_steps(shorter))
        expected, longer = whole.actions(frames)
        np.testing.assert_array_equal(chunks[mask], expected[mask])
        left = np.concatenate([np.arange(n)[::-1] for n in shorter.frames_per_episode()])
        np.testing.assert_array_equal(mask.sum(axis=1), np.minimum(left // stride + 1, ARM.action_horizon))
        assert (longer | ~mask).all()


@pytest.mark.parametrize("stride", [2, 5])
def test_a_thinned_selection(dataset: EpisodeDataset, stride: int) -> None:
    """Every so many-th step, from the first that is not skipped on; counts are of those."""
    selection = Selection(success="episode_metadata/success", skip_first=1)
    thinned = EpisodeDataset(dataset.index, ARM, frame_stride=stride, selection=selection)
    assert kept_steps(thinned) == by_step(lambda e, t: e % 2 == 0 and t >= 1 and (t - 1) % stride == 0)
    assert sum(thinned.removed.values()) + len(thinned) == sum(-(-n // stride) for n in TRAIN)


def test_what_is_removed_is_logged(toy: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        dataset = open_dataset(toy, ARM, "train", selection=Selection(success="episode_metadata/success", min_length=4))
    short, failed = sum(n for n in TRAIN if n < 4), sum(n for n in TRAIN[1::2] if n >= 4)
    assert dataset.removed == {"episode shorter than 4": short, "episode_metadata/success says no": failed}
    assert f"left out: {short} (episode shorter than 4), {failed} (episode_metadata/success says no)" in caplog.text


def test_idle_steps(dataset: EpisodeDataset) -> None:
    """A step is idle where every change is below the threshold and the gripper's command is that of the step before."""
    action = np.array(dataset.index.columns["action"])
    quiet = np.random.default_rng(1).random(STEPS) < 0.5
    action[quiet, :2] = 0.001
    action[:, 2] = np.random.default_rng(2).choice([-1.0, 1.0], STEPS, p=[0.2, 0.8])
    robot = acting(ActionField("hand", "action", 2, unit="cm", command="delta"), ARM.action[1])
    still = EpisodeDataset(with_columns(dataset.index, action=action), robot, selection=Selection(idle_below=1e-4))
    size = np.abs(action[:, :2]).max(axis=1) / 100

    def keep(e: int, t: int) -> bool:
        at = START[e] + t
        return bool(size[at] >= 1e-4 or (t > 0 and action[at, 2] != action[at - 1, 2]))

    assert kept_steps(still) == by_step(keep)
    assert still.removed == {"idle, below 0.0001": STEPS - len(still)}
    assert 0 < len(still) < STEPS


@pytest.mark.parametrize("model", ["quaternion_xyzw", "rotation_6d"])
def test_idle_turns(dataset: EpisodeDataset, model: str) -> None:
    """Of a quaternion or 6-D the angle counts: its numbers are not 0 where nothing turns."""
    angle = np.random.default_rng(0).choice([0.0, 0.01, 0.3], STEPS)
    axis = np.random.default_rng(1).normal(size=(STEPS, 3))
    turns = Rotation.from_rotvec(axis / np.linalg.norm(axis, axis=1, keepdims=True) * angle[:, None])
    turn = ActionField("turn", "turn", 4, rotation="quaternion_xyzw", model_rotation=model, command="delta")
    index = with_columns(dataset.index, turn=turns.as_quat().astype(np.float32))
    moving = EpisodeDataset(index, acting(turn), selection=Selection(idle_below=0.1))
    assert kept_steps(moving) == np.flatnonzero(angle > 0.1).tolist()


@pytest.mark.parametrize("relative", [False, True])
def test_a_step_is_idle_where_every_field_is(dataset: EpisodeDataset, relative: bool) -> None:
    """Fields are looked at one after another, each at what the ones before it left."""
    rng = np.random.default_rng(3)
    moves = rng.random((3, STEPS)) < 0.3
    axis = rng.normal(size=(STEPS, 3))
    turns = Rotation.from_rotvec(
        axis / np.linalg.norm(axis, axis=1, keepdims=True) * np.where(moves[0], 0.3, 0.01)[:, None]
    )
    here = Rotation.random(STEPS, rng=rng)
    action = np.stack([np.where(moves[1], 5.0, 0.0), np.zeros(STEPS), np.cumsum(moves[2]) % 2 * 2 - 1], axis=1)
    index = with_columns(
        dataset.index,
        action=action.astype(np.float32),
        turn=(here * turns if relative else turns).as_quat().astype(np.float32),
        here=here.as_quat().astype(np.float32),
    )
    turn = ActionField("turn", "turn", 4, rotation="quaternion_xyzw", model_rotation="rotation_6d", command="delta")
    if relative:
        turn = dataclasses.replace(turn, command="absolute", relative_to="here")
    fields = (turn, ActionField("hand", "action", 2, unit="cm", command="delta"), ARM.action[1])

    def kept(*action: ActionField) -> set[int]:
        state = (*ARM.state, StateField("here", "here", 4, rotation="quaternion_xyzw"))
        robot = dataclasses.replace(ARM, state=state, action=action)
        return set(kept_steps(EpisodeDataset(index, robot, selection=Selection(idle_below=0.04))))

    together = kept(*fields)
    assert together == kept(fields[0]) | kept(fields[1]) | kept(fields[1], fields[2])
    first = set(START[:-1].tolist())
    assert together == set(np.flatnonzero(moves[0] | moves[1]).tolist()) | (set(np.flatnonzero(moves[2])) - first)
    assert 0 < len(together) < STEPS


def test_ranges_to_keep(dataset: EpisodeDataset, tmp_path: Path) -> None:
    """Ranges may overlap, be empty, or reach beyond the episode; episodes without an entry are left out."""
    ranges = {"é/0--ray": [[1, 3], [2, 5], [5, 5]], "é/6--ray": [[18, 99]], "é/9--ray": [], "of another": [[0, 1]]}
    (tmp_path / "ranges.json").write_text(json.dumps(ranges))
    selection = Selection(
        keep_ranges=str(tmp_path / "ranges.json"),
        keep_ranges_key=("episode_metadata/file_path", "episode_metadata/renderer"),
    )
    selected = EpisodeDataset(dataset.index, ARM, selection=selection)
    assert kept_steps(selected) == by_step(lambda e, t: (e == 0 and 1 <= t < 5) or (e == 6 and t >= 18))
    assert selected.removed == {
        "episode not in keep_ranges": STEPS - TRAIN[0] - TRAIN[6] - TRAIN[9],
        "not in keep_ranges": TRAIN[0] - 4 + 18 + TRAIN[9],
    }


@pytest.mark.parametrize("stride", [1, 2])
def test_values_that_are_not_finite_can_be_left_out(
    dataset: EpisodeDataset, caplog: pytest.LogCaptureFixture, stride: int
) -> None:
    """With them every frame whose state or chunk they are in; all are counted, the first are named."""
    action, state = (np.array(dataset.index.columns[k]) for k in ("action", "observation/state"))
    bad_action, bad_state = (6, 4), (2, 3)  # episode, step
    action[START[6] + 4, 1], state[START[2] + 3, 0] = np.nan, np.inf
    state[START[4], 2] = np.nan  # not a value that the robot has
    index = with_columns(dataset.index, **{"action": action, "observation/state": state})
    robot = dataclasses.replace(ARM, stride=stride)
    with caplog.at_level(logging.WARNING):
        selected = EpisodeDataset(index, robot, selection=Selection(skip_not_finite=True))
    reach = ARM.action_horizon * stride

    def keep(e: int, t: int) -> bool:
        return (
            t + stride <= TRAIN[e]
            and (e, t) != bad_state
            and not (e == bad_action[0] and t <= bad_action[1] < t + reach)
        )

    assert kept_steps(selected) == by_step(keep)
    assert selected.removed["not finite"] == 1 + min(5, reach)
    assert np.isfinite(selected.actions(np.arange(len(selected)))[0]).all()
    assert np.isfinite(selected.state(np.arange(len(selected)))).all()
    assert "episode 6, step 4 (toy_arm-train.tfrecord-00001" in caplog.text
    assert "'hand' (observation/state) is [inf" in caplog.text
    with pytest.raises(DatasetError, match=r"(?s)episode 2, step 3 .*episode 6, step 4 "):
        EpisodeDataset(index, robot)


@pytest.mark.parametrize("convention", ["trigger", "look_ahead"])
def test_a_derived_gripper_depends_on_its_whole_episode(dataset: EpisodeDataset, convention: str) -> None:
    """One value that is not finite leaves out all of the episode, because it may decide the command of any step."""
    action = np.array(dataset.index.columns["action"])
    action[START[6] + 4, 2] = np.nan
    gripper = Gripper(open=-1.0, closed=1.0, convention=convention)
    robot = acting(ARM.action[0], ActionField("gripper", "action", 1, start=2, gripper=gripper))
    index = with_columns(dataset.index, action=action)
    selected = EpisodeDataset(index, robot, selection=Selection(skip_not_finite=True))
    assert kept_steps(selected) == by_step(lambda e, t: e != 6)
    assert selected.removed == {"not finite": TRAIN[6]}
    with pytest.raises(DatasetError, match=r"episode 6, step 4 .*'gripper' \(action\) is \[nan\]") as wrong:
        EpisodeDataset(index, robot)
    assert "more steps" not in str(wrong.value)


@pytest.mark.parametrize(("rotation", "size"), [("quaternion_xyzw", 4), ("quaternion_wxyz", 4), ("rotation_6d", 6)])
def test_rotations_that_are_none(dataset: EpisodeDataset, rotation: str, size: int) -> None:
    """Zeros are found when a dataset is opened, as NaN is; they can be left out, and then all frames can be encoded."""
    values = np.random.default_rng(0).normal(size=(STEPS, size)).astype(np.float32)
    values[START[2] + 3] = 0
    turn = StateField("turn", "observation/turn", size, rotation=rotation, model_rotation="rpy")
    goal = ActionField("goal", "observation/turn", size, rotation=rotation, model_rotation="rpy", relative_to="turn")
    robot = dataclasses.replace(ARM, state=(turn,), action=(goal,))
    index = with_columns(dataset.index, **{"observation/turn": values})
    selected = EpisodeDataset(index, robot, selection=Selection(skip_not_finite=True))
    reached = by_step(lambda e, t: e == 2 and t <= 3 < t + ARM.action_horizon)
    assert kept_steps(selected) == [s for s in range(STEPS) if s not in reached]
    assert np.isfinite(selected.encoded(np.arange(len(selected)))[1]).all()
    with pytest.raises(
        DatasetError, match=rf"(?s)episode 2, step 3 .*'turn' .*\[0.0, .*a rotation \({rotation}\)"
    ) as e:
        EpisodeDataset(index, robot)
    assert "action field 'goal'" in str(e.value)


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


# ---- Damaged images --------------------------------------------------------------------------------------------------

PAST = dataclasses.replace(ARM, cameras=(*ARM.cameras, Camera("past", "observation/image", steps_back=2)))


def with_damage(index: FrameIndex, **damaged: Iterable[int]) -> FrameIndex:
    steps = {f"observation/{key}": np.array(sorted(at), np.int64) for key, at in damaged.items()}
    return dataclasses.replace(index, damaged=steps)


@settings(max_examples=20, deadline=None)
@given(
    st.sets(st.integers(0, STEPS - 1), max_size=40),
    st.sets(st.integers(0, STEPS - 1), max_size=40),
    st.sampled_from([1, 3]),
    st.sampled_from([7, 1 << 16]),
)
def test_frames_show_no_damaged_image(
    dataset: EpisodeDataset, image: set[int], wrist: set[int], stride: int, block: int
) -> None:
    """Neither now nor in the past; what no camera shows is no matter, nor are images of other keys."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("openpi_like.data.blocks.BLOCK", block)
        index = with_damage(dataset.index, image=image, wrist=wrist, other={0})
        seeing = EpisodeDataset(index, PAST, frame_stride=stride, max_corrupt_fraction=0.99)
    frames = EpisodeDataset(dataset.index, PAST, frame_stride=stride)
    episode = np.searchsorted(START, np.arange(STEPS), side="right") - 1
    expected = [
        s
        for s in kept_steps(frames)
        if s not in image | wrist and not (s - 2 in image and episode[s - 2] == episode[s])
    ]
    assert kept_steps(seeing) == expected
    lost = len(frames) - len(expected)
    assert seeing.removed == ({"damaged image": lost} if lost else {})
    for camera in PAST.cameras:
        shown = seeing.present(np.arange(len(seeing)), camera)
        at = seeing.steps(np.arange(len(seeing)))[shown] - camera.steps_back
        assert not set(at.tolist()) & (wrist if camera.name == "wrist" else image)


def test_damaged_images_are_told(dataset: EpisodeDataset, caplog: pytest.LogCaptureFixture) -> None:
    index = with_damage(dataset.index, image=range(8, 15), wrist={9, 40})
    seeing = EpisodeDataset(index, ARM, max_corrupt_fraction=0.08)
    assert seeing.removed == {"damaged image": 8}
    warning = next(r.getMessage() for r in caplog.records if "damaged" in r.getMessage())
    assert "at 8 of 110 steps an image of robot 'arm' is damaged; they are left out:" in warning
    assert "episode 2, step 4 (toy_arm-train.tfrecord-00000, record 2): observation/image\n" in warning
    assert "... and 2 more images of observation/image\n" in warning
    assert "episode 6, step 3 (toy_arm-train.tfrecord-00001, record 1): observation/wrist" in warning


def test_more_damaged_images_than_tolerated(dataset: EpisodeDataset) -> None:
    index = with_damage(dataset.index, image=range(8, 15), wrist={9, 40})
    for tolerated in (0.0, 0.07):
        with pytest.raises(DatasetError) as error:
            EpisodeDataset(index, ARM, max_corrupt_fraction=tolerated)
        for part in (
            f"at 8 of 110 steps an image of its cameras is damaged, tolerated are {tolerated:g} of them",
            "(max_corrupt_fraction); copy these files again, or tolerate them:",
            "episode 2, step 0 (toy_arm-train.tfrecord-00000, record 2): observation/image",
            "... and 2 more images of observation/image",
        ):
            assert part in str(error.value)
    one = dataclasses.replace(ARM, cameras=ARM.cameras[1:])
    assert EpisodeDataset(index, one, max_corrupt_fraction=0.02).removed == {"damaged image": 2}
    start = EpisodeDataset(index, ARM, episodes=range(2))  # steps 0 to 7, where all is well
    assert (len(start), start.removed) == (8, {})


def test_damaged_images_of_an_absent_camera_are_no_matter(dataset: EpisodeDataset) -> None:
    lengths = dataset.index.images["observation/wrist"][:, 1]
    camera = Camera("wrist", "observation/wrist", min_bytes=int(np.median(lengths)) + 1)
    absent = np.flatnonzero(lengths < camera.min_bytes).tolist()
    robot = dataclasses.replace(ARM, cameras=(ARM.cameras[0], camera))
    assert len(EpisodeDataset(with_damage(dataset.index, wrist=absent), robot)) == STEPS
    one = int(np.argmax(lengths))
    assert len(EpisodeDataset(with_damage(dataset.index, wrist=[one]), robot, max_corrupt_fraction=0.01)) == STEPS - 1


def test_a_checked_dataset_opens_and_is_read_without_its_damaged_images(copy: Path) -> None:
    """Before it is checked, opening stops at its first image and says what to do."""
    index = open_index(copy, "train")
    whole = index.read_image(0, "observation/image")
    change_record(shard(copy), 0, lambda data: data.replace(whole, b"x" * len(whole)))
    with pytest.raises(
        DatasetError, match=r"step 0 .*cannot decode .*camera 'base'.*data/index\.py --decode finds all"
    ):
        open_dataset(copy, ARM, "train", max_corrupt_fraction=0.01)
    check_images(open_index(copy, "train"))
    with pytest.raises(DatasetError, match=r"(?s)at 1 of 110 steps .*record 0\): observation/image"):
        open_dataset(copy, ARM, "train")
    dataset = open_dataset(copy, ARM, "train", max_corrupt_fraction=0.01)
    assert kept_steps(dataset) == list(range(1, STEPS))
    out = np.empty((STEPS - 1, 12, 16, 3), np.uint8)
    dataset.images_into(np.arange(STEPS - 1), ARM.cameras[0], list(out))
    np.testing.assert_array_equal(out, [dataset.image(i, ARM.cameras[0]) for i in range(STEPS - 1)])


# ---- Cameras and texts -----------------------------------------------------------------------------------------------


def test_history_is_a_camera_that_looks_back(dataset: EpisodeDataset) -> None:
    past = Camera("past", "observation/image", steps_back=2)
    robot = dataclasses.replace(ARM, cameras=(*ARM.cameras, past))
    with_past = EpisodeDataset(dataset.index, robot)
    present = with_past.present(np.arange(STEPS), past)
    assert np.flatnonzero(present).tolist() == by_step(lambda e, t: t >= 2)
    assert with_past.present(np.arange(STEPS), ARM.cameras[0]).all()
    for frame in np.flatnonzero(present)[::9]:
        np.testing.assert_array_equal(with_past.image(int(frame), past), dataset.image(int(frame) - 2, ARM.cameras[0]))
    with pytest.raises(
        DatasetError, match=r"episode 2, step 1 .* camera 'past' shows 2 steps before, when the episode"
    ):
        with_past.image(int(START[2]) + 1, past)


def test_images_that_are_too_small_are_absent(dataset: EpisodeDataset) -> None:
    lengths = dataset.index.images["observation/wrist"][:, 1]
    least = int(np.median(lengths)) + 1
    camera = Camera("wrist", "observation/wrist", min_bytes=least)
    present = dataset.present(np.arange(STEPS), camera)
    np.testing.assert_array_equal(present, lengths >= least)
    assert 0 < present.sum() < STEPS


@pytest.mark.parametrize("looks_back", [False, True])
def test_an_absent_image_need_not_be_one(copy: Path, looks_back: bool) -> None:
    """The first image that is shown is looked at when a dataset is opened, not those that are absent."""
    index = open_index(copy, "train")
    step = int(index.episode_start[1]) if looks_back else 0  # episode 1 has one step, so nothing looks back to it
    whole = index.read_image(step, "observation/image")
    change_record(shard(copy), int(looks_back), lambda data: data.replace(whole, b"x" * len(whole)))
    part = "train[9%:]" if looks_back else "train"
    camera = Camera("base", "observation/image", steps_back=1)
    if not looks_back:
        camera = Camera("base", "observation/image", min_bytes=len(whole) + 1)
    robot = dataclasses.replace(ARM, cameras=(camera,))
    dataset = open_dataset(copy, robot, part)
    assert not dataset.present(np.zeros(1, int), camera).any()
    with pytest.raises(
        DatasetError, match=rf"step 0 .*: cannot decode observation/image: not an image: {len(whole)} by"
    ):
        open_dataset(copy, dataclasses.replace(ARM, cameras=(Camera("base", "observation/image"),)), part)


def test_a_camera_that_is_never_there_is_told(toy: Path, caplog: pytest.LogCaptureFixture) -> None:
    camera = Camera("base", "observation/image", min_bytes=1 << 20)
    dataset = open_dataset(toy, dataclasses.replace(ARM, cameras=(camera,)), "train")
    assert not dataset.present(np.arange(len(dataset)), camera).any()
    assert "camera 'base' (observation/image) is absent at every step" in caplog.text


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


def test_frames_without_an_instruction_are_counted(dataset: EpisodeDataset, caplog: pytest.LogCaptureFixture) -> None:
    """Once, with the first place; with a selection, of what is left; and not where there is nothing to say."""
    missing = sum(TRAIN[3::4])
    with caplog.at_level(logging.WARNING):
        EpisodeDataset(dataset.index, ARM, selection=Selection(skip_first=1))
    left = sum(n - 1 for n in TRAIN[3::4])
    (said,) = [r.getMessage() for r in caplog.records if "no instruction" in r.getMessage()]
    assert (
        f": {left} of {STEPS - len(TRAIN)} frames have no instruction ('language_instruction'), the first is " in said
    )
    assert "episode 3, step 1 " in said
    assert said.endswith("set labelled in the selection to leave them out")
    caplog.clear()
    spoken = dataclasses.replace(ARM, language_alternatives=("episode_metadata/file_path",))
    with caplog.at_level(logging.WARNING):
        assert EpisodeDataset(dataset.index, ARM, selection=Selection(labelled=True)).removed == {
            "no instruction": missing
        }
        EpisodeDataset(dataset.index, spoken)
        EpisodeDataset(dataset.index, CART)
    assert "no instruction" not in caplog.text


def test_a_dataset_travels_to_another_process(toy: Path) -> None:
    selection = Selection(success="episode_metadata/success")
    dataset = open_dataset(toy, ARM, "train[25%:]", selection=selection)
    other = pickle.loads(pickle.dumps(dataset))
    frames = np.arange(len(dataset))
    assert len(pickle.dumps(dataset)) < 20_000
    assert (len(other), other.removed) == (len(dataset), dataset.removed)
    np.testing.assert_array_equal(other.actions(frames)[0], dataset.actions(frames)[0])
    np.testing.assert_array_equal(other.image(3, ARM.cameras[0]), dataset.image(3, ARM.cameras[0]))


# ---- What can be wrong -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"success_pattern": "("}, r"success_pattern '\(' is no regular expression: .*without success"),
        ({"min_length": 0, "skip_first": -1}, "min_length=0, .* skip_first=-1, skip_last=0, expected both >= 0"),
        ({"skip_last": -2}, "skip_first=0, skip_last=-2, expected both >= 0"),
        ({"idle_below": 0.0}, "idle_below=0.0, expected a number above 0"),
        ({"keep_ranges_key": ()}, "keep_ranges_key is empty"),
    ],
)
def test_selections_that_make_no_sense(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"Selection: .*{message}"):
        Selection(**changes)


def problem(dataset: EpisodeDataset, robot: Robot = ARM, **selection: Any) -> str:
    with pytest.raises(DatasetError) as e:
        EpisodeDataset(dataset.index, robot, selection=Selection(**selection))
    return str(e.value)


def test_a_selection_by_fields_that_are_not_there(dataset: EpisodeDataset) -> None:
    text = problem(
        dataset,
        dataclasses.replace(ARM, language_alternatives=("language_instruction_2",)),
        success="episode_metadata/sucess",
        keep_ranges="x.json",
        idle_below=0.1,
    )
    assert (
        "selection.success: the dataset has no 'episode_metadata/sucess'; did you mean 'episode_metadata/succ" in text
    )
    assert "keep_ranges_key: the dataset has no 'episode_metadata/recording_folderpath'" in text
    assert "language_alternatives: the dataset has no 'language_instruction_2'; did you mean 'language_ins" in text
    assert "'observation/state' has shape (4,), expected one number" in problem(dataset, success="observation/state")
    assert "'episode_metadata/success' is a field of kind 'numeric'" in problem(
        dataset, success="episode_metadata/success", success_pattern="x"
    )
    fixed = acting(ActionField("gripper", "action", 1, gripper=Gripper(1.0, 0.0)))
    assert "no action field is a delta, a velocity or relative" in problem(dataset, fixed, idle_below=0.1)


def test_ranges_that_do_not_fit(dataset: EpisodeDataset, tmp_path: Path) -> None:
    path = tmp_path / "ranges.json"
    where: dict[str, Any] = {"keep_ranges": str(path), "keep_ranges_key": ("episode_metadata/file_path",)}
    assert "No such file" in problem(dataset, **where)
    path.write_text("[1]")
    assert "expected JSON like {episode: [[start, end], ...]}" in problem(dataset, **where)
    path.write_text(json.dumps({"é/1": [[3, 1]], "é/2": [[0, 1]]}))
    assert "not 0 <= start <= end in ['é/1']" in problem(dataset, **where)
    path.write_text(json.dumps({"e/1": [[0, 1]]}))
    assert "it has names like 'e/1', the episodes have names like 'é/11'; correct keep_ranges_key" in problem(
        dataset, **where
    )


def test_nothing_left_says_why(dataset: EpisodeDataset) -> None:
    text = problem(dataset, min_length=21)
    assert text.endswith(f"no frame is left for robot 'arm'; left out: {STEPS} (episode shorter than 21)")
    text = problem(dataset, success="episode_metadata/file_path", success_pattern="won")
    assert text.endswith(f"left out: {STEPS} (episode_metadata/file_path says no)")


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


def test_a_gripper_that_is_not_as_described(dataset: EpisodeDataset, caplog: pytest.LogCaptureFixture) -> None:
    action = np.array(dataset.index.columns["action"])
    action[:, 2] = np.where(np.arange(STEPS) < 100, -1.0, 1.2)
    with caplog.at_level(logging.WARNING):
        EpisodeDataset(with_columns(dataset.index, action=action), ARM)
    assert (
        "action field 'gripper' lies outside closed=1 to open=-1 in 10 of 110 steps (-1 to 1.2); is that what this "
        "dataset stores?" in caplog.text
    )
