"""Franka arm of the DROID platform, in the columns of the dataset lerobot/droid_1.0.1: 15 Hz, radians.

The columns are those of lerobot/examples/port_datasets/port_droid.py. The gripper (Robotiq 2F-85) is 0 open, 1 closed.
DROID's arms are Franka Emika Robots (Panda). Ranges, speeds and accelerations are those of Franka's documentation
(source/control-parameters-joint-panda.csv and -fr3.csv): where the robot stops, not what is advisable.

FRANKA_DROID commands joint positions (the column `action`), FRANKA_DROID_VELOCITY the joint velocities that openpi
trains on, where 1 is 0.2 rad in a step (droid/robot_ik/robot_ik_solver.py). FR3_DROID is the same platform with a
Franka Research 3. The RLDS release is `oxe:DROID` and `oxe:DROID_JOINTS`.
"""

import dataclasses

from openpi_like.robots.gripper import Gripper
from openpi_like.robots.lerobot_fields import gripper, image, joints, lerobot_robot
from openpi_like.robots.limits import Limits
from openpi_like.robots.robot import ActionField

PANDA_LIMITS = Limits(
    (-2.8973, -1.7628, -2.8973, -3.0718, -2.8973, -0.0175, -2.8973),
    (2.8973, 1.7628, 2.8973, -0.0698, 2.8973, 3.7525, 2.8973),
    (2.175, 2.175, 2.175, 2.175, 2.61, 2.61, 2.61),
    (15.0, 7.5, 10.0, 12.5, 15.0, 20.0, 20.0),
)
FR3_LIMITS = Limits(
    (-2.7437, -1.7837, -2.9007, -3.0421, -2.8065, 0.5445, -3.0159),
    (2.7437, 1.7837, 2.9007, -0.1518, 2.8065, 4.5169, 3.0159),
    (2.62, 2.62, 2.62, 2.62, 5.26, 4.18, 5.26),
    10.0,
)
_JOINTS = tuple(f"joint_{i}" for i in range(7))
_CAMERAS = (image("base", "exterior_1_left"), image("base_1", "exterior_2_left"), image("wrist", "wrist_left"))
_GRIPPER = gripper("gripper", Gripper(open=0.0, closed=1.0), start=7)

FRANKA_DROID = dataclasses.replace(
    lerobot_robot("franka_droid", 15, _CAMERAS, joints(_JOINTS, PANDA_LIMITS), _GRIPPER),
    language_alternatives=("language_instruction_2", "language_instruction_3"),
)
FRANKA_DROID_VELOCITY = dataclasses.replace(
    FRANKA_DROID,
    name="franka_droid_velocity",
    action=(
        ActionField("joints", "action.joint_velocity", 7, command="velocity", names=_JOINTS, limits=Limits(-1.0, 1.0)),
        dataclasses.replace(_GRIPPER[1], key="action.gripper_position", start=0),
    ),
)
FR3_DROID = lerobot_robot("fr3_droid", 15, _CAMERAS, joints(_JOINTS, FR3_LIMITS), _GRIPPER)
