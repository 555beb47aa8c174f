"""The reader of nuScenes, on a copy along known curves: state, history, plan, command, and the dataset it becomes."""

import dataclasses
import math

import numpy as np
import pytest

from openpi_like.driving.nuscenes.can_bus import CanBus, Signal, read_can_bus
from openpi_like.driving.nuscenes.episodes import Options, command, ego_states, future, steps_of, to_episode
from openpi_like.driving.nuscenes.scenes import CHANNELS, read_scenes
from openpi_like.driving.nuscenes.tables import read_tables
from openpi_like.robots.ego_vehicle import EGO_VEHICLE
from tests.driving import nuscenes_copy
from tests.driving.nuscenes_copy import LEFT, STRAIGHT, Curve, Drive, write_copy

RIGHT = Drive("scene-1094", Curve(3.0, -8.0, 0.3, 6.0, radius=-20.0), 12, can_bus=False)
NO_CAN_BUS = CanBus(None, None, None)
ORDER = [name.rpartition(" [")[0] for name in EGO_VEHICLE.state_names]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_copy(tmp_path_factory.mktemp("nuscenes"), (LEFT, STRAIGHT, RIGHT))


@pytest.fixture(scope="module")
def scenes(root):
    return {scene.name: scene for scene in read_scenes(read_tables(root, "v1.0-mini"))}


def seen(drive, now, then):
    """Where the lidar is at a time, (right, ahead) as seen from another: by complex numbers, without matrices."""
    x, y, heading = drive.curve.lidar(now)
    there = drive.curve.lidar(then)
    ahead_left = (complex(*there[:2]) - complex(x, y)) * complex(math.cos(heading), -math.sin(heading))
    return -ahead_left.imag, ahead_left.real


@pytest.mark.parametrize("drive", [LEFT, STRAIGHT, RIGHT], ids=lambda drive: drive.name)
def test_plan_and_history_are_the_curve_seen_from_now(scenes, drive):
    scene = scenes[drive.name]
    states, _ = ego_states(scene, NO_CAN_BUS, Options())
    assert states.shape == (drive.keyframes - 4, 17)
    for k, state in zip(steps_of(scene, Options()), states, strict=True):
        now = k / 2
        plan, known = future(scene, k)
        assert known == min(6, drive.keyframes - 1 - k)
        expected = [seen(drive, now, now + 0.5 * i) for i in range(1, known + 1)]
        np.testing.assert_allclose(plan[:known], np.reshape(expected, (-1, 2)), atol=1e-6)
        np.testing.assert_allclose(plan[known:], np.tile(plan[max(known - 1, 0)], (6 - known, 1)), atol=1e-9)
        history = [seen(drive, now, now - 0.5 * i) for i in (4, 3, 2, 1)]
        np.testing.assert_allclose(state[9:].reshape(4, 2), history, atol=2e-5)


def test_frames_turn_the_right_way(scenes):
    left, _ = future(scenes[LEFT.name], 4)
    right, _ = future(scenes[RIGHT.name], 4)
    assert (np.diff(left[:, 0], prepend=0) < 0).all()
    assert (np.diff(right[:, 0], prepend=0) > 0).all()
    # A quarter of a circle is not passed, so both go on ahead; the lidar's circle is a little wider than the axle's.
    assert (left[:3, 1] > 0).all()
    np.testing.assert_allclose(
        np.linalg.norm(left[0]), 2 * math.hypot(25.0, nuscenes_copy.LIDAR_AHEAD) * math.sin(0.5 * 8 / 25 / 2), rtol=1e-6
    )


def test_state_of_a_circle(scenes):
    """A point on a circle: speed is radius times rate; the change of two chords points to the centre."""
    states, measured = ego_states(scenes[LEFT.name], NO_CAN_BUS, Options())
    assert not measured.any()
    rate, radius = 8.0 / 25.0, math.hypot(25.0, nuscenes_copy.LIDAR_AHEAD)
    chord = 2 * radius * math.sin(rate / 4) / 0.5
    by_name = dict(zip(ORDER, states.T, strict=True))
    np.testing.assert_allclose(np.hypot(by_name["velocity_right"], by_name["velocity_ahead"]), chord, rtol=1e-5)
    np.testing.assert_allclose(by_name["yaw_rate_0"], rate, rtol=1e-5)  # to the left, and across pi without a jump
    change = np.hypot(by_name["change_right"], by_name["change_ahead"])
    np.testing.assert_allclose(change, chord * 2 * math.sin(rate / 4) / 0.5, rtol=1e-4)
    assert (by_name["change_right"] < 0).all()
    np.testing.assert_array_equal(states[:, 5:7], states[:, 3:5])
    np.testing.assert_array_equal(by_name["speed_0"], by_name["velocity_ahead"])
    np.testing.assert_allclose(np.tan(by_name["steering_0"]), 2.588 * rate / by_name["velocity_ahead"], rtol=1e-5)


def test_nothing_is_clipped_on_a_fast_straight(scenes):
    states, _ = ego_states(scenes[STRAIGHT.name], NO_CAN_BUS, Options())
    times = np.arange(4, 9) / 2
    np.testing.assert_allclose(states[:, 1], 38 + 0.8 * (times - 0.25), rtol=1e-5)
    assert states[:, 1].max() * 3.6 > 140
    np.testing.assert_allclose(states[:, 4], 0.8, atol=1e-3)
    np.testing.assert_allclose(states[:, [0, 2, 3, 8]], 0, atol=1e-4)


def test_the_can_bus_is_read_at_the_nearest_message(root, scenes):
    can_bus = read_can_bus(root, LEFT.name)
    assert can_bus.files == "pose, steeranglefeedback"
    states, measured = ego_states(scenes[LEFT.name], can_bus, Options(steering_ratio=15.0))
    poses, _ = ego_states(scenes[LEFT.name], NO_CAN_BUS, Options())
    assert measured.all()
    for k, state in enumerate(states, 4):
        ahead, left = nuscenes_copy.felt(k / 2)
        np.testing.assert_allclose(state[5:7], [-left, ahead], atol=1e-5)
        np.testing.assert_allclose(state[7], nuscenes_copy.measured_speed(k / 2), rtol=1e-6)
        np.testing.assert_allclose(state[8], nuscenes_copy.wheel(k / 2) / 15, atol=1e-6)
    others = [0, 1, 2, 3, 4, *range(9, 17)]
    np.testing.assert_array_equal(states[:, others], poses[:, others])


def test_messages_far_from_a_keyframe_are_not_used():
    signal = Signal(np.array([0, 1_000_000, 1_300_000]), np.array([[1.0], [2.0], [3.0]]))
    times = np.array([-200_000, -100_000, 40_000, 499_000, 950_000, 1_149_000, 1_151_000, 1_400_001, 1_400_000])
    values, near = signal.at(times)
    np.testing.assert_array_equal(values[:, 0], [1, 1, 1, 1, 2, 2, 3, 3, 3])
    np.testing.assert_array_equal(near, [False, True, True, False, True, False, False, False, True])
    values, near = Signal(np.array([5]), np.array([[7.0]])).at(np.array([0, 10**9]))
    assert (values == 7).all()
    np.testing.assert_array_equal(near, [True, False])


def test_the_beginning_is_left_out_or_extrapolated(root, scenes):
    scene, extrapolate = scenes[STRAIGHT.name], Options(beginning="extrapolate")
    usual, whole = to_episode(root, scene), to_episode(root, scene, extrapolate)
    np.testing.assert_array_equal(usual.steps["history_known"], 4)
    np.testing.assert_array_equal(whole.steps["history_known"], [0, 1, 2, 3, 4, 4, 4, 4, 4])
    np.testing.assert_array_equal(whole.state[4:], usual.state)
    np.testing.assert_array_equal(whole.action[4:], usual.action)
    assert (usual.metadata["left_out_steps"], whole.metadata["left_out_steps"]) == (4, 0)
    first = 38 / 2 + 0.8 / 8  # metres of the first half second
    np.testing.assert_allclose(whole.state[0, 9:].reshape(4, 2), [[0, -first * k] for k in (4, 3, 2, 1)], atol=1e-3)
    np.testing.assert_allclose(whole.state[0, :5], [0, 2 * first, 0, 0, 0], atol=1e-3)


@pytest.mark.parametrize(
    ("aside", "said"),
    [(2.0, "turn right"), (1.99, "go straight"), (-1.99, "go straight"), (-2.0, "turn left"), (0.0, "go straight")],
)
def test_command_is_said_by_the_last_known_waypoint(aside, said):
    plan = np.array([[9.0, 1.0], [-9.0, 2.0], [aside, 3.0]])
    assert command(plan) == said
    assert command(np.zeros((0, 2))) == "go straight"


def test_an_episode_holds_pictures_as_they_are(root, scenes):
    episode = to_episode(root, scenes[LEFT.name])
    for view, channel in CHANNELS.items():
        assert episode.images[view] == [nuscenes_copy.picture(LEFT.name, channel, k) for k in range(4, 13)]
    assert list(episode.prompt) == ["turn left"] * 6 + ["go straight"] * 3  # 1 s of this circle is 1.6 m aside
    assert episode.metadata["location"] == "singapore-onenorth"
    assert episode.metadata["state_from"] == "poses and CAN bus"
    assert episode.metadata["longest_interval_s"] == 0.5
    np.testing.assert_array_equal(episode.steps["plan_known"], [6, 6, 6, 5, 4, 3, 2, 1, 0])
    np.testing.assert_array_equal(episode.steps["timestamp"], LEFT.start_us + 500_000 * np.arange(4, 13))
    assert episode.steps["sample_token"][0] == nuscenes_copy.token(LEFT.name, "sample", 4)
    other = to_episode(root, scenes[STRAIGHT.name])
    assert (other.metadata["can_bus"], other.metadata["state_from"]) == ("none", "poses")
    assert not other.steps["can_bus"].any()


def test_time_that_passes_unevenly_counts(scenes):
    """The keyframes keep their places; velocities are by the time that really passed."""
    scene = scenes[STRAIGHT.name]
    late = [dataclasses.replace(s, timestamp=s.timestamp + 100_000 * (k == 4)) for k, s in enumerate(scene.samples)]
    usual, _ = ego_states(scene, NO_CAN_BUS, Options())
    uneven, _ = ego_states(dataclasses.replace(scene, samples=tuple(late)), NO_CAN_BUS, Options())
    np.testing.assert_allclose(uneven[0, 1], usual[0, 1] * 0.5 / 0.6, rtol=1e-6)
    np.testing.assert_allclose(uneven[1, 1], usual[1, 1] * 0.5 / 0.4, rtol=1e-6)
    apart = [38 / 2 + 0.8 / 8 + 0.2 * k for k in (3, 4)]  # metres from one keyframe to the next
    np.testing.assert_allclose(uneven[1, 4], (apart[1] / 0.4 - apart[0] / 0.6) / 0.5, rtol=1e-4)
    np.testing.assert_array_equal(uneven[:, 9:], usual[:, 9:])


def test_options_that_are_wrong():
    with pytest.raises(ValueError, match=r"beginning 'pad'.*; steering_ratio 0"):
        Options(beginning="pad", steering_ratio=0.0)
