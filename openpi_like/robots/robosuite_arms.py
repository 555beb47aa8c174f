"""Five arms at one table in robosuite 1.5, each with its own gripper, and all with the same cameras, state and actions.

So a policy that was pretrained on some of them can be fine-tuned to another one, dim by dim. The fields are what
robosuite itself gives and takes: the pose of the point between the fingers in the scene's frame (origin on the floor
below the middle of the table, x away from the robot, z up), and changes of that pose as fractions of the longest step
that its operational space controller takes at 20 Hz, 5 cm and 0.5 rad, as in the data of robomimic and LIBERO.
"""

from openpi_like.robots.oxe_fields import OPENNESS, ROBOSUITE, normalized, pose
from openpi_like.robots.robot import Camera, Robot, StateField


def _arm(name: str) -> Robot:
    return Robot(
        name=f"robosuite_{name}",
        cameras=(Camera("base", "observation/image", 64, 64), Camera("wrist", "observation/image_wrist", 64, 64)),
        state=(
            *pose("observation/state", rotation="quaternion_xyzw"),
            # Share of the full opening: the grippers are of several kinds.
            StateField("gripper", "observation/state", 1, start=7, gripper=OPENNESS),
        ),
        action=normalized(ROBOSUITE),
        control_hz=20.0,
        action_horizon=8,
        execute_steps=4,
    )


PANDA = _arm("panda")
SAWYER = _arm("sawyer")
UR5E = _arm("ur5e")
IIWA = _arm("iiwa")
KINOVA3 = _arm("kinova3")

# name -> robot
ARMS = {robot.name: robot for robot in (PANDA, SAWYER, UR5E, IIWA, KINOVA3)}
