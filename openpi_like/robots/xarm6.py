"""xArm 6 of UFACTORY, as its plugin lerobot_robot_ufactory records it in joint space.

Conventions and sources are those of `xarm7`, ranges those of the SDK's XARM6_X4.
"""

import math

from openpi_like.robots.gripper import Gripper
from openpi_like.robots.lerobot_fields import gripper, image, joints, lerobot_robot
from openpi_like.robots.limits import Limits

_TURN = 2 * math.pi

XARM6 = lerobot_robot(
    "xarm6",
    30,
    (image("base", "overhead"), image("wrist", "wrist")),
    joints(
        tuple(f"J{i}.pos" for i in range(1, 7)),
        Limits(
            (-_TURN, -2.059488, -3.92699, -_TURN, -1.692969, -_TURN),
            (_TURN, 2.094395, 0.191986, _TURN, math.pi, _TURN),
            math.pi,
            20.0,
        ),
    ),
    gripper("gripper.pos", Gripper(open=0.0, closed=1.0), start=6),
)
