"""Arms and hands of a Unitree G1, as unitree_lerobot converts recordings of xr_teleoperate: 30 Hz, radians.

Names and order are those of unitree_lerobot/utils/constants.py; in the right hand of a Dex3 the index finger comes
before the middle finger, in the left one after it. Ranges and speeds are those of
unitree_ros/robots/g1_description/g1_29dof_with_hand_rev_1_0.urdf. A Dex1-1 gripper is the angle of its motor, 0 closed
to 5.4 open (xr_teleoperate). Legs and waist belong to Unitree's own controller.

UNITREE_G1 has Dex3 hands (robot_type Unitree_G1_Dex3), UNITREE_G1_DEX1 grippers (Unitree_G1_Dex1).
"""

from openpi_like.robots.gripper import Gripper
from openpi_like.robots.lerobot_fields import gripper, image, joints, lerobot_robot
from openpi_like.robots.limits import Limits

_ARM = ("ShoulderPitch", "ShoulderRoll", "ShoulderYaw", "Elbow", "WristRoll", "WristPitch", "WristYaw")
_ARM_SPEED = (37.0, 37.0, 37.0, 37.0, 37.0, 22.0, 22.0)
_LEFT_ARM = Limits(
    (-3.0892, -1.5882, -2.618, -1.0472, -1.972222, -1.61443, -1.61443),
    (2.6704, 2.2515, 2.618, 2.0944, 1.972222, 1.61443, 1.61443),
    _ARM_SPEED,
)
_RIGHT_ARM = Limits(
    (-3.0892, -2.2515, -2.618, -1.0472, -1.972222, -1.61443, -1.61443),
    (2.6704, 1.5882, 2.618, 2.0944, 1.972222, 1.61443, 1.61443),
    _ARM_SPEED,
)
_HAND_SPEED = (3.14, 12.0, 12.0, 12.0, 12.0, 12.0, 12.0)
_LEFT_HAND = Limits(
    (-1.047198, -0.610865, 0.0, -1.570796, -1.745329, -1.570796, -1.745329),
    (1.047198, 1.047198, 1.745329, 0.0, 0.0, 0.0, 0.0),
    _HAND_SPEED,
)
_RIGHT_HAND = Limits(
    (-1.047198, -1.047198, -1.745329, 0.0, 0.0, 0.0, 0.0),
    (1.047198, 0.610865, 0.0, 1.570796, 1.745329, 1.570796, 1.745329),
    _HAND_SPEED,
)
_LEFT_FINGERS = ("Thumb0", "Thumb1", "Thumb2", "Middle0", "Middle1", "Index0", "Index1")
_RIGHT_FINGERS = ("Thumb0", "Thumb1", "Thumb2", "Index0", "Index1", "Middle0", "Middle1")
_DEX1 = Gripper(open=5.4, closed=0.0)

_ARMS = (
    joints(tuple(f"kLeft{name}" for name in _ARM), _LEFT_ARM, field="left_joints"),
    joints(tuple(f"kRight{name}" for name in _ARM), _RIGHT_ARM, start=7, field="right_joints"),
)
_CAMERAS = (
    image("base", "cam_left_high"),
    image("base_1", "cam_right_high"),
    image("wrist_left", "cam_left_wrist"),
    image("wrist_right", "cam_right_wrist"),
)

UNITREE_G1 = lerobot_robot(
    "unitree_g1",
    30,
    _CAMERAS,
    *_ARMS,
    joints(tuple(f"kLeftHand{name}" for name in _LEFT_FINGERS), _LEFT_HAND, start=14, field="left_hand"),
    joints(tuple(f"kRightHand{name}" for name in _RIGHT_FINGERS), _RIGHT_HAND, start=21, field="right_hand"),
)
UNITREE_G1_DEX1 = lerobot_robot(
    "unitree_g1_dex1",
    30,
    _CAMERAS,
    *_ARMS,
    gripper("kLeftGripper", _DEX1, start=14, field="left_gripper", unit="rad"),
    gripper("kRightGripper", _DEX1, start=15, field="right_gripper", unit="rad"),
)
