"""Fetch's arm in Meta-World's scenes: Cartesian steps of the hand in the robot's own frame, and a gripper effort."""

from openpi_like.robots.gripper import Gripper
from openpi_like.robots.robot import ActionField, Camera, Robot, StateField

# Axes are to the front, to the left and up, from a point on the table's level in the middle of the robot.
METAWORLD_FETCH = Robot(
    name="metaworld_fetch",
    cameras=(Camera("base", "observation/image", 64, 64),),
    state=(
        StateField("hand", "observation/state", 3, unit="m"),
        StateField("gripper", "observation/state", 1, start=3, gripper=Gripper(open=1.0, closed=0.0)),
    ),
    action=(
        # Fraction of the longest step that the controller takes, per axis.
        ActionField("hand", "action", 3, command="delta"),
        # An effort, not a position: 1 opens, -1 closes, as in gymnasium-robotics.
        ActionField("gripper", "action", 1, start=3, gripper=Gripper(open=1.0, closed=-1.0)),
    ),
    control_hz=20.0,
    action_horizon=8,
    execute_steps=2,
)
