"""Robots made of a field or two, and rotations as stored in each representation."""

import numpy as np

from openpi_like.robots.representations import UNITS
from openpi_like.robots.robot import ActionField, Camera, Robot, StateField

STATE = StateField("hand", "s", 3)
ACTION = ActionField("hand", "a", 3)


def make_robot(state, action, **changes):
    defaults = {
        "name": "r",
        "cameras": (Camera("base", "observation/image"),),
        "state": tuple(state),
        "action": tuple(action),
        "control_hz": 10.0,
        "action_horizon": 4,
        "execute_steps": 2,
    }
    return Robot(**{**defaults, **changes})


def rotation_values(representation, rotations, unit="1"):
    """(N, size) values of scipy rotations, converted by scipy alone."""
    to_array = {
        "rpy": lambda r: r.as_euler("xyz"),
        "zxy": lambda r: r.as_euler("zxy"),
        "axis_angle": lambda r: r.as_rotvec(),
        "quaternion_xyzw": lambda r: r.as_quat(),
        "quaternion_wxyz": lambda r: np.roll(r.as_quat(), 1, axis=-1),
        "rotation_6d": lambda r: np.concatenate([r.as_matrix()[:, :, 0], r.as_matrix()[:, :, 1]], axis=-1),
    }
    return to_array[representation](rotations) / UNITS[unit][1]
