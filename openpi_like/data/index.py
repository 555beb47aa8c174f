"""The index of one split: where every image lies, and everything else as columns.

One pass over the records builds it, shard by shard; afterwards it is memory-mapped, so opening it costs nothing and
processes share it. It is kept in a directory whose name carries a fingerprint of the files it was built from:

    index.json                  name, shards, schema, tables of texts, what was left out or skipped
    step/<column>.npy           numeric fields (N, *shape), texts as ids (N,), N = steps of all episodes
    image/<column>.npy          (N, 2) int64: offset and length in bytes of the encoded image; the offset counts from
                                the beginning of the shard file, for ArrayRecord of the record
    episode/<column>.npy        fields of whole episodes (E, *shape)
    place/<column>.npy          start (E + 1,), shard (E,) and record (E,) of the episodes
    damaged/<column>.npy        steps whose image does not decode, ascending; only where that was checked, see `damage`

While it is built there is one file per finished shard in `.parts-*`. A build that was stopped goes on from these, also
when other shards have changed in between. The result does not depend on the number of processes.
"""

import contextlib
import dataclasses
import hashlib
import json
import logging
import math
import multiprocessing
import os
import shutil
import tempfile
import threading
import time
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from openpi_like.config import near_names
from openpi_like.data import arrayrecord, files, tfrecord
from openpi_like.data.files import Location, Ranges, Url
from openpi_like.data.schema import DatasetError, Feature, Schema, Split, read_schema, read_split

INDEX_VERSION = 3
# Step fields with more values than this (sentence embeddings, point clouds) would dwarf the rest of the index.
MAX_STEP_VALUES = 256
SHOWN_RECORDS = 50  # damaged records listed in one message
DAMAGED = "damaged"  # the directory of an index that says which images do not decode

Progress = Callable[[int, int], None]  # bytes that are done, bytes of all shards

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
    checked: whether every image was decoded once, see `openpi_like.data.damage`. damaged: key -> ascending steps whose
    image cannot be; without keys that have none, and empty while nothing was checked. `where` says file and record.
    path: the directory it is memory-mapped from; pickling takes only this, so other processes share the memory.
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
    checked: bool
    damaged: dict[str, np.ndarray]
    path: Path
    _ranges: Ranges = dataclasses.field(default_factory=Ranges, init=False, repr=False, compare=False)
    _records: arrayrecord.Records = dataclasses.field(
        default_factory=arrayrecord.Records, init=False, repr=False, compare=False
    )

    def __reduce__(self) -> tuple[Any, ...]:
        return load_index, (self.path, self.split, self.schema)

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
        e = self._episode(step)
        shard = self.split.shards[self.episode_shard[e]].name
        at = step - int(self.episode_start[e])
        return f"{self.split}, episode {e}, step {at} ({shard}, record {self.episode_record[e]})"

    def _episode(self, step: int) -> int:
        return int(self.episode_start.searchsorted(step, side="right")) - 1

    def read_image(self, step: int, key: str) -> bytes:
        """Returns the encoded image of one step. May be called from several threads.

        Raises:
            DatasetError: it cannot be read.
        """
        e = self._episode(step)
        shard = self.split.shards[self.episode_shard[e]]
        offset, length = self.images[key][step].tolist()
        try:
            if self.split.file_format == "array_record":
                data = self._records.read(shard, int(self.episode_record[e]))[offset : offset + length]
            else:
                data = self._ranges.read(shard, offset, length)
        except (OSError, tfrecord.RecordError) as error:
            raise DatasetError(f"{self.where(step)}: cannot read {key}: {error}{files.advice(error)}") from error
        if len(data) < length:
            raise DatasetError(
                f"{self.where(step)}: read {len(data)} of {length} bytes of {key}; "
                "the file was changed since it was indexed: copy it again"
            )
        return data

    def close(self) -> None:
        """Closes the shard files; reading opens them again."""
        self._ranges.close()
        self._records.close()


def open_index(
    directory: str | Path | Url,
    split: str,
    *,
    index_dir: str | Path | None = None,
    max_corrupt_fraction: float = 0.0,
    workers: int = 1,
    progress: Progress | None = None,
) -> FrameIndex:
    """Opens the index of a split, building it first where there is none or the files have changed since.

    Args:
        directory: a TFDS directory, which holds dataset_info.json; a path or any URL (see `files`).
        index_dir: where indexes are kept; default `.openpi_like_index` in `directory`, or the cache directory (see
            `files.cache_directory`) where `directory` is a URL or cannot be written.
        max_corrupt_fraction: part of the records that may be damaged or missing; these are skipped, counted and
            reported.
        workers: processes that build. With more than one a program needs its `if __name__ == "__main__"`.
        progress: called while building with the bytes that are done and those of all shards.

    Raises:
        DatasetError: files are missing or damaged, or do not match the dataset's own description; lists all of it.
    """
    directory = files.locate(directory)
    if isinstance(directory, Path):
        directory = directory.absolute()  # the index may be used in a process with another working directory
    try:
        return _open(directory, split, index_dir, max_corrupt_fraction, workers, progress)
    except (OSError, DatasetError) as e:
        if not (advice := files.advice(e)):
            raise
        raise DatasetError(f"{directory}: {e}{advice}") from e


def _open(
    directory: Location,
    split: str,
    index_dir: str | Path | None,
    max_corrupt_fraction: float,
    workers: int,
    progress: Progress | None,
) -> FrameIndex:
    found = read_split(directory, split, allow_missing=max_corrupt_fraction > 0)
    schema = read_schema(directory)
    fingerprint = _fingerprint(found, schema)
    roots = [Path(index_dir).absolute()] if index_dir is not None else _default_roots(directory)
    name = f"{found.dataset}-{found.version}-{split}-{_digest(fingerprint)}"
    paths = [root / name for root in roots]
    path = next((p for p in paths if (p / "index.json").is_file()), None)
    if path is None:
        root = _writable(roots, found)
        path = root / name
        stale = [(p, old) for p, old in _stale(root, directory, split) if p != path]  # not what another process built
        for _, old in stale:
            changed = sorted(k for k in fingerprint if fingerprint[k] != old["fingerprint"].get(k))
            _log.warning("index of %s is stale (changed: %s), building it again", found, ", ".join(changed))
        _build(path, directory, found, schema, fingerprint, max_corrupt_fraction, workers, progress)
        for other, _ in stale:
            shutil.rmtree(other, ignore_errors=True)
    index = load_index(path, found, schema)
    total = sum(found.lengths)
    if len(index.skipped) > max_corrupt_fraction * total:
        raise DatasetError(_corrupt_message(found, index.skipped, max_corrupt_fraction))
    if index.skipped:
        listed = _some(index.skipped)
        _log.warning("%s: %d of %d records are damaged and skipped:\n  %s", found, len(index.skipped), total, listed)
    return index


def _fingerprint(split: Split, schema: Schema) -> dict[str, Any]:
    return {
        "index_version": INDEX_VERSION,
        "features.json": _schema_digest(schema),
        "shard lengths": list(split.lengths),
        "shard names": [s.name for s in split.shards],
        "shard sizes": [s and s.size for s in split.stats],
        "shard times": [s and s.stamp for s in split.stats],
    }


def _schema_digest(schema: Schema) -> str:
    return _digest([dataclasses.asdict(f) for f in (*schema.steps.values(), *schema.episode.values())])


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def _default_roots(directory: Location) -> list[Path]:
    beside = [directory / ".openpi_like_index"] if isinstance(directory, Path) else []
    return [*beside, files.cache_directory().absolute() / "index"]


def _writable(roots: Sequence[Path], split: Split) -> Path:
    problems = []
    for root in roots:
        try:
            root.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=root):
                pass
        except OSError as e:
            problems.append(f"cannot write the index of {split} in {root}: {e}")
            continue
        if problems:
            _log.warning("%s; it is kept in %s", "; ".join(problems), root)
        return root
    raise DatasetError("; ".join(problems) + "; give another index_dir")


def _stale(root: Path, directory: Location, split: str) -> list[tuple[Path, dict[str, Any]]]:
    """Indexes in `root` of the same directory and split, built from other files."""
    found = []
    for path in sorted(root.glob("*/index.json")):
        with contextlib.suppress(FileNotFoundError):  # another builder has just removed it
            meta = json.loads(path.read_text())
            if meta["directory"] == files.absolute(directory) and meta["split"] == split:
                found.append((path.parent, meta))
    return found


# ---- Building: the fields of one record ------------------------------------------------------------------------------

Rows = np.ndarray | list[str]
Reader = Callable[[bytes, tfrecord.Span], Rows]


@dataclasses.dataclass(frozen=True)
class _Field:
    """A column of the index. folder: "step", "image" or "episode". read: a record's values, texts as strings."""

    folder: str
    feature: Feature
    dtype: np.dtype
    shape: tuple[int, ...]
    read: Reader

    @property
    def column(self) -> str:
        return f"{self.folder}/{self.feature.key}"

    @property
    def name(self) -> str:
        """Name in a record."""
        return self.feature.key if self.folder == "episode" else f"steps/{self.feature.key}"


def _fields(schema: Schema) -> tuple[list[_Field], dict[str, str]]:
    """Returns the columns, and key -> why a field has none."""
    fields: list[_Field] = []
    left_out: dict[str, str] = {}
    for level, features in (("step", schema.steps), ("episode", schema.episode)):
        for key, f in features.items():
            shape = tuple(d for d in f.shape if d is not None)
            if f.kind == "numeric" and not 0 < math.prod(shape) <= MAX_STEP_VALUES:
                left_out[key] = f"it has {math.prod(shape)} values, more than {MAX_STEP_VALUES}"
                if not math.prod(shape):
                    left_out[key] = f"it has no values, its shape is {shape}"
            elif f.kind == "numeric":
                fields.append(_Field(level, f, np.dtype(f.dtype), shape, _numeric_reader(f, shape)))
            elif f.kind == "text":
                read = _code_point_reader(shape[0]) if f.encoding == "code_points" else _read_texts
                fields.append(_Field(level, f, np.dtype(np.int32), (), read))
            elif f.kind == "image" and level == "step":
                fields.append(_Field("image", f, np.dtype(np.int64), (2,), _read_image_spans))
            elif f.kind == "image":
                left_out[key] = "images of whole episodes cannot be read here"
            else:
                left_out[key] = f"fields of kind {f.dtype} and shape {f.shape} cannot be read here"
    return fields, left_out


def _numeric_reader(feature: Feature, shape: tuple[int, ...]) -> Reader:
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
        rows = values.astype(dtype)
        if dtype.kind != "f" and dtype.itemsize < 8 and (rows != values).any():
            wrong = int(values[rows != values][0])
            raise tfrecord.RecordError(f"{wrong} is not of type {dtype}", resumable=True)
        return rows.reshape(-1, *shape)

    return read


def _read_texts(data: bytes, span: tfrecord.Span) -> list[str]:
    raws = [data[a:b] for a, b in tfrecord.read_bytes(data, span)]
    try:
        return [raw.decode() for raw in raws]
    except UnicodeDecodeError as e:
        raise tfrecord.RecordError(f"the text {e.object!r} is not UTF-8", resumable=True) from None


def _code_point_reader(length: int) -> Reader:
    def read(data: bytes, span: tfrecord.Span) -> list[str]:
        values = tfrecord.read_integers(data, span)
        if len(values) % length:
            raise tfrecord.RecordError(f"{len(values)} values, expected a multiple of {length}", resumable=True)
        rows = values.reshape(-1, length)
        texts: list[str] = []
        for i, row in enumerate(rows):
            same = i > 0 and np.array_equal(row, rows[i - 1])  # as a rule it is one text for the whole episode
            texts.append(texts[-1] if same else _from_code_points(row))
        return texts

    return read


def _from_code_points(row: np.ndarray) -> str:
    end = int(np.argmax(row == 0)) if (row == 0).any() else len(row)
    wrong = (row < 0) | (row > 0x10FFFF) | ((row >= 0xD800) & (row < 0xE000))
    wrong[end:] = row[end:] != 0
    if wrong.any():
        at = int(np.argmax(wrong))
        what = "a Unicode code point" if at < end else f"0, as the text ends at {end}"
        raise tfrecord.RecordError(f"value {at} of a text is {row[at]}, expected {what}", resumable=True)
    return "".join(map(chr, row[:end]))


def _read_image_spans(data: bytes, span: tfrecord.Span) -> np.ndarray:
    spans = np.array(tfrecord.read_bytes(data, span), np.int64).reshape(-1, 2)
    return np.stack([spans[:, 0], spans[:, 1] - spans[:, 0]], axis=1)


# ---- Building: one shard ---------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Shard:
    """What a process needs to index one shard. expected: its records. part: the file that it writes."""

    location: Location
    file_format: str
    expected: int
    size: int
    schema: Schema
    part: Path


class _Episodes:
    """The columns of one shard."""

    def __init__(self, schema: Schema) -> None:
        self._fields, _ = _fields(schema)
        self._names = {f"steps/{key}" for key in schema.steps} | set(schema.episode)
        self._rows: dict[str, list[np.ndarray]] = {f.column: [np.empty((0, *f.shape), f.dtype)] for f in self._fields}
        self._texts: dict[str, dict[str, int]] = {f.column: {} for f in self._fields if f.feature.kind == "text"}
        self._lengths: list[int] = []
        self._records: list[int] = []
        self._unknown: set[str] = set()
        self._parsed = 0
        self._undecodable: dict[str, tuple[int, str]] = {}

    def add(self, data: bytes, offset: int, record: int) -> None:
        """Adds one episode; adds nothing if it is malformed (RecordError)."""
        features = tfrecord.parse_example(data)
        self._parsed += 1
        rows: dict[str, Rows] = {}
        problems = []
        for field in self._fields:
            if field.name not in features:
                problems.append(f"{field.name}: missing; {near_names(field.name, list(features))}")
                continue
            try:
                rows[field.column] = field.read(data, features[field.name])
            except tfrecord.RecordError as e:
                problems.append(f"{field.name}: {e}")
                if field.feature.kind == "text":
                    count, first = self._undecodable.get(field.column, (0, str(e)))
                    self._undecodable[field.column] = count + 1, first
        lengths = {f: len(rows[f.column]) for f in self._fields if f.column in rows}
        steps = {n for f, n in lengths.items() if f.folder != "episode"}
        problems += [
            f"{f.name}: {n} values, expected 1" for f, n in lengths.items() if f.folder == "episode" and n != 1
        ]
        if len(steps) > 1:
            counts = ", ".join(f"{f.feature.key}: {n}" for f, n in lengths.items() if f.folder != "episode")
            problems.append(f"fields differ in their number of steps ({counts})")
        elif steps == {0}:
            problems.append("it has no steps")
        if problems:
            raise tfrecord.RecordError("; ".join(problems), resumable=True)
        for field in self._fields:
            values = rows[field.column]
            if isinstance(values, list):
                table = self._texts[field.column]
                values = np.array([table.setdefault(text, len(table)) for text in values], np.int32)
            elif field.folder == "image":
                values[:, 0] += offset
            self._rows[field.column].append(values)
        self._lengths.append(steps.pop())
        self._records.append(record)
        self._unknown |= features.keys() - self._names

    def save(self, path: Path, **meta: Any) -> None:
        """Writes all of it to one file, which is there whole or not at all."""
        # Features of several parts (ragged ones) are stored under the name of the feature and that of the part.
        unknown = sorted(u for u in self._unknown if not any(u.startswith(f"{name}/") for name in self._names))
        meta |= {"texts": {column: list(table) for column, table in self._texts.items()}, "unknown": unknown}
        meta |= {"parsed": self._parsed, "undecodable": self._undecodable}
        arrays = {column: np.concatenate(rows) for column, rows in self._rows.items()}
        arrays |= {"place/length": np.array(self._lengths, np.int64), "place/record": np.array(self._records, np.int64)}
        arrays["meta"] = np.frombuffer(json.dumps(meta).encode(), np.uint8)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            try:
                np.savez(file, **arrays)  # type: ignore[arg-type]  # numpy's stub takes the names for its own options
                file.flush()
                os.fsync(file.fileno())
                os.replace(file.name, path)
            finally:
                Path(file.name).unlink(missing_ok=True)


def _read_shard(shard: _Shard) -> Iterator[tuple[int, str, bytes | tfrecord.RecordError]]:
    """Yields (offset of the payload, what to call the place, payload) of every record."""
    if shard.file_format == "array_record":
        for record, payload in enumerate(arrayrecord.read_records(shard.location)):
            yield 0, f"{shard.location.name}, record {record}", payload
    else:
        for record, (offset, payload) in enumerate(tfrecord.read_records(shard.location)):
            yield offset, f"{shard.location.name}, record {record}, byte {offset}", payload


def _index_shard(shard: _Shard, report: Callable[[int], None] | None = None) -> None:
    """Reads one shard and writes its part. report: called with the bytes that are done."""
    episodes, damaged, records = _Episodes(shard.schema), [], 0
    name = shard.location.name
    for offset, place, payload in _read_shard(shard):
        try:
            if isinstance(payload, tfrecord.RecordError):
                raise payload
            episodes.add(payload, offset, records)
        except tfrecord.RecordError as e:
            damaged.append(f"{place}: {e}")
            if not e.resumable:
                damaged += [f"{name}, record {k}: behind the damage" for k in range(records + 1, shard.expected)]
                records = max(records + 1, shard.expected)
                break
        records += 1
        if report is not None:
            report(shard.size * min(records, shard.expected) // max(shard.expected, 1))
    told = f"the file holds {records}, dataset_info.json says {shard.expected}"
    damaged += [f"{name}, record {k}: missing, {told}" for k in range(records, shard.expected)]
    surplus = f"{name}: more records than expected, {told}" if records > shard.expected else None
    episodes.save(shard.part, damaged=damaged, surplus=surplus)


# ---- Building: all shards --------------------------------------------------------------------------------------------


def _exit_with_parent() -> None:
    """Ends this process when the one that started it is killed; else it would wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _index_shards(split: Split, shards: Sequence[_Shard], workers: int, progress: Progress | None) -> None:
    """Writes the parts that are not there yet; all shards are tried before a failure is raised."""
    total = sum(s.size for s in shards)
    todo = [s for s in shards if not (s.part.is_file() and zipfile.is_zipfile(s.part))]
    done = total - sum(s.size for s in todo)
    if len(todo) < len(shards):
        _log.info("%s: %d of %d shards were indexed before", split, len(shards) - len(todo), len(shards))
    tell = progress or (lambda done, total: None)
    tell(done, total)
    problems = []
    if workers == 1 or len(todo) < 2:
        for shard in todo:
            before = done
            try:
                _index_shard(shard, lambda n, before=before: tell(before + n, total))  # type: ignore[misc]
            except OSError as e:
                problems.append(f"{shard.location.name}: {e}")
            done += shard.size
            tell(done, total)
    else:
        context = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(min(workers, len(todo)), context, _exit_with_parent)
        try:
            futures = {pool.submit(_index_shard, shard): shard for shard in todo}
            for future in as_completed(futures):
                try:
                    future.result()
                except OSError as e:
                    problems.append(f"{futures[future].location.name}: {e}")
                done += futures[future].size
                tell(done, total)
        except BrokenProcessPool as e:
            raise DatasetError(
                f"{split}: a process that builds the index died ({e}), perhaps for lack of memory, or because the "
                'program has no `if __name__ == "__main__"`; finished shards are kept: run again, with fewer workers'
            ) from e
        finally:
            pool.shutdown(cancel_futures=True)
    if problems:
        raise DatasetError(
            f"{split}: {len(problems)} of {len(shards)} shards cannot be indexed; run again, the others are kept:\n  "
            + _some(sorted(problems))
        )


class _Column:
    """A .npy file that grows by rows, so that merging needs no more memory than one shard."""

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


def file_name(key: str) -> str:
    """Returns the name of a column's file."""
    return key.replace("%", "%25").replace("/", "%2F") + ".npy"


def _merge(root: Path, schema: Schema, parts: Sequence[Path | None]) -> dict[str, dict[str, list[str]]]:
    """Writes the columns of all parts, in order, to `root`; None is a shard without episodes. Returns the texts."""
    fields, _ = _fields(schema)
    tables: dict[str, dict[str, int]] = {f.column: {} for f in fields if f.feature.kind == "text"}
    with contextlib.ExitStack() as stack:

        def column(folder: str, key: str, dtype: np.dtype, shape: tuple[int, ...]) -> _Column:
            return stack.enter_context(contextlib.closing(_Column(root / folder / file_name(key), dtype, shape)))

        columns = {f.column: column(f.folder, f.feature.key, f.dtype, f.shape) for f in fields}
        start, shard, record = (column("place", key, np.dtype(np.int64), ()) for key in ("start", "shard", "record"))
        steps = 0
        start.append(np.zeros(1))
        for i, part in enumerate(parts):
            if part is None:
                continue
            with np.load(part) as arrays:
                texts = json.loads(arrays["meta"].tobytes())["texts"]
                for name, target in columns.items():
                    rows = arrays[name]
                    if name in tables:  # ids of the shard to those of the dataset, both in order of first appearance
                        table = tables[name]
                        rows = np.array([table.setdefault(text, len(table)) for text in texts[name]], np.int32)[rows]
                    target.append(rows)
                ends = steps + np.cumsum(arrays["place/length"])
                start.append(ends)
                shard.append(np.full(len(ends), i))
                record.append(arrays["place/record"])
                steps = int(ends[-1]) if len(ends) else steps
    merged: dict[str, dict[str, list[str]]] = {"step": {}, "episode": {}}
    for f in fields:
        if f.column in tables:
            merged[f.folder][f.feature.key] = list(tables[f.column])
    return merged


def _some(problems: Sequence[str]) -> str:
    more = [f"... and {len(problems) - SHOWN_RECORDS} more"] if len(problems) > SHOWN_RECORDS else []
    return "\n  ".join([*problems[:SHOWN_RECORDS], *more])


def _corrupt_message(split: Split, problems: Sequence[str], fraction: float) -> str:
    return (
        f"{split}: {len(problems)} of {sum(split.lengths)} records are damaged, tolerated are "
        f"{fraction:g} of them (max_corrupt_fraction):\n  {_some(problems)}\ncopy these files again, or tolerate them"
    )


def _part_meta(shard: _Shard) -> dict[str, Any]:
    with np.load(shard.part) as arrays:
        return json.loads(arrays["meta"].tobytes())


def _undecodable(shards: Sequence[_Shard]) -> dict[str, str]:
    """Returns text column -> why no record's text can be decoded: such a field is no text, token ids for instance."""
    parsed, counts, why = 0, Counter[str](), dict[str, str]()
    for meta in map(_part_meta, shards):
        parsed += meta["parsed"]
        for column, (count, first) in meta["undecodable"].items():
            counts[column] += count
            why.setdefault(column, f"it cannot be decoded as text in any record; in the first, {first}")
    return {column: why[column] for column, count in counts.items() if count == parsed}


def _without(schema: Schema, columns: Collection[str]) -> Schema:
    """Returns the schema with some columns marked as what cannot be read."""

    def marked(level: str, features: dict[str, Feature]) -> dict[str, Feature]:
        return {
            k: dataclasses.replace(f, kind="other") if f"{level}/{k}" in columns else f for k, f in features.items()
        }

    return Schema(marked("step", schema.steps), marked("episode", schema.episode))


def _shards(parts: Path, split: Split, schema: Schema) -> list[_Shard | None]:
    """What there is to do; None for a shard that is missing. A part is good for one shard as it is now."""
    shards: list[_Shard | None] = []
    for i, (location, expected, stat) in enumerate(zip(split.shards, split.lengths, split.stats, strict=True)):
        if stat is None:
            shards.append(None)
            continue
        key = _digest([INDEX_VERSION, _schema_digest(schema), location.name, stat.size, stat.stamp, expected])
        part = parts / f"{i:05d}-{key}.npz"
        shards.append(_Shard(location, split.file_format, expected, stat.size, schema, part))
    return shards


def _build(
    path: Path,
    directory: Location,
    split: Split,
    schema: Schema,
    fingerprint: dict[str, Any],
    max_corrupt_fraction: float,
    workers: int,
    progress: Progress | None,
) -> None:
    started = time.perf_counter()
    name = files.absolute(directory)
    parts = path.parent / f".parts-{split.dataset}-{split.version}-{split.name}-{_digest(name)}"
    shards = _shards(parts, split, schema)
    present = [s for s in shards if s is not None]
    try:
        parts.mkdir(exist_ok=True)
        _index_shards(split, present, workers, progress)
        if undecodable := _undecodable(present):
            _log.warning("%s: reading it once more, without %s", split, ", ".join(undecodable))
            schema = _without(schema, undecodable)
            shards = _shards(parts, split, schema)
            present = [s for s in shards if s is not None]
            _index_shards(split, present, workers, progress)
        left_out = _fields(schema)[1] | {c.partition("/")[2]: why for c, why in undecodable.items()}
        damaged, surplus = [], []
        for shard, location, expected in zip(shards, split.shards, split.lengths, strict=True):
            if shard is None:
                damaged += [f"{location.name}, record {k}: the file is missing" for k in range(expected)]
                continue
            meta = _part_meta(shard)
            damaged += meta["damaged"]
            surplus += [meta["surplus"]] if meta["surplus"] else []
            for key in meta["unknown"]:
                left_out.setdefault(key.removeprefix("steps/"), "features.json does not have it")
        problems = []
        if surplus:
            problems.append(f"{split}: {_some(surplus)}\ncopy the dataset again")
        if len(damaged) > max_corrupt_fraction * sum(split.lengths) or len(damaged) == sum(split.lengths):
            problems.append(_corrupt_message(split, damaged, max_corrupt_fraction))
        if problems:
            raise DatasetError("\n".join(problems))
        draft = Path(tempfile.mkdtemp(dir=parts))
        index = {
            "directory": name,
            "split": split.name,
            "fingerprint": fingerprint,
            "texts": _merge(draft, schema, [None if s is None else s.part for s in shards]),
            "left_out": left_out,
            "skipped": damaged,
        }
        (draft / "index.json").write_text(json.dumps(index))
        draft.rename(path)
    except (OSError, DatasetError) as e:
        # Another process may have been faster, with the same files, and have cleared the parts away.
        if not (path / "index.json").is_file():
            raise e if isinstance(e, DatasetError) else DatasetError(f"cannot build the index of {split}: {e}") from e
    shutil.rmtree(parts, ignore_errors=True)
    size = sum(s.size for s in present) / 1e6
    _log.info("indexed %s: %.0f MB in %.1f s", split, size, time.perf_counter() - started)
    with_reasons = json.loads((path / "index.json").read_text())["left_out"]
    if with_reasons:
        _log.info("%s: not in the index: %s", split, "; ".join(f"{k}: {why}" for k, why in with_reasons.items()))


# ---- Loading ---------------------------------------------------------------------------------------------------------


def load_index(path: Path, split: Split, schema: Schema) -> FrameIndex:
    """Returns the index in a directory that `open_index` made for these files."""
    meta = json.loads((path / "index.json").read_text())

    def array(folder: str, key: str) -> np.ndarray:
        # As a plain array: `np.memmap` itself costs microseconds at every access.
        return np.asarray(np.load(path / folder / file_name(key), mmap_mode="r"))

    def numeric(level: str, features: dict[str, Feature]) -> dict[str, np.ndarray]:
        keys = [k for k, f in features.items() if f.kind == "numeric" and k not in meta["left_out"]]
        return {k: array(level, k) for k in keys}

    def damaged() -> dict[str, np.ndarray]:
        found = {k: array(DAMAGED, k) for k, f in schema.steps.items() if (path / DAMAGED / file_name(k)).is_file()}
        return {k: steps for k, steps in found.items() if len(steps)}

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
        checked=(path / DAMAGED).is_dir(),
        damaged=damaged(),
        path=path,
    )
