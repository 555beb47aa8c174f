"""Robots as users have them, beside what their public sources say: names of dims, poses, sizes of steps, limits.

The lists here are written from the sources that the robots' files name, not from the files.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from openpi_like.config import from_json, to_json
from openpi_like.robots import Robot
from openpi_like.robots.find import _NO_ROBOTS, find_robot
from openpi_like.robots.oxe import OTHER_ACTIONS, ROBOTS

DEGREE = math.pi / 180


class Source(NamedTuple):
    """What a public source says of a robot. pose: of the state, at home or at rest."""

    names: Sequence[str]  # of the action's dims; the state has the same
    unit: str
    pose: Sequence[float]
    hz: float
    cameras: Sequence[str]
    gripper: tuple[float, float] | None = None  # open, closed


def _aloha(side: str = "") -> list[str]:
    motors = ("waist", "shoulder", "elbow", "forearm_roll", "wrist_angle", "wrist_rotate", "gripper")
    return [f"{side}{m}" for m in motors]


def _images(*names: str) -> list[str]:
    return [f"observation.images.{name}" for name in names]


SO = [f"{m}.pos" for m in ("shoulder_pan", "shoulder_lift", "elbow_flex", "wrist_flex", "wrist_roll", "gripper")]
G1_ARMS = [
    *("kLeftShoulderPitch", "kLeftShoulderRoll", "kLeftShoulderYaw", "kLeftElbow"),
    *("kLeftWristRoll", "kLeftWristPitch", "kLeftWristYaw"),
    *("kRightShoulderPitch", "kRightShoulderRoll", "kRightShoulderYaw", "kRightElbow"),
    *("kRightWristRoll", "kRightWristPitch", "kRightWristYaw"),
]
G1_HANDS = [
    *("kLeftHandThumb0", "kLeftHandThumb1", "kLeftHandThumb2"),
    *("kLeftHandMiddle0", "kLeftHandMiddle1", "kLeftHandIndex0", "kLeftHandIndex1"),
    *("kRightHandThumb0", "kRightHandThumb1", "kRightHandThumb2"),
    *("kRightHandIndex0", "kRightHandIndex1", "kRightHandMiddle0", "kRightHandMiddle1"),
]
WXAI = [*(f"joint_{i}.pos" for i in range(6)), "left_carriage_joint.pos"]
DROID = [*(f"joint_{i}" for i in range(7)), "gripper"]
DROID_IMAGES = _images("exterior_1_left", "exterior_2_left", "wrist_left")
UR = ["shoulder_pan_joint", "shoulder_lift_joint", "elbow_joint", *(f"wrist_{i}_joint" for i in (1, 2, 3)), "gripper"]
ALOHA_IMAGES = _images("cam_high", "cam_low", "cam_left_wrist", "cam_right_wrist")
G1_IMAGES = _images("cam_left_high", "cam_right_high", "cam_left_wrist", "cam_right_wrist")

START = (0, -0.96, 1.16, 0, -0.3, 0, 0)  # START_ARM_POSE of ALOHA's code, gripper closed
STAGED = (0, math.pi / 3, math.pi / 6, math.pi / 5, 0, 0, 0)  # staged_positions of lerobot_trossen
PANDA = (0, 0, 0, -1.57079, 0, 1.57079, -0.7853, 0)  # "home" of mujoco_menagerie, gripper open
UR_HOME = (-1.5708, -1.5708, 1.5708, -1.5708, -1.5708, 0, 0)  # the same for the UR5e
XARM7_START = (0, 0, 0, 90 * DEGREE, 0, 90 * DEGREE, 0, 0)  # start_joints of lerobot_robot_ufactory
XARM6_START = (0, 0, -90 * DEGREE, 0, 90 * DEGREE, 0, 0)

SOURCES = {
    "so101": Source(SO, "deg", (0,) * 6, 30, _images("front", "wrist"), (100, 0)),
    "so101:SO101_NORMALIZED": Source(SO, "1", (0,) * 6, 30, _images("front", "wrist"), (100, 0)),
    "so100": Source(SO, "deg", (0,) * 6, 30, _images("front", "wrist"), (100, 0)),
    "so100:SO100_NORMALIZED": Source(SO, "1", (0,) * 6, 30, _images("front", "wrist"), (100, 0)),
    "koch": Source(SO, "1", (0,) * 6, 30, _images("front", "wrist"), (100, 0)),
    "viperx": Source(_aloha(), "rad", START, 50, _images("cam_high", "cam_wrist"), (1, 0)),
    "aloha_stationary": Source([*_aloha("left_"), *_aloha("right_")], "rad", START * 2, 50, ALOHA_IMAGES, (1, 0)),
    "aloha2": Source([*_aloha("left_"), *_aloha("right_")], "rad", START * 2, 50, ALOHA_IMAGES, (1, 0)),
    "wxai": Source(WXAI, "rad", STAGED, 30, _images("cam_main", "cam_wrist"), (0.044, 0)),
    "wxai:WXAI_STATIONARY": Source(
        [f"{side}_{name}" for side in ("left", "right") for name in WXAI],
        "rad",
        STAGED * 2,
        30,
        _images("top", "bottom", "left", "right"),
        (0.044, 0),
    ),
    "franka_droid": Source(DROID, "rad", PANDA, 15, DROID_IMAGES, (0, 1)),
    "franka_droid:FRANKA_DROID_VELOCITY": Source(DROID, "1", PANDA, 15, DROID_IMAGES, (0, 1)),
    "franka_droid:FR3_DROID": Source(DROID, "rad", PANDA, 15, DROID_IMAGES, (0, 1)),
    "ur5e": Source(UR, "rad", UR_HOME, 20, ["image", "wrist_image"], (0, 1)),
    "xarm7": Source(
        [*(f"J{i}.pos" for i in range(1, 8)), "gripper.pos"],
        "rad",
        XARM7_START,
        30,
        _images("overhead", "wrist"),
        (0, 1),
    ),
    "xarm6": Source(
        [*(f"J{i}.pos" for i in range(1, 7)), "gripper.pos"],
        "rad",
        XARM6_START,
        30,
        _images("overhead", "wrist"),
        (0, 1),
    ),
    "unitree_g1": Source([*G1_ARMS, *G1_HANDS], "rad", (0,) * 28, 30, G1_IMAGES),
    "unitree_g1:UNITREE_G1_DEX1": Source(
        [*G1_ARMS, "kLeftGripper", "kRightGripper"], "rad", (0,) * 16, 30, G1_IMAGES, (5.4, 0)
    ),
}
ALL = pytest.mark.parametrize("name", SOURCES)


def bounds(robot: Robot, what: str = "action") -> tuple[np.ndarray, np.ndarray]:
    limits, size = getattr(robot, f"{what}_limits"), getattr(robot, f"robot_{what}_size")
    return limits.arrays(size)[:2]


@ALL
def test_names_units_and_rates_are_those_of_the_source(name: str) -> None:
    robot, source = find_robot(name), SOURCES[name]
    for fields in (robot.state, robot.action):
        assert [n for f in fields for n in f.names] == list(source.names)
        grippers = [f.gripper for f in fields if f.gripper is not None]
        assert [(g.open, g.closed) for g in grippers] == [source.gripper] * len(grippers)
        assert bool(grippers) == (source.gripper is not None)
    assert {f.unit for f in robot.action if f.gripper is None} == {source.unit}
    assert (robot.control_hz, robot.action_horizon) == (source.hz, source.hz)
    assert [c.key for c in robot.cameras] == list(source.cameras)
    assert robot.language_key == "task"
    # One run of numbers after the other: together they are the whole vector.
    for fields in (robot.state, robot.action):
        for key in {f.key for f in fields}:
            runs = [(f.start, f.size) for f in fields if f.key == key]
            assert [start for start, _ in runs] == [0, *np.cumsum([size for _, size in runs[:-1]])], key


@ALL
def test_the_documented_pose_is_within_limits(name: str) -> None:
    robot, source = find_robot(name), SOURCES[name]
    lower, upper = bounds(robot, "state")
    assert np.isfinite([lower, upper]).all()
    assert (lower <= source.pose).all()
    assert (source.pose <= upper).all()
    if all(f.command == "absolute" for f in robot.action):
        at_rest = np.tile(np.asarray(source.pose, np.float32), (4, 1))
        assert robot.limit_problems(at_rest) == []
        jump = at_rest.copy()
        jump[2:] = np.where(upper - at_rest[2:] > at_rest[2:] - lower, upper, lower)  # to a stop, within a step
        speeds = robot.action_limits.arrays(len(lower))[2]
        fast = abs(jump[2] - at_rest[0]) * source.hz > speeds * 1.01
        problems = robot.limit_problems(jump)
        assert [n for n, f in zip(source.names, fast, strict=True) if f] == [
            p.split(" [")[0] for p in problems if "velocity limit" in p
        ]
        assert fast.any()


@ALL
@given(data=st.data())
@settings(max_examples=15, deadline=None)
def test_decode_inverts_encode_and_keeps_to_the_limits(name: str, data: st.DataObject) -> None:
    robot = find_robot(name)
    parts = st.floats(0, 1, width=32)
    (lower, upper), (low, high) = bounds(robot), bounds(robot, "state")
    state = low + data.draw(arrays(np.float32, len(low), elements=parts)) * (high - low)
    chosen = data.draw(arrays(np.float32, (1, len(lower)), elements=parts | st.sampled_from([0.0, 1.0])))
    actions = np.tile(lower + chosen * (upper - lower), (3, 1)).astype(np.float32)
    encoded = robot.encode_actions(actions, state)
    decoded = robot.decode_actions(encoded, state)
    np.testing.assert_allclose(decoded, actions, rtol=1e-6, atol=1e-4 if SOURCES[name].unit == "deg" else 2e-5)
    assert robot.limit_problems(decoded) == []
    is_gripper = np.concatenate([[f.gripper is not None] * f.model_size for f in robot.action])
    opening = encoded[:, is_gripper]
    assert ((opening >= -1e-6) & (opening <= 1 + 1e-6)).all()


@ALL
def test_a_stored_robot_is_read_back(name: str) -> None:
    robot = find_robot(name)
    stored = json.dumps(to_json(robot), allow_nan=False)
    assert from_json(json.loads(stored)) == robot


@ALL
def test_a_slip_of_the_pen_is_answered_with_the_robot(name: str) -> None:
    module, _, attribute = name.partition(":")
    wrong = f"{module}:{attribute.replace('D', 'T', 1)}X" if attribute else f"{module}s"
    with pytest.raises(ValueError, match=f"did you mean .*'{attribute or module}'"):
        find_robot(wrong)


def test_numbers_of_the_manufacturers() -> None:
    """A few by hand, in the units of the data sheets."""

    def numbers(name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        robot = find_robot(name)
        return robot.action_limits.arrays(robot.robot_action_size)

    _, upper, speed, _ = numbers("so101")
    np.testing.assert_allclose(upper[:3], [110.0, 100.0, 1.69 / DEGREE], atol=0.01)
    np.testing.assert_allclose(speed, [60 / 0.192] * 5 + [np.inf])
    _, _, speed, _ = numbers("koch")
    np.testing.assert_allclose(speed[:2], [61 / 60 * 200, np.inf])
    lower, upper, speed, _ = numbers("aloha2")
    np.testing.assert_allclose(lower[:6], [-3.14158, -1.85005, -1.76278, -3.14158, -1.8675, -3.14158], atol=2e-5)
    np.testing.assert_allclose(upper[7:13], [3.14158, 1.25664, 1.6057, 3.14158, 2.23402, 3.14158], atol=2e-5)
    assert speed[0] == math.pi
    *_, acceleration = numbers("franka_droid")
    assert acceleration.tolist() == [15.0, 7.5, 10.0, 12.5, 15.0, 20.0, 20.0, math.inf]
    _, _, speed, acceleration = numbers("franka_droid:FR3_DROID")
    assert (speed[4:7].tolist(), acceleration[0]) == ([5.26, 4.18, 5.26], 10.0)
    lower, upper, _, acceleration = numbers("xarm7")
    np.testing.assert_allclose(
        [lower[1], upper[1], lower[3], upper[3]], np.array([-118, 120, -11, 225]) * DEGREE, rtol=1e-5
    )
    np.testing.assert_allclose(acceleration[:7], 1145 * DEGREE, rtol=2e-3)
    assert numbers("wxai")[2][6] == 0.0875
    lower, upper, *_ = numbers("unitree_g1")
    np.testing.assert_array_equal(lower[14:21][2:], -upper[21:28][2:])  # one hand mirrors the other


def test_every_robot_has_its_source_here_and_is_listed_in_the_docs() -> None:
    files = {p.stem for p in Path("openpi_like/robots").glob("[!_]*.py")}
    others = {f for f in files if f.startswith(("oxe", "robosuite"))}
    before = {"aloha", "cubes_panda", "ego_vehicle", "fetch", "metaworld_fetch", "pusht", "sawyer", "widowx"}
    assert files - others - before - set(_NO_ROBOTS) == {name.partition(":")[0] for name in SOURCES}
    listed = Path("docs/robots.md").read_text()
    for name in SOURCES:
        assert f"`{name}`" in listed, name
    robots = {id(r): r for r in (*map(find_robot, SOURCES), *ROBOTS.values(), *OTHER_ACTIONS.values())}.values()
    assert len({r.name for r in robots}) == len(robots)
