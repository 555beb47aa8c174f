"""What is far from the training data is said, or refused; what is beyond a robot's limits is never sent."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from openpi_like.data.normalize import FieldStats, Normalization
from openpi_like.robots import ActionField, Camera, Robot, StateField
from openpi_like.robots.limits import Limits
from openpi_like.serve.ranges import RangeError, Ranges, RobotRanges, Span, Watched

STATS = FieldStats(
    ("x", "y", "z"), (0.0,) * 3, (1.0,) * 3, (-1.0,) * 3, (1.0,) * 3, (-2.0, 0.0, 5.0), (2.0, 1.0, 5.0), 9
)
ACTIONS = FieldStats(
    ("joint_0", "joint_1"), (0.0,) * 2, (1.0,) * 2, (-1.0,) * 2, (1.0,) * 2, (-1.2, -3.0), (1.2, 3.6), 9
)
NORMALIZATION = Normalization("arm", "zscore", STATS, ACTIONS)
ROBOT = Robot(
    name="arm",
    cameras=(Camera("base", "image"),),
    state=(StateField("hand", "state", 3),),
    action=(ActionField("joint", "action", 2, limits=Limits(lower=-1.0, upper=(1.0, None))),),
    control_hz=10.0,
    action_horizon=4,
    execute_steps=2,
)


@given(st.lists(st.floats(-1e6, 1e6), min_size=3, max_size=3))
def test_distances_are_in_units_of_what_was_seen(values):
    got = Span(STATS).beyond(np.array([values]))
    low, high, unit = (-2.0, 0.0, 5.0), (2.0, 1.0, 5.0), (4.0, 1.0, 5.0)  # z never moved: its own size is the unit
    expected = [max(v - h, lo - v, 0) / u for v, lo, h, u in zip(values, low, high, unit, strict=True)]
    np.testing.assert_allclose(got, expected, rtol=1e-12)


def test_the_farthest_of_a_chunk_counts():
    chunk = np.array([[0, 0.5, 5], [6, 0.5, 5], [-4, 1.5, 5]])
    np.testing.assert_allclose(Span(STATS).beyond(chunk), [1.0, 0.5, 0.0])
    np.testing.assert_allclose(
        Span(STATS).beyond(np.stack([chunk, chunk[:1].repeat(3, 0)])), [[1.0, 0.5, 0.0], [0.0, 0.0, 0.0]]
    )


def test_what_is_far_is_said_and_what_is_farther_refused():
    ranges = Ranges(warn=0.1, refuse=5.0)
    check = RobotRanges(ROBOT, NORMALIZATION, ranges)
    assert check.check_state(np.array([2.3, 0.5, 5.0])) == []
    (sentence,) = check.check_state(np.array([4.0, -1.0, 5.0]))
    assert (
        sentence == "state is beyond the training data in 2 of 3 dims: y (1 times its range), x (0.5 times its range)"
    )
    with pytest.raises(
        RangeError, match=r"robot 'arm': state is beyond .* y \(1e\+06 times its range\); refused beyond 5"
    ):
        check.check_state(np.array([0.0, 1e6, 5.0]))
    lenient = RobotRanges(ROBOT, NORMALIZATION, dataclasses.replace(ranges, refuse=None))
    (sentence,) = lenient.check_state(np.array([0.0, 1e6, 5.0]))
    assert "y (1e+06 times its range)" in sentence


def test_actions_beyond_limits_are_cut_and_said_or_refused():
    """Each chunk of several by itself."""
    actions = np.array([[[0.5, 9.0], [1.2, -3.0], [-1.1, 0.0]], [[0.5, 0.5]] * 3], np.float32)
    cut, fine = RobotRanges(ROBOT, NORMALIZATION, Ranges()).check_actions(actions, actions)
    assert isinstance(cut, tuple)
    assert isinstance(fine, tuple)
    inside, (far, sentence) = cut
    np.testing.assert_array_equal(inside, np.array([[0.5, 9.0], [1.0, -1.0], [-1.0, 0.0]], np.float32))
    assert sentence == "actions were cut at the robot's limits in joint_0 [1] (by 0.2), joint_1 [1] (by 2)"
    assert far == "actions is beyond the training data in 1 of 2 dims: joint_1 (0.82 times its range)"
    np.testing.assert_array_equal(fine[0], actions[1])
    assert fine[1] == []
    strict = RobotRanges(ROBOT, NORMALIZATION, Ranges(beyond_limits="refuse"))
    error, _ = strict.check_actions(actions, actions)
    assert isinstance(error, RangeError)
    assert str(error) == "robot 'arm': actions beyond its limits in joint_0 [1] (by 0.2), joint_1 [1] (by 2)"
    (same,) = strict.check_actions(np.zeros((1, 3, 2), np.float32), inside[None])
    assert isinstance(same, tuple)
    np.testing.assert_array_equal(same[0], inside)
    assert same[1] == []


def test_pictures_that_show_nothing_or_never_change_are_said():
    rng, watched = np.random.default_rng(0), Watched(frozen=3)
    picture = lambda: rng.integers(0, 256, (8, 8, 3), np.uint8)  # noqa: E731
    still, moving = picture(), np.arange(20, dtype=np.float32)
    said_of = [watched.look({"base": picture(), "wrist": still}, moving[i : i + 1]) for i in range(4)]
    assert said_of[:2] == [[], []]
    assert said_of[2] == ["camera 'wrist' has not changed in 3 requests, while the state did"]
    assert watched.look({"base": picture(), "wrist": picture()}, moving[9:10]) == []
    resting = Watched(frozen=3)  # nothing moves: nothing need change
    assert [resting.look({"base": still}, moving[:1]) for _ in range(9)] == [[]] * 9
    black, grey = np.zeros((8, 8, 3), np.uint8), np.full((8, 8, 3), 128, np.uint8)
    assert watched.look({"base": black, "wrist": grey}, moving[:1]) == [
        "camera 'base' is all black",
        "camera 'wrist' shows one colour",
    ]


@pytest.mark.parametrize("wrong", [{"warn": -0.1}, {"warn": 2.0, "refuse": 1.0}, {"frozen": 1}])
def test_ranges_that_are_none_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Ranges(**wrong)
