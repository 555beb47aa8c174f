"""Writes a small dataset with the schema of a published one: what its numbers, texts and colours are."""

import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from tests.data.oxe_words import Columns, Published

LENGTHS = (4, 1, 6)  # the second episode is a failure, where a dataset says so


def feature(tfds: Any, word: str) -> Any:
    """The TFDS feature that a word of `oxe_words` stands for."""
    f = tfds.features
    kind, _, size = word.partition(" ")
    if size:
        height, width = map(int, size.split("x"))
        if kind == "map":
            return f.Tensor(shape=(height, width), dtype=np.float32)
        if kind == "depth":
            return f.Image(shape=(height, width, 1), dtype=np.float32)
        return f.Image(shape=(height, width, 3), encoding_format=None if kind == "image" else kind)
    if kind == "t":
        return f.Text()
    dtype = {"f": np.float32, "z": np.float32, "d": np.float64, "l": np.int64, "u": np.uint8, "b": np.bool_}
    shape = tuple(int(n) for n in word[1:].split("x")) if word[1:] else ()
    return f.Tensor(shape=shape, dtype=dtype.get(word[0], np.int32), encoding="zlib" if word[0] == "z" else "none")


def colour(episode: int, step: int, camera: int) -> np.ndarray:
    return np.array([20 + 30 * episode + 10 * step, 200 - 25 * camera, 30 + 40 * camera], np.uint8)


def said(name: str, episode: int, key: str) -> str:
    """An instruction; the first two of DROID's first episode are empty."""
    if name == "droid" and episode == 0 and key in ("language_instruction", "language_instruction_2"):
        return ""
    return f"do thing {episode} ({key[-1]}) ü"


def value(
    name: str, word: str, key: str, rng: np.random.Generator, episode: int, step: int = 0, camera: int = 0
) -> Any:
    """A value of one feature, before `fix`."""
    kind, _, size = word.partition(" ")
    if size:
        height, width = map(int, size.split("x"))
        if kind in ("map", "depth"):
            return np.zeros((height, width, 1) if kind == "depth" else (height, width), np.float32)
        return np.broadcast_to(colour(episode, step, camera), (height, width, 3)).copy()
    if kind == "t":
        return said(name, episode, key)
    if kind[0] == "c":
        text = said(name, episode, key)
        return np.array([ord(c) for c in text] + [0] * (int(kind[1:]) - len(text)), np.int32)
    shape = tuple(int(n) for n in word[1:].split("x")) if word[1:] else ()
    if kind[0] in "buli":
        return rng.integers(0, 2, shape).astype({"b": np.bool_, "u": np.uint8, "l": np.int64, "i": np.int32}[kind[0]])
    return rng.uniform(-1, 1, shape).astype(np.float64 if kind[0] == "d" else np.float32)


def nested(features: dict[str, Any], make: Any, path: str = "") -> dict[str, Any]:
    """`make(word, path)` for every leaf."""
    return {
        k: nested(v, make, f"{path}{k}/") if isinstance(v, dict) else make(v, f"{path}{k}") for k, v in features.items()
    }


def write(tfds: Any, directory: Path, name: str, published: Published) -> list[Columns]:
    """Writes three episodes; returns the columns of each, by key."""
    steps = {"observation": published.observation, "action": published.action, **published.more}
    cameras = [key for key, word in published.observation.items() if word.startswith(("jpeg", "png", "image"))]
    rng = np.random.default_rng(3)
    episodes, columns = [], []
    for e, length in enumerate(LENGTHS):
        rows = []
        for t in range(length):

            def make(word: str, path: str, e: int = e, t: int = t) -> Any:
                camera = cameras.index(path.rpartition("observation/")[2]) if " " in word and word[0] in "jpi" else 0
                return fix(name, path, value(name, word, path, rng, e, t, camera), rng)

            rows.append(nested(steps, make))
        metadata = nested(published.episode, lambda word, path, e=e: value(name, word, path, rng, e))
        if name == "kuka":
            metadata["success"] = e != 1
        if name == "bc_z":
            for row in rows:
                row["observation"]["episode_success"] = np.float32(e != 1)
        if name == "droid":
            metadata["episode_metadata"]["file_path"] = f"/data/{'failure' if e == 1 else 'success'}/{e}"
        episodes.append({"steps": rows, **metadata})
        flat = [_flat(row) for row in rows]
        columns.append({k: np.stack([row[k] for row in flat]) for k in flat[0] if not isinstance(flat[0][k], str)})
    features = {"steps": tfds.features.Dataset(nested(steps, lambda w, _: feature(tfds, w)))}
    features |= nested(published.episode, lambda w, _: feature(tfds, w))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        directory.mkdir(parents=True)
        identity = tfds.core.DatasetIdentity(
            name=name, version=tfds.core.Version(directory.name), data_dir=os.fspath(directory), module_name=__name__
        )
        info = tfds.core.DatasetInfo(builder=identity, features=tfds.features.FeaturesDict(features))
        writer = tfds.core.SequentialWriter(info, 100, file_format="tfrecord")
        writer.initialize_splits(["train"])
        writer.add_examples({"train": episodes})
        writer.close_all()
    return columns


def fix(name: str, path: str, x: Any, rng: np.random.Generator) -> Any:
    """Makes quaternions of unit length, and gripper commands those that a dataset has."""
    quaternions = {
        "observation/base_pose_tool_reached": 3,
        "observation/clip_function_input/base_pose_tool_reached": 3,
        "observation/end_effector_cartesian_pos": 3,
        "observation/end_effector_state": 3,
        "observation/eef_pose": 3,
        "observation/robot_state": 9,
        "observation/state": 3 if name.startswith(("furniture", "austin_sailor")) else None,
        "action": 3 if name.startswith(("furniture", "iamlab")) else None,
    }
    start = quaternions.get(path)
    if start is not None and len(x) > 6:
        x[start : start + 4] /= np.linalg.norm(x[start : start + 4])
    if path == "action/gripper_closedness_action":
        relative = name not in ("viola", "roboturk")
        return np.asarray(rng.choice([-1.0, 0.0, 1.0] if relative else [0.0, 1.0], np.shape(x)), np.float32)
    if name == "bridge_dataset" and path == "action":
        x[6] = rng.choice([0.0, 0.3, 0.6, 1.0])
    return x


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for k, v in tree.items():
        flat |= _flat(v, f"{prefix}{k}/") if isinstance(v, dict) else {f"{prefix}{k}": v}
    return flat
