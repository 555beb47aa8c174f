"""Does the rate fit, and do steps come regularly?"""

import dataclasses

import numpy as np

from openpi_like.data.dataset_check import same_rate
from openpi_like.data.robot_check.findings import Finding
from openpi_like.data.robot_check.robot_sample import LATE, RobotSample

_MISSING = 0.01  # of the steps: a frame lost now and then is usual


@dataclasses.dataclass(frozen=True)
class Rates:
    """See the module."""

    name: str = "Rate"
    question: str = "Is control_hz (times stride) the rate at which the data were recorded, and is that regular?"

    def findings(self, sample: RobotSample) -> list[Finding]:
        """See `Check.findings`."""
        robot, rate = sample.robot, sample.rate
        said = robot.control_hz * robot.stride
        if rate is None:
            return [
                Finding(
                    "found",
                    "",
                    f"the data do not say their rate; taken as {said:g} Hz, as the robot says",
                    "speeds and lags in seconds rest on it",
                )
            ]
        found = []
        if same_rate(rate.hz, said):
            found.append(Finding("found", "", f"{rate.hz:.4g} steps per second by {rate.source}, as the robot says"))
        else:
            stride = round(rate.hz / robot.control_hz)
            advice = f"set control_hz={rate.hz / robot.stride:.4g}"
            if stride > 1 and same_rate(rate.hz, stride * robot.control_hz):
                advice += f", or keep {robot.control_hz:g} and set stride={stride}"
            found.append(
                Finding(
                    "suspect",
                    "",
                    f"{rate.hz:.4g} steps per second by {rate.source}, but control_hz {robot.control_hz:g} times "
                    f"stride {robot.stride} is {said:g}",
                    advice,
                )
            )
        if rate.gaps is not None:
            usual = float(np.median(rate.gaps))
            late = float((rate.gaps > LATE * usual).mean())
            shown = f"{late:.1%} of the steps come more than {LATE:g} times as late as usual, {rate.gaps.max():.3g} s"
            if late > _MISSING:
                found.append(
                    Finding("suspect", "", f"irregular: {shown} at most", "frames were dropped; see which episodes")
                )
            else:
                found.append(Finding("found", "", f"regular: {shown} at most"))
        return found
