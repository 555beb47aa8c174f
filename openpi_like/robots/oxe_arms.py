"""Robots of OXE that are another single arm: WidowX, Jaco, Sawyer, UR5, xArm, Stretch and others, see `oxe`."""

import dataclasses

from openpi_like.robots.oxe_fields import CLOSEDNESS, OPENNESS, TRIGGER, joints, metric, oxe_robot, pose, world_vector
from openpi_like.robots.robot import ActionField, Camera, StateField
from openpi_like.robots.widowx import WIDOWX

# Bridge V2 (the release of RAIL, 256 x 256). What was commanded first in an episode is all but zero (1e-10 to 5e-7, but
# never 0), and what was reached differs from it; so actions are how the state changes, as for octo and openvla. The
# gripper's measured opening takes intermediate values while it moves. A camera that was absent is a black JPEG of 2419
# bytes (691 at 64 x 64, which are the smallest); the flags has_image_* cannot be trusted.
BRIDGE = dataclasses.replace(
    WIDOWX,
    name="bridge",
    cameras=tuple(dataclasses.replace(c, min_bytes=2420) for c in WIDOWX.cameras),
    action=(
        ActionField("hand", "observation/state", 3, unit="m", command="delta", next_step="change"),
        ActionField(
            "hand_rotation",
            "observation/state",
            3,
            start=3,
            unit="rad",
            rotation="rpy",
            command="delta",
            next_step="change",
        ),
        ActionField("gripper", "action", 1, start=6, gripper=dataclasses.replace(OPENNESS, convention="look_ahead")),
    ),
    normalization="quantile",
)

# An outdated part of Bridge in the OXE bucket: one camera of 480 x 640, commands as sent.
BRIDGE_OXE = oxe_robot(
    "bridge_oxe",
    5.0,
    (Camera("base", "observation/image"),),
    (*pose("observation/state"), StateField("gripper", "observation/state", 1, start=6, gripper=OPENNESS)),
    world_vector(ActionField("gripper", "action/open_gripper", 1, gripper=OPENNESS)),
)


# Kinova Jaco 2: no rotation. The pose is a position and a quaternion (the dataset's own README); the gripper is in the
# last two joints.
JACO_PLAY = oxe_robot(
    "jaco_play",
    10.0,
    (Camera("base", "observation/image"), Camera("wrist", "observation/image_wrist")),
    (
        *pose("observation/end_effector_cartesian_pos", rotation="quaternion_xyzw"),
        StateField("fingers", "observation/joint_pos", 2, start=6, unit="rad"),
    ),
    (
        ActionField("hand", "action/world_vector", 3, unit="m", command="delta"),
        ActionField("gripper", "action/gripper_closedness_action", 1, gripper=TRIGGER),
    ),
)

# Sawyer, without any state.
ROBOTURK = oxe_robot(
    "roboturk",
    10.0,
    (Camera("base", "observation/front_rgb"),),
    (),
    world_vector(ActionField("gripper", "action/gripper_closedness_action", 1, gripper=CLOSEDNESS)),
)

# Hello Stretch: velocities, a camera on the gripper (it is no scene view), no state.
NYU_DOOR_OPENING = oxe_robot(
    "nyu_door_opening",
    3.0,
    (Camera("wrist", "observation/image"),),
    (),
    world_vector(ActionField("gripper", "action/gripper_closedness_action", 1, gripper=TRIGGER), "velocity"),
)

# robot_state: joints (6), position (3), quaternion (4), gripper closed, action blocked. The hand's images are BGR.
BERKELEY_AUTOLAB_UR5 = oxe_robot(
    "berkeley_autolab_ur5",
    5.0,
    (Camera("base", "observation/image"), Camera("wrist", "observation/hand_image", channel_order="bgr")),
    (
        *pose("observation/robot_state", start=6, rotation="quaternion_xyzw"),
        StateField("gripper", "observation/robot_state", 1, start=13, gripper=CLOSEDNESS),
    ),
    world_vector(ActionField("gripper", "action/gripper_closedness_action", 1, gripper=TRIGGER)),
)

# xArm. Actions are poses, in units that no source names; the last of eight ends the episode.
UCSD_KITCHEN = oxe_robot(
    "ucsd_kitchen",
    2.0,
    (Camera("base", "observation/image"),),
    (joints("observation/state"),),
    (
        ActionField("hand", "action", 3),
        ActionField("hand_rotation", "action", 3, start=3),
        ActionField("gripper", "action", 1, start=6, gripper=OPENNESS),
    ),
    "language_instruction",
)

# A wheelchair's arm. Angles are SciPy's "zxy". The seventh value of the state is not described and not used.
DLR_EDAN = oxe_robot(
    "dlr_edan",
    5.0,
    (Camera("base", "observation/image"),),
    pose("observation/state", rotation="zxy"),
    metric(CLOSEDNESS, rotation="zxy"),
    "language_instruction",
)

# The action has no gripper: its target is the state's one step later. Both cameras are BGR.
BERKELEY_FANUC = oxe_robot(
    "berkeley_fanuc",
    10.0,
    (
        Camera("base", "observation/image", channel_order="bgr"),
        Camera("wrist", "observation/wrist_image", channel_order="bgr"),
    ),
    (
        *pose("observation/end_effector_state", rotation="quaternion_xyzw"),
        StateField("gripper", "observation/state", 1, start=6, gripper=CLOSEDNESS),
    ),
    (
        *metric(CLOSEDNESS)[:2],
        ActionField("gripper", "observation/state", 1, start=6, gripper=CLOSEDNESS, next_step="value"),
    ),
    "language_instruction",
)

# Hello Stretch. The last of eight actions ends the episode.
CMU_STRETCH = oxe_robot(
    "cmu_stretch",
    10.0,
    (Camera("base", "observation/image"),),
    (
        StateField("hand", "observation/state", 3, unit="m"),
        StateField("gripper", "observation/state", 1, start=3),
    ),
    metric(OPENNESS),
    "language_instruction",
)

# Hello Stretch's gripper on a stick, in homes: a wrist camera and no other.
DOBBE = oxe_robot(
    "dobbe",
    3.75,
    (Camera("wrist", "observation/wrist_image"),),
    (*pose("observation/state"), StateField("gripper", "observation/state", 1, start=6, gripper=OPENNESS)),
    metric(OPENNESS),
    "language_instruction",
)
