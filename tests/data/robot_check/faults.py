"""What is changed in a robot or in data to see whether it is found."""

import dataclasses
import itertools
from typing import Any

import numpy as np
from scipy.spatial.transform import Rotation

from openpi_like.data.index import FrameIndex
from openpi_like.data.robot_check import CHECKS, Finding, RobotSample, check_robot
from openpi_like.robots import Robot


def with_field(robot: Robot, what: str, name: str, **changes: Any) -> Robot:
    """The robot with another `state` or `action` field of that name."""
    fields = getattr(robot, what)
    assert any(f.name == name for f in fields)
    changed: Any = {what: tuple(dataclasses.replace(f, **changes) if f.name == name else f for f in fields)}
    return dataclasses.replace(robot, **changed)


def inverted(robot: Robot, what: str, name: str = "gripper") -> Robot:
    """The robot with open and closed swapped."""
    (field,) = (f for f in getattr(robot, what) if f.name == name)
    swapped = dataclasses.replace(field.gripper, open=field.gripper.closed, closed=field.gripper.open)
    return with_field(robot, what, name, gripper=swapped)


def with_columns(index: FrameIndex, **columns: np.ndarray) -> FrameIndex:
    """The index with other numbers; `observation__state` is the field observation/state."""
    changed = {k.replace("__", "/"): v for k, v in columns.items()}
    return dataclasses.replace(index, columns={**index.columns, **changed})


def with_quaternion(index: FrameIndex, length: float) -> FrameIndex:
    """The index with the turn of its arm as a quaternion (x, y, z, w) of that length, in `observation/quaternion`."""
    turn = Rotation.from_euler("xyz", index.columns["observation/state"][:, 3:6])
    return with_columns(index, observation__quaternion=(length * turn.as_quat()).astype(np.float32))


def scaled(index: FrameIndex, key: str, dims: slice, factor: float) -> FrameIndex:
    """The index with some dims of a field in other units."""
    x = np.array(index.columns[key])
    x[:, dims] *= factor
    return with_columns(index, **{key.replace("/", "__"): x})


def late(index: FrameIndex, steps: int) -> FrameIndex:
    """The index with all actions stored so many steps late."""
    x, start = np.array(index.columns["action"]), np.asarray(index.episode_start)
    for first, end in itertools.pairwise(start):
        x[first:end] = x[np.clip(np.arange(first, end) - steps, first, end - 1)]
    return with_columns(index, action=x)


def suspected(index: FrameIndex, robot: Robot, **options: Any) -> list[tuple[str, Finding]]:
    """All that looks wrong but in pictures, with the name of the check."""
    checks = tuple(check for check in CHECKS if check.name != "Cameras")
    found = check_robot(RobotSample.take(index, robot, **options), checks)
    return [(name, f) for name, findings in found.items() for f in findings if f.level != "found"]
