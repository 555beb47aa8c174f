"""What the numbers of a gripper say."""

import dataclasses

import numpy as np
from jaxtyping import Bool, Float

from openpi_like.config import near_names

CONVENTIONS = ("absolute", "trigger", "look_ahead")


@dataclasses.dataclass(frozen=True)
class Gripper:
    """The dataset's values of a fully open and a fully closed gripper. Model space is 1 = open, 0 = closed.

    convention: what a stored value says.
        "absolute": the opening itself, or the one that is wanted. Values between the two stay as they are.
        "trigger": a change. `open` opens, `closed` closes, anything about half way between them leaves the gripper as
            it is. The first trigger of an episode is taken to change something, so before it the gripper is in the
            opposite state; without any trigger it is open.
        "look_ahead": a measured opening that stands in for a command. While it is between open and closed, the command
            is the one of the two that it reaches next; where the episode ends before that, the nearer one.
    """

    open: float
    closed: float
    convention: str = "absolute"

    def __post_init__(self) -> None:
        problems = []
        if self.open == self.closed:
            problems.append(f"open and closed are both {self.open}, expected two different values")
        if self.convention not in CONVENTIONS:
            problems.append(f"convention {self.convention!r} is unknown; {near_names(self.convention, CONVENTIONS)}")
        if problems:
            raise ValueError("gripper: " + "; ".join(problems))

    def opens(self, values: Float[np.ndarray, "N"], first: Bool[np.ndarray, "N"]) -> Bool[np.ndarray, "N"]:
        """Returns whether the command of each step is to be open (or else closed), for derived conventions.

        values: as stored, whole episodes. first: True at the first step of each episode.
        """
        opening = (values.astype(np.float64) - self.closed) / (self.open - self.closed)
        if self.convention == "trigger":
            # octo's thresholds: triggers count from a tenth of full size on
            said = np.select([opening > 0.55, opening < 0.45], [1, 0], -1)
            before, after = _nearest_said(said, first), _nearest_said(said[::-1], _last(first)[::-1])[::-1]
            return np.select([before >= 0, after >= 0], [before == 1, after == 0], True)
        # Bridge's thresholds, as its users have them
        said = np.select([opening > 0.95, opening < 0.05], [1, 0], -1)
        after = _nearest_said(said[::-1], _last(first)[::-1])[::-1]
        return np.where(after >= 0, after == 1, opening >= 0.5)


def _last(first: np.ndarray) -> np.ndarray:
    """True at the last step of each episode."""
    return np.append(first[1:], True)


def _nearest_said(said: np.ndarray, first: np.ndarray) -> np.ndarray:
    """Per step, the last value so far in its episode that is not -1, or -1 where there is none."""
    at = np.arange(len(said))
    latest = np.maximum.accumulate(np.where(said >= 0, at, -1))
    start = np.maximum.accumulate(np.where(first, at, 0))
    return np.where(latest >= start, said[latest], -1)
