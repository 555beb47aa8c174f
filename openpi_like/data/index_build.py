"""Building an index: its shards in any number of processes, then their columns one behind the other.

While an index is built there is one file per finished shard in `.parts-*`. A build that was stopped goes on from these,
also when other shards have changed in between. The result does not depend on the number of processes.
"""

import contextlib
import dataclasses
import hashlib
import json
import logging
import multiprocessing
import os
import shutil
import tempfile
import threading
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from openpi_like.data import files
from openpi_like.data.files import Location
from openpi_like.data.index_columns import file_name, index_columns, large_tables
from openpi_like.data.index_shard import index_shard
from openpi_like.data.schema import DatasetError, Feature, Schema, Shard, Split

INDEX_VERSION = 3
SHOWN_RECORDS = 50  # damaged records listed in one message

Progress = Callable[[int, int], None]  # bytes that are done, bytes of all shards

_log = logging.getLogger(__name__)


def schema_digest(schema: Schema) -> str:
    """Returns a digest of everything that is known of all fields, but for labels, which nothing here rests on."""
    fields = [dataclasses.asdict(f) for f in (*schema.steps.values(), *schema.episode.values())]
    return digest([{k: v for k, v in f.items() if k != "labels" and (k != "names" or v)} for f in fields])


def digest(value: Any) -> str:
    """Returns a digest of JSON-ready data, 16 hex digits."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def _exit_with_parent() -> None:
    """Ends this process when the one that started it is killed; else it would wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _index_shards(split: Split, shards: Sequence[Shard], workers: int, progress: Progress | None) -> None:
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
                index_shard(shard, lambda n, before=before: tell(before + n, total))  # type: ignore[misc]
            except OSError as e:
                problems.append(f"{shard.location.name}: {e}")
            done += shard.size
            tell(done, total)
    else:
        context = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(min(workers, len(todo)), context, _exit_with_parent)
        try:
            futures = {pool.submit(index_shard, shard): shard for shard in todo}
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
            + some_of(sorted(problems))
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


def _merge(root: Path, schema: Schema, parts: Sequence[Path | None]) -> dict[str, dict[str, list[str]]]:
    """Writes the columns of all parts, in order, to `root`; None is a shard without episodes. Returns the texts."""
    fields, _ = index_columns(schema)
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


def some_of(problems: Sequence[str]) -> str:
    """Returns the first problems, one a line, and how many more there are."""
    more = [f"... and {len(problems) - SHOWN_RECORDS} more"] if len(problems) > SHOWN_RECORDS else []
    return "\n  ".join([*problems[:SHOWN_RECORDS], *more])


def corrupt_message(split: Split, problems: Sequence[str], fraction: float) -> str:
    """Returns what to say where more records are damaged than the tolerated fraction."""
    return (
        f"{split}: {len(problems)} of {sum(split.lengths)} records are damaged, tolerated are "
        f"{fraction:g} of them (max_corrupt_fraction):\n  {some_of(problems)}\ncopy these files again, or tolerate them"
    )


def _part_meta(shard: Shard) -> dict[str, Any]:
    with np.load(shard.part) as arrays:
        return json.loads(arrays["meta"].tobytes())


def _undecodable(shards: Sequence[Shard]) -> dict[str, str]:
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


def _shards(parts: Path, split: Split, schema: Schema) -> list[Shard | None]:
    """What there is to do; None for a shard that is missing. A part is good for one shard as it is now."""
    shards: list[Shard | None] = []
    for i, (location, expected, stat) in enumerate(zip(split.shards, split.lengths, split.stats, strict=True)):
        if stat is None:
            shards.append(None)
            continue
        known = [INDEX_VERSION, schema_digest(schema), location.name, stat.size, stat.stamp, expected]
        more = [part for part in (large_tables(schema), split.companions) if part]
        key = digest([*known, *more])
        part = parts / f"{i:05d}-{key}.npz"
        shards.append(Shard(split, i, stat.size, schema, part))
    return shards


def build_index(
    path: Path,
    directory: Location,
    split: Split,
    schema: Schema,
    fingerprint: dict[str, Any],
    max_corrupt_fraction: float,
    workers: int,
    progress: Progress | None,
) -> None:
    """Builds the index of a split in the directory `path`, which is there whole or not at all.

    fingerprint: of the files, kept in the index. directory, max_corrupt_fraction, workers, progress: see `open_index`.

    Raises:
        DatasetError: as `open_index`.
    """
    started = time.perf_counter()
    name = files.absolute(directory)
    parts = path.parent / f".parts-{split.dataset}-{split.version}-{split.name}-{digest(name)}"
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
        left_out = index_columns(schema)[1] | {c.partition("/")[2]: why for c, why in undecodable.items()}
        damaged, surplus = [], []
        for shard, location, expected in zip(shards, split.shards, split.lengths, strict=True):
            if shard is None:
                damaged += [f"{location.name}, record {k}: the file is missing" for k in range(expected)]
                continue
            meta = _part_meta(shard)
            damaged += meta["damaged"]
            surplus += [meta["surplus"]] if meta["surplus"] else []
            for key in meta["unknown"]:
                left_out.setdefault(key.removeprefix("steps/"), "the dataset's own description does not have it")
        problems = []
        if surplus:
            problems.append(f"{split}: {some_of(surplus)}\ncopy the dataset again")
        if len(damaged) > max_corrupt_fraction * sum(split.lengths) or len(damaged) == sum(split.lengths):
            problems.append(corrupt_message(split, damaged, max_corrupt_fraction))
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
        split.storage.complete(split, parts, draft)
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
