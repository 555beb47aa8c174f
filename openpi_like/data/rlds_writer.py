"""Writes episodes as RLDS: a TFDS directory that any RLDS reader opens (`tfds.builder_from_directory`).

TensorFlow Datasets does the writing, so this needs the `rlds` extra. One record is one episode; a step holds
`observation`, `action`, `reward`, `discount`, `is_first`, `is_last`, `is_terminal` and the instruction, under the keys
that the robot declares. Images are stored as the encoded bytes they come as.
"""

import dataclasses
import os
import shutil
import struct
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from openpi_like.robots.robot import Robot, StateField

VERSION = "1.0.0"
_METADATA_KINDS = (str, bool, int, float)


@dataclasses.dataclass(frozen=True)
class Episode:
    """One episode of T steps: observations, and the action taken after each of them.

    images: camera name -> T images, encoded as PNG.
    state, action: robot space, in the order of `Robot.state` and `Robot.action`.
    metadata: strings, bools, ints and floats; the same keys in every episode of a dataset.
    """

    images: Mapping[str, list[bytes]]
    state: Float[np.ndarray, "T Ds"]
    action: Float[np.ndarray, "T J"]
    prompt: str
    success: bool
    metadata: Mapping[str, str | bool | int | float]


def dataset_directory(root: Path, name: str) -> Path:
    """Returns where dataset `name` lies under `root`: the directory that TFDS opens."""
    return root / name / VERSION


def write_rlds(
    root: Path,
    name: str,
    robot: Robot,
    splits: Mapping[str, Iterable[Episode]],
    *,
    description: str,
    metadata: Mapping[str, Any],
    episodes_per_shard: int = 32,
    file_format: str = "tfrecord",
    on_episode: Callable[[], None] = lambda: None,
) -> Path:
    """Writes a dataset and returns its directory, `root/name/1.0.0`.

    It appears there at once when it is complete: it is written beside, then renamed.

    Args:
        splits: split name -> its episodes, in the order in which they are stored.
        description, metadata: stored with the dataset, readable without its records; `metadata` is JSON-ready.
        file_format: "tfrecord", or "array_record" for readers that need random access.
        on_episode: called after every episode written.

    Raises:
        FileExistsError: there is such a dataset already.
        ValueError: an episode does not fit the robot, or a split is empty.
    """
    import tensorflow_datasets as tfds  # seconds to import, and only this function needs it

    final = dataset_directory(root, name)
    if final.exists():
        raise FileExistsError(f"{final} exists; delete it to write the dataset again, or write under another name")
    part = final.with_name(f"{VERSION}.incomplete")
    shutil.rmtree(part, ignore_errors=True)  # left by a run that was killed
    part.mkdir(parents=True)

    writer, kinds = None, None
    for split, episodes in splits.items():
        count = 0
        for episode in episodes:
            where = f"episode {count} of split {split!r}"
            _check(episode, robot, where)
            own = {k: type(v).__name__ for k, v in episode.metadata.items()}
            kinds = kinds or own
            if own != kinds:
                raise ValueError(f"{where}: metadata {own} are not those of the first episode, {kinds}")
            if writer is None:
                identity = tfds.core.DatasetIdentity(
                    name=name, version=tfds.core.Version(VERSION), data_dir=os.fspath(part), module_name=__name__
                )
                info = tfds.core.DatasetInfo(
                    builder=identity,
                    description=description,
                    features=_features(tfds, robot, episode.metadata),
                    metadata=tfds.core.MetadataDict(dict(metadata)),
                )
                writer = tfds.core.SequentialWriter(info, episodes_per_shard, file_format=file_format)
                writer.initialize_splits(list(splits))
            writer.add_examples({split: [_example(robot, episode)]})
            count += 1
            on_episode()
        if count == 0:
            raise ValueError(f"split {split!r} has no episodes; leave it out, or record some")
    if writer is None:
        raise ValueError("no splits given, expected at least one with episodes")
    writer.close_all()
    part.rename(final)
    return final


def _check(episode: Episode, robot: Robot, where: str) -> None:
    steps = len(episode.action)
    problems = []
    for what, x, size in (
        ("state", episode.state, robot.robot_state_size),
        ("action", episode.action, robot.robot_action_size),
    ):
        if x.shape != (steps, size):
            problems.append(f"{what} has shape {x.shape}, expected ({steps}, {size})")
        elif not np.all(np.isfinite(x)):
            problems.append(f"{what} has values that are not finite")
    if steps == 0:
        problems.append("it has no steps")
    cameras = sorted(c.name for c in robot.cameras)
    if sorted(episode.images) != cameras:
        problems.append(f"cameras {sorted(episode.images)}, expected {cameras}")
    for camera in robot.cameras:
        frames = episode.images.get(camera.name)
        if frames is None:
            continue
        if len(frames) != steps:
            problems.append(f"camera {camera.name!r} has {len(frames)} images, expected {steps}")
        if not all(f.startswith(b"\x89PNG") for f in frames):
            problems.append(f"camera {camera.name!r} has images that are not PNG")
            continue
        # The header of a PNG has width and height as big-endian 32-bit integers from byte 16 on.
        sizes = {struct.unpack(">II", f[16:24])[::-1] for f in frames}
        expected = (camera.height, camera.width)
        if any(want not in (None, got) for size in sizes for got, want in zip(size, expected, strict=True)):
            problems.append(
                f"camera {camera.name!r} has images of (height, width) {sorted(sizes)}, expected {expected}"
            )
    kinds = {k: type(v).__name__ for k, v in episode.metadata.items() if not isinstance(v, _METADATA_KINDS)}
    if kinds:
        problems.append(f"metadata of types {kinds}, expected str, bool, int or float")
    if problems:
        raise ValueError(f"{where} does not fit robot {robot.name!r}: " + "; ".join(problems))


def _features(tfds: Any, robot: Robot, metadata: Mapping[str, Any]) -> Any:
    step: dict[str, Any] = {
        "reward": tfds.features.Scalar(np.float32),
        "discount": tfds.features.Scalar(np.float32),
        "is_first": tfds.features.Scalar(np.bool_),
        "is_last": tfds.features.Scalar(np.bool_),
        "is_terminal": tfds.features.Scalar(np.bool_),
    }
    if robot.language_key is not None:
        _put(step, robot.language_key, tfds.features.Text())
    for camera in robot.cameras:
        shape = (camera.height, camera.width, 3)
        _put(step, camera.key, tfds.features.Image(shape=shape, dtype=np.uint8, encoding_format="png"))
    for fields in (robot.state, robot.action):
        for key, size in _sizes(fields).items():
            _put(step, key, tfds.features.Tensor(shape=(size,), dtype=np.float32))
    kinds = {str: tfds.features.Text(), bool: np.bool_, int: np.int64, float: np.float32}
    return tfds.features.FeaturesDict(
        {
            "steps": tfds.features.Dataset(step),
            "episode_metadata": {k: kinds[type(v)] for k, v in metadata.items()},
        }
    )


def _example(robot: Robot, episode: Episode) -> dict[str, Any]:
    steps = len(episode.action)
    arrays = _pack(robot.state, episode.state) | _pack(robot.action, episode.action)
    out = []
    for t in range(steps):
        last = t == steps - 1
        done = last and episode.success
        step: dict[str, Any] = {
            "reward": np.float32(done),
            "discount": np.float32(1.0),
            "is_first": t == 0,
            "is_last": last,
            "is_terminal": done,
        }
        if robot.language_key is not None:
            _put(step, robot.language_key, episode.prompt)
        for camera in robot.cameras:
            _put(step, camera.key, episode.images[camera.name][t])
        for key, x in arrays.items():
            _put(step, key, x[t])
        out.append(step)
    return {"steps": out, "episode_metadata": dict(episode.metadata)}


def _sizes(fields: tuple[StateField, ...]) -> dict[str, int]:
    """RLDS key -> number of values that the fields take there."""
    sizes: dict[str, int] = {}
    for f in fields:
        sizes[f.key] = max(sizes.get(f.key, 0), f.start + f.size)
    return sizes


def _pack(fields: tuple[StateField, ...], x: np.ndarray) -> dict[str, np.ndarray]:
    """Splits (T, all fields) into one array per RLDS key."""
    packed = {key: np.zeros((len(x), size), np.float32) for key, size in _sizes(fields).items()}
    start = 0
    for f in fields:
        packed[f.key][:, f.start : f.start + f.size] = x[:, start : start + f.size]
        start += f.size
    return packed


def _put(tree: dict[str, Any], path: str, value: Any) -> None:
    *parents, last = path.split("/")
    for parent in parents:
        tree = tree.setdefault(parent, {})
    tree[last] = value
