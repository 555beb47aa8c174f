"""Robot space and model space: numbers by hand, laws over random robots, and every error."""

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from openpi_like.config import from_json, to_json
from openpi_like.robots.aloha import ALOHA
from openpi_like.robots.gripper import Gripper
from openpi_like.robots.limits import Limits
from openpi_like.robots.pusht import PUSHT
from openpi_like.robots.representations import UNITS
from openpi_like.robots.robot import ActionField, Camera, StateField
from openpi_like.robots.sawyer import SAWYER
from openpi_like.robots.widowx import WIDOWX
from tests.robots.single_fields import ACTION, STATE, make_robot

ALL = (PUSHT, SAWYER, ALOHA, WIDOWX)


# ---- numbers by hand


def test_units_and_gripper():
    gripper = Gripper(open=-1.0, closed=1.0)
    state = [
        StateField("hand", "s", 2, unit="mm"),
        StateField("turn", "s", 1, start=2, unit="deg"),
        StateField("gripper", "s", 1, start=3, gripper=gripper),
    ]
    robot = make_robot(state, [ActionField("gripper", "a", 2, gripper=gripper)])
    encoded = robot.encode_state(np.array([120.0, -5.0, 90.0, 0.5]))
    np.testing.assert_allclose(encoded, [0.12, -0.005, math.pi / 2, 0.25], rtol=1e-6)
    assert encoded.dtype == np.float32
    actions = robot.encode_actions(np.array([[-1.0, 1.0], [0.0, 3.0]]), np.zeros(4))
    np.testing.assert_allclose(actions, [[1.0, 0.0], [0.5, -1.0]])  # out of range stays out of range


def test_relative_to_subtracts_the_first_state_from_the_whole_chunk():
    chunk = np.array([[110.0, 220.0], [130.0, 190.0]])
    encoded = PUSHT.encode_actions(chunk, np.array([100.0, 200.0]))
    np.testing.assert_allclose(encoded, [[10.0, 20.0], [30.0, -10.0]])


def test_relative_to_converts_units_on_both_sides():
    robot = make_robot(
        [StateField("hand", "s", 1, unit="m")], [ActionField("hand", "a", 1, unit="cm", relative_to="hand")]
    )
    np.testing.assert_allclose(robot.encode_actions(np.array([[25.0]]), np.array([0.1])), [[0.15]], rtol=1e-6)
    np.testing.assert_allclose(robot.decode_actions(np.array([[0.15]]), np.array([0.1])), [[25.0]], rtol=1e-6)


def test_names_and_sizes():
    assert PUSHT.action_names == ("disc_0 [px]", "disc_1 [px]")
    assert SAWYER.state_names == ("hand_0 [m]", "hand_1 [m]", "hand_2 [m]", "gripper_0 [1]")
    sizes = [(r.robot_state_size, r.robot_action_size, r.state_size, r.action_size) for r in ALL]
    assert sizes == [(2, 2, 2, 2), (4, 4, 4, 4), (14, 14, 14, 14), (7, 7, 7, 7)]
    wide = make_robot(
        [StateField("r", "s", 3, rotation="rpy", model_rotation="rotation_6d")], [ActionField("x", "a", 1)]
    )
    assert (wide.robot_state_size, wide.state_size) == (3, 6)
    assert len(wide.state_names) == 6
    turn = ("roll", "pitch", "yaw")
    named = make_robot(
        [StateField("r", "s", 3, unit="deg", rotation="rpy", model_rotation="axis_angle", names=turn)],
        [ActionField("arm", "a", 2, unit="deg", names=("waist", "elbow"))],
    )
    assert named.action_names == ("waist [rad]", "elbow [rad]")
    assert named.robot_action_names == ("waist [deg]", "elbow [deg]")
    assert named.state_names == ("r_0 [rad]", "r_1 [rad]", "r_2 [rad]")  # no roll, pitch, yaw any more


# ---- laws

FLOATS = st.floats(-10, 10, width=32)


@pytest.mark.parametrize("robot", ALL, ids=lambda r: r.name)
@given(data=st.data())
@settings(max_examples=30, deadline=None)
def test_decode_inverts_encode(robot, data):
    batch = data.draw(st.sampled_from([(), (2,), (2, 3)]))
    state = data.draw(arrays(np.float32, (*batch, robot.robot_state_size), elements=FLOATS))
    actions = data.draw(arrays(np.float32, (*batch, 5, robot.robot_action_size), elements=FLOATS))
    encoded = robot.encode_actions(actions, state)
    assert encoded.shape == (*batch, 5, robot.action_size)
    np.testing.assert_allclose(robot.decode_actions(encoded, state), actions, atol=1e-5)


@given(
    unit=st.sampled_from(sorted(UNITS)),
    reference_unit=st.sampled_from(["m", "mm", "cm"]),
    limits=st.tuples(FLOATS, FLOATS).filter(lambda x: abs(x[0] - x[1]) > 0.1),
    data=st.data(),
)
@settings(max_examples=50, deadline=None)
def test_units_and_grippers_invert(unit, reference_unit, limits, data):
    state = [StateField("hand", "s", 2, unit=reference_unit), StateField("x", "s", 1, start=2, unit=unit)]
    action = [
        ActionField("hand", "a", 2, unit="cm", relative_to="hand"),
        ActionField("x", "a", 1, start=2, unit=unit, command="delta"),
        ActionField("gripper", "a", 1, start=3, gripper=Gripper(*limits)),
    ]
    robot = make_robot(state, action)
    s = data.draw(arrays(np.float32, 3, elements=FLOATS))
    a = data.draw(arrays(np.float32, (3, 4), elements=FLOATS))
    encoded = robot.encode_actions(a, s)
    np.testing.assert_allclose(robot.decode_actions(encoded, s), a, atol=2e-3)  # metres in float32, read back in cm
    np.testing.assert_allclose(encoded[:, 2], a[:, 2] * UNITS[unit][1], rtol=1e-5, atol=1e-7)


# ---- commands that are derived


def by_loop(values, lengths, gripper):
    """Open or closed, step by step, as `Gripper` words it."""
    opening = [(v - gripper.closed) / (gripper.open - gripper.closed) for v in values]
    result, at = [], 0
    for length in lengths:
        episode = opening[at : at + length]
        at += length
        if gripper.convention == "trigger":
            said = [True if v > 0.55 else False if v < 0.45 else None for v in episode]
            now = next((not s for s in said if s is not None), True)
            for s in said:
                now = now if s is None else s
                result.append(now)
        else:
            for i, v in enumerate(episode):
                reached = [x for x in episode[i:] if x > 0.95 or x < 0.05]
                result.append(reached[0] > 0.95 if reached else v >= 0.5)
    return result


@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    limits=st.sampled_from([(-1.0, 1.0), (1.0, -1.0), (1.0, 0.0), (0.0, 1.0), (0.08, 0.0)]),
    convention=st.sampled_from(["trigger", "look_ahead"]),
    data=st.data(),
)
@settings(max_examples=150, deadline=None)
def test_derived_grippers_are_those_of_a_loop(lengths, limits, convention, data):
    gripper = Gripper(open=limits[0], closed=limits[1], convention=convention)
    parts = st.sampled_from([0.0, 0.04, 0.2, 0.5, 0.5, 0.5, 0.8, 0.97, 1.0])
    opening = np.array(data.draw(st.lists(parts, min_size=sum(lengths), max_size=sum(lengths))))
    values = gripper.closed + opening * (gripper.open - gripper.closed)
    first = np.zeros(len(values), bool)
    first[np.cumsum([0, *lengths[:-1]])] = True
    assert gripper.opens(values, first).tolist() == by_loop(values, lengths, gripper)


def test_triggers_by_hand():
    """-1 opens, 1 closes; three episodes: closed, then open; no trigger; a redundant one."""
    gripper = Gripper(open=-1.0, closed=1.0, convention="trigger")
    values = np.array([0, 0, -1, 0, 1, 0, 0, 0, 0, 1, 1, 0], float)
    first = np.isin(np.arange(12), [0, 6, 8])
    assert gripper.opens(values, first).astype(int).tolist() == [0, 0, 1, 1, 0, 0, 1, 1, 1, 0, 0, 0]


def test_combined_commands():
    """Four control steps of three stored ones each."""
    x = np.arange(24.0).reshape(4, 3, 2)
    for command, expected in (("absolute", x[:, 2]), ("delta", x[:, 0] + x[:, 1] + x[:, 2]), ("velocity", x[:, 1])):
        np.testing.assert_allclose(ActionField("x", "a", 2, command=command).combine(x), expected)


def test_a_robot_without_a_state():
    robot = make_robot([], [ACTION])
    assert (robot.state_size, robot.state_names) == (0, ())
    assert robot.encode_state(np.zeros((5, 0))).shape == (5, 0)
    chunk = np.ones((5, 4, 3))
    np.testing.assert_array_equal(
        robot.decode_actions(robot.encode_actions(chunk, np.zeros((5, 0))), np.zeros((5, 0))), chunk
    )


def test_a_robot_stored_before_fields_were_added_is_read():
    stored = to_json(WIDOWX)
    for name in ("stride", "language_alternatives"):
        del stored[name]
    for camera in stored["cameras"]:
        for name in ("steps_back", "min_bytes", "fit", "upside_down"):
            del camera[name]
    for field in (*stored["state"], *stored["action"]):
        field.pop("next_step", None)
        for name in ("names", "limits"):
            del field[name]
        if field["gripper"]:
            del field["gripper"]["convention"]
            field["gripper"]["__class__"] = "openpi_like.robots.robot:Gripper"
    assert from_json(stored) == WIDOWX


# ---- errors


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Gripper(1.0, 1.0), "both 1.0"),
        (lambda: Gripper(1.0, 0.0, "triger"), "convention 'triger' is unknown; did you mean 'trigger'"),
        (lambda: Camera("c", "k", fit="zoom"), "fit 'zoom', expected 'pad', 'crop' or 'stretch'"),
        (lambda: Camera("c", "k", steps_back=-1), "steps_back -1 and min_bytes 0, expected both >= 0"),
        (lambda: StateField("g", "s", 1, gripper=Gripper(1.0, 0.0, "trigger")), "'trigger' is for commands"),
        (lambda: ActionField("x", "s", 1, next_step="delta"), "next_step 'delta', expected None, 'value' or 'change'"),
        (lambda: ActionField("x", "s", 1, next_step="change"), "gives a command of kind 'delta', not 'absolute'"),
        (lambda: ActionField("x", "s", 1, next_step="value", command="delta"), "of kind 'absolute', not 'delta'"),
        (lambda: ActionField("x", "s", 1, command="velocity", relative_to="x"), "velocity command cannot be made rel"),
        (
            lambda: ActionField("g", "s", 1, gripper=Gripper(1.0, 0.0), command="delta"),
            "gripper command of kind 'delta'",
        ),
        (
            lambda: ActionField("g", "s", 1, gripper=Gripper(1.0, 0.0, "trigger"), next_step="value"),
            "gripper convention 'trigger' and next_step exclude each other",
        ),
        (
            lambda: ActionField("g", "s", 2, gripper=Gripper(1.0, 0.0, "look_ahead")),
            "gripper convention 'look_ahead' and size 2, expected a size of 1",
        ),
        (lambda: make_robot([STATE], [ACTION], stride=0), "stride 0, expected at least 1"),
        (lambda: make_robot([STATE], [ACTION], language_alternatives=("language_instruction",)), "name a text twice"),
        (
            lambda: make_robot(
                [STATE], [ACTION], language_key=None, default_prompt="go", language_alternatives=("other",)
            ),
            "language_alternatives without language_key",
        ),
        (lambda: Camera("c", "k", channel_order="gbr"), "channel_order 'gbr', expected 'rgb' or 'bgr'"),
        (lambda: StateField("x", "s", 1, unit="millimetres"), "unit 'millimetres' is unknown"),
        (lambda: StateField("x", "s", 1, unit="degs"), "did you mean 'deg'"),
        (lambda: StateField("x", "s", 3, rotation="axisangle"), "did you mean 'axis_angle'"),
        (lambda: StateField("x", "s", 3, rotation="rpy", model_rotation="6d"), "rotation '6d' is unknown"),
        (lambda: StateField("x", "s", 3, model_rotation="rpy"), "model_rotation is given without rotation"),
        (lambda: StateField("x", "s", 3, rotation="quaternion_xyzw"), "size 3, expected 4"),
        (lambda: StateField("x", "s", 3, rotation="rpy", gripper=Gripper(0.0, 1.0)), "not both"),
        (lambda: StateField("x", "s", 0), "size 0 and start 0"),
        (lambda: StateField("x", "s", 1, start=-1), "start -1"),
        (lambda: ActionField("x", "s", 1, unit="feet"), "ActionField 'x': unit 'feet'"),
        (lambda: ActionField("x", "s", 1, command="relative"), "command 'relative', expected 'absolute', 'delta' or"),
        (lambda: ActionField("x", "s", 1, command="delta", relative_to="x"), "cannot be made relative"),
        (lambda: StateField("x", "s", 2, names=("a",)), r"1 names \('a',\), expected 2, or none"),
        (
            lambda: StateField("x", "s", 3, limits=Limits((0.0, 0.0), velocity=1.0)),
            "limits.lower has 2 numbers, expected 3, or one number for all dims",
        ),
        (
            lambda: StateField("x", "s", 3, rotation="rpy", limits=Limits(acceleration=1.0)),
            "limits of velocity and acceleration of a rotation",
        ),
        (
            lambda: make_robot([StateField(n, "s", 1, names=("waist",)) for n in ("left", "right")], [ACTION]),
            r"state dims \['waist'\] are named twice",
        ),
        (lambda: make_robot([STATE, STATE], [ACTION]), r"state field names \['hand'\] are used twice"),
        (lambda: make_robot([STATE], [ACTION, ACTION]), "action field names"),
        (lambda: make_robot([STATE], [ACTION], cameras=()), "no camera, expected at least one"),
        (lambda: make_robot([STATE], []), "no action field, expected at least one"),
        (
            lambda: make_robot([STATE], [dataclasses.replace(ACTION, relative_to="hnad")]),
            "relative to 'hnad', no such state; did you mean 'hand'",
        ),
        (
            lambda: make_robot([STATE], [dataclasses.replace(ACTION, size=2, relative_to="hand")]),
            "differ in size or rotation",
        ),
        (
            lambda: make_robot([STATE], [dataclasses.replace(ACTION, rotation="rpy", relative_to="hand")]),
            "differ in size or rotation",
        ),
        (lambda: make_robot([STATE], [ACTION], execute_steps=5), r"execute_steps 5, expected 1 \.\. action_horizon 4"),
        (lambda: make_robot([STATE], [ACTION], execute_steps=0), "execute_steps 0"),
        (lambda: make_robot([STATE], [ACTION], control_hz=0.0), "control_hz 0.0, expected > 0"),
        (lambda: make_robot([STATE], [ACTION], normalization="minmax"), "expected 'zscore' or 'quantile'"),
        (lambda: make_robot([STATE], [ACTION], language_key=None), "language_key and default_prompt are both None"),
    ],
)
def test_errors(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_all_problems_are_reported_at_once():
    with pytest.raises(ValueError, match=r"(?s)Robot 'r'.*no camera.*execute_steps 9.*control_hz -1"):
        make_robot([STATE], [ACTION], cameras=(), execute_steps=9, control_hz=-1.0)
    with pytest.raises(ValueError, match=r"(?s)unit 'inch'.*rotation 'euler'.*size 0"):
        StateField("x", "s", 0, unit="inch", rotation="euler")


def test_wrong_sizes_name_the_fields():
    with pytest.raises(
        ValueError, match=r"state of robot 'sawyer': got shape \(3,\), expected last axis 4 \(hand:3, g"
    ):
        SAWYER.encode_state(np.zeros(3))
    with pytest.raises(ValueError, match=r"actions of robot 'pusht': got shape \(8, 3\), expected last axis 2"):
        PUSHT.encode_actions(np.zeros((8, 3)), np.zeros(2))
    with pytest.raises(ValueError, match="state of robot 'pusht'"):
        PUSHT.encode_actions(np.zeros((8, 2)), np.zeros(3))
    with pytest.raises(ValueError, match="actions of robot 'aloha'"):
        ALOHA.decode_actions(np.zeros((8, 7)), np.zeros(14))
    with pytest.raises(ValueError, match="state of robot 'aloha'"):
        ALOHA.decode_actions(np.zeros((8, 14)), np.zeros(7))
