"""Fetch's arm in Meta-World's scenes: Cartesian steps of the hand, and a gripper effort."""

from openpi_like.robots.gripper import Gripper
from openpi_like.robots.robot import ActionField, Camera, Robot, StateField

# Axes are those of the scene: to the right, to the front and up.
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
        # An effort, not a position: 1 opens, -1 closes, as Fetch has it in gymnasium-robotics; Sawyer has the opposite.
        ActionField("gripper", "action", 1, start=3, gripper=Gripper(open=1.0, closed=-1.0)),
    ),
    control_hz=20.0,
    action_horizon=8,
    execute_steps=2,
)
