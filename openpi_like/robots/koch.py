"""Koch v1.1, as LeRobot's `koch_follower` records it: 30 Hz, -100 to 100 over the range that was calibrated.

Names, units and the gripper's 0 (closed) to 100 (open) are those of lerobot/robots/koch_follower. Two motors are
calibrated over a full turn, so their speeds are known in these units: those without load of an XL430-W250 at 12 V
(61 rev/min, `shoulder_pan`) and an XL330-M288 at 5 V (103 rev/min, `wrist_roll`), from ROBOTIS' e-manual.
"""

from openpi_like.robots.gripper import Gripper
from openpi_like.robots.lerobot_fields import gripper, image, joints, lerobot_robot
from openpi_like.robots.limits import Limits

_NAMES = ("shoulder_pan.pos", "shoulder_lift.pos", "elbow_flex.pos", "wrist_flex.pos", "wrist_roll.pos")
_TURN = 200.0  # units of a full turn

KOCH = lerobot_robot(
    "koch",
    30,
    (image("base", "front"), image("wrist", "wrist")),
    joints(_NAMES, Limits(-100.0, 100.0, (61 / 60 * _TURN, None, None, None, 103 / 60 * _TURN)), unit="1"),
    gripper("gripper.pos", Gripper(open=100.0, closed=0.0), start=5),
)
