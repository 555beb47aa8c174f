"""One ViperX 300 6DOF of Trossen Robotics (Interbotix), as one arm of ALOHA is recorded: 50 Hz, radians.

Names of joints, their ranges and their speed of half a turn per second are those of Interbotix'
interbotix_xsarm_descriptions/urdf/aloha_vx300s.urdf.xacro. The gripper is 0 (closed) to 1 (open), between the ends that
ALOHA's code calibrates.
"""

import math

from openpi_like.robots.gripper import Gripper
from openpi_like.robots.lerobot_fields import Pair, gripper, image, joints, lerobot_robot
from openpi_like.robots.limits import Limits

_JOINTS = ("waist", "shoulder", "elbow", "forearm_roll", "wrist_angle", "wrist_rotate")
_LIMITS = Limits(
    tuple(map(math.radians, (-180, -106, -101, -180, -107, -180))),
    tuple(map(math.radians, (180, 72, 92, 180, 128, 180))),
    math.pi,
)


def viperx(side: str = "", start: int = 0) -> tuple[Pair, Pair]:
    """Returns the fields of one arm: six joints and a gripper. side: "left_" or "right_" of two."""
    names = tuple(f"{side}{name}" for name in _JOINTS)
    ends = Gripper(open=1.0, closed=0.0)
    return (
        joints(names, _LIMITS, start=start, field=f"{side}joints"),
        gripper(f"{side}gripper", ends, start=start + 6, field=f"{side}gripper"),
    )


VIPERX = lerobot_robot("viperx", 50, (image("base", "cam_high"), image("wrist", "cam_wrist")), *viperx())
