"""SO-100 of TheRobotStudio, as LeRobot's `so100_follower` records it: the conventions of `so101`.

Angles are limited to half of the ranges in SO-ARM100/Simulation/SO100/so100.urdf, because LeRobot's zero is the middle.
SO100_NORMALIZED: see `so101`.
"""

import dataclasses

from openpi_like.robots.lerobot_fields import joints, lerobot_robot
from openpi_like.robots.limits import Limits
from openpi_like.robots.so101 import CAMERAS, GRIPPER, NAMES, SO101_NORMALIZED, SPEED

SO100 = lerobot_robot(
    "so100",
    30,
    CAMERAS,
    joints(
        NAMES, Limits((-114.6, -100.3, -90.0, -106.0, -180.0), (114.6, 100.3, 90.0, 106.0, 180.0), SPEED), unit="deg"
    ),
    GRIPPER,
)
SO100_NORMALIZED = dataclasses.replace(SO101_NORMALIZED, name="so100_normalized")
