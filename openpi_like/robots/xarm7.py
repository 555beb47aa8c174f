"""xArm 7 of UFACTORY, as its plugin lerobot_robot_ufactory records it in joint space: 30 Hz, radians.

Names are those of its `uf::robot`; the gripper is 0 (open) to 1 (closed), whichever of the supported ones it is. Ranges
are those of xArm-Python-SDK/xarm/core/config/x_config.py (XARM7_X4), the greatest acceleration that of its
xarm/x3/base.py; the speed of half a turn per second is that of xarm_ros2's URDF. Name your cameras as you record them.
"""

import math

from openpi_like.robots.gripper import Gripper
from openpi_like.robots.lerobot_fields import gripper, image, joints, lerobot_robot
from openpi_like.robots.limits import Limits

_TURN = 2 * math.pi

XARM7 = lerobot_robot(
    "xarm7",
    30,
    (image("base", "overhead"), image("wrist", "wrist")),
    joints(
        tuple(f"J{i}.pos" for i in range(1, 8)),
        Limits(
            (-_TURN, -2.059488, -_TURN, -0.191986, -_TURN, -1.692969, -_TURN),
            (_TURN, 2.094395, _TURN, 3.92699, _TURN, math.pi, _TURN),
            math.pi,
            20.0,
        ),
    ),
    gripper("gripper.pos", Gripper(open=0.0, closed=1.0), start=7),
)
