"""One shard of a split read into one file with all of its columns, a part of the index that is built from it."""

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from openpi_like.data.index_columns import index_columns
from openpi_like.data.schema import Schema, Shard
from openpi_like.data.storage import RecordError, Rows, StoredEpisode


class _Episodes:
    """The columns of one shard."""

    def __init__(self, schema: Schema) -> None:
        self._fields, _ = index_columns(schema)
        self._rows: dict[str, list[np.ndarray]] = {f.column: [np.empty((0, *f.shape), f.dtype)] for f in self._fields}
        self._texts: dict[str, dict[str, int]] = {f.column: {} for f in self._fields if f.feature.kind == "text"}
        self._lengths: list[int] = []
        self._records: list[int] = []
        self._unknown: set[str] = set()
        self._parsed = 0
        self._undecodable: dict[str, tuple[int, str]] = {}

    def add(self, episode: StoredEpisode, record: int) -> None:
        """Adds one episode; adds nothing if it cannot be used (RecordError)."""
        self._parsed += 1
        for column, why in episode.undecodable.items():
            count, first = self._undecodable.get(column, (0, why))
            self._undecodable[column] = count + 1, first
        rows, problems = episode.rows, list(episode.problems)
        lengths = {f: len(rows[f.column]) for f in self._fields if f.column in rows}
        steps = {n for f, n in lengths.items() if f.folder != "episode"}
        problems += [
            f"{f.feature.key}: {n} values, expected 1" for f, n in lengths.items() if f.folder == "episode" and n != 1
        ]
        if len(steps) > 1:
            counts = ", ".join(f"{f.feature.key}: {n}" for f, n in lengths.items() if f.folder != "episode")
            problems.append(f"fields differ in their number of steps ({counts})")
        elif steps == {0}:
            problems.append("it has no steps")
        if problems:
            raise RecordError("; ".join(problems), resumable=True)
        for field in self._fields:
            self._rows[field.column].append(self._stored(field.column, rows[field.column]))
        self._lengths.append(steps.pop())
        self._records.append(record)
        self._unknown |= episode.unknown

    def _stored(self, column: str, values: Rows) -> np.ndarray:
        if not isinstance(values, list):
            return values
        table = self._texts[column]
        return np.array([table.setdefault(text, len(table)) for text in values], np.int32)

    def save(self, path: Path, **meta: Any) -> None:
        """Writes all of it to one file, which is there whole or not at all."""
        meta |= {"texts": {column: list(table) for column, table in self._texts.items()}}
        meta |= {"unknown": sorted(self._unknown)}
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


def index_shard(shard: Shard, report: Callable[[int], None] | None = None) -> None:
    """Reads one shard and writes its part. report: called with the bytes that are done."""
    episodes, damaged, records = _Episodes(shard.schema), [], 0
    name = shard.location.name
    for place, episode in shard.split.storage.episodes(shard):
        try:
            if isinstance(episode, RecordError):
                raise episode
            episodes.add(episode, records)
        except RecordError as e:
            damaged.append(f"{place}: {e}")
            if not e.resumable:
                damaged += [f"{name}, record {k}: behind the damage" for k in range(records + 1, shard.expected)]
                records = max(records + 1, shard.expected)
                break
        records += 1
        if report is not None:
            report(shard.size * min(records, shard.expected) // max(shard.expected, 1))
    told = f"the file holds {records}, the dataset says {shard.expected}"
    damaged += [f"{name}, record {k}: missing, {told}" for k in range(records, shard.expected)]
    surplus = f"{name}: more records than expected, {told}" if records > shard.expected else None
    episodes.save(shard.part, damaged=damaged, surplus=surplus)
