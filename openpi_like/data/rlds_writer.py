"""Writes episodes as RLDS: a TFDS directory that any RLDS reader opens (`tfds.builder_from_directory`).

TensorFlow Datasets does the writing, so this needs the `rlds` extra. One record is one episode; a step holds
`observation`, `action`, `reward`, `discount`, `is_first`, `is_last`, `is_terminal` and the instruction, under the keys
that the robot declares. Images are stored as the encoded bytes they come as. What a robot does not store, but reads
out of something else (a camera of the past, a command derived from states), is not written either.
"""

import dataclasses
import itertools
import os
import shutil
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
from jaxtyping import Float

from openpi_like.data.rlds_tables import MAX_RECORD_BYTES
from openpi_like.robots.robot import ActionField, Camera, Robot, StateField

VERSION = "1.0.0"
_METADATA_KINDS = (str, bool, int, float)
_FORMATS = {b"\x89PNG": "png", b"\xff\xd8\xff": "jpeg"}


@dataclasses.dataclass(frozen=True)
class Episode:
    """One episode of T steps: observations, and the action taken after each of them.

    images: camera name -> T images, encoded as PNG or JPEG, each camera in one of them throughout a dataset.
    state, action: robot space, in the order of `Robot.state` and `Robot.action`. A robot that plans has a plan at each
        step, (T, A, J); how much of it is known, where the robot says that some are not, is one of `steps`.
    prompt: of the whole episode, or of each step.
    metadata: strings, bools, ints and floats; the same keys in every episode of a dataset.
    steps: further numbers of each step, arrays (T, ...) by key, and texts, arrays (T,); the same keys, types and shapes
        in every episode.
    """

    images: Mapping[str, list[bytes]]
    state: Float[np.ndarray, "T Ds"]
    action: Float[np.ndarray, "T *A J"]
    prompt: str | Sequence[str]
    success: bool
    metadata: Mapping[str, str | bool | int | float]
    steps: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)


def dataset_directory(root: Path, name: str, version: str = VERSION) -> Path:
    """Returns where dataset `name` lies under `root`: the directory that TFDS opens."""
    return root / name / version


def write_rlds(
    root: Path,
    name: str,
    robot: Robot,
    splits: Mapping[str, Iterable[Episode]],
    *,
    description: str,
    metadata: Mapping[str, Any],
    version: str = VERSION,
    episodes_per_shard: int = 32,
    file_format: str = "tfrecord",
    on_episode: Callable[[], None] = lambda: None,
) -> Path:
    """Writes a dataset and returns its directory, `root/name/version`.

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

    final = dataset_directory(root, name, version)
    if final.exists():
        raise FileExistsError(f"{final} exists; delete it to write the dataset again, or write under another name")
    part = final.with_name(f"{version}.incomplete")
    shutil.rmtree(part, ignore_errors=True)  # left by a run that was killed
    part.mkdir(parents=True)

    writer, layout = None, None
    for split, episodes in splits.items():
        count = 0
        for episode in episodes:
            where = f"episode {count} of split {split!r}"
            _check(episode, robot, where)
            own = _layout(episode)
            layout = layout or own
            if own != layout:
                differ = [f"{what} {own[what]}, {layout[what]}" for what in own if own[what] != layout[what]]
                raise ValueError(f"{where} differs from the first episode in (here, there): {'; '.join(differ)}")
            if writer is None:
                identity = tfds.core.DatasetIdentity(
                    name=name, version=tfds.core.Version(version), data_dir=os.fspath(part), module_name=__name__
                )
                info = tfds.core.DatasetInfo(
                    builder=identity,
                    description=description,
                    features=_features(tfds, robot, episode),
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
    problems = _robot_problems(robot)
    for what, x, shape in (
        ("state", episode.state, (robot.robot_state_size,)),
        ("action", episode.action, (*_entries(robot), robot.robot_action_size)),
    ):
        if x.shape != (steps, *shape):
            problems.append(f"{what} has shape {x.shape}, expected {(steps, *shape)}")
        elif not np.all(np.isfinite(x)):
            problems.append(f"{what} has values that are not finite")
    if steps == 0:
        problems.append("it has no steps")
    cameras = sorted(c.name for c in stored_cameras(robot))
    if sorted(episode.images) != cameras:
        problems.append(f"cameras {sorted(episode.images)}, expected {cameras}")
    for camera in stored_cameras(robot):
        frames = episode.images.get(camera.name)
        if frames is None:
            continue
        if len(frames) != steps:
            problems.append(f"camera {camera.name!r} has {len(frames)} images, expected {steps}")
        if len({image_format(f) for f in frames} - {None}) != 1 or None in map(image_format, frames):
            problems.append(f"camera {camera.name!r} has images that are not all PNG, or not all JPEG")
            continue
        sizes = {image_size(f) for f in frames}
        expected = (camera.height, camera.width)
        if any(want not in (None, got) for size in sizes for got, want in zip(size, expected, strict=True)):
            problems.append(
                f"camera {camera.name!r} has images of (height, width) {sorted(sizes)}, expected {expected}"
            )
    if not isinstance(episode.prompt, str) and len(episode.prompt) != steps:
        problems.append(f"{len(episode.prompt)} prompts, expected one, or {steps}")
    problems += [f"{k!r} has {len(x)} steps, expected {steps}" for k, x in episode.steps.items() if len(x) != steps]
    for key, x in episode.steps.items():
        if x.dtype.kind in "OSV" or (_is_text(x) and x.ndim != 1):
            problems.append(f"{key!r} is of {x.dtype} {x.shape}, expected numbers, or one text (str) a step")
    size = sum(len(frame) for frames in episode.images.values() for frame in frames)
    if size > MAX_RECORD_BYTES:
        problems.append(
            f"its images are {size / 2**30:.1f} GiB, and one record, an episode, holds less than 2; store them as "
            "JPEG, or smaller, or record shorter episodes"
        )
    if robot.plan is not None and robot.plan.known not in (None, *episode.steps):
        problems.append(f"no steps[{robot.plan.known!r}], expected how many entries of each plan are known")
    for things in robot.entities:
        of = {things.key: (steps, things.count, things.size), things.mask_key: (steps, things.count)}
        problems += [
            f"steps[{key!r}], of entities {things.name!r}, has shape {got}, expected {shape}"
            for key, shape in of.items()
            if key is not None and (got := np.shape(episode.steps.get(key, np.zeros(0)))) != shape
        ]
    kinds = {k: type(v).__name__ for k, v in episode.metadata.items() if not isinstance(v, _METADATA_KINDS)}
    if kinds:
        problems.append(f"metadata of types {kinds}, expected str, bool, int or float")
    if problems:
        raise ValueError(f"{where} does not fit robot {robot.name!r}: " + "; ".join(problems))


def image_size(data: bytes) -> tuple[int, int]:
    """Returns height and width of an encoded image, PNG or JPEG, from its header.

    Raises:
        ValueError: it is neither.
    """
    found = image_format(data)
    if found == "png":  # width and height are big-endian 32-bit integers from byte 16 on
        width, height = struct.unpack(">II", data[16:24])
        return height, width
    if found == "jpeg":
        height, width, *_ = simplejpeg.decode_jpeg_header(data)
        return height, width
    raise ValueError(f"neither PNG nor JPEG: {len(data)} bytes that begin with {data[:8]!r}")


def image_format(data: bytes) -> str | None:
    """Returns "png", "jpeg", or None for bytes that are neither."""
    return next((name for magic, name in _FORMATS.items() if data.startswith(magic)), None)


def stored_cameras(robot: Robot) -> list[Camera]:
    """Returns the cameras whose images a dataset holds: those of the past show what another one has stored."""
    return [c for c in robot.cameras if not c.steps_back]


def stored_actions(robot: Robot) -> list[ActionField]:
    """Returns the action fields that a dataset holds: others are read out of its states."""
    states = {f.key for f in robot.state}
    return [f for f in robot.action if f.next_step is None and f.key not in states]


def _entries(robot: Robot) -> tuple[int, ...]:
    """Axes of the action of one step, before its dims: of a plan, its entries."""
    return () if robot.plan is None else (robot.action_horizon,)


def _robot_problems(robot: Robot) -> list[str]:
    """Returns why this robot's state, which is all that is written of it, does not tell what its actions read."""
    written = {(f.key, i) for f in robot.state for i in range(f.start, f.start + f.size)}
    stored = {f.name for f in stored_actions(robot)}
    return [
        f"action field {f.name!r} is read out of {f.key!r} from {f.start} on, which is not part of the robot's state; "
        "add it there"
        for f in robot.action
        if f.name not in stored and not {(f.key, i) for i in range(f.start, f.start + f.size)} <= written
    ]


def _layout(episode: Episode) -> dict[str, Any]:
    """What has to be the same in all episodes of a dataset."""
    return {
        "images": {name: image_format(frames[0]) for name, frames in episode.images.items()},
        "metadata": {k: type(v).__name__ for k, v in episode.metadata.items()},
        "steps": {k: ("text" if _is_text(x) else str(x.dtype), x.shape[1:]) for k, x in episode.steps.items()},
    }


def _features(tfds: Any, robot: Robot, episode: Episode) -> Any:
    step: dict[str, Any] = {
        "reward": tfds.features.Scalar(np.float32),
        "discount": tfds.features.Scalar(np.float32),
        "is_first": tfds.features.Scalar(np.bool_),
        "is_last": tfds.features.Scalar(np.bool_),
        "is_terminal": tfds.features.Scalar(np.bool_),
    }
    for key in _texts(robot):
        _put(step, key, tfds.features.Text())
    for camera in stored_cameras(robot):
        shape, encoding = (camera.height, camera.width, 3), image_format(episode.images[camera.name][0])
        _put(step, camera.key, tfds.features.Image(shape=shape, dtype=np.uint8, encoding_format=encoding))
    fields: tuple[tuple[Sequence[StateField], tuple[int, ...]], ...]
    fields = ((robot.state, ()), (stored_actions(robot), _entries(robot)))
    for of, entries in fields:
        for key, size in _sizes(of).items():
            _put(step, key, tfds.features.Tensor(shape=(*entries, size), dtype=np.float32))
    for key, x in episode.steps.items():
        text = tfds.features.Text() if _is_text(x) else None
        _put(step, key, text or tfds.features.Tensor(shape=x.shape[1:], dtype=x.dtype.type))
    # Records hold floats of 32 bits, whatever else is declared.
    kinds = {str: tfds.features.Text(), bool: np.bool_, int: np.int64, float: np.float32}
    return tfds.features.FeaturesDict(
        {
            "steps": tfds.features.Dataset(step),
            "episode_metadata": {k: kinds[type(v)] for k, v in episode.metadata.items()},
        }
    )


def _is_text(x: np.ndarray) -> bool:
    return x.dtype.kind == "U"


def _texts(robot: Robot) -> tuple[str, ...]:
    """Keys of the instruction; alternatives are there, and empty."""
    return () if robot.language_key is None else (robot.language_key, *robot.language_alternatives)


def _example(robot: Robot, episode: Episode) -> dict[str, Any]:
    steps = len(episode.action)
    ends = itertools.accumulate(f.size for f in robot.action)
    commands = [episode.action[..., end - f.size : end] for f, end in zip(robot.action, ends, strict=True)]
    fields = stored_actions(robot)
    arrays = _pack(robot.state, episode.state)
    if stored := [x for f, x in zip(robot.action, commands, strict=True) if f in fields]:
        arrays |= _pack(fields, np.concatenate(stored, axis=-1))
    prompts = [episode.prompt] * steps if isinstance(episode.prompt, str) else episode.prompt
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
        for key in _texts(robot):
            _put(step, key, prompts[t] if key == robot.language_key else "")
        for camera in stored_cameras(robot):
            _put(step, camera.key, episode.images[camera.name][t])
        for key, x in (arrays | dict(episode.steps)).items():
            _put(step, key, str(x[t]) if _is_text(x) else x[t])
        out.append(step)
    return {"steps": out, "episode_metadata": dict(episode.metadata)}


def _sizes(fields: Sequence[StateField]) -> dict[str, int]:
    """RLDS key -> number of values that the fields take there."""
    sizes: dict[str, int] = {}
    for f in fields:
        sizes[f.key] = max(sizes.get(f.key, 0), f.start + f.size)
    return sizes


def _pack(fields: Sequence[StateField], x: np.ndarray) -> dict[str, np.ndarray]:
    """Splits (T, ..., all fields) into one array per RLDS key."""
    packed = {key: np.zeros((*x.shape[:-1], size), np.float32) for key, size in _sizes(fields).items()}
    start = 0
    for f in fields:
        packed[f.key][..., f.start : f.start + f.size] = x[..., start : start + f.size]
        start += f.size
    return packed


def _put(tree: dict[str, Any], path: str, value: Any) -> None:
    *parents, last = path.split("/")
    for parent in parents:
        tree = tree.setdefault(parent, {})
    tree[last] = value
