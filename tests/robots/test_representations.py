"""Rotations in every representation: by hand, as SciPy has them, there and back, and what is none."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from openpi_like.robots.representations import ROTATIONS, UNITS
from openpi_like.robots.robot import ActionField, StateField
from tests.robots.single_fields import ACTION, make_robot, rotation_values


def test_quarter_turn_in_every_representation():
    h = math.sqrt(0.5)
    by_hand: dict[str, list[float]] = {
        "rpy": [0, 0, math.pi / 2],
        "zxy": [math.pi / 2, 0, 0],
        "axis_angle": [0, 0, math.pi / 2],
        "quaternion_xyzw": [0, 0, h, h],
        "quaternion_wxyz": [h, 0, 0, h],
        "rotation_6d": [0, 1, 0, -1, 0, 0],
    }
    assert by_hand.keys() == ROTATIONS.keys()
    for name, values in by_hand.items():
        field = StateField("r", "s", 3, rotation="rpy", unit="deg", model_rotation=name)
        got = make_robot([field], [ActionField("x", "a", 1)]).encode_state(np.array([0.0, 0.0, 90.0]))
        np.testing.assert_allclose(got, values, atol=1e-6, err_msg=name)


def test_relative_rotation_is_in_the_frame_of_the_state():
    state = StateField("r", "s", 3, rotation="rpy", unit="deg")
    action = ActionField("r", "a", 3, rotation="rpy", unit="deg", model_rotation="axis_angle", relative_to="r")
    robot = make_robot([state], [action])
    got = robot.encode_actions(np.array([[0.0, 0.0, 75.0]]), np.array([0.0, 0.0, 30.0]))
    np.testing.assert_allclose(got, [[0.0, 0.0, math.pi / 4]], atol=1e-6)
    # After a quarter turn about z, the world's x axis is the hand's -y axis: a roll of the world is a turn about that.
    quarter = Rotation.from_euler("z", 90, degrees=True)
    target = (Rotation.from_euler("x", 20, degrees=True) * quarter).as_euler("xyz", degrees=True)
    got = robot.encode_actions(target[None], np.array([0.0, 0.0, 90.0]))
    np.testing.assert_allclose(got, [[0.0, -math.radians(20), 0.0]], atol=1e-6)


@pytest.mark.parametrize("stored", sorted(ROTATIONS))
@pytest.mark.parametrize("model", sorted(ROTATIONS))
@pytest.mark.parametrize("relative", [False, True])
@given(seed=st.integers(0, 10_000))
@settings(max_examples=5, deadline=None)
def test_rotations_invert(stored, model, relative, seed):
    unit = "deg" if stored in ("rpy", "zxy", "axis_angle") else "1"
    size = ROTATIONS[stored][0]
    field = {"size": size, "rotation": stored, "model_rotation": model, "unit": unit}
    robot = make_robot(
        [StateField("r", "s", **field)],
        [ActionField("r", "a", **field, relative_to="r" if relative else None)],
    )
    rng = np.random.default_rng(seed)
    targets, now = Rotation.random(6, rng=rng), Rotation.random(1, rng=rng)
    a, s = rotation_values(stored, targets, unit), rotation_values(stored, now, unit)[0]
    encoded = robot.encode_actions(a, s)
    assert encoded.shape == (6, ROTATIONS[model][0])
    # The same rotations by scipy; q and -q are one rotation, hence the comparison of matrices.
    expected = now.inv() * targets if relative else targets
    got = ROTATIONS[model][1](encoded.astype(np.float64))
    np.testing.assert_allclose(got.as_matrix(), expected.as_matrix(), atol=1e-5)
    decoded = ROTATIONS[stored][1](robot.decode_actions(encoded, s).astype(np.float64) * UNITS[unit][1])
    np.testing.assert_allclose(decoded.as_matrix(), targets.as_matrix(), atol=1e-4)


@pytest.mark.parametrize("kind", ["rpy", "zxy", "axis_angle", "quaternion_wxyz"])
@given(seed=st.integers(0, 10_000))
@settings(max_examples=10, deadline=None)
def test_changes_of_a_rotation_lead_to_the_next(kind, seed):
    """Changes act about axes of the base; k of them, combined, lead k steps on; none is longer than half a turn."""
    size = ROTATIONS[kind][0]
    unit = "1" if kind.startswith("quaternion") else "deg"
    field = ActionField("r", "s", size, rotation=kind, unit=unit, command="delta", next_step="change")
    path = Rotation.random(6, rng=np.random.default_rng(seed))
    x = rotation_values(kind, path, unit)
    changes = field.change(x[:-1], x[1:])
    turn = ROTATIONS[kind][1](changes * UNITS[unit][1])
    np.testing.assert_allclose((turn * path[:-1]).as_matrix(), path[1:].as_matrix(), atol=1e-9)
    total = ROTATIONS[kind][1](field.combine(changes[None]) * UNITS[unit][1])
    np.testing.assert_allclose((total * path[:1]).as_matrix(), path[5:].as_matrix(), atol=1e-9)


def test_6d_of_any_two_vectors_is_a_rotation():
    # A policy's output is not orthonormal; Gram-Schmidt keeps the direction of the first vector.
    got = ROTATIONS["rotation_6d"][1](np.array([[2.0, 0, 0, 1.0, 3.0, 0]])).as_matrix()
    np.testing.assert_allclose(got, [np.eye(3)], atol=1e-12)


@pytest.mark.parametrize("rotation", ["quaternion_xyzw", "rotation_6d"])
def test_values_that_are_no_rotation_name_the_field(rotation):
    size = ROTATIONS[rotation][0]
    field = StateField("turn", "s", size, rotation=rotation, model_rotation="rpy")
    x = np.ones((3, size))
    x[0, 0] = 2.0
    x[1], x[2, 1] = 0, np.nan
    assert field.usable(x).tolist() == [True, False, False]
    with pytest.raises(ValueError, match=rf"'turn' has values that are no rotation \({rotation}\): \[0.0, 0.0, "):
        make_robot([field], [ACTION]).encode_state(x)
    if rotation == "rotation_6d":  # two vectors of one direction
        assert not field.usable(np.array([[1.0, 2, 3, 2, 4, 6]])).any()
