"""The statistics that checks rest on, beside other implementations and cases made by hand."""

import dataclasses

import numpy as np
import pytest
from scipy.spatial.transform import Rotation
from scipy.stats import pearsonr

from openpi_like.data.index import FrameIndex
from openpi_like.data.robot_check import RobotSample
from openpi_like.data.robot_check.replay import Replay
from openpi_like.data.robot_check.response import Response, Series, explained, follows_which, size_ratio
from tests.data.robot_check.arm import ARM, EPISODES, STEPS
from tests.data.robot_check.faults import with_columns

ACTION, STATE = {f.name: f for f in ARM.action}, {f.name: f for f in ARM.state}


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def test_explained_variance_is_that_of_scipy(rng: np.random.Generator) -> None:
    a, b = rng.normal(size=(900, 3)), rng.normal(size=(900, 3))
    b[:, 0] += 2 * a[:, 0]
    b[:, 1] -= 2 * a[:, 1]  # the opposite explains nothing
    clipped = [np.clip(x, np.sort(x, axis=0)[1], np.sort(x, axis=0)[-2]) for x in (a, b)]
    squares = [max(pearsonr(*(x[:, d] for x in clipped)).statistic, 0) ** 2 for d in range(3)]
    assert explained(a, b) == pytest.approx(np.average(squares, weights=clipped[0].var(axis=0)))
    a[5] = 1e9  # a glitch decides nothing
    assert explained(a, b) == pytest.approx(np.average(squares, weights=clipped[0].var(axis=0)), rel=0.1)
    assert np.isnan(explained(np.ones((50, 2)), b[:50, :2]))


@pytest.mark.parametrize("delay", [1, 2, 4])
def test_lag_size_and_order_are_those_that_were_made(
    arm_index: FrameIndex, rng: np.random.Generator, delay: int
) -> None:
    """A hand that does half of what it is told, `delay` steps later, with axes 0 and 1 swapped."""
    action = np.array(arm_index.columns["action"])
    state = np.array(arm_index.columns["observation/state"])
    action[:, :3] = rng.normal(size=(EPISODES * STEPS, 3))
    told = action[:, [1, 0, 2]].reshape(EPISODES, STEPS, 3)
    done = np.zeros_like(told)
    done[:, delay:] = told[:, :-delay]
    state[:, :3] = 0.5 * done.cumsum(axis=1).reshape(-1, 3)
    sample = RobotSample.take(with_columns(arm_index, action=action, observation__state=state), ARM)
    which = follows_which(sample, ACTION["hand"], STATE["hand"])
    assert which.argmax(axis=1).tolist() == [1, 0, 2]
    assert which.max(axis=1) == pytest.approx(1, abs=1e-3)
    straight = np.concatenate([action[:, [1, 0, 2]], action[:, 3:]], axis=1)
    sample = RobotSample.take(with_columns(arm_index, action=straight, observation__state=state), ARM)
    response = Response.measure(sample, ACTION["hand"], STATE["hand"])
    assert (response.lag, response.best_change) == (delay, pytest.approx(1, abs=1e-3))
    assert response.best_target < 0.2
    assert size_ratio(sample, ACTION["hand"], STATE["hand"], delay, 0.1) == pytest.approx(2, rel=1e-3)


def test_a_perfect_replay_is_not_off(arm_index: FrameIndex, rng: np.random.Generator) -> None:
    """Positions add up and turns are composed about axes of the base, as their commands say."""
    action = np.array(arm_index.columns["action"])
    state = np.array(arm_index.columns["observation/state"])
    for e in range(EPISODES):
        rows = slice(e * STEPS, (e + 1) * STEPS)
        state[rows, :3] = np.concatenate([np.zeros((1, 3)), action[rows][:-1, :3].cumsum(axis=0)])
        pose = Rotation.random(random_state=e)
        for t in range(STEPS):
            state[e * STEPS + t, 3:6] = pose.as_euler("xyz")
            pose = Rotation.from_euler("xyz", action[e * STEPS + t, 3:6]) * pose
    sample = RobotSample.take(with_columns(arm_index, action=action, observation__state=state), ARM)
    hand, turn, joints = Replay().findings(sample)
    for finding in (hand, turn):
        assert finding.message == f"replayed, it is 0% of the way off in the median of {EPISODES} episodes"
    curve = turn.curves[0]
    np.testing.assert_allclose(curve.lines["replayed"][1], curve.lines["recorded"][1], atol=1e-5)
    assert joints.level == "found"


def test_a_command_moves_the_state_of_its_name_or_none(arm_index: FrameIndex) -> None:
    """Parts of the largest turn are no rotation; they do not move the position, which has as many dims, instead."""
    parts = dataclasses.replace(ACTION["turn"], unit="1", rotation=None)
    robot = dataclasses.replace(ARM, action=(ACTION["hand"], parts, ACTION["joints"], ACTION["gripper"]))
    sample = RobotSample.take(arm_index, robot)
    assert [sample.state_of(f) for f in robot.action] == [STATE["hand"], None, STATE["joints"], STATE["gripper"]]
    assert sample.state_of(dataclasses.replace(ACTION["joints"], name="targets", relative_to=None)) == STATE["joints"]
    assert sample.state_of(dataclasses.replace(parts, name="other")) == STATE["hand"]


def test_changes_of_angles_are_turns() -> None:
    """From 179 to -179 degrees it is 2 degrees, about the axis that turns."""
    field = dataclasses.replace(STATE["turn"], unit="deg")
    series = Series(field, np.array([[0.0, 0.0, 179.0], [0.0, 0.0, -179.0]]))
    turn = series.change(np.array([0]), np.array([1]))
    np.testing.assert_allclose(turn, [[0, 0, np.radians(2)]], atol=1e-9)
