"""What a check of a robot on its data says."""

import dataclasses
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, UInt8

from openpi_like.data.robot_check.robot_sample import RobotSample
from openpi_like.data.traps import Trap

LEVELS = ("found", "suspect", "error")


@dataclasses.dataclass(frozen=True)
class Curves:
    """Lines over one axis. lines: label -> (x, y), both (n,). x, y: what the axes are."""

    title: str
    lines: dict[str, tuple[Float[np.ndarray, "_"], Float[np.ndarray, "_"]]]
    x: str
    y: str = ""


@dataclasses.dataclass(frozen=True)
class Picture:
    """An image with a line below it."""

    caption: str
    image: UInt8[np.ndarray, "h w 3"]


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing that a check says.

    level: "found" is a measurement, "suspect" says that the robot is probably not described as the data are, "error"
        that the data cannot be used so. about: the field or camera, "" for all. message: what was measured.
    advice: what to change, or to look at. curves, pictures: what the page shows for it.
    """

    level: str
    about: str
    message: str
    advice: str = ""
    curves: tuple[Curves, ...] = ()
    pictures: tuple[Picture, ...] = ()

    def __post_init__(self) -> None:
        if self.level not in LEVELS:
            raise ValueError(f"level {self.level!r}, expected one of {', '.join(LEVELS)}")
        if self.level != "found" and not self.advice:
            raise ValueError(f"{self.level} about {self.about!r} without advice: {self.message}")

    @classmethod
    def of_trap(cls, trap: Trap | None, about: str, advice: str = "") -> "list[Finding]":
        """Returns the suspicion of a `Trap`, if there is one. advice: in place of the trap's, for this robot."""
        return [] if trap is None else [cls("suspect", about, f"{trap.kind}: {trap.found}", advice or trap.advice)]


@runtime_checkable
class Check(Protocol):
    """One subject of a robot's description. name: its heading. question: what it answers, in a line."""

    @property
    def name(self) -> str: ...

    @property
    def question(self) -> str: ...

    def findings(self, sample: RobotSample) -> list[Finding]:
        """Returns what the data of a sample say."""
