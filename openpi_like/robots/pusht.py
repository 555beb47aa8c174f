"""PushT: a disc pushes a T-shaped block onto a target, in the plane (gym-pusht)."""

from openpi_like.robots.robot import ActionField, Camera, Robot, StateField

# Positions are pixels of the simulator's 512 x 512 world, x to the right and y down, whatever size images have.
PUSHT = Robot(
    name="pusht",
    cameras=(Camera("base", "observation/image", 96, 96),),
    state=(StateField("disc", "observation/state", 2, unit="px"),),
    action=(ActionField("disc", "action", 2, unit="px", relative_to="disc"),),
    control_hz=10.0,
    action_horizon=8,
    execute_steps=4,
)
