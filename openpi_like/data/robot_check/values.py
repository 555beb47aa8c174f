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
        for field in robot.action:
            if field.name in sample.commands and field.gripper is None:
                found += _cut(f"action {field.name}", sample.commands[field.name], field.command, field.unit)
        return found


def _constant(about: str, x: np.ndarray) -> list[Finding]:
    trap = traps.constant_dims(about, bounds(x), len(x))
    return [] if trap is None else [Finding("found", about, f"constant: {trap.found}", trap.advice)]


def _cut(about: str, x: np.ndarray, command: str, unit: str) -> list[Finding]:
    """Commands at both ends of a range around 0: of changes and rates, whose ends are those of a controller or a cut.

    Targets rest at the ends of a movement, so theirs say nothing.
    """
    if command == "absolute":
        return []
    low, high = bounds(x)
    span = high - low
    tolerance = 1e-4 * span
    share = np.minimum((x <= low + tolerance).mean(axis=0), (x >= high - tolerance).mean(axis=0))
    distinct = np.array([len(np.unique(column)) for column in x.T])
    cut = (share >= _CUT / 2) & (np.abs(low + high) <= _SYMMETRIC * span) & (distinct >= _DISTINCT)
    if not cut.any():
        return []
    shown = ", ".join(
        f"[{d}] {((x[:, d] <= low[d] + tolerance[d]) | (x[:, d] >= high[d] - tolerance[d])).mean():.0%} at "
        f"{low[d]:.4g} or {high[d]:.4g}"
        for d in np.flatnonzero(cut)
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
