"""WidowX 250 of Bridge V2 (Walke et al. 2023), in the layout of its Open X-Embodiment release."""

from openpi_like.robots.gripper import Gripper
from openpi_like.robots.robot import ActionField, Camera, Robot, StateField

_GRIPPER = Gripper(open=1.0, closed=0.0)

# Angles are stored as roll, pitch, yaw about fixed axes. image_0 is over the shoulder in every episode; the two other
# views move from episode to episode, and where a camera was absent the dataset holds black frames.
WIDOWX = Robot(
    name="widowx",
    cameras=(
        Camera("base", "observation/image_0"),
        Camera("base_1", "observation/image_1"),
        Camera("base_2", "observation/image_2"),
    ),
    state=(
        StateField("hand", "observation/state", 3, unit="m"),
        StateField("hand_rotation", "observation/state", 3, start=3, unit="rad", rotation="rpy"),
        StateField("gripper", "observation/state", 1, start=6, gripper=_GRIPPER),
    ),
    action=(
        ActionField("hand", "action", 3, unit="m", command="delta"),
        ActionField("hand_rotation", "action", 3, start=3, unit="rad", rotation="rpy", command="delta"),
        ActionField("gripper", "action", 1, start=6, gripper=_GRIPPER),
    ),
    control_hz=5.0,
    action_horizon=8,
    execute_steps=4,
)
