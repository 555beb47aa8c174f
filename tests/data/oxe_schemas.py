"""The schemas of the catalogue's datasets as they are published, and what their numbers mean, written down once more.

A feature is written as a word: "f7" float32 (7,), "f" a float32 scalar, "d7" float64, "i3" int32, "l10" int64, "u"
uint8, "b" bool, "z7" float32 (7,) compressed with zlib, "t" a text, "c512" a text as 512 code points, "jpeg 480x640"
and "png 480x640" images, "image 480x640" an image whose encoding features.json does not say, "depth 8x9" float32 depth
as an image, "map 8x9" a float32 array.

`state` and `action` return what the model should see of one episode, (T, De) and (T', J), from its columns; they do
not use the robot's fields.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from scipy.spatial.transform import Rotation

Columns = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Published:
    """observation, action, more: features of a step. episode: features of the whole. relative: dims of the action that
    are relative to the same dims of the chunk's first state. cameras: slot -> (key, are its channels swapped).
    """

    observation: dict[str, str]
    action: dict[str, str] | str
    state: Callable[[Columns], np.ndarray]
    actions: Callable[[Columns], np.ndarray]
    cameras: dict[str, tuple[str, bool]]
    more: dict[str, Any] = dataclasses.field(default_factory=dict)
    episode: dict[str, Any] = dataclasses.field(default_factory=dict)
    relative: tuple[int, ...] = ()
    language: str = "language_instruction"


def stack(*parts: np.ndarray) -> np.ndarray:
    return np.concatenate([p.reshape(len(p), math.prod(p.shape[1:])) for p in parts], axis=1)


_KINDS: dict[str, Callable[[np.ndarray], Rotation]] = {
    "quat": Rotation.from_quat,
    "vector": Rotation.from_rotvec,
    "zxy": lambda x: Rotation.from_euler("zxy", x),
}


def rpy(x: np.ndarray, kind: str = "quat") -> np.ndarray:
    return _KINDS[kind](x).as_euler("xyz")


def six(x: np.ndarray, kind: str = "quat") -> np.ndarray:
    """The first two columns of the rotation matrix."""
    matrix = _KINDS[kind](x).as_matrix()
    return np.concatenate([matrix[:, :, 0], matrix[:, :, 1]], axis=1)


def trigger(x: np.ndarray) -> np.ndarray:
    """1 = open from -1 opens, 1 closes, 0 nothing; step by step."""
    x = x.reshape(-1)
    said = [i for i in range(len(x)) if x[i] != 0]
    state = 1.0 if not said else (1.0 if x[said[0]] > 0 else 0.0)
    out = []
    for value in x:
        state = {1.0: 0.0, -1.0: 1.0, 0.0: state}[float(value)]
        out.append(state)
    return np.array(out)[:, None]


def look_ahead(x: np.ndarray) -> np.ndarray:
    """Each step takes the next value above 0.95 or below 0.05; step by step."""
    out = []
    for i in range(len(x)):
        value = next((v for v in x[i:] if v > 0.95 or v < 0.05), x[i])
        out.append(float(value >= 0.5))
    return np.array(out)[:, None]


def turns(angles: np.ndarray) -> np.ndarray:
    """Per step the rotation about base axes that leads to the next one."""
    now, later = (Rotation.from_euler("xyz", a) for a in (angles[:-1], angles[1:]))
    return (later * now.inv()).as_euler("xyz")


_S = "observation/state"
_GOOGLE_STEP = {"is_first": "b", "is_last": "b", "is_terminal": "b", "reward": "f"}
_STEP = {**_GOOGLE_STEP, "discount": "f", "language_embedding": "f512", "language_instruction": "t"}
_FILE = {"episode_metadata": {"file_path": "t"}}
_SAID = {"natural_language_embedding": "f512", "natural_language_instruction": "t"}
_SAID_AT = "observation/natural_language_instruction"
_RT1_ACTION = {
    "base_displacement_vector": "f2",
    "base_displacement_vertical_rotation": "f1",
    "gripper_closedness_action": "f1",
    "rotation_delta": "f3",
    "terminate_episode": "i3",
    "world_vector": "f3",
}


def _google_action(gripper: str, kind: str) -> dict[str, str]:
    return {gripper: kind, "rotation_delta": "f3", "terminate_episode": "f", "world_vector": "f3"}


def _moves(c: Columns) -> np.ndarray:
    return stack(c["action/world_vector"], c["action/rotation_delta"])


def _seven(open_: float, closed: float) -> Callable[[Columns], np.ndarray]:
    return lambda c: stack(c["action"][:, :6], (c["action"][:, 6] - closed) / (open_ - closed))


def _pose_gripper(pose: str, gripper: str) -> Callable[[Columns], np.ndarray]:
    return lambda c: stack(c[pose][:, :3], six(c[pose][:, 3:7]), 1 - c[gripper])


def _shown(*keys: str, bgr: tuple[str, ...] = ()) -> dict[str, tuple[str, bool]]:
    """Slots from "slot=key" words."""
    pairs = [k.split("=") for k in keys]
    return {slot: (f"observation/{key}", key in bgr) for slot, key in pairs}


PUBLISHED: dict[str, Published] = {
    "fractal20220817_data": Published(
        {
            "base_pose_tool_reached": "f7",
            "gripper_closed": "f1",
            "gripper_closedness_commanded": "f1",
            "height_to_bottom": "f1",
            "image": "jpeg 256x320",
            "orientation_box": "f6",
            "workspace_bounds": "f9",
            **_SAID,
        },
        _RT1_ACTION,
        _pose_gripper("observation/base_pose_tool_reached", "observation/gripper_closed"),
        lambda c: stack(_moves(c), trigger(c["action/gripper_closedness_action"])),
        _shown("base=image"),
        _GOOGLE_STEP,
        {"aspects": {"success": "b", "has_aspects": "b"}},
        language=_SAID_AT,
    ),
    "kuka": Published(
        {
            "clip_function_input/base_pose_tool_reached": "z7",
            "clip_function_input/workspace_bounds": "z9",
            "gripper_closed": "z1",
            "height_to_bottom": "f1",
            "image": "jpeg 512x640",
            "task_id": "f1",
            **_SAID,
        },
        _RT1_ACTION,
        _pose_gripper("observation/clip_function_input/base_pose_tool_reached", "observation/gripper_closed"),
        lambda c: stack(_moves(c), trigger(c["action/gripper_closedness_action"])),
        _shown("base=image"),
        _GOOGLE_STEP,
        {"success": "b"},
        language=_SAID_AT,
    ),
    "bridge_dataset": Published(
        {f"image_{i}": "jpeg 256x256" for i in range(4)} | {"state": "f7"},
        "f7",
        lambda c: c[_S],
        lambda c: stack(np.diff(c[_S][:, :3], axis=0), turns(c[_S][:, 3:6]), look_ahead(c["action"][:, 6])[:-1]),
        _shown("base=image_0", "base_1=image_1", "base_2=image_2"),
        _STEP,
        {"episode_metadata": {"file_path": "t", "has_image_0": "b", "has_language": "b", "episode_id": "i"}},
    ),
    "bridge": Published(
        {"image": "image 480x640", "state": "f7", **_SAID},
        _google_action("open_gripper", "b"),
        lambda c: c[_S],
        lambda c: stack(_moves(c), c["action/open_gripper"]),
        _shown("base=image"),
        _GOOGLE_STEP,
        language=_SAID_AT,
    ),
    "taco_play": Published(
        {
            "depth_gripper": "map 84x84",
            "depth_static": "map 150x200",
            "rgb_gripper": "image 84x84",
            "rgb_static": "image 150x200",
            "robot_obs": "f15",
            "structured_language_instruction": "t",
            **_SAID,
        },
        {"actions": "f7", "rel_actions_gripper": "f7", "rel_actions_world": "f7", "terminate_episode": "f"},
        lambda c: stack(c["observation/robot_obs"][:, :6], c["observation/robot_obs"][:, 6] / 0.08),
        lambda c: stack(c["action/rel_actions_world"][:, :6], (c["action/rel_actions_world"][:, 6] + 1) / 2),
        _shown("base=rgb_static", "wrist=rgb_gripper"),
        _GOOGLE_STEP,
        language=_SAID_AT,
    ),
    "jaco_play": Published(
        {
            "end_effector_cartesian_pos": "f7",
            "end_effector_cartesian_velocity": "f6",
            "image": "image 224x224",
            "image_wrist": "image 224x224",
            "joint_pos": "f8",
            **_SAID,
        },
        {"gripper_closedness_action": "f1", "terminate_episode": "i3", "world_vector": "f3"},
        lambda c: stack(
            c["observation/end_effector_cartesian_pos"][:, :3],
            six(c["observation/end_effector_cartesian_pos"][:, 3:]),
            c["observation/joint_pos"][:, 6:],
        ),
        lambda c: stack(c["action/world_vector"], trigger(c["action/gripper_closedness_action"])),
        _shown("base=image", "wrist=image_wrist"),
        _GOOGLE_STEP,
        language=_SAID_AT,
    ),
    "berkeley_cable_routing": Published(
        {k: "image 128x128" for k in ("image", "top_image", "wrist225_image", "wrist45_image")}
        | {"robot_state": "f7", **_SAID},
        {"rotation_delta": "f3", "terminate_episode": "f", "world_vector": "f3"},
        lambda c: c["observation/robot_state"],
        _moves,
        _shown("base=image", "base_1=top_image", "wrist=wrist45_image", "wrist_1=wrist225_image"),
        _GOOGLE_STEP,
        language=_SAID_AT,
    ),
    "roboturk": Published(
        {"front_rgb": "image 480x640", **_SAID},
        _google_action("gripper_closedness_action", "f1"),
        lambda c: np.zeros((len(c["reward"]), 0)),
        lambda c: stack(_moves(c), 1 - c["action/gripper_closedness_action"]),
        _shown("base=front_rgb"),
        _GOOGLE_STEP,
        language=_SAID_AT,
    ),
    "nyu_door_opening_surprising_effectiveness": Published(
        {"image": "image 720x960", **_SAID},
        _google_action("gripper_closedness_action", "f1"),
        lambda c: np.zeros((len(c["reward"]), 0)),
        lambda c: stack(_moves(c), trigger(c["action/gripper_closedness_action"])),
        _shown("wrist=image"),
        _GOOGLE_STEP,
        language=_SAID_AT,
    ),
    "viola": Published(
        {
            "agentview_rgb": "image 224x224",
            "ee_states": "f16",
            "eye_in_hand_rgb": "image 224x224",
            "gripper_states": "f1",
            "joint_states": "f7",
            **_SAID,
        },
        _google_action("gripper_closedness_action", "f"),
        lambda c: stack(c["observation/joint_states"], c["observation/gripper_states"] / 0.08),
        lambda c: stack(_moves(c), (1 - c["action/gripper_closedness_action"]) / 2),
        _shown("base=agentview_rgb", "wrist=eye_in_hand_rgb"),
        _GOOGLE_STEP,
        language=_SAID_AT,
    ),
    "berkeley_autolab_ur5": Published(
        {
            "hand_image": "image 480x640",
            "image": "image 480x640",
            "image_with_depth": "depth 480x640",
            "robot_state": "f15",
            **_SAID,
        },
        _google_action("gripper_closedness_action", "f"),
        lambda c: stack(
            c["observation/robot_state"][:, 6:9],
            six(c["observation/robot_state"][:, 9:13]),
            1 - c["observation/robot_state"][:, 13],
        ),
        lambda c: stack(_moves(c), trigger(c["action/gripper_closedness_action"])),
        _shown("base=image", "wrist=hand_image", bgr=("hand_image",)),
        _GOOGLE_STEP,
        language=_SAID_AT,
    ),
    "toto": Published(
        {"image": "image 480x640", "state": "f7", **_SAID},
        _google_action("open_gripper", "b"),
        lambda c: c[_S],
        lambda c: stack(_moves(c), c["action/open_gripper"]),
        _shown("base=image"),
        _GOOGLE_STEP,
        language=_SAID_AT,
    ),
    "language_table": Published(
        {
            "effector_target_translation": "f2",
            "effector_translation": "f2",
            "instruction": "c512",
            "rgb": "jpeg 360x640",
        },
        "f2",
        lambda c: c["observation/effector_translation"],
        lambda c: c["action"],
        _shown("base=rgb"),
        _GOOGLE_STEP,
        {"episode_id": "t"},
        language="observation/instruction",
    ),
    "stanford_hydra_dataset_converted_externally_to_rlds": Published(
        {"image": "png 240x320", "state": "f27", "wrist_image": "png 240x320"},
        "f7",
        lambda c: stack(c[_S][:, :3], c[_S][:, 7:10], c[_S][:, 24]),
        _seven(0, 1),
        _shown("base=image", "wrist=wrist_image", bgr=("image", "wrist_image")),
        {**_STEP, "is_dense": "f"},
        _FILE,
    ),
    "austin_buds_dataset_converted_externally_to_rlds": Published(
        {"image": "png 128x128", "state": "f24", "wrist_image": "png 128x128"},
        "f7",
        lambda c: c[_S][:, :8],
        _seven(-1, 1),
        _shown("base=image", "wrist=wrist_image"),
        _STEP,
        _FILE,
    ),
    "nyu_franka_play_dataset_converted_externally_to_rlds": Published(
        {
            "depth": "i128x128x1",
            "depth_additional_view": "i128x128x1",
            "image": "png 128x128",
            "image_additional_view": "png 128x128",
            "state": "f13",
        },
        "f15",
        lambda c: c[_S][:, 7:13],
        lambda c: stack(c["action"][:, 7:13], (c["action"][:, 13] + 1) / 2),
        _shown("base=image", "base_1=image_additional_view"),
        _STEP,
        _FILE,
    ),
    "furniture_bench_dataset_converted_externally_to_rlds": Published(
        {"image": "jpeg 224x224", "state": "f35", "wrist_image": "jpeg 224x224"},
        "f8",
        lambda c: stack(c[_S][:, :3], six(c[_S][:, 3:7]), c[_S][:, 34]),
        lambda c: stack(c["action"][:, :3], rpy(c["action"][:, 3:7]), (1 - c["action"][:, 7]) / 2),
        _shown("base=image", "wrist=wrist_image"),
        {**_STEP, "skill_completion": "f"},
        {"episode_metadata": {"file_path": "t", "furniture": "t", "initial_randomness": "t"}},
    ),
    "ucsd_kitchen_dataset_converted_externally_to_rlds": Published(
        {"image": "png 480x640", "state": "f21"},
        "f8",
        lambda c: c[_S][:, :7],
        lambda c: c["action"][:, :7],
        _shown("base=image"),
        _STEP,
        _FILE,
    ),
    "austin_sailor_dataset_converted_externally_to_rlds": Published(
        {
            "image": "png 128x128",
            "state": "f8",
            "state_ee": "f16",
            "state_gripper": "f1",
            "state_joint": "f7",
            "wrist_image": "png 128x128",
        },
        "f7",
        lambda c: stack(c[_S][:, :3], six(c[_S][:, 3:7]), c[_S][:, 7]),
        _seven(-1, 1),
        _shown("base=image", "wrist=wrist_image"),
        _STEP,
        _FILE,
    ),
    "austin_sirius_dataset_converted_externally_to_rlds": Published(
        {
            "image": "png 84x84",
            "state": "f8",
            "state_ee": "f16",
            "state_gripper": "f1",
            "state_joint": "f7",
            "wrist_image": "png 84x84",
        },
        "f7",
        lambda c: stack(c["observation/state_joint"], c["observation/state_gripper"]),
        _seven(-1, 1),
        _shown("base=image", "wrist=wrist_image"),
        {**_STEP, "action_mode": "f", "intv_label": "f"},
        _FILE,
    ),
    "bc_z": Published(
        {
            "episode_success": "f",
            "image": "jpeg 171x213",
            "present/autonomous": "l",
            "present/axis_angle": "f3",
            "present/intervention": "l",
            "present/sensed_close": "f1",
            "present/xyz": "f3",
            "sequence_length": "l",
            **_SAID,
        },
        {"future/axis_angle_residual": "f30", "future/target_close": "l10", "future/xyz_residual": "f30"},
        lambda c: stack(
            c["observation/present/xyz"],
            six(c["observation/present/axis_angle"], "vector"),
            1 - c["observation/present/sensed_close"],
        ),
        lambda c: stack(
            c["action/future/xyz_residual"][:, :3],
            c["action/future/axis_angle_residual"][:, :3],
            1 - c["action/future/target_close"][:, 0],
        ),
        _shown("base=image"),
        _GOOGLE_STEP,
        language=_SAID_AT,
    ),
    "dlr_edan_shared_control_converted_externally_to_rlds": Published(
        {"image": "png 360x640", "state": "f7"},
        "f7",
        lambda c: stack(c[_S][:, :3], six(c[_S][:, 3:6], "zxy")),
        lambda c: stack(c["action"][:, :3], rpy(c["action"][:, 3:6], "zxy"), 1 - c["action"][:, 6]),
        _shown("base=image"),
        _STEP,
        _FILE,
    ),
    "iamlab_cmu_pickup_insert_converted_externally_to_rlds": Published(
        {"image": "png 360x640", "state": "f20", "wrist_image": "png 240x320"},
        "f8",
        lambda c: c[_S][:, :8],
        lambda c: stack(c["action"][:, :3], six(c["action"][:, 3:7]), c["action"][:, 7]),
        _shown("base=image", "wrist=wrist_image"),
        _STEP,
        _FILE,
    ),
    "utaustin_mutex": Published(
        {"image": "png 128x128", "state": "f24", "wrist_image": "png 128x128"},
        "f7",
        lambda c: c[_S][:, :8],
        _seven(-1, 1),
        _shown("base=image", "wrist=wrist_image", bgr=("image", "wrist_image")),
        _STEP,
        _FILE,
    ),
    "berkeley_fanuc_manipulation": Published(
        {"end_effector_state": "f7", "image": "png 224x224", "state": "f13", "wrist_image": "png 224x224"},
        "f6",
        lambda c: stack(
            c["observation/end_effector_state"][:, :3],
            six(c["observation/end_effector_state"][:, 3:]),
            1 - c[_S][:, 6],
        ),
        lambda c: stack(c["action"][:-1], 1 - c[_S][1:, 6]),
        _shown("base=image", "wrist=wrist_image", bgr=("image", "wrist_image")),
        _STEP,
        _FILE,
    ),
    "cmu_stretch": Published(
        {"image": "png 128x128", "state": "f4"},
        "f8",
        lambda c: c[_S],
        lambda c: c["action"][:, :7],
        _shown("base=image"),
        _STEP,
        _FILE,
    ),
    "dobbe": Published(
        {"gripper": "f1", "quat": "f4", "rot": "f3", "state": "f7", "wrist_image": "jpeg 256x256", "xyz": "f3"},
        "f7",
        lambda c: c[_S],
        lambda c: c["action"],
        _shown("wrist=wrist_image"),
        _STEP,
        _FILE,
    ),
    "fmb": Published(
        {
            **{f"image_{k}": "jpeg 256x256" for k in ("side_1", "side_2", "wrist_1", "wrist_2")},
            "image_side_1_depth": "map 256x256",
            "color_id": "u",
            "eef_force": "f3",
            "eef_pose": "f7",
            "eef_vel": "f6",
            "joint_pos": "f7",
            "length": "t",
            "object_id": "u",
            "primitive": "t",
            "state_gripper_pose": "f",
        },
        "f7",
        _pose_gripper("observation/eef_pose", "observation/state_gripper_pose"),
        lambda c: c["action"],
        _shown("base=image_side_1", "base_1=image_side_2", "wrist=image_wrist_1", "wrist_1=image_wrist_2"),
        _STEP,
        {"episode_metadata": {"file_path": "t", "episode_task": "t", "episode_language_instruction": "t"}},
    ),
    "droid": Published(
        {
            "cartesian_position": "d6",
            "exterior_image_1_left": "jpeg 180x320",
            "exterior_image_2_left": "jpeg 180x320",
            "gripper_position": "d1",
            "joint_position": "d7",
            "wrist_image_left": "jpeg 180x320",
        },
        "d7",
        lambda c: stack(c["observation/cartesian_position"], 1 - c["observation/gripper_position"]),
        lambda c: stack(c["action_dict/cartesian_velocity"], 1 - c["action_dict/gripper_position"]),
        _shown("base=exterior_image_1_left", "base_1=exterior_image_2_left", "wrist=wrist_image_left"),
        {
            **_GOOGLE_STEP,
            "discount": "f",
            "language_instruction": "t",
            "language_instruction_2": "t",
            "language_instruction_3": "t",
            "action_dict": {
                "cartesian_position": "d6",
                "cartesian_velocity": "d6",
                "gripper_position": "d1",
                "gripper_velocity": "d1",
                "joint_position": "d7",
                "joint_velocity": "d7",
            },
        },
        {"episode_metadata": {"file_path": "t", "recording_folderpath": "t"}},
    ),
    "aloha_static_dataset": Published(
        {k: "jpeg 480x640" for k in ("cam_high", "cam_low", "cam_left_wrist", "cam_right_wrist")} | {"state": "f14"},
        "f14",
        lambda c: c[_S],
        lambda c: c["action"],
        _shown("base=cam_high", "base_1=cam_low", "wrist_left=cam_left_wrist", "wrist_right=cam_right_wrist"),
        _STEP,
        _FILE,
        relative=(0, 1, 2, 3, 4, 5, 7, 8, 9, 10, 11, 12),
    ),
    "aloha_mobile": Published(
        {k: "jpeg 480x640" for k in ("cam_high", "cam_left_wrist", "cam_right_wrist")} | {"state": "f14"},
        "f16",
        lambda c: c[_S],
        lambda c: c["action"],
        _shown("base=cam_high", "wrist_left=cam_left_wrist", "wrist_right=cam_right_wrist"),
        {k: v for k, v in _STEP.items() if k != "language_embedding"},
        _FILE,
        relative=(0, 1, 2, 3, 4, 5, 7, 8, 9, 10, 11, 12),
    ),
}
for _suite in ("spatial", "object", "goal", "10"):
    PUBLISHED[f"libero_{_suite}_no_noops"] = Published(
        {"image": "jpeg 256x256", "joint_state": "f7", "state": "f8", "wrist_image": "jpeg 256x256"},
        "f7",
        lambda c: c[_S],
        _seven(-1, 1),
        _shown("base=image", "wrist=wrist_image"),
        {k: v for k, v in _STEP.items() if k != "language_embedding"},
        _FILE,
    )
