"""WidowX AI of Trossen Robotics, as its plugin lerobot_trossen records it: 30 Hz, radians, fingers in metres.

Names are those of `widowxai_follower_robot` and `bi_widowxai_follower_robot`. Ranges and speeds, also of the fingers
(0 closed, 44 mm open), are those of trossen_arm_description/urdf/generated/wxai/wxai_follower.urdf. Cameras are named
as in many public recordings.

WXAI is one arm, WXAI_STATIONARY the two of Trossen AI Stationary.
"""

import math

from openpi_like.robots.gripper import Gripper
from openpi_like.robots.lerobot_fields import Pair, gripper, image, joints, lerobot_robot
from openpi_like.robots.limits import Limits

_TURN = math.pi
_LIMITS = Limits(
    (-3.05433, 0.0, 0.0, -_TURN / 2, -_TURN / 2, -_TURN),
    (3.05433, _TURN, 0.75 * _TURN, _TURN / 2, _TURN / 2, _TURN),
    (3.375, 3.375, 3.375, 7.0, 7.0, 7.0),
)
_FINGERS = Gripper(open=0.044, closed=0.0)


def _arm(side: str = "", start: int = 0) -> tuple[Pair, Pair]:
    names = tuple(f"{side}joint_{i}.pos" for i in range(6))
    finger = f"{side}left_carriage_joint.pos"
    return (
        joints(names, _LIMITS, start=start, field=f"{side}joints"),
        gripper(finger, _FINGERS, start=start + 6, field=f"{side}gripper", unit="m", velocity=0.0875),
    )


WXAI = lerobot_robot("wxai", 30, (image("base", "cam_main"), image("wrist", "cam_wrist")), *_arm())

WXAI_STATIONARY = lerobot_robot(
    "wxai_stationary",
    30,
    (image("base", "top"), image("base_1", "bottom"), image("wrist_left", "left"), image("wrist_right", "right")),
    *_arm("left_"),
    *_arm("right_", start=7),
)
