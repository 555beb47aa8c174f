"""The CAN bus expansion of nuScenes: what the car itself measured, where it is there.

Two of its files are used, `can_bus/scene-0001_pose.json` (50 Hz; acceleration and velocity in the ego frame) and
`can_bus/scene-0001_steeranglefeedback.json` (100 Hz; angle of the steering wheel in rad, positive to the left); facts
are from nutonomy/nuscenes-devkit, python-sdk/nuscenes/can_bus/README.md. Some scenes have none: the devkit lists 21.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from openpi_like.config import near_names
from openpi_like.driving.nuscenes.frames import right_ahead
from openpi_like.driving.nuscenes.tables import raise_all

FOLDER = "can_bus"
NEAR_US = 100_000  # a message farther away than this, in microseconds, says nothing of a keyframe


@dataclasses.dataclass(frozen=True)
class Signal:
    """Numbers and when they were measured, in microseconds, in order."""

    times: Int[np.ndarray, "N"]
    values: Float[np.ndarray, "N K"]

    def at(self, times_T: Int[np.ndarray, "T"]) -> tuple[Float[np.ndarray, "T K"], Bool[np.ndarray, "T"]]:
        """Returns the values measured nearest to some times, and whether that is near enough, see `NEAR_US`."""
        after = np.searchsorted(self.times, times_T).clip(1, len(self.times) - 1) if len(self.times) > 1 else 0
        before = np.maximum(np.asarray(after) - 1, 0)
        nearer = np.abs(times_T - self.times[before]) <= np.abs(self.times[after] - times_T)
        nearest = np.where(nearer, before, after)
        return self.values[nearest], np.abs(self.times[nearest] - times_T) <= NEAR_US


@dataclasses.dataclass(frozen=True)
class CanBus:
    """What was measured in a scene. felt: acceleration to the right and ahead, m/s^2. speed: ahead, m/s. wheel: angle
    of the steering wheel, rad, to the left. None: there is no such file, or it holds no message."""

    felt: Signal | None
    speed: Signal | None
    wheel: Signal | None

    @property
    def files(self) -> str:
        """Which messages there are, in words: "pose, steeranglefeedback", or "none"."""
        there = {"pose": self.felt, "steeranglefeedback": self.wheel}
        return ", ".join(name for name, signal in there.items() if signal is not None) or "none"


def read_can_bus(root: Path, scene: str) -> CanBus:
    """Reads the messages of a scene, such as "scene-0061"; what is not there is None.

    Raises:
        NuScenesError: a file is cut off, or a message is not as it should be.
    """
    problems = list[str]()
    pose = _read(root, scene, "pose", {"accel": 3, "vel": 3}, problems)
    wheel = _read(root, scene, "steeranglefeedback", {"value": 1}, problems)
    raise_all(f"{root / FOLDER}, {scene}", problems)
    felt = speed = None
    if pose is not None:
        felt = Signal(pose.times, right_ahead(pose.values[:, :3]))
        speed = Signal(pose.times, pose.values[:, 3:4])
    return CanBus(felt, speed, wheel)


def _read(root: Path, scene: str, kind: str, fields: dict[str, int], problems: list[str]) -> Signal | None:
    path = root / FOLDER / f"{scene}_{kind}.json"
    if not path.is_file():
        return None
    try:
        messages = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as e:
        problems.append(f"{path.name} is not JSON ({e}), expected a list of messages; unpack or download it again")
        return None
    if not isinstance(messages, list):
        problems.append(f"{path.name} holds a {type(messages).__name__}, expected a list of messages")
        return None
    wrong = {i: said for i, message in enumerate(messages) if (said := _wrong(message, fields))}
    if wrong:
        i, said = next(iter(wrong.items()))
        problems.append(f"{path.name}: {len(wrong)} messages are not as expected, the first, message {i}: {said}")
    if wrong or not messages:
        return None
    times = np.array([message["utime"] for message in messages], np.int64)
    values = np.array([np.hstack([message[field] for field in fields]) for message in messages], np.float64)
    order = np.argsort(times, kind="stable")  # each message says when it was measured
    return Signal(times[order], values[order])


def _wrong(message: Any, fields: dict[str, int]) -> str:
    if not isinstance(message, dict):
        return f"a {type(message).__name__}, expected an object"
    for field in ("utime", *fields):
        if field not in message:
            return f"no {field!r}, {near_names(field, list(message))}"
    if not isinstance(message["utime"], int):
        return f"utime {message['utime']!r}, expected whole microseconds"
    for field, size in fields.items():
        value = message[field]
        numbers = value if size > 1 and isinstance(value, list) else [value]
        good = all(isinstance(x, int | float) and np.isfinite(x) for x in numbers)
        if len(numbers) != size or not good:
            return f"{field} {str(value)[:60]!r}, expected {size} finite numbers"
    return ""
