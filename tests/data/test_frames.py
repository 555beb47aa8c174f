"""Which steps are frames, against plain loops over all of them."""

import dataclasses
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from openpi_like.data.dataset import EpisodeDataset, open_dataset
from openpi_like.data.schema import DatasetError
from openpi_like.data.selection import Selection
from openpi_like.robots import ActionField, Gripper, StateField
from tests.data.toy import ARM, CART
from tests.data.toy_dataset import START, STEPS, TRAIN, acting, by_step, kept_steps, problem, with_columns


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


def test_nothing_left_says_why(dataset: EpisodeDataset) -> None:
    text = problem(dataset, min_length=21)
    assert text.endswith(f"no frame is left for robot 'arm'; left out: {STEPS} (episode shorter than 21)")
    text = problem(dataset, success="episode_metadata/file_path", success_pattern="won")
    assert text.endswith(f"left out: {STEPS} (episode_metadata/file_path says no)")
