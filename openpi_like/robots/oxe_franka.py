"""Robots of OXE that are a Franka, see `oxe`."""

import dataclasses

from openpi_like.robots.gripper import Gripper
from openpi_like.robots.oxe_fields import (
    CLOSEDNESS,
    FRANKA_WIDTH,
    OPENNESS,
    ROBOSUITE,
    joints,
    metric,
    normalized,
    oxe_robot,
    pose,
    world_vector,
)
from openpi_like.robots.robot import ActionField, Camera, StateField

# Static images are 150 x 200. Commands are relative, in the base frame, and scaled as in CALVIN, from the same lab.
TACO_PLAY = oxe_robot(
    "taco_play",
    15.0,
    (Camera("base", "observation/rgb_static"), Camera("wrist", "observation/rgb_gripper")),
    (
        *pose("observation/robot_obs"),
        StateField("gripper", "observation/robot_obs", 1, start=6, gripper=FRANKA_WIDTH),
    ),
    normalized(Gripper(open=1.0, closed=-1.0), "action/rel_actions_world"),
)

# Velocities, and no gripper: it holds the cable.
BERKELEY_CABLE_ROUTING = oxe_robot(
    "berkeley_cable_routing",
    10.0,
    (
        Camera("base", "observation/image"),
        Camera("base_1", "observation/top_image"),
        Camera("wrist", "observation/wrist45_image"),
        Camera("wrist_1", "observation/wrist225_image"),
    ),
    (joints("observation/robot_state"),),
    (
        ActionField("hand", "action/world_vector", 3, unit="m/s", command="velocity"),
        ActionField("hand_rotation", "action/rotation_delta", 3, unit="rad/s", command="velocity"),
    ),
)

# The gripper's command is one number per step, not an array of one.
VIOLA = oxe_robot(
    "viola",
    20.0,
    (Camera("base", "observation/agentview_rgb"), Camera("wrist", "observation/eye_in_hand_rgb")),
    (
        joints("observation/joint_states"),
        StateField("gripper", "observation/gripper_states", 1, gripper=FRANKA_WIDTH),
    ),
    world_vector(ActionField("gripper", "action/gripper_closedness_action", 1, gripper=ROBOSUITE)),
)

TOTO = oxe_robot(
    "toto",
    30.0,
    (Camera("base", "observation/image"),),
    (joints("observation/state"),),
    world_vector(ActionField("gripper", "action/open_gripper", 1, gripper=OPENNESS)),
)

# State: position, quaternion, Euler angles, joints, joint velocities, gripper. Both cameras are stored as BGR.
STANFORD_HYDRA = oxe_robot(
    "stanford_hydra",
    10.0,
    (
        Camera("base", "observation/image", channel_order="bgr"),
        Camera("wrist", "observation/wrist_image", channel_order="bgr"),
    ),
    (
        StateField("hand", "observation/state", 3, unit="m"),
        StateField("hand_rotation", "observation/state", 3, start=7, unit="rad", rotation="rpy"),
        StateField("gripper", "observation/state", 1, start=24),
    ),
    metric(CLOSEDNESS),
    "language_instruction",
)

_AUSTIN_CAMERAS = (Camera("base", "observation/image"), Camera("wrist", "observation/wrist_image"))

# State: joints, gripper, and the hand's pose as a 4 x 4 matrix. Actions of the Austin datasets are normalised.
AUSTIN_BUDS = oxe_robot(
    "austin_buds",
    20.0,
    _AUSTIN_CAMERAS,
    (joints("observation/state"), StateField("gripper", "observation/state", 1, start=7)),
    normalized(ROBOSUITE),
    "language_instruction",
)

AUSTIN_SAILOR = oxe_robot(
    "austin_sailor",
    20.0,
    _AUSTIN_CAMERAS,
    (
        *pose("observation/state", rotation="quaternion_xyzw"),
        StateField("gripper", "observation/state", 1, start=7),
    ),
    normalized(ROBOSUITE),
    "language_instruction",
)

# Human interventions are marked in `action_mode` and `intv_label`, see `oxe_disputed`.
AUSTIN_SIRIUS = oxe_robot(
    "austin_sirius",
    20.0,
    _AUSTIN_CAMERAS,
    (joints("observation/state_joint"), StateField("gripper", "observation/state_gripper", 1)),
    normalized(ROBOSUITE),
    "language_instruction",
)

# Both cameras are stored as BGR. Instructions are whole paragraphs: look at prompt_len.
UTAUSTIN_MUTEX = oxe_robot(
    "utaustin_mutex",
    20.0,
    (
        Camera("base", "observation/image", channel_order="bgr"),
        Camera("wrist", "observation/wrist_image", channel_order="bgr"),
    ),
    (joints("observation/state"), StateField("gripper", "observation/state", 1, start=7)),
    normalized(ROBOSUITE),
    "language_instruction",
)

# Action: joint velocities (7), then the hand, the gripper and an end flag. The state has no gripper.
NYU_FRANKA_PLAY = oxe_robot(
    "nyu_franka_play",
    3.0,
    (Camera("base", "observation/image"), Camera("base_1", "observation/image_additional_view")),
    pose("observation/state", start=7),
    metric(Gripper(open=1.0, closed=-1.0), start=7),
    "language_instruction",
)

# Rotations are quaternions, of the state and of the change. The state ends with the gripper's width.
FURNITURE_BENCH = oxe_robot(
    "furniture_bench",
    10.0,
    (Camera("base", "observation/image"), Camera("wrist", "observation/wrist_image")),
    (
        *pose("observation/state", rotation="quaternion_xyzw"),
        StateField("gripper", "observation/state", 1, start=34, unit="m"),
    ),
    (
        ActionField("hand", "action", 3, unit="m", command="delta"),
        ActionField(
            "hand_rotation", "action", 4, start=3, rotation="quaternion_xyzw", model_rotation="rpy", command="delta"
        ),
        ActionField("gripper", "action", 1, start=7, gripper=ROBOSUITE),
    ),
    "language_instruction",
)

# Actions are poses, not changes; the state has no pose that they could be made relative to. Their orientation is 6-D,
# so the gripper is the tenth dim.
IAMLAB_CMU_PICKUP_INSERT = oxe_robot(
    "iamlab_cmu_pickup_insert",
    20.0,
    (Camera("base", "observation/image"), Camera("wrist", "observation/wrist_image")),
    (joints("observation/state"), StateField("gripper", "observation/state", 1, start=7, gripper=OPENNESS)),
    (
        ActionField("hand", "action", 3, unit="m"),
        ActionField("hand_rotation", "action", 4, start=3, rotation="quaternion_xyzw", model_rotation="rotation_6d"),
        ActionField("gripper", "action", 1, start=7, gripper=OPENNESS),
    ),
    "language_instruction",
)

# The state's gripper is binary, 0 open and 1 closed (the benchmark's own description).
FMB = oxe_robot(
    "fmb",
    10.0,
    (
        Camera("base", "observation/image_side_1"),
        Camera("base_1", "observation/image_side_2"),
        Camera("wrist", "observation/image_wrist_1"),
        Camera("wrist_1", "observation/image_wrist_2"),
    ),
    (
        *pose("observation/eef_pose", rotation="quaternion_xyzw"),
        StateField("gripper", "observation/state_gripper_pose", 1, gripper=CLOSEDNESS),
    ),
    normalized(OPENNESS),
    "language_instruction",
)

_DROID_CAMERAS = (
    Camera("base", "observation/exterior_image_1_left"),
    Camera("base_1", "observation/exterior_image_2_left"),
    Camera("wrist", "observation/wrist_image_left"),
)
_DROID_STATE_GRIPPER = StateField("gripper", "observation/gripper_position", 1, gripper=CLOSEDNESS)
_DROID_GRIPPER = ActionField("gripper", "action_dict/gripper_position", 1, gripper=CLOSEDNESS)

# Velocities are normalised to the controller's limits. Numbers are float64. Three people described most of the
# successful episodes; any of the three texts may be empty.
DROID = dataclasses.replace(
    oxe_robot(
        "droid",
        15.0,
        _DROID_CAMERAS,
        (*pose("observation/cartesian_position"), _DROID_STATE_GRIPPER),
        (
            ActionField("hand", "action_dict/cartesian_velocity", 3, command="velocity"),
            ActionField("hand_rotation", "action_dict/cartesian_velocity", 3, start=3, command="velocity"),
            _DROID_GRIPPER,
        ),
        "language_instruction",
    ),
    language_alternatives=("language_instruction_2", "language_instruction_3"),
)

# The same data with the actions that openpi trains on.
DROID_JOINTS = dataclasses.replace(
    DROID,
    name="droid_joints",
    state=(joints("observation/joint_position"), _DROID_STATE_GRIPPER),
    action=(ActionField("joints", "action_dict/joint_velocity", 7, command="velocity"), _DROID_GRIPPER),
)

# The four LIBERO suites in openvla's release without idle steps. Images were turned by 180 degrees when the dataset was
# built, so the simulator's have to be turned too. Orientations are near a half turn, where roll, pitch and yaw jump, so
# the axis-angle vector stays as it is stored, which openpi and openvla read as well.
LIBERO = oxe_robot(
    "libero",
    20.0,
    (Camera("base", "observation/image"), Camera("wrist", "observation/wrist_image")),
    (
        StateField("hand", "observation/state", 3, unit="m"),
        StateField("hand_rotation", "observation/state", 3, start=3, unit="rad", rotation="axis_angle"),
        StateField("fingers", "observation/state", 2, start=6, unit="m"),
    ),
    normalized(ROBOSUITE),
    "language_instruction",
)
