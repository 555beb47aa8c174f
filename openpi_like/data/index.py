"""The index of one split: where every image lies, and everything else as columns.

One pass over the records builds it; afterwards it is memory-mapped, so opening it costs nothing and processes share it.
It is kept in a directory whose name carries a fingerprint of the files it was built from:

    index.json                  name, shards, schema, tables of texts, what was left out or skipped
    step/<column>.npy           numeric fields (N, *shape), texts as ids (N,), N = steps of all episodes
    image/<column>.npy          (N, 2) int64: byte offset in the shard file and length of the encoded image
    episode/<column>.npy        fields of whole episodes (E, *shape)
    place/<column>.npy          start (E + 1,), shard (E,) and record (E,) of the episodes
"""

import dataclasses
import hashlib
import json
import logging
import math
import shutil
import tempfile
import time
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from openpi_like.data import tfrecord
from openpi_like.data.schema import DatasetError, Feature, Schema, Split, read_schema, read_split

INDEX_VERSION = 1
# Step fields with more values than this (sentence embeddings, point clouds) would dwarf the rest of the index.
MAX_STEP_VALUES = 256
SHOWN_RECORDS = 50  # damaged records listed in one message

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Texts:
    """A text field: `table[ids[i]]` is the text of step (or episode) i."""

    ids: np.ndarray
    table: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class FrameIndex:
    """The index of one split. N steps in E episodes; all arrays are read-only and memory-mapped.

    columns: key -> (N, *shape). images: key -> (N, 2) offset and length in the shard. texts: key -> ids (N,).
    episode_columns, episode_texts: the same for fields of whole episodes, first axis E.
    episode_start: (E + 1,), first step of each episode. episode_shard, episode_record: (E,), where it is stored.
    left_out: key -> why a field is not in the index. skipped: damaged records, when some are tolerated.
    """

    split: Split
    schema: Schema
    columns: dict[str, np.ndarray]
    images: dict[str, np.ndarray]
    texts: dict[str, Texts]
    episode_columns: dict[str, np.ndarray]
    episode_texts: dict[str, Texts]
    episode_start: np.ndarray
    episode_shard: np.ndarray
    episode_record: np.ndarray
    left_out: dict[str, str]
    skipped: tuple[str, ...]

    @property
    def steps(self) -> int:
        """N, steps of all episodes."""
        return int(self.episode_start[-1])

    @property
    def episodes(self) -> int:
        """E."""
        return len(self.episode_shard)

    def where(self, step: int) -> str:
        """Returns a description of one step for error messages: dataset, episode, step, file and record."""
        e = int(np.searchsorted(self.episode_start, step, side="right")) - 1
        shard = self.split.shards[self.episode_shard[e]].name
        at = step - int(self.episode_start[e])
        return f"{self.split}, episode {e}, step {at} ({shard}, record {self.episode_record[e]})"


def open_index(
    directory: str | Path, split: str, *, index_dir: str | Path | None = None, max_corrupt_fraction: float = 0.0
) -> FrameIndex:
    """Opens the index of a split, building it first where there is none or the files have changed since.

    Args:
        directory: a TFDS directory, which holds dataset_info.json.
        index_dir: where indexes are kept; default `.openpi_like_index` in `directory`.
        max_corrupt_fraction: part of the records that may be damaged; these are skipped, counted and reported.

    Raises:
        DatasetError: files are missing or damaged, or do not match the dataset's own description; lists all of it.
    """
    directory = Path(directory)
    found = read_split(directory, split)
    schema = read_schema(directory)
    root = Path(index_dir) if index_dir is not None else directory / ".openpi_like_index"
    fingerprint = _fingerprint(found, schema)
    path = root / f"{found.dataset}-{found.version}-{split}-{_digest(fingerprint)}"
    if not (path / "index.json").is_file():
        stale = _stale(root, directory, split)
        for _, old in stale:
            changed = sorted(k for k in fingerprint if fingerprint[k] != old["fingerprint"].get(k))
            _log.warning("index of %s is stale (changed: %s), building it again", found, ", ".join(changed))
        _build(path, directory, found, schema, fingerprint, max_corrupt_fraction)
        for other, _ in stale:
            shutil.rmtree(other, ignore_errors=True)
    index = _load(path, found, schema)
    total = sum(found.lengths)
    if len(index.skipped) > max_corrupt_fraction * total:
        raise DatasetError(_corrupt_message(found, index.skipped, max_corrupt_fraction))
    if index.skipped:
        listed = _some(index.skipped)
        _log.warning("%s: %d of %d records are damaged and skipped:\n  %s", found, len(index.skipped), total, listed)
    return index


def _fingerprint(split: Split, schema: Schema) -> dict[str, Any]:
    stats = [(p.name, p.stat()) for p in split.shards]
    return {
        "index_version": INDEX_VERSION,
        "features.json": _digest([dataclasses.asdict(f) for f in (*schema.steps.values(), *schema.episode.values())]),
        "shard lengths": list(split.lengths),
        "shard names": [name for name, _ in stats],
        "shard sizes": [s.st_size for _, s in stats],
        "shard times": [s.st_mtime_ns for _, s in stats],
    }


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def _stale(root: Path, directory: Path, split: str) -> list[tuple[Path, dict[str, Any]]]:
    """Indexes in `root` of the same directory and split, built from other files."""
    found = []
    for path in sorted(root.glob("*/index.json")) if root.is_dir() else []:
        meta = json.loads(path.read_text())
        if meta["directory"] == str(directory.resolve()) and meta["split"] == split:
            found.append((path.parent, meta))
    return found


# ---- Building --------------------------------------------------------------------------------------------------------


class _Column:
    """A .npy file that grows by rows, so that building needs no more memory than one record."""

    def __init__(self, path: Path, dtype: np.dtype, shape: tuple[int, ...]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file: BinaryIO = path.open("wb")
        self._dtype, self._shape, self._rows = dtype, shape, 0
        self._header()

    def _header(self) -> None:
        # numpy leaves room in the header for the first axis to grow, so rewriting it in place is safe.
        description = np.lib.format.dtype_to_descr(self._dtype)
        header = {"descr": description, "fortran_order": False, "shape": (self._rows, *self._shape)}
        self._file.seek(0)
        np.lib.format.write_array_header_1_0(self._file, header)

    def append(self, rows: np.ndarray) -> None:
        self._file.write(np.ascontiguousarray(rows, self._dtype).tobytes())
        self._rows += len(rows)

    def close(self) -> None:
        self._header()
        self._file.close()


class _TextTable:
    def __init__(self) -> None:
        self._ids: dict[bytes, int] = {}

    def ids(self, data: bytes, spans: list[tfrecord.Span]) -> np.ndarray:
        return np.array([self._ids.setdefault(data[a:b], len(self._ids)) for a, b in spans], np.int32)

    def texts(self, key: str) -> list[str]:
        try:
            return [raw.decode() for raw in self._ids]
        except UnicodeDecodeError as e:
            raise DatasetError(f"{key}: the text {e.object!r} is not UTF-8; the dataset was written wrongly") from None


def _file_name(key: str) -> str:
    return key.replace("%", "%25").replace("/", "%2F") + ".npy"


class _Writer:
    """Columns of one index under construction."""

    def __init__(self, root: Path, schema: Schema) -> None:
        self.left_out: dict[str, str] = {}
        self.tables: dict[str, dict[str, _TextTable]] = {"step": {}, "episode": {}}
        self._columns: dict[tuple[str, str], _Column] = {}
        self._readers: list[tuple[str, Feature, Callable[[bytes, tfrecord.Span], np.ndarray]]] = []
        for level, features in (("step", schema.steps), ("episode", schema.episode)):
            for key, feature in features.items():
                folder = level
                dtype: np.dtype = np.dtype(np.int32)
                shape: tuple[int, ...] = ()
                if feature.kind == "numeric":
                    shape = tuple(d for d in feature.shape if d is not None)
                    dtype = np.dtype(feature.dtype)
                    if math.prod(shape) > MAX_STEP_VALUES:
                        self.left_out[key] = f"it has {math.prod(shape)} values, more than {MAX_STEP_VALUES}"
                        continue
                    read = _numeric_reader(feature, shape)
                elif feature.kind == "text":
                    table = self.tables[level][key] = _TextTable()
                    read = _text_reader(table)
                elif feature.kind == "image" and level == "step":
                    folder, dtype, shape = "image", np.dtype(np.int64), (2,)
                    read = _image_reader
                else:
                    self.left_out[key] = f"fields of kind {feature.dtype} cannot be read here"
                    continue
                self._columns[folder, key] = _Column(root / folder / _file_name(key), dtype, shape)
                self._readers.append((folder, feature, read))
        for key in ("start", "shard", "record"):
            self._columns["place", key] = _Column(root / "place" / _file_name(key), np.dtype(np.int64), ())
        self._steps = 0
        self._columns["place", "start"].append(np.zeros(1))

    def add(self, data: bytes, offset: int, shard: int, record: int) -> None:
        """Adds one episode; adds nothing if it is malformed (RecordError)."""
        features = tfrecord.parse_example(data)
        rows, problems = {}, []
        for folder, feature, read in self._readers:
            name = feature.key if folder == "episode" else f"steps/{feature.key}"
            if name not in features:
                problems.append(f"{name}: missing")
                continue
            try:
                rows[folder, feature.key] = read(data, features[name])
            except tfrecord.RecordError as e:
                problems.append(f"{name}: {e}")
        lengths = {name: len(x) for name, x in rows.items()}
        steps = {n for (folder, _), n in lengths.items() if folder != "episode"}
        problems += [f"{k}: {n} values, expected 1" for (f, k), n in lengths.items() if f == "episode" and n != 1]
        if len(steps) > 1:
            counts = ", ".join(f"{k}: {n}" for (f, k), n in lengths.items() if f != "episode")
            problems.append(f"fields differ in their number of steps ({counts})")
        elif steps == {0}:
            problems.append("it has no steps")
        if problems:
            raise tfrecord.RecordError("; ".join(problems), resumable=True)
        for (folder, key), x in rows.items():
            if folder == "image":
                x[:, 0] += offset
            self._columns[folder, key].append(x)
        self._steps += steps.pop()
        for key, value in (("start", self._steps), ("shard", shard), ("record", record)):
            self._columns["place", key].append(np.array([value]))

    def close(self) -> None:
        for column in self._columns.values():
            column.close()


def _numeric_reader(feature: Feature, shape: tuple[int, ...]) -> Callable[[bytes, tfrecord.Span], np.ndarray]:
    dtype = np.dtype(feature.dtype)

    def read(data: bytes, span: tfrecord.Span) -> np.ndarray:
        if feature.encoding != "none":
            raws = [data[a:b] for a, b in tfrecord.read_bytes(data, span)]
            try:
                arrays = [np.frombuffer(zlib.decompress(r) if feature.encoding == "zlib" else r, dtype) for r in raws]
                return np.stack([a.reshape(shape) for a in arrays]) if arrays else np.empty((0, *shape), dtype)
            except (zlib.error, ValueError) as e:
                raise tfrecord.RecordError(f"cannot decode its {feature.encoding} encoding: {e}", resumable=True) from e
        values = tfrecord.read_floats(data, span) if dtype.kind == "f" else tfrecord.read_integers(data, span)
        if len(values) % math.prod(shape):
            raise tfrecord.RecordError(f"{len(values)} values, expected a multiple of {shape}", resumable=True)
        return values.astype(dtype).reshape(-1, *shape)

    return read


def _text_reader(table: _TextTable) -> Callable[[bytes, tfrecord.Span], np.ndarray]:
    return lambda data, span: table.ids(data, tfrecord.read_bytes(data, span))


def _image_reader(data: bytes, span: tfrecord.Span) -> np.ndarray:
    spans = np.array(tfrecord.read_bytes(data, span), np.int64).reshape(-1, 2)
    return np.stack([spans[:, 0], spans[:, 1] - spans[:, 0]], axis=1)


def _some(problems: Sequence[str]) -> str:
    more = [f"... and {len(problems) - SHOWN_RECORDS} more"] if len(problems) > SHOWN_RECORDS else []
    return "\n  ".join([*problems[:SHOWN_RECORDS], *more])


def _corrupt_message(split: Split, problems: Sequence[str], fraction: float) -> str:
    return (
        f"{split}: {len(problems)} of {sum(split.lengths)} records are damaged, tolerated are "
        f"{fraction:g} of them (max_corrupt_fraction):\n  {_some(problems)}\ncopy these files again, or tolerate them"
    )


def _build(
    path: Path, directory: Path, split: Split, schema: Schema, fingerprint: dict[str, Any], max_corrupt_fraction: float
) -> None:
    started = time.perf_counter()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=".building-", dir=path.parent))
    except OSError as e:
        raise DatasetError(f"cannot write the index of {split} in {path.parent}: {e}; give another index_dir") from e
    try:
        writer = _Writer(part, schema)
        damaged: list[str] = []  # single records
        broken: list[str] = []  # whole shards
        for i, (shard, expected) in enumerate(zip(split.shards, split.lengths, strict=True)):
            records = 0
            for offset, record in tfrecord.read_records(shard):
                try:
                    if isinstance(record, tfrecord.RecordError):
                        raise record
                    writer.add(record, offset, i, records)
                except tfrecord.RecordError as e:
                    damaged.append(f"{shard.name}, record {records}, byte {offset}: {e}")
                    if not e.resumable:
                        lost = expected - records - 1
                        damaged += [f"{shard.name}, record {records + 1 + k}: behind the damage" for k in range(lost)]
                        records = expected
                        break
                records += 1
            if records != expected:
                broken.append(f"{shard.name} holds {records} records, dataset_info.json says {expected}")
        writer.close()
        if broken:
            raise DatasetError(f"{split}: " + "; ".join(broken) + "; copy the dataset again")
        if len(damaged) > max_corrupt_fraction * sum(split.lengths) or len(damaged) == sum(split.lengths):
            raise DatasetError(_corrupt_message(split, damaged, max_corrupt_fraction))
        meta = {
            "directory": str(directory.resolve()),
            "split": split.name,
            "fingerprint": fingerprint,
            "texts": {level: {k: t.texts(k) for k, t in tables.items()} for level, tables in writer.tables.items()},
            "left_out": writer.left_out,
            "skipped": damaged,
        }
        (part / "index.json").write_text(json.dumps(meta))
        try:
            part.rename(path)
        except OSError:
            if not (path / "index.json").is_file():
                raise
            # Another process was faster, with the same files.
    finally:
        shutil.rmtree(part, ignore_errors=True)
    size = sum(p.stat().st_size for p in split.shards) / 1e6
    _log.info("indexed %s: %.0f MB in %.1f s", split, size, time.perf_counter() - started)
    if writer.left_out:
        _log.info("%s: not in the index: %s", split, "; ".join(f"{k}: {why}" for k, why in writer.left_out.items()))


# ---- Loading ---------------------------------------------------------------------------------------------------------


def _load(path: Path, split: Split, schema: Schema) -> FrameIndex:
    meta = json.loads((path / "index.json").read_text())

    def array(folder: str, key: str) -> np.ndarray:
        return np.load(path / folder / _file_name(key), mmap_mode="r")

    def numeric(level: str, features: dict[str, Feature]) -> dict[str, np.ndarray]:
        keys = [k for k, f in features.items() if f.kind == "numeric" and k not in meta["left_out"]]
        return {k: array(level, k) for k in keys}

    def texts(level: str) -> dict[str, Texts]:
        return {k: Texts(array(level, k), tuple(table)) for k, table in meta["texts"][level].items()}

    return FrameIndex(
        split=split,
        schema=schema,
        columns=numeric("step", schema.steps),
        images={k: array("image", k) for k, f in schema.steps.items() if f.kind == "image"},
        texts=texts("step"),
        episode_columns=numeric("episode", schema.episode),
        episode_texts=texts("episode"),
        episode_start=array("place", "start"),
        episode_shard=array("place", "shard"),
        episode_record=array("place", "record"),
        left_out=meta["left_out"],
        skipped=tuple(meta["skipped"]),
    )
