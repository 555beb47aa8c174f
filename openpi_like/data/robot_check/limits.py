"""Do the data stay within the limits that the robot declares?"""

import dataclasses

import numpy as np

from openpi_like.data.robot_check.findings import Finding
from openpi_like.data.robot_check.robot_sample import RobotSample
from openpi_like.robots.robot import ActionField, StateField

_OFTEN = 0.01  # of the steps: glitches of a sensor, and differences of noisy positions, are rarer
_TAIL = 0.001  # of the steps are left out where limits are proposed


@dataclasses.dataclass(frozen=True)
class LimitsKept:
    """See the module."""

    name: str = "Limits"
    question: str = "Do states and commands stay within the declared limits? Where none are declared, what is reached?"

    def findings(self, sample: RobotSample) -> list[Finding]:
        """See `Check.findings`."""
        found = []
        for f in sample.robot.state:
            found += _beyond(f"state {f.name}", f, sample.states[f.name], "absolute", sample)
        for f in sample.robot.action:
            if f.name in sample.commands:
                found += _beyond(f"action {f.name}", f, sample.commands[f.name], f.command, sample)
        return found


def _beyond(about: str, field: StateField, x: np.ndarray, command: str, sample: RobotSample) -> list[Finding]:
    if field.limits is None:
        if not isinstance(field, ActionField) or field.gripper is not None or field.rotation is not None:
            return []
        reached = ", ".join(f"{a:.3g} .. {b:.3g}" for a, b in np.quantile(x, [_TAIL, 1 - _TAIL], axis=0).T)
        return [
            Finding(
                "found",
                about,
                f"no limits declared; the data reach {reached}",
                "with limits=Limits(lower=, upper=, velocity=) a server can refuse or cut what the robot must not do",
            )
        ]
    parts = [field.limits.excess(x[sample.episode(e)], sample.hz, command) for e in range(len(sample.lengths))]
    often, seldom = list[str](), list[str]()
    bounds = dict(zip(parts[0], field.limits.arrays(field.size), strict=True))
    for kind, bound in bounds.items():
        by = np.concatenate([part[kind] for part in parts])
        for d in np.flatnonzero((by > 0).any(axis=0)):
            share = float((by[:, d] > 0).mean())
            far = f"by up to {by[:, d].max():.3g} in {share:.2%} of the steps"
            line = f"{field.dim_names[d]} {kind} {bound[d]:.4g} {far}"
            (often if share > _OFTEN else seldom).append(line)
    if often:
        return [
            Finding(
                "suspect",
                about,
                "beyond its limits: " + "; ".join(often + seldom),
                "look at unit, start and rate; if these are right, the limits are too narrow",
            )
        ]
    if seldom:
        return [Finding("found", about, "seldom beyond its limits: " + "; ".join(seldom))]
    return [Finding("found", about, "within its limits")]
