"""Fetch's arm in gymnasium-robotics: Cartesian steps of the hand, which points down, and a gripper effort."""

from openpi_like.robots.robot import ActionField, Camera, Gripper, Robot, StateField

# The state has nothing that a real arm would not know: no object, no goal, which is a red ball in the pictures.
FETCH = Robot(
    name="fetch",
    cameras=(Camera("base", "observation/image", 64, 64), Camera("wrist", "observation/image_wrist", 64, 64)),
    state=(
        StateField("hand", "observation/state", 3, unit="m"),
        StateField("gripper", "observation/state", 1, start=3, gripper=Gripper(open=1.0, closed=0.0)),
    ),
    action=(
        # Fraction of the longest step that the controller takes (5 cm), per axis.
        ActionField("hand", "action", 3, command="delta"),
        # An effort, not a position: 1 opens, -1 closes.
        ActionField("gripper", "action", 1, start=3, gripper=Gripper(open=1.0, closed=-1.0)),
    ),
    control_hz=25.0,
    action_horizon=8,
    execute_steps=4,
)
