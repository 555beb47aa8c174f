"""ALOHA: two ViperX 300 arms on one table, joint position control (gym-aloha's model)."""

from openpi_like.robots.gripper import Gripper
from openpi_like.robots.robot import ActionField, Camera, Robot, StateField

_GRIPPER = Gripper(open=1.0, closed=0.0)

# Per arm: waist, shoulder, elbow, forearm roll, wrist angle, wrist rotation, gripper.
ALOHA = Robot(
    name="aloha",
    cameras=(
        Camera("base", "observation/image_top", 64, 64),
        Camera("wrist_right", "observation/image_right_wrist", 64, 64),
    ),
    state=(
        StateField("left_joints", "observation/state", 6, unit="rad"),
        StateField("left_gripper", "observation/state", 1, start=6, gripper=_GRIPPER),
        StateField("right_joints", "observation/state", 6, start=7, unit="rad"),
        StateField("right_gripper", "observation/state", 1, start=13, gripper=_GRIPPER),
    ),
    action=(
        ActionField("left_joints", "action", 6, unit="rad", relative_to="left_joints"),
        ActionField("left_gripper", "action", 1, start=6, gripper=_GRIPPER),
        ActionField("right_joints", "action", 6, start=7, unit="rad", relative_to="right_joints"),
        ActionField("right_gripper", "action", 1, start=13, gripper=_GRIPPER),
    ),
    control_hz=50.0,
    action_horizon=20,
    execute_steps=10,
)
