"""Waypoints as plain text digits: `[(x1,y1),...,(xA,yA)]` in metres with two decimals, as language planners write them
(OpenDriveVLA, Zhou et al. 2025, arXiv 2503.23463, section 3.5; GPT-Driver, Mao et al. 2023, arXiv 2310.01415).

What a model wrote is read strictly: a point is taken as it stands in the text or not at all, and a plan that is not
whole is said to be so. Published parsers repair digits and repeat the last point until there are enough, which is a
motion that nobody chose.
"""

import dataclasses
import re

import numpy as np
from jaxtyping import Float

BEGIN, END = "<traj_start>", "<traj_end>"
MOST_M = 1000.0
"""A coordinate beyond this, in metres, is no waypoint of three seconds."""
CHARACTERS = "0123456789-.,()[]"
"""All that `format_waypoints` writes with."""

_LIST = re.compile(r"\[(?=\s*\()", re.ASCII)
_NUMBER = r"[+-]?[0-9]{1,6}(?:\.[0-9]{1,9})?"
_PAIR = re.compile(rf"\(\s*({_NUMBER})\s*,\s*({_NUMBER})\s*\)", re.ASCII)
_POINT = re.compile(rf"\s*{_PAIR.pattern}\s*", re.ASCII)
_SHOWN = 24  # characters of what is no point


@dataclasses.dataclass(frozen=True)
class Parsed:
    """What a text says. points: (n, 2) metres, those before the first thing that is none. problems: why it is not the
    plan that was asked for; empty where it is."""

    points: Float[np.ndarray, "n 2"]
    problems: tuple[str, ...] = ()

    @property
    def whole(self) -> bool:
        """Whether this is the plan that was asked for."""
        return not self.problems


def format_waypoints(points_A2: Float[np.ndarray, "A 2"]) -> str:
    """Returns waypoints as text; what `parse_waypoints` reads of it is at most 5 mm away. What is rounded to zero has
    no sign.

    Raises:
        ValueError: coordinates that are not finite, or farther than `MOST_M`.
    """
    if points_A2.ndim != 2 or points_A2.shape[1] != 2:
        raise ValueError(f"waypoints of shape {points_A2.shape}, expected (A, 2)")
    wrong = ~(np.abs(points_A2) <= MOST_M)
    if wrong.any():
        step, axis = (int(i) for i in np.argwhere(wrong)[0])
        raise ValueError(
            f"waypoint {step} has {'xy'[axis]}={points_A2[step, axis]}, expected metres within {MOST_M:g}; check units "
            "and frame"
        )
    return "[" + ",".join(f"({x:z.2f},{y:z.2f})" for x, y in points_A2.tolist()) + "]"


def parse_waypoints(text: str, count: int) -> Parsed:
    """Returns the waypoints that a text holds; never raises, and never returns a point that the text does not have.

    The list is the one behind `<traj_start>`, or else the only one there is; before it there may be other words. Spaces
    may be anywhere but inside of numbers.

    Args:
        text: as a model wrote it.
        count: A, how many points a plan has.
    """
    before, marked, behind = text.rpartition(BEGIN)
    behind = behind.partition(END)[0]
    lists = list(_LIST.finditer(behind))
    if not lists:
        return Parsed(np.zeros((0, 2)), (f"no list of points [(x,y),...] in {_shown(behind)}",))
    points, problems, at = list[tuple[float, float]](), list[str](), lists[0].end()
    if len(lists) > 1:
        problems.append(f"{len(lists)} lists of points, expected one; the first is read")
    if BEGIN in before:
        problems.append(f"{before.count(BEGIN) + 1} times {BEGIN}, expected once; what is behind the last is read")
    while True:
        found = _POINT.match(behind, at)
        if found is None:
            problems.append(f"point {len(points)}: got {_shown(behind[at:])}, expected (x,y) in metres")
            break
        x, y = (float(number) for number in found.groups())
        if max(abs(x), abs(y)) > MOST_M:
            problems.append(f"point {len(points)}: ({x:g},{y:g}) is farther than {MOST_M:g} m")
            break
        points.append((x, y))
        at = found.end() + 1
        mark = behind[found.end() : at]
        if mark == "]":
            rest = behind[at:]
            if (rest.strip() and marked) or _PAIR.search(rest):  # without marks other words may follow
                problems.append(f"behind the list: got {_shown(rest)}, expected its end")
            break
        if mark != ",":
            problems.append(f"after point {len(points) - 1}: got {_shown(behind[found.end() :])}, expected , or ]")
            break
    if len(points) != count:
        problems.append(f"{len(points)} points, expected {count}")
    return Parsed(np.array(points, np.float64).reshape(-1, 2), tuple(problems))


def _shown(text: str) -> str:
    return repr(text[:_SHOWN] + ("..." if len(text) > _SHOWN else "")) if text else "nothing"
