"""UR5e of Universal Robots, in the columns of openpi's example examples/ur5: 20 Hz, radians.

The joints' names, ranges and speed of half a turn per second are those of
Universal_Robots_ROS2_Description/config/ur5e/joint_limits.yaml, which gives no accelerations. The rate, and the gripper
(Robotiq 2F-85, 0 open to 1 closed), are those of the UR5e that pi0 was pretrained with (openpi's docs/norm_stats.md).
"""

import math

from openpi_like.robots.gripper import Gripper
from openpi_like.robots.limits import Limits
from openpi_like.robots.robot import ActionField, Camera, Robot, StateField

_NAMES = (
    "shoulder_pan_joint",
    "shoulder_lift_joint",
    "elbow_joint",
    "wrist_1_joint",
    "wrist_2_joint",
    "wrist_3_joint",
)
_TURN = 2 * math.pi
_LIMITS = Limits(
    (-_TURN, -_TURN, -_TURN / 2, -_TURN, -_TURN, -_TURN), (_TURN, _TURN, _TURN / 2, _TURN, _TURN, _TURN), _TURN / 2
)
_GRIPPER, _GRIPPER_LIMITS = Gripper(open=0.0, closed=1.0), Limits(0.0, 1.0)

UR5E = Robot(
    name="ur5e",
    cameras=(Camera("base", "image"), Camera("wrist", "wrist_image")),
    state=(
        StateField("joints", "joints", 6, unit="rad", names=_NAMES, limits=_LIMITS),
        StateField("gripper", "gripper", 1, gripper=_GRIPPER, names=("gripper",), limits=_GRIPPER_LIMITS),
    ),
    action=(
        ActionField("joints", "actions", 6, unit="rad", names=_NAMES, limits=_LIMITS, relative_to="joints"),
        ActionField("gripper", "actions", 1, start=6, gripper=_GRIPPER, names=("gripper",), limits=_GRIPPER_LIMITS),
    ),
    control_hz=20.0,
    action_horizon=20,
    execute_steps=10,
    normalization="quantile",
    language_key="task",
)
