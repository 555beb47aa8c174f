"""Robots of OXE whose datasets Google recorded, see `oxe`."""

from openpi_like.robots.oxe_fields import CLOSEDNESS, TRIGGER, oxe_robot, pose, world_vector
from openpi_like.robots.robot import ActionField, Camera, StateField

# The state's gripper is closedness; gripper commands are triggers. Neither is passed on raw, so that both are openness.
# The dataset also has base motion and `terminate_episode`, which are not used.
FRACTAL = oxe_robot(
    "fractal",
    3.0,
    (Camera("base", "observation/image"),),
    (
        *pose("observation/base_pose_tool_reached", rotation="quaternion_xyzw"),
        StateField("gripper", "observation/gripper_closed", 1, gripper=CLOSEDNESS),
    ),
    world_vector(ActionField("gripper", "action/gripper_closedness_action", 1, gripper=TRIGGER)),
)

# The state is stored as zlib-compressed tensors, under keys that contain a slash.
KUKA = oxe_robot(
    "kuka",
    10.0,
    (Camera("base", "observation/image"),),
    (
        *pose("observation/clip_function_input/base_pose_tool_reached", rotation="quaternion_xyzw"),
        StateField("gripper", "observation/gripper_closed", 1, gripper=CLOSEDNESS),
    ),
    world_vector(ActionField("gripper", "action/gripper_closedness_action", 1, gripper=TRIGGER)),
)

# Every step stores the next ten actions; the first of them is that step's. Rotations are a difference of axis-angle
# vectors, "to add to the current axis angle", which is not a rotation that could be converted.
BC_Z = oxe_robot(
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
        StateField("gripper", "observation/present/sensed_close", 1, gripper=CLOSEDNESS),
    ),
    (
        ActionField("hand", "action/future/xyz_residual", 3, unit="m", command="delta"),
        ActionField("hand_rotation", "action/future/axis_angle_residual", 3, unit="rad", command="delta"),
        ActionField("gripper", "action/future/target_close", 1, gripper=CLOSEDNESS),
    ),
)

# An xArm that pushes blocks in the plane: no rotation, no gripper. The instruction is stored as code points.
LANGUAGE_TABLE = oxe_robot(
    "language_table",
    10.0,
    (Camera("base", "observation/rgb"),),
    (StateField("hand", "observation/effector_translation", 2, unit="m"),),
    (ActionField("hand", "action", 2, unit="m", command="delta"),),
    "observation/instruction",
)
