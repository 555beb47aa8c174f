"""The words in which `oxe_schemas` writes down what is published of a dataset.

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


STATE = "observation/state"
GOOGLE_STEP = {"is_first": "b", "is_last": "b", "is_terminal": "b", "reward": "f"}
STEP = {**GOOGLE_STEP, "discount": "f", "language_embedding": "f512", "language_instruction": "t"}
FILE = {"episode_metadata": {"file_path": "t"}}
SAID = {"natural_language_embedding": "f512", "natural_language_instruction": "t"}
SAID_AT = "observation/natural_language_instruction"
RT1_ACTION = {
    "base_displacement_vector": "f2",
    "base_displacement_vertical_rotation": "f1",
    "gripper_closedness_action": "f1",
    "rotation_delta": "f3",
    "terminate_episode": "i3",
    "world_vector": "f3",
}


def google_action(gripper: str, kind: str) -> dict[str, str]:
    return {gripper: kind, "rotation_delta": "f3", "terminate_episode": "f", "world_vector": "f3"}


def moves(c: Columns) -> np.ndarray:
    return stack(c["action/world_vector"], c["action/rotation_delta"])


def seven(open_: float, closed: float) -> Callable[[Columns], np.ndarray]:
    return lambda c: stack(c["action"][:, :6], (c["action"][:, 6] - closed) / (open_ - closed))


def pose_gripper(pose: str, gripper: str) -> Callable[[Columns], np.ndarray]:
    return lambda c: stack(c[pose][:, :3], six(c[pose][:, 3:7]), 1 - c[gripper])


def shown(*keys: str, bgr: tuple[str, ...] = ()) -> dict[str, tuple[str, bool]]:
    """Slots from "slot=key" words."""
    pairs = [k.split("=") for k in keys]
    return {slot: (f"observation/{key}", key in bgr) for slot, key in pairs}
