"""How far states, pictures and actions are from what a checkpoint has seen; and what becomes of those that are."""

import dataclasses
import zlib
from typing import Literal

import numpy as np
from jaxtyping import Float

from openpi_like.data.normalize import FieldStats, Normalization
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


class Span:
    """What was seen of a field in training, and how far numbers are beyond it."""

    def __init__(self, stats: FieldStats) -> None:
        """Where nothing varied, the unit is the size of the number itself, or 1 where that is less."""
        self._names, self._low, self._high = stats.names, np.array(stats.min), np.array(stats.max)
        width = self._high - self._low
        self._unit = np.where(width > 1e-6, width, np.maximum(1.0, np.abs(self._high)))

    def beyond(self, values: Float[np.ndarray, "*batch T D"]) -> Float[np.ndarray, "*batch D"]:
        """Returns how far steps in model space are beyond what was seen, in units of its range: the farthest of T."""
        distance = np.maximum(values - self._high, self._low - values).max(-2)
        return np.maximum(distance, 0.0) / self._unit

    def said(self, what: str, distance: Float[np.ndarray, " D"], warn: float) -> list[str]:
        """Returns a sentence about the dims that are farther than `warn`, or none."""
        if not (distance > warn).any():
            return []
        far = np.flatnonzero(distance > warn)
        worst = sorted(far, key=lambda i: -distance[i])[:5]
        dims = ", ".join(f"{self._names[i]} ({distance[i]:.2g} times its range)" for i in worst)
        return [f"{what} is beyond the training data in {len(far)} of {len(distance)} dims: {dims}"]


class RobotRanges:
    """What a robot's states and actions are held against, worked out once."""

    def __init__(self, robot: Robot, normalization: Normalization, ranges: Ranges) -> None:
        self._robot, self._ranges, self._normalization = robot, ranges, normalization
        self._state, self._action = Span(normalization.state), Span(normalization.action)
        self._lower, self._upper, *_ = robot.action_limits.arrays(robot.robot_action_size)

    def check_state(self, encoded: Float[np.ndarray, " De"]) -> list[str]:
        """Returns what is to be said of a state in model space.

        Raises:
            RangeError: it is farther than `ranges.refuse`.
        """
        distance, refuse = self._state.beyond(encoded[None]), self._ranges.refuse
        if refuse is not None and distance.max(initial=0.0) > refuse:
            (sentence,) = self._state.said("state", distance, refuse)
            raise RangeError(
                f"robot {self._robot.name!r}: {sentence}; refused beyond {refuse:g}, check units and order"
            )
        return self._state.said("state", distance, self._ranges.warn)

    def check_actions(
        self, encoded: Float[np.ndarray, "B A J"], actions: Float[np.ndarray, "B A Js"]
    ) -> list[tuple[np.ndarray, list[str]] | RangeError]:
        """Returns each chunk within the robot's lower and upper limits, and what is to be said of it; or the error that
        it is beyond them, where that is to be refused.

        encoded: the same chunks in model space. actions: in robot space.
        """
        inside = np.clip(actions, self._lower, self._upper).astype(np.float32)
        cut = np.abs(actions - inside).max(1)
        far = cut > 1e-4 * np.maximum(1.0, np.abs(inside).max(1))
        rows = self._normalization.statistics_rows(encoded)
        distances = self._action.beyond(rows.reshape(len(encoded), -1, rows.shape[-1]))
        return [self._said(*row) for row in zip(inside, cut, far, distances, strict=True)]

    def _said(
        self, inside: np.ndarray, cut: np.ndarray, far: np.ndarray, distance: np.ndarray
    ) -> tuple[np.ndarray, list[str]] | RangeError:
        sentences = self._action.said("actions", distance, self._ranges.warn)
        if not far.any():
            return inside, sentences
        dims = ", ".join(f"{self._robot.robot_action_names[i]} (by {cut[i]:.3g})" for i in np.flatnonzero(far))
        if self._ranges.beyond_limits == "refuse":
            return RangeError(f"robot {self._robot.name!r}: actions beyond its limits in {dims}")
        return inside, [*sentences, f"actions were cut at the robot's limits in {dims}"]


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
            if picture.min() == (most := picture.max()):
                shows = "shows one colour" if most else "is all black"
                sentences.append(f"camera {name!r} {shows}")
            checksum = zlib.adler32(np.ascontiguousarray(picture).data)
            before, times = self._seen.get(name, (None, 0))
            times = times + moved if checksum == before else 1
            self._seen[name] = (checksum, times)
            if times >= self._frozen:
                sentences.append(f"camera {name!r} has not changed in {times} requests, while the state did")
        return sentences
