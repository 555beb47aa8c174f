"""Rewrites a dataset with smaller images, once, so that every later epoch reads and decodes less.

The result is a TFDS directory of the same name, version, splits and shards. Only colour images of steps change: one
larger than a box is shrunk to fit into it, its aspect ratio kept, and all are stored in one encoding; an image that is
small enough and has that encoding already is copied. Every other feature is copied byte for byte.

One shard is one task: it is written beside, then renamed, and a small file next to it says so. A run that was stopped
goes on with what is missing. `dataset_info.json` comes last, so a directory that has one is complete.
"""

import contextlib
import dataclasses
import json
import multiprocessing
import os
import struct
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import cv2

from openpi_like.data import arrayrecord, files, tfrecord
from openpi_like.data.files import Location
from openpi_like.data.images import ENCODINGS, decode, encode, encoding
from openpi_like.data.layouts.tfds import read_schema, read_split, split_names
from openpi_like.data.schema import DatasetError, Feature
from openpi_like.data.storage import RecordError

_DONE = ".prepared"  # what is done, in the directory that is written
_PART = ".part-"  # begins the names of files that are not complete
_SHOWN = 20

Progress = Callable[[int, int], None]


@dataclasses.dataclass(frozen=True)
class Prepare:
    """height, width: the box, in pixels. encoding: "jpeg" or "png". quality: of JPEG, 4:2:0, 1 to 100.

    file_format: "tfrecord" or "array_record".
    """

    height: int = 256
    width: int = 256
    encoding: str = "jpeg"
    quality: int = 95
    file_format: str = "tfrecord"

    def __post_init__(self) -> None:
        problems = []
        if self.height < 1 or self.width < 1:
            problems.append(f"box of {self.height} x {self.width} pixels, expected at least 1 x 1")
        if self.encoding not in ENCODINGS:
            problems.append(f"encoding {self.encoding!r}, expected 'jpeg' or 'png'")
        if not 1 <= self.quality <= 100:
            problems.append(f"quality {self.quality}, expected 1 to 100")
        if self.file_format not in ("tfrecord", "array_record"):
            problems.append(f"file_format {self.file_format!r}, expected 'tfrecord' or 'array_record'")
        if problems:
            raise ValueError("Prepare: " + "; ".join(problems))

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Returns the height and width that an image of this size gets."""
        scale = min(self.height / height, self.width / width, 1.0)
        return max(1, round(height * scale)), max(1, round(width * scale))

    def image(self, data: bytes) -> bytes:
        """Returns the encoded image as it is to be stored; no bytes, which some datasets use for no image, stay so.

        Raises:
            ValueError: these bytes are not an image.
        """
        if not data:
            return data
        image = decode(data)
        size = self.size(*image.shape[:2])
        if size == image.shape[:2] and encoding(data) == self.encoding:
            return data
        if size != image.shape[:2]:
            image = cv2.resize(image, size[::-1], interpolation=cv2.INTER_AREA)
        return encode(image, self.encoding, self.quality)


@dataclasses.dataclass(frozen=True)
class Task:
    """One shard. images: names of the features that change. expected: records. stamp: of the file it was made from."""

    source: Location
    source_format: str
    target: Path
    expected: int
    stamp: str
    images: tuple[str, ...]
    config: Prepare

    @property
    def done(self) -> Path:
        """The file that says that this shard is complete."""
        return self.target.parent / _DONE / f"{self.target.name}.json"


@dataclasses.dataclass(frozen=True)
class Done:
    """What was written: records, bytes of all records, and of their images before and after."""

    records: int
    bytes: int
    images_before: int
    images_after: int
    stamp: str


# ---- Records ---------------------------------------------------------------------------------------------------------


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _field(number: int, payload: bytes) -> bytes:
    """One length-delimited protobuf field."""
    return _varint(number << 3 | 2) + _varint(len(payload)) + payload


def rewrite_example(data: bytes, images: Sequence[str], change: Callable[[bytes], bytes]) -> tuple[bytes, int, int]:
    """Returns a `tf.train.Example` with the values of some features changed, and their bytes before and after.

    The order of features and the bytes of all others stay.

    Raises:
        RecordError: it is not an Example, or lacks one of the features.
        ValueError: raised by `change`.
    """
    features = tfrecord.parse_example(data)
    missing = sorted(set(images) - set(features))
    if missing:
        raise RecordError(f"has no {', '.join(missing)}", resumable=True)
    before = after = 0
    entries = []
    for name, span in features.items():
        feature = data[slice(*span)]
        if name in images:
            old = [data[a:b] for a, b in tfrecord.read_bytes(data, span)]
            new = [change(value) for value in old]
            before, after = before + sum(map(len, old)), after + sum(map(len, new))
            feature = _field(1, b"".join(_field(1, value) for value in new))
        entries.append(_field(1, _field(1, name.encode()) + _field(2, feature)))
    return _field(1, b"".join(entries)), before, after


def _records(task: Task) -> Iterator[bytes | RecordError]:
    if task.source_format == "array_record":
        return arrayrecord.read_records(task.source)
    return (payload for _, payload in tfrecord.read_records(task.source))


class _TFRecordWriter:
    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")

    def write(self, payload: bytes) -> None:
        length = struct.pack("<Q", len(payload))
        crcs = (struct.pack("<I", tfrecord.masked_crc(x)) for x in (length, payload))
        self._file.write(length + next(crcs) + payload + next(crcs))

    def close(self) -> None:
        with self._file:
            self._file.flush()
            os.fsync(self._file.fileno())


def _writer(path: Path, file_format: str) -> Any:
    if file_format == "tfrecord":
        return _TFRecordWriter(path)
    from array_record.python.array_record_module import ArrayRecordWriter  # not there on every system

    return ArrayRecordWriter(os.fspath(path), "group_size:1")  # as TFDS writes it


def prepare_shard(task: Task) -> list[str]:
    """Writes one shard, unless it is done; returns what is wrong, in which case nothing is written."""
    if _load_done(task) is not None:
        return []
    attempt = uuid.uuid4().hex  # Beam may make a second one while the first still runs
    part, done = (path.with_name(f"{_PART}{attempt}-{path.name}") for path in (task.target, task.done))
    problems: list[str] = []
    number = total = before = after = 0
    try:
        with contextlib.closing(_writer(part, task.config.file_format)) as writer:
            for number, record in enumerate(_records(task), 1):
                try:
                    if isinstance(record, RecordError):
                        raise record
                    payload, old, new = rewrite_example(record, task.images, task.config.image)
                except ValueError as e:
                    problems.append(f"{task.source.name}, record {number - 1}: {e}")
                    continue
                writer.write(payload)
                total, before, after = total + len(payload), before + old, after + new
        if number != task.expected:
            problems.append(f"{task.source.name} holds {number} records, dataset_info.json says {task.expected}")
        if not problems:
            part.rename(task.target)
            done.write_text(json.dumps(dataclasses.asdict(Done(number, total, before, after, task.stamp))))
            done.rename(task.done)
    except OSError as e:  # a store that does not answer, a disk that is full
        problems.append(f"{task.source.name}, after {number} records: {e}")
    for rest in (part, done):
        rest.unlink(missing_ok=True)
    return problems


def _load_done(task: Task) -> Done | None:
    if not (task.done.is_file() and task.target.is_file()):
        return None
    done = Done(**json.loads(task.done.read_text()))
    return done if done.stamp == task.stamp else None


# ---- Datasets --------------------------------------------------------------------------------------------------------


def colour_images(features: Sequence[Feature]) -> list[Feature]:
    """Returns the images that are changed; depth, masks and other images are copied."""
    return [f for f in features if f.kind == "image" and f.dtype == "uint8" and f.shape[2:] == (3,)]


def plan(source: str | Path, out: Path, config: Prepare, splits: Sequence[str] = ()) -> list[Task]:
    """Returns the shards to write, all those of some splits (default: all splits).

    The directory is made, and remembers what it is made from and how.

    Raises:
        DatasetError: the source is not a dataset; or `out` cannot be written, or is made in another way.
    """
    directory = files.locate(source)
    names = tuple(splits) or tuple(split_names(directory))
    found = [read_split(directory, name) for name in names]
    images = tuple(f"steps/{f.key}" for f in colour_images(list(read_schema(directory).steps.values())))
    if not images:
        raise DatasetError(f"{source} has no colour images, so there is nothing to prepare")
    recipe = {"source": files.absolute(directory), "splits": list(names), **dataclasses.asdict(config)}
    told = out / _DONE / "recipe.json"
    try:
        if out.is_dir() and any(out.iterdir()) and not told.is_file():
            raise DatasetError(f"{out} is not empty, and not a dataset that was begun here; give another directory")
        told.parent.mkdir(parents=True, exist_ok=True)
        if told.is_file():
            before = json.loads(told.read_text())
            changed = {k: (before.get(k), recipe[k]) for k in recipe if before.get(k) != recipe[k]}
            if changed:
                text = ", ".join(f"{k} was {old!r} and is {new!r}" for k, (old, new) in changed.items())
                raise DatasetError(f"{out} was begun in another way ({text}); give another directory, or delete it")
        told.write_text(json.dumps(recipe, indent=1))
        for part in (*out.glob(f"{_PART}*"), *told.parent.glob(f"{_PART}*")):
            part.unlink()  # of a run that was killed
    except OSError as e:
        raise DatasetError(f"cannot write {out}: {e}; give another directory") from e
    return [
        Task(
            source=shard,
            source_format=split.storage.name,
            target=out / f"{split.dataset}-{split.name}.{config.file_format}-{i:05d}-of-{len(split.shards):05d}",
            expected=expected,
            stamp=f"{stat.size} {stat.stamp}" if stat else "",
            images=images,
            config=config,
        )
        for split in found
        for i, (shard, expected, stat) in enumerate(zip(split.shards, split.lengths, split.stats, strict=True))
    ]


def write_shards(tasks: Sequence[Task], *, workers: int = 1, progress: Progress | None = None) -> None:
    """Writes all shards that are not done, in processes.

    progress: called with the shards that are done, and all of them.

    Raises:
        DatasetError: shards could not be read or written; lists what is wrong with each. The others are done.
    """
    if workers < 1:
        raise ValueError(f"workers={workers}, expected at least 1")
    problems: list[str] = []

    def finish(results: Iterator[list[str]]) -> None:
        for i, wrong in enumerate(results):
            problems.extend(wrong)
            if progress is not None:
                progress(i + 1, len(tasks))

    if workers == 1:
        finish(map(prepare_shard, tasks))
    else:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(workers, context) as pool:
            finish(f.result() for f in as_completed([pool.submit(prepare_shard, task) for task in tasks]))
    raise_problems(problems)


def raise_problems(problems: Sequence[str]) -> None:
    """Raises DatasetError unless there are none."""
    if problems:
        more = [f"... and {len(problems) - _SHOWN} more"] if len(problems) > _SHOWN else []
        text = "\n  ".join([*sorted(problems)[:_SHOWN], *more])
        raise DatasetError(
            f"{len(problems)} problems; these shards are not written:\n  {text}\n"
            "copy those that are damaged again, then run this again"
        )


def write_info(source: str | Path, out: Path, config: Prepare, tasks: Sequence[Task]) -> list[Done]:
    """Completes the dataset: features.json with the new images, dataset_info.json with the new files; returns all done.

    Raises:
        DatasetError: shards are not done.
    """
    results = [_load_done(task) for task in tasks]
    done = [d for d in results if d is not None]
    if len(done) < len(tasks):
        raise DatasetError(f"{len(tasks) - len(done)} of {len(tasks)} shards are not written; run it again")
    directory = files.locate(source)
    splits = json.loads((out / _DONE / "recipe.json").read_text())["splits"]
    features = json.loads(files.read_text(directory / "features.json"))
    steps = features["featuresDict"]["features"]["steps"]["sequence"]["feature"]
    keys = {f.key for f in colour_images(list(read_schema(directory).steps.values()))}
    _change_images(steps, "", keys, config)
    (out / "features.json").write_text(json.dumps(features, indent=4))
    info = json.loads(files.read_text(directory / "dataset_info.json"))
    info["fileFormat"] = config.file_format
    info["splits"] = [s for s in info["splits"] if s["name"] in splits]
    for split in info["splits"]:
        stem = f"{info['name']}-{split['name']}.{config.file_format}-"
        size = sum(d.bytes for task, d in zip(tasks, done, strict=True) if task.target.name.startswith(stem))
        split["filepathTemplate"] = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
        split["numBytes"] = str(size)
    part = out / f"{_PART}dataset_info.json"
    part.write_text(json.dumps(info, indent=2))
    part.rename(out / "dataset_info.json")
    return done


def _change_images(node: dict[str, Any], path: str, keys: set[str], config: Prepare) -> None:
    """Writes the new encoding and shape of images into a node of features.json and those below it."""
    for name, child in node.get("featuresDict", {}).get("features", {}).items():
        _change_images(child, f"{path}/{name}" if path else name, keys, config)
    if "image" not in node or path not in keys:
        return
    node["image"]["encodingFormat"] = config.encoding
    shape = node["image"].get("shape", {}).get("dimensions")
    if shape and all(d is not None and int(d) > 0 for d in shape[:2]):
        shape[:2] = map(str, config.size(int(shape[0]), int(shape[1])))
