"""Sawyer arm of Meta-World: Cartesian steps of the hand, and a gripper effort."""

from openpi_like.robots.gripper import Gripper
from openpi_like.robots.robot import ActionField, Camera, Robot, StateField

# The state has nothing that a real arm would not know: no object poses, no goal.
SAWYER = Robot(
    name="sawyer",
    cameras=(Camera("base", "observation/image", 64, 64),),
    state=(
        StateField("hand", "observation/state", 3, unit="m"),
        StateField("gripper", "observation/state", 1, start=3, gripper=Gripper(open=1.0, closed=0.0)),
    ),
    action=(
        # Fraction of the longest step that the controller takes, per axis.
        ActionField("hand", "action", 3, command="delta"),
        # An effort, not a position: -1 opens, 1 closes.
        ActionField("gripper", "action", 1, start=3, gripper=Gripper(open=-1.0, closed=1.0)),
    ),
    control_hz=20.0,
    action_horizon=8,
    execute_steps=2,
)
