"""How far states, pictures and actions are from what a checkpoint has seen; and what becomes of those that are."""

import dataclasses
import zlib
from typing import Literal

import numpy as np

from openpi_like.data.normalize import FieldStats
from openpi_like.robots import Robot


class RangeError(ValueError):
    """A state is farther from the training data, or an action farther beyond the robot's limits, than is allowed."""


@dataclasses.dataclass(frozen=True)
class Ranges:
    """What is said, and what is refused. Distances are in units of the training data's range, dim by dim.

    warn: a state or an action that is farther beyond the range is said in the reply. refuse: a state that is farther
    gets no answer; None answers all. beyond_limits: what becomes of actions outside of the robot's limits: "clip" cuts
    them, and says so; "refuse" sends none. frozen: a picture that is the same, bit for bit, in so many requests one
    after the other, while the state changes, is said.
    """

    warn: float = 0.1
    refuse: float | None = 5.0
    beyond_limits: Literal["clip", "refuse"] = "clip"
    frozen: int = 5

    def __post_init__(self) -> None:
        problems = []
        if not self.warn >= 0 or (self.refuse is not None and not self.refuse >= self.warn):
            problems.append(f"warn={self.warn}, refuse={self.refuse}, expected 0 <= warn <= refuse")
        if self.frozen < 2:
            problems.append(f"frozen={self.frozen}, expected at least 2")
        if problems:
            raise ValueError("Ranges: " + "; ".join(problems))


def beyond(values: np.ndarray, stats: FieldStats) -> np.ndarray:
    """Returns how far values (..., D) in model space are beyond what was seen, in units of its range, per dim (D,).

    Where nothing varied in training, the unit is the size of the number itself, or 1 where that is less.
    """
    low, high = np.array(stats.min), np.array(stats.max)
    width = np.where(high - low > 1e-6, high - low, np.maximum(1.0, np.abs(high)))
    distance = np.maximum(values - high, low - values) / width
    return np.maximum(distance, 0).reshape(-1, len(low)).max(0)


def said(what: str, distance: np.ndarray, stats: FieldStats, warn: float) -> list[str]:
    """Returns a sentence about the dims that are farther than `warn`, or none."""
    far = np.flatnonzero(distance > warn)
    if not len(far):
        return []
    worst = sorted(far, key=lambda i: -distance[i])[:5]
    dims = ", ".join(f"{stats.names[i]} ({distance[i]:.2g} times its range)" for i in worst)
    return [f"{what} is beyond the training data in {len(far)} of {len(distance)} dims: {dims}"]


def check_state(robot: Robot, encoded: np.ndarray, stats: FieldStats, ranges: Ranges) -> list[str]:
    """Returns what is to be said of a state (De,) in model space.

    Raises:
        RangeError: it is farther than `ranges.refuse`.
    """
    distance = beyond(encoded, stats)
    if ranges.refuse is not None and distance.max(initial=0.0) > ranges.refuse:
        (sentence,) = said("state", distance, stats, ranges.refuse)
        raise RangeError(f"robot {robot.name!r}: {sentence}; refused beyond {ranges.refuse:g}, check units and order")
    return said("state", distance, stats, ranges.warn)


def check_actions(robot: Robot, actions: np.ndarray, ranges: Ranges) -> tuple[np.ndarray, list[str]]:
    """Returns actions (A, Js) in robot space within the robot's lower and upper limits, and what is to be said of them.

    Raises:
        RangeError: they are beyond them, and that is to be refused.
    """
    lower, upper, *_ = robot.action_limits.arrays(actions.shape[1])
    inside = np.clip(actions, lower, upper).astype(np.float32)
    by = np.abs(actions - inside).max(0)
    far = np.flatnonzero(by > 1e-4 * np.maximum(1.0, np.abs(inside).max(0)))
    if not len(far):
        return inside, []
    dims = ", ".join(f"{robot.robot_action_names[i]} (by {by[i]:.3g})" for i in far)
    if ranges.beyond_limits == "refuse":
        raise RangeError(f"robot {robot.name!r}: actions beyond its limits in {dims}")
    return inside, [f"actions were cut at the robot's limits in {dims}"]


class Watched:
    """The pictures of one session: which cameras show nothing, or always the same."""

    def __init__(self, frozen: int) -> None:
        self._frozen = frozen
        self._seen: dict[str, tuple[int, int]] = {}  # by camera: checksum, and in how many requests it was that
        self._state: bytes | None = None

    def look(self, pictures: dict[str, np.ndarray], state: np.ndarray) -> list[str]:
        """Returns what is to be said of the pictures of one more request, by camera."""
        moved, self._state = state.tobytes() != self._state, state.tobytes()
        sentences = []
        for name, picture in pictures.items():
            if not picture.any():
                sentences.append(f"camera {name!r} is all black")
            elif picture.min() == picture.max():
                sentences.append(f"camera {name!r} shows one colour")
            checksum = zlib.adler32(np.ascontiguousarray(picture).data)
            before, times = self._seen.get(name, (None, 0))
            times = times + moved if checksum == before else 1
            self._seen[name] = (checksum, times)
            if times >= self._frozen:
                sentences.append(f"camera {name!r} has not changed in {times} requests, while the state did")
        return sentences
