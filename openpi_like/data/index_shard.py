"""One shard of a split read into one file with all of its columns, a part of the index that is built from it."""

import dataclasses
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from openpi_like.config import near_names
from openpi_like.data import arrayrecord, tfrecord
from openpi_like.data.files import Location
from openpi_like.data.index_columns import Rows, index_columns
from openpi_like.data.schema import Schema


@dataclasses.dataclass(frozen=True)
class Shard:
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
        self._fields, _ = index_columns(schema)
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


def _read_shard(shard: Shard) -> Iterator[tuple[int, str, bytes | tfrecord.RecordError]]:
    """Yields (offset of the payload, what to call the place, payload) of every record."""
    if shard.file_format == "array_record":
        for record, payload in enumerate(arrayrecord.read_records(shard.location)):
            yield 0, f"{shard.location.name}, record {record}", payload
    else:
        for record, (offset, payload) in enumerate(tfrecord.read_records(shard.location)):
            yield offset, f"{shard.location.name}, record {record}, byte {offset}", payload


def index_shard(shard: Shard, report: Callable[[int], None] | None = None) -> None:
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
