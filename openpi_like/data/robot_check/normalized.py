"""Where a robot is normalised by quantiles: how much of what it is trained on lies beyond them, and how far?"""

import dataclasses

import numpy as np

from openpi_like.data.dataset import EpisodeDataset
from openpi_like.data.normalize import FieldStats
from openpi_like.data.robot_check.findings import Finding
from openpi_like.data.robot_check.robot_sample import RobotSample, at_its_rate
from openpi_like.data.selection import Selection
from openpi_like.data.stats import Coverage, compute_coverage, compute_normalization
from openpi_like.robots.robot import StateField

_STEPS = 10_000  # looked at, each with its whole chunk
_FAR = 10.0  # after normalisation, where 98 % lie within -1 to 1: quick arms reach 6


@dataclasses.dataclass(frozen=True)
class Normalized:
    """See the module. In model space, with the statistics that training would compute."""

    name: str = "Normalization"
    question: str = "How much of what the policy learns lies beyond the quantiles by which it is normalised? How far?"

    def findings(self, sample: RobotSample) -> list[Finding]:
        """See `Check.findings`."""
        robot = sample.robot
        if robot.normalization != "quantile":
            return [Finding("found", "", "by mean and standard deviation, so there are no ends to be beyond")]
        dataset = EpisodeDataset(
            sample.index,
            at_its_rate(robot, sample.index),
            frame_stride=-(-sample.index.steps // _STEPS),
            selection=Selection(skip_not_finite=True),
            max_corrupt_fraction=1.0,
        )
        normalization = compute_normalization(dataset)
        state, action = compute_coverage(normalization, dataset)
        return [
            *_beyond("state", robot.state, normalization.state, state),
            *_beyond("action", robot.action, normalization.action, action),
        ]


def _beyond(what: str, fields: tuple[StateField, ...], stats: FieldStats, coverage: Coverage) -> list[Finding]:
    found, first = [], 0
    for field in fields:
        dims = np.arange(first, first + field.model_size)
        first += field.model_size
        shown = ", ".join(
            f"{stats.names[d]} {coverage.outside[d] / coverage.count:.1%}, the farthest {coverage.largest[d]:.3g}"
            for d in dims
        )
        message = f"beyond the quantiles, which become -1 and 1: {shown}"
        if coverage.largest[dims].max() <= _FAR:
            found.append(Finding("found", f"{what} {field.name}", message))
        else:
            advice = (
                "look at these steps: next to them all others are small, and a policy that acts by bins or tanh cuts "
                "them; leave them out (keep_ranges of the selection) if they are glitches"
            )
            found.append(Finding("suspect", f"{what} {field.name}", message, advice))
    return found
