"""Robots of the Open X-Embodiment (OXE) collection: one per dataset, as published in RLDS.

Sources, where a comment does not say otherwise: the TFDS catalogue's feature descriptions, and how octo (241fb35) and
openvla (c8f03f4) read these datasets. Where these contradict each other, `oxe_disputed` says who says what, and what is
done.

Robots whose actions move a hand have one order of slots: hand (3), hand_rotation (3), gripper (1), so that the dims of
a mixture line up. One that lacks rotation or gripper has fewer dims, and what follows moves up: they are not padded
with zeros that a policy would learn. Positions are in the robot's base frame.

Rotations in model space: changes are roll, pitch, yaw. Normalised commands (unit "1"), velocities and bc_z's
differences of vectors are no rotations, and stay as they are stored. Orientations that are stored as roll, pitch, yaw
stay so too, as does LIBERO's axis-angle; all others are 6-D (the first two columns of the matrix), because a hand that
points down is about half a turn from the base frame, where angles jump.

Camera slots: "base" (and "base_1") see the scene, "wrist" (and "wrist_1") ride on the hand. No image sizes are
demanded, because copies that were resized are common.

Normalisation is by quantiles: some of these datasets have single values that are a hundred times what a robot can do (a
command of 22 m in fractal20220817_data), which would set the scale of a z-score.
"""

import dataclasses

from openpi_like.robots.aloha import ALOHA
from openpi_like.robots.robot import ActionField, Camera, Gripper, Robot, StateField
from openpi_like.robots.widowx import WIDOWX

_OPENNESS = Gripper(open=1.0, closed=0.0)
_CLOSEDNESS = Gripper(open=0.0, closed=1.0)
_ROBOSUITE = Gripper(open=-1.0, closed=1.0)  # an effort: -1 opens, 1 closes
_TRIGGER = Gripper(open=-1.0, closed=1.0, convention="trigger")
_FRANKA_WIDTH = Gripper(open=0.08, closed=0.0)  # metres between the fingers

_SAID = "observation/natural_language_instruction"


def _robot(
    name: str,
    hz: float,
    cameras: tuple[Camera, ...],
    state: tuple[StateField, ...],
    action: tuple[ActionField, ...],
    language: str = _SAID,
) -> Robot:
    """A chunk of 16 steps, or of 8 for robots slower than 8 Hz; half of it is executed."""
    horizon = 16 if hz >= 8 else 8
    return Robot(
        name=name,
        cameras=cameras,
        state=state,
        action=action,
        control_hz=hz,
        action_horizon=horizon,
        execute_steps=horizon // 2,
        normalization="quantile",
        language_key=language,
    )


def _pose(key: str, *, start: int = 0, rotation: str = "rpy") -> tuple[StateField, StateField]:
    """Position in metres, then orientation, one behind the other in the state."""
    size = 4 if rotation.startswith("quaternion") else 3
    unit = "1" if size == 4 else "rad"
    model = "rpy" if rotation == "rpy" else "rotation_6d"
    turn = StateField("hand_rotation", key, size, start + 3, unit, rotation=rotation, model_rotation=model)
    return StateField("hand", key, 3, start, unit="m"), turn


def _joints(key: str, size: int = 7, start: int = 0) -> StateField:
    return StateField("joints", key, size, start, unit="rad")


def _world_vector(gripper: ActionField, command: str = "delta") -> tuple[ActionField, ...]:
    """The actions of datasets that Google converted: fields of a dict."""
    rate, rotation = ("/s", None) if command == "velocity" else ("", "rpy")
    return (
        ActionField("hand", "action/world_vector", 3, unit=f"m{rate}", command=command),
        ActionField("hand_rotation", "action/rotation_delta", 3, unit=f"rad{rate}", rotation=rotation, command=command),
        gripper,
    )


def _normalized(gripper: Gripper, key: str = "action") -> tuple[ActionField, ...]:
    """Seven commands as a fraction of the longest step that the controller takes."""
    return (
        ActionField("hand", key, 3, command="delta"),
        ActionField("hand_rotation", key, 3, start=3, command="delta"),
        ActionField("gripper", key, 1, start=6, gripper=gripper),
    )


def _metric(gripper: Gripper, start: int = 0, rotation: str = "rpy") -> tuple[ActionField, ...]:
    """Changes in metres and radians, one behind the other in the action."""
    turn = ActionField(
        "hand_rotation", "action", 3, start + 3, "rad", rotation=rotation, model_rotation="rpy", command="delta"
    )
    return (
        ActionField("hand", "action", 3, start, unit="m", command="delta"),
        turn,
        ActionField("gripper", "action", 1, start + 6, gripper=gripper),
    )


# ---- Google robots ---------------------------------------------------------------------------------------------------

# The state's gripper is closedness; gripper commands are triggers. Neither is passed on raw, so that both are openness.
# The dataset also has base motion and `terminate_episode`, which are not used.
FRACTAL = _robot(
    "fractal",
    3.0,
    (Camera("base", "observation/image"),),
    (
        *_pose("observation/base_pose_tool_reached", rotation="quaternion_xyzw"),
        StateField("gripper", "observation/gripper_closed", 1, gripper=_CLOSEDNESS),
    ),
    _world_vector(ActionField("gripper", "action/gripper_closedness_action", 1, gripper=_TRIGGER)),
)

# The state is stored as zlib-compressed tensors, under keys that contain a slash.
KUKA = _robot(
    "kuka",
    10.0,
    (Camera("base", "observation/image"),),
    (
        *_pose("observation/clip_function_input/base_pose_tool_reached", rotation="quaternion_xyzw"),
        StateField("gripper", "observation/gripper_closed", 1, gripper=_CLOSEDNESS),
    ),
    _world_vector(ActionField("gripper", "action/gripper_closedness_action", 1, gripper=_TRIGGER)),
)

# Every step stores the next ten actions; the first of them is that step's. Rotations are a difference of axis-angle
# vectors, "to add to the current axis angle", which is not a rotation that could be converted.
BC_Z = _robot(
    "bc_z",
    10.0,
    (Camera("base", "observation/image"),),
    (
        StateField("hand", "observation/present/xyz", 3, unit="m"),
        StateField(
            "hand_rotation",
            "observation/present/axis_angle",
            3,
            unit="rad",
            rotation="axis_angle",
            model_rotation="rotation_6d",
        ),
        StateField("gripper", "observation/present/sensed_close", 1, gripper=_CLOSEDNESS),
    ),
    (
        ActionField("hand", "action/future/xyz_residual", 3, unit="m", command="delta"),
        ActionField("hand_rotation", "action/future/axis_angle_residual", 3, unit="rad", command="delta"),
        ActionField("gripper", "action/future/target_close", 1, gripper=_CLOSEDNESS),
    ),
)

# An xArm that pushes blocks in the plane: no rotation, no gripper. The instruction is stored as code points.
LANGUAGE_TABLE = _robot(
    "language_table",
    10.0,
    (Camera("base", "observation/rgb"),),
    (StateField("hand", "observation/effector_translation", 2, unit="m"),),
    (ActionField("hand", "action", 2, unit="m", command="delta"),),
    "observation/instruction",
)

# ---- WidowX ----------------------------------------------------------------------------------------------------------

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
        ActionField("gripper", "action", 1, start=6, gripper=dataclasses.replace(_OPENNESS, convention="look_ahead")),
    ),
    normalization="quantile",
)

# An outdated part of Bridge in the OXE bucket: one camera of 480 x 640, commands as sent.
BRIDGE_OXE = _robot(
    "bridge_oxe",
    5.0,
    (Camera("base", "observation/image"),),
    (*_pose("observation/state"), StateField("gripper", "observation/state", 1, start=6, gripper=_OPENNESS)),
    _world_vector(ActionField("gripper", "action/open_gripper", 1, gripper=_OPENNESS)),
)

# ---- Franka ----------------------------------------------------------------------------------------------------------

# Static images are 150 x 200. Commands are relative, in the base frame, and scaled as in CALVIN, from the same lab.
TACO_PLAY = _robot(
    "taco_play",
    15.0,
    (Camera("base", "observation/rgb_static"), Camera("wrist", "observation/rgb_gripper")),
    (
        *_pose("observation/robot_obs"),
        StateField("gripper", "observation/robot_obs", 1, start=6, gripper=_FRANKA_WIDTH),
    ),
    _normalized(Gripper(open=1.0, closed=-1.0), "action/rel_actions_world"),
)

# Velocities, and no gripper: it holds the cable.
BERKELEY_CABLE_ROUTING = _robot(
    "berkeley_cable_routing",
    10.0,
    (
        Camera("base", "observation/image"),
        Camera("base_1", "observation/top_image"),
        Camera("wrist", "observation/wrist45_image"),
        Camera("wrist_1", "observation/wrist225_image"),
    ),
    (_joints("observation/robot_state"),),
    (
        ActionField("hand", "action/world_vector", 3, unit="m/s", command="velocity"),
        ActionField("hand_rotation", "action/rotation_delta", 3, unit="rad/s", command="velocity"),
    ),
)

# The gripper's command is one number per step, not an array of one.
VIOLA = _robot(
    "viola",
    20.0,
    (Camera("base", "observation/agentview_rgb"), Camera("wrist", "observation/eye_in_hand_rgb")),
    (
        _joints("observation/joint_states"),
        StateField("gripper", "observation/gripper_states", 1, gripper=_FRANKA_WIDTH),
    ),
    _world_vector(ActionField("gripper", "action/gripper_closedness_action", 1, gripper=_ROBOSUITE)),
)

TOTO = _robot(
    "toto",
    30.0,
    (Camera("base", "observation/image"),),
    (_joints("observation/state"),),
    _world_vector(ActionField("gripper", "action/open_gripper", 1, gripper=_OPENNESS)),
)

# State: position, quaternion, Euler angles, joints, joint velocities, gripper. Both cameras are stored as BGR.
STANFORD_HYDRA = _robot(
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
    _metric(_CLOSEDNESS),
    "language_instruction",
)

_AUSTIN_CAMERAS = (Camera("base", "observation/image"), Camera("wrist", "observation/wrist_image"))

# State: joints, gripper, and the hand's pose as a 4 x 4 matrix. Actions of the Austin datasets are normalised.
AUSTIN_BUDS = _robot(
    "austin_buds",
    20.0,
    _AUSTIN_CAMERAS,
    (_joints("observation/state"), StateField("gripper", "observation/state", 1, start=7)),
    _normalized(_ROBOSUITE),
    "language_instruction",
)

AUSTIN_SAILOR = _robot(
    "austin_sailor",
    20.0,
    _AUSTIN_CAMERAS,
    (
        *_pose("observation/state", rotation="quaternion_xyzw"),
        StateField("gripper", "observation/state", 1, start=7),
    ),
    _normalized(_ROBOSUITE),
    "language_instruction",
)

# Human interventions are marked in `action_mode` and `intv_label`, see `oxe_disputed`.
AUSTIN_SIRIUS = _robot(
    "austin_sirius",
    20.0,
    _AUSTIN_CAMERAS,
    (_joints("observation/state_joint"), StateField("gripper", "observation/state_gripper", 1)),
    _normalized(_ROBOSUITE),
    "language_instruction",
)

# Both cameras are stored as BGR. Instructions are whole paragraphs: look at prompt_len.
UTAUSTIN_MUTEX = _robot(
    "utaustin_mutex",
    20.0,
    (
        Camera("base", "observation/image", channel_order="bgr"),
        Camera("wrist", "observation/wrist_image", channel_order="bgr"),
    ),
    (_joints("observation/state"), StateField("gripper", "observation/state", 1, start=7)),
    _normalized(_ROBOSUITE),
    "language_instruction",
)

# Action: joint velocities (7), then the hand, the gripper and an end flag. The state has no gripper.
NYU_FRANKA_PLAY = _robot(
    "nyu_franka_play",
    3.0,
    (Camera("base", "observation/image"), Camera("base_1", "observation/image_additional_view")),
    _pose("observation/state", start=7),
    _metric(Gripper(open=1.0, closed=-1.0), start=7),
    "language_instruction",
)

# Rotations are quaternions, of the state and of the change. The state ends with the gripper's width.
FURNITURE_BENCH = _robot(
    "furniture_bench",
    10.0,
    (Camera("base", "observation/image"), Camera("wrist", "observation/wrist_image")),
    (
        *_pose("observation/state", rotation="quaternion_xyzw"),
        StateField("gripper", "observation/state", 1, start=34, unit="m"),
    ),
    (
        ActionField("hand", "action", 3, unit="m", command="delta"),
        ActionField(
            "hand_rotation", "action", 4, start=3, rotation="quaternion_xyzw", model_rotation="rpy", command="delta"
        ),
        ActionField("gripper", "action", 1, start=7, gripper=_ROBOSUITE),
    ),
    "language_instruction",
)

# Actions are poses, not changes; the state has no pose that they could be made relative to. Their orientation is 6-D,
# so the gripper is the tenth dim.
IAMLAB_CMU_PICKUP_INSERT = _robot(
    "iamlab_cmu_pickup_insert",
    20.0,
    (Camera("base", "observation/image"), Camera("wrist", "observation/wrist_image")),
    (_joints("observation/state"), StateField("gripper", "observation/state", 1, start=7, gripper=_OPENNESS)),
    (
        ActionField("hand", "action", 3, unit="m"),
        ActionField("hand_rotation", "action", 4, start=3, rotation="quaternion_xyzw", model_rotation="rotation_6d"),
        ActionField("gripper", "action", 1, start=7, gripper=_OPENNESS),
    ),
    "language_instruction",
)

# The state's gripper is binary, 0 open and 1 closed (the benchmark's own description).
FMB = _robot(
    "fmb",
    10.0,
    (
        Camera("base", "observation/image_side_1"),
        Camera("base_1", "observation/image_side_2"),
        Camera("wrist", "observation/image_wrist_1"),
        Camera("wrist_1", "observation/image_wrist_2"),
    ),
    (
        *_pose("observation/eef_pose", rotation="quaternion_xyzw"),
        StateField("gripper", "observation/state_gripper_pose", 1, gripper=_CLOSEDNESS),
    ),
    _normalized(_OPENNESS),
    "language_instruction",
)

_DROID_CAMERAS = (
    Camera("base", "observation/exterior_image_1_left"),
    Camera("base_1", "observation/exterior_image_2_left"),
    Camera("wrist", "observation/wrist_image_left"),
)
_DROID_STATE_GRIPPER = StateField("gripper", "observation/gripper_position", 1, gripper=_CLOSEDNESS)
_DROID_GRIPPER = ActionField("gripper", "action_dict/gripper_position", 1, gripper=_CLOSEDNESS)

# Velocities are normalised to the controller's limits. Numbers are float64. Three people described most of the
# successful episodes; any of the three texts may be empty.
DROID = dataclasses.replace(
    _robot(
        "droid",
        15.0,
        _DROID_CAMERAS,
        (*_pose("observation/cartesian_position"), _DROID_STATE_GRIPPER),
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
    state=(_joints("observation/joint_position"), _DROID_STATE_GRIPPER),
    action=(ActionField("joints", "action_dict/joint_velocity", 7, command="velocity"), _DROID_GRIPPER),
)

# The four LIBERO suites in openvla's release without idle steps. Images were turned by 180 degrees when the dataset was
# built, so the simulator's have to be turned too. Orientations are near a half turn, where roll, pitch and yaw jump, so
# the axis-angle vector stays as it is stored, which openpi and openvla read as well.
LIBERO = _robot(
    "libero",
    20.0,
    (Camera("base", "observation/image"), Camera("wrist", "observation/wrist_image")),
    (
        StateField("hand", "observation/state", 3, unit="m"),
        StateField("hand_rotation", "observation/state", 3, start=3, unit="rad", rotation="axis_angle"),
        StateField("fingers", "observation/state", 2, start=6, unit="m"),
    ),
    _normalized(_ROBOSUITE),
    "language_instruction",
)

# ---- Other arms ------------------------------------------------------------------------------------------------------

# Kinova Jaco 2: no rotation. The pose is a position and a quaternion (the dataset's own README); the gripper is in the
# last two joints.
JACO_PLAY = _robot(
    "jaco_play",
    10.0,
    (Camera("base", "observation/image"), Camera("wrist", "observation/image_wrist")),
    (
        *_pose("observation/end_effector_cartesian_pos", rotation="quaternion_xyzw"),
        StateField("fingers", "observation/joint_pos", 2, start=6, unit="rad"),
    ),
    (
        ActionField("hand", "action/world_vector", 3, unit="m", command="delta"),
        ActionField("gripper", "action/gripper_closedness_action", 1, gripper=_TRIGGER),
    ),
)

# Sawyer, without any state.
ROBOTURK = _robot(
    "roboturk",
    10.0,
    (Camera("base", "observation/front_rgb"),),
    (),
    _world_vector(ActionField("gripper", "action/gripper_closedness_action", 1, gripper=_CLOSEDNESS)),
)

# Hello Stretch: velocities, a camera on the gripper (it is no scene view), no state.
NYU_DOOR_OPENING = _robot(
    "nyu_door_opening",
    3.0,
    (Camera("wrist", "observation/image"),),
    (),
    _world_vector(ActionField("gripper", "action/gripper_closedness_action", 1, gripper=_TRIGGER), "velocity"),
)

# robot_state: joints (6), position (3), quaternion (4), gripper closed, action blocked. The hand's images are BGR.
BERKELEY_AUTOLAB_UR5 = _robot(
    "berkeley_autolab_ur5",
    5.0,
    (Camera("base", "observation/image"), Camera("wrist", "observation/hand_image", channel_order="bgr")),
    (
        *_pose("observation/robot_state", start=6, rotation="quaternion_xyzw"),
        StateField("gripper", "observation/robot_state", 1, start=13, gripper=_CLOSEDNESS),
    ),
    _world_vector(ActionField("gripper", "action/gripper_closedness_action", 1, gripper=_TRIGGER)),
)

# xArm. Actions are poses, in units that no source names; the last of eight ends the episode.
UCSD_KITCHEN = _robot(
    "ucsd_kitchen",
    2.0,
    (Camera("base", "observation/image"),),
    (_joints("observation/state"),),
    (
        ActionField("hand", "action", 3),
        ActionField("hand_rotation", "action", 3, start=3),
        ActionField("gripper", "action", 1, start=6, gripper=_OPENNESS),
    ),
    "language_instruction",
)

# A wheelchair's arm. Angles are SciPy's "zxy". The seventh value of the state is not described and not used.
DLR_EDAN = _robot(
    "dlr_edan",
    5.0,
    (Camera("base", "observation/image"),),
    _pose("observation/state", rotation="zxy"),
    _metric(_CLOSEDNESS, rotation="zxy"),
    "language_instruction",
)

# The action has no gripper: its target is the state's one step later. Both cameras are BGR.
BERKELEY_FANUC = _robot(
    "berkeley_fanuc",
    10.0,
    (
        Camera("base", "observation/image", channel_order="bgr"),
        Camera("wrist", "observation/wrist_image", channel_order="bgr"),
    ),
    (
        *_pose("observation/end_effector_state", rotation="quaternion_xyzw"),
        StateField("gripper", "observation/state", 1, start=6, gripper=_CLOSEDNESS),
    ),
    (
        *_metric(_CLOSEDNESS)[:2],
        ActionField("gripper", "observation/state", 1, start=6, gripper=_CLOSEDNESS, next_step="value"),
    ),
    "language_instruction",
)

# Hello Stretch. The last of eight actions ends the episode.
CMU_STRETCH = _robot(
    "cmu_stretch",
    10.0,
    (Camera("base", "observation/image"),),
    (
        StateField("hand", "observation/state", 3, unit="m"),
        StateField("gripper", "observation/state", 1, start=3),
    ),
    _metric(_OPENNESS),
    "language_instruction",
)

# Hello Stretch's gripper on a stick, in homes: a wrist camera and no other.
DOBBE = _robot(
    "dobbe",
    3.75,
    (Camera("wrist", "observation/wrist_image"),),
    (*_pose("observation/state"), StateField("gripper", "observation/state", 1, start=6, gripper=_OPENNESS)),
    _metric(_OPENNESS),
    "language_instruction",
)

# ---- ALOHA: two arms, absolute joint angles at 50 Hz, as in the simulator --------------------------------------------

_ALOHA_WRISTS = (
    Camera("wrist_left", "observation/cam_left_wrist"),
    Camera("wrist_right", "observation/cam_right_wrist"),
)
ALOHA_STATIC = dataclasses.replace(
    ALOHA,
    name="aloha_static",
    cameras=(Camera("base", "observation/cam_high"), Camera("base_1", "observation/cam_low"), *_ALOHA_WRISTS),
    action_horizon=50,
    execute_steps=25,
    normalization="quantile",
)
# Linear and angular velocity of the base follow the arms.
ALOHA_MOBILE = dataclasses.replace(
    ALOHA_STATIC,
    name="aloha_mobile",
    cameras=(Camera("base", "observation/cam_high"), *_ALOHA_WRISTS),
    action=(
        *ALOHA_STATIC.action,
        ActionField("base_velocity", "action", 1, start=14, unit="m/s", command="velocity"),
        ActionField("base_turn", "action", 1, start=15, unit="rad/s", command="velocity"),
    ),
)

# TFDS name -> robot
ROBOTS: dict[str, Robot] = {
    "fractal20220817_data": FRACTAL,
    "kuka": KUKA,
    "bridge_dataset": BRIDGE,
    "bridge": BRIDGE_OXE,
    "taco_play": TACO_PLAY,
    "jaco_play": JACO_PLAY,
    "berkeley_cable_routing": BERKELEY_CABLE_ROUTING,
    "roboturk": ROBOTURK,
    "nyu_door_opening_surprising_effectiveness": NYU_DOOR_OPENING,
    "viola": VIOLA,
    "berkeley_autolab_ur5": BERKELEY_AUTOLAB_UR5,
    "toto": TOTO,
    "language_table": LANGUAGE_TABLE,
    "stanford_hydra_dataset_converted_externally_to_rlds": STANFORD_HYDRA,
    "austin_buds_dataset_converted_externally_to_rlds": AUSTIN_BUDS,
    "nyu_franka_play_dataset_converted_externally_to_rlds": NYU_FRANKA_PLAY,
    "furniture_bench_dataset_converted_externally_to_rlds": FURNITURE_BENCH,
    "ucsd_kitchen_dataset_converted_externally_to_rlds": UCSD_KITCHEN,
    "austin_sailor_dataset_converted_externally_to_rlds": AUSTIN_SAILOR,
    "austin_sirius_dataset_converted_externally_to_rlds": AUSTIN_SIRIUS,
    "bc_z": BC_Z,
    "dlr_edan_shared_control_converted_externally_to_rlds": DLR_EDAN,
    "iamlab_cmu_pickup_insert_converted_externally_to_rlds": IAMLAB_CMU_PICKUP_INSERT,
    "utaustin_mutex": UTAUSTIN_MUTEX,
    "berkeley_fanuc_manipulation": BERKELEY_FANUC,
    "cmu_stretch": CMU_STRETCH,
    "dobbe": DOBBE,
    "fmb": FMB,
    "droid": DROID,
    "libero_spatial_no_noops": LIBERO,
    "libero_object_no_noops": LIBERO,
    "libero_goal_no_noops": LIBERO,
    "libero_10_no_noops": LIBERO,
    "aloha_static_dataset": ALOHA_STATIC,
    "aloha_mobile": ALOHA_MOBILE,
}
