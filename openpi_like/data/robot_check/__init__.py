"""Checks of a robot's description on its data: what was measured, what looks wrong, and what to change.

A check is an object with a name, a question and `findings`; a new one is a new file with such a class, and a line in
`CHECKS`. Nothing here changes data or robot.
"""

from openpi_like.data.robot_check.cameras import Cameras
from openpi_like.data.robot_check.commands import Commands
from openpi_like.data.robot_check.findings import Check, Curves, Finding, Picture
from openpi_like.data.robot_check.grippers import Grippers
from openpi_like.data.robot_check.language import Language
from openpi_like.data.robot_check.limits import LimitsKept
from openpi_like.data.robot_check.normalized import Normalized
from openpi_like.data.robot_check.rates import Rates
from openpi_like.data.robot_check.replay import Replay
from openpi_like.data.robot_check.robot_sample import RobotSample
from openpi_like.data.robot_check.rotations import Rotations
from openpi_like.data.robot_check.sim_replay import SimReplay
from openpi_like.data.robot_check.units import Units
from openpi_like.data.robot_check.values import Values

__all__ = ["CHECKS", "Check", "Curves", "Finding", "Picture", "RobotSample", "check_robot"]

CHECKS: tuple[Check, ...] = (
    Values(),
    Normalized(),
    Rates(),
    Units(),
    LimitsKept(),
    Grippers(),
    Commands(),
    Rotations(),
    Replay(),
    SimReplay(),
    Language(),
    Cameras(),
)


def check_robot(sample: RobotSample, checks: tuple[Check, ...] = CHECKS) -> dict[str, list[Finding]]:
    """Returns what each check finds, by its name, in order.

    Raises:
        DatasetError: an image cannot be read or decoded, or does not have the size that the robot says; or there is no
            step that a robot normalised by quantiles could be trained on.
    """
    return {check.name: check.findings(sample) for check in checks}
