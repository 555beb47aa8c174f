"""Are the numbers finite, in a sensible range, and not cut?"""

import dataclasses

import numpy as np

from openpi_like.data import traps
from openpi_like.data.episode_sample import bounds
from openpi_like.data.robot_check.findings import Finding
from openpi_like.data.robot_check.robot_sample import RobotSample
from openpi_like.data.step_values import describe_not_finite

_SYMMETRIC = 0.01  # of the range: ends that differ by less in size are those of a cut
_CUT = 0.05  # of the steps at an end and at its opposite: chance puts a step or two there
_NAMED = 0.01  # of the steps at an end: fewer are not worth a line
_STUCK = 0.05  # of the steps at an end of a position in the midst of episodes: in many, real ones have none
_VISITS = 5  # of an end in the midst of episodes: the turning point of a single one is not cut
_DISTINCT = 20  # values: fewer are levels, not a range


@dataclasses.dataclass(frozen=True)
class Values:
    """See the module."""

    name: str = "Values"
    question: str = "Are all numbers finite and in a sensible range? How many are cut at an end of it?"

    def findings(self, sample: RobotSample) -> list[Finding]:
        """See `Check.findings`."""
        robot, found = sample.robot, []
        if len(sample.not_finite):
            for what, fields in (("state", robot.state), ("action", robot.action)):
                if lines := describe_not_finite(sample.index, fields, sample.not_finite, f"{what} field "):
                    found.append(
                        Finding(
                            "error",
                            what,
                            f"{len(sample.not_finite)} of {sample.index.steps} steps have values that are not finite "
                            "or no rotation: " + "; ".join(lines),
                            "repair these episodes, or set skip_not_finite in the selection to leave the steps out",
                        )
                    )
        for what, fields, values in (("state", robot.state, sample.states), ("action", robot.action, sample.commands)):
            for field in fields:
                if field.name not in values:
                    continue
                about, x = f"{what} {field.name}", values[field.name]
                if field.gripper is None and field.rotation is None:
                    found += Finding.of_trap(traps.outliers(field.key, x, bounds(x)), about)
                found += _constant(about, x)
        for state in robot.state:
            if state.gripper is None:
                found += _stuck(f"state {state.name}", sample.states[state.name], sample)
        for field in robot.action:
            if field.name in sample.commands and field.gripper is None:
                about, x = f"action {field.name}", sample.commands[field.name]
                if field.command == "absolute":
                    found += _stuck(about, x, sample)
                else:
                    found += _cut(about, x, field.unit)
        return found


def _constant(about: str, x: np.ndarray) -> list[Finding]:
    trap = traps.constant_dims(about, bounds(x), len(x))
    return [] if trap is None else [Finding("found", about, f"constant: {trap.found}", trap.advice)]


def _at_ends(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns which values (n, D) are at the least and which at the greatest of their dim; of levels, none."""
    low, high = bounds(x)
    tolerance = 1e-4 * (high - low)
    ranges = np.array([len(np.unique(column)) >= _DISTINCT for column in x.T])
    return (x <= low + tolerance) & ranges, (x >= high - tolerance) & ranges


def _stuck(about: str, x: np.ndarray, sample: RobotSample) -> list[Finding]:
    """Positions, and targets, at the very end of their range, again and again.

    Episodes begin and end at rest, which may be at an end of the range, so what is at one from the first step on or to
    the last is not suspected.
    """
    at_low, at_high = _at_ends(x)
    at = at_low | at_high
    midst = at.copy()
    for e in range(len(sample.lengths)):
        part = at[sample.episode(e)]
        rests = np.logical_and.accumulate(part) | np.logical_and.accumulate(part[::-1])[::-1]
        midst[sample.episode(e)] &= ~rests
    share, stuck = at.mean(axis=0), midst.mean(axis=0)
    visits = (midst[1:] & ~midst[:-1]).sum(axis=0)
    low, high = bounds(x)
    shown = ", ".join(
        f"[{d}] {share[d]:.1%} at {low[d]:.4g} or {high[d]:.4g}, {stuck[d]:.1%} in the midst of an episode"
        for d in np.flatnonzero(share >= _NAMED)
    )
    if not shown:
        return []
    if not ((stuck >= _STUCK) & (visits >= _VISITS)).any():
        return [Finding("found", about, f"at an end of the range: {shown}")]
    return [
        Finding(
            "suspect",
            about,
            f"saturated: {shown}",
            "a sensor, a calibration or a controller cuts it there: record what lies beyond, or declare the ends as "
            "limits",
        )
    ]


def _cut(about: str, x: np.ndarray, unit: str) -> list[Finding]:
    """Changes and rates at both ends of a range around 0, which are those of a controller or a cut."""
    at_low, at_high = _at_ends(x)
    low, high = bounds(x)
    share = np.minimum(at_low.mean(axis=0), at_high.mean(axis=0))
    cut = (share >= _CUT / 2) & (np.abs(low + high) <= _SYMMETRIC * (high - low))
    if not cut.any():
        return []
    shown = ", ".join(
        f"[{d}] {(at_low | at_high)[:, d].mean():.0%} at {low[d]:.4g} or {high[d]:.4g}" for d in np.flatnonzero(cut)
    )
    if unit == "1":  # a fraction of what a controller does at most, which is its own business
        return [Finding("found", about, f"at an end of the range: {shown}")]
    return [
        Finding(
            "suspect",
            about,
            f"cut: {shown}",
            "the policy never sees what was asked for beyond these; record commands before they are cut, or declare "
            "the ends as limits",
        )
    ]
