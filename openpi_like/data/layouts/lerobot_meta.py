"""LeRobot datasets, versions 2.0 to 3: what `meta/` says of their episodes. Nothing of lerobot or torch is needed.

Fields keep LeRobot's names ("observation.state", "action", "observation.images.front"). Two texts are added to every
step: "task", what `task_index` stands for, and "subtask" where there are subtasks.
"""

import contextlib
import dataclasses
import functools
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from openpi_like.data import files
from openpi_like.data.files import Location
from openpi_like.data.index_build import digest
from openpi_like.data.layouts.layout import is_file
from openpi_like.data.layouts.lerobot_info import INFO, feature, file_name, file_stats, generation, join, read_info
from openpi_like.data.layouts.parquet_pages import pyarrow
from openpi_like.data.schema import DatasetError, Feature, Schema

TEXTS = {"task": "task_index", "subtask": "subtask_index"}  # text that is added -> the column of its number
_FORM = 2  # of what is remembered of a dataset
_SHOWN = 5  # episodes that a message names


@dataclasses.dataclass(frozen=True)
class Episodes:
    """What `meta/` says of E episodes, in the order of their numbers.

    number, length: (E,). tables: names of data files; table: (E,), which of them holds an episode. videos: key -> names
    of files; video, start, end: key -> (E,), which of them, and from what second to what second of it an episode is
    shown; the end is infinite where a video holds one episode. Names are relative to the dataset. texts: added text ->
    number -> text.
    """

    number: np.ndarray
    length: np.ndarray
    tables: list[str]
    table: np.ndarray
    videos: dict[str, list[str]]
    video: dict[str, np.ndarray]
    start: dict[str, np.ndarray]
    end: dict[str, np.ndarray]
    texts: dict[str, dict[int, str]]


def meta_files(directory: Location) -> list[str]:
    return [f"meta/{name}" for name in files.list_files(directory / "meta")] + [
        f"meta/{name}" for name in files.glob(directory / "meta", "episodes/*/*.parquet")
    ]


def read_schema(directory: Location) -> Schema:
    """Returns the fields of a step by `meta/info.json`; episodes have none."""
    steps = [feature(key, of) for key, of in read_info(directory)["features"].items()]
    known = {f.key for f in steps}
    steps += [
        Feature(text, "text", "string", ())
        for text in read_episodes(directory).texts
        if text not in known and TEXTS[text] in known
    ]
    return Schema(steps={f.key: f for f in sorted(steps, key=lambda f: f.key)}, episode={})


@contextlib.contextmanager
def open_parquet(location: Location) -> Iterator[Any]:
    """Opens a Parquet file with pyarrow.

    Raises:
        DatasetError: it is not there, or is not Parquet. MissingPackageError: pyarrow is not installed.
    """
    pa = pyarrow()
    import pyarrow.parquet as pq

    try:
        with files.open_binary(location) as file, pq.ParquetFile(file) as opened:
            yield opened
    except (OSError, pa.ArrowException, UnicodeDecodeError) as e:  # the last of names of columns, and of texts
        raise DatasetError(f"{location} cannot be read as Parquet: {e}; copy it again") from e


@functools.lru_cache(maxsize=64)
def _read_episodes(directory: Location, stamp: str) -> Episodes:
    info = read_info(directory)
    fields = [feature(key, of) for key, of in info["features"].items()]
    keys = [f.key for f in fields if f.encoding == "video" and f.kind == "image"]
    if keys and not info.get("video_path"):
        raise DatasetError(f"{directory}/{INFO}: features {keys} are videos, but there is no 'video_path'")
    if generation(info) == 3:
        return _remembered(directory, stamp, lambda: _version_3(directory, info, keys))
    return _version_2(directory, info, keys)


def read_episodes(directory: Location) -> Episodes:
    """Returns what `meta/` says of the episodes. It is read once, and again when its files change.

    Raises:
        DatasetError: a file is missing or not what it should be.
    """
    try:
        stamp = digest([dataclasses.astuple(stat) for _, stat in file_stats(directory, meta_files(directory))])
        return _read_episodes(directory, stamp)
    except OSError as e:
        raise DatasetError(f"cannot read {directory}/meta: {e}; copy the dataset again") from e


def _remembered(directory: Location, stamp: str, read: Callable[[], Episodes]) -> Episodes:
    """Returns what `read` reads, which is kept in the cache directory as long as the files are as their stamp says.

    So a process that trains does without pyarrow, which takes 40 MiB.
    """
    kept = files.cache_directory() / "lerobot" / f"{digest([_FORM, files.absolute(directory), stamp])}.json"
    if kept.is_file():
        stored = json.loads(kept.read_text())
        return Episodes(
            number=np.array(stored["number"], np.int64),
            length=np.array(stored["length"], np.int64),
            tables=stored["tables"],
            table=np.array(stored["table"], np.int64),
            videos=stored["videos"],
            video={key: np.array(of, np.int64) for key, of in stored["video"].items()},
            start={key: np.array(of, np.float64) for key, of in stored["start"].items()},
            end={key: np.array(of, np.float64) for key, of in stored["end"].items()},
            texts={text: {int(n): of for n, of in table.items()} for text, table in stored["texts"].items()},
        )
    found = read()
    with contextlib.suppress(OSError):  # who cannot write it reads it again
        kept.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=kept.parent, delete=False) as file:
            json.dump(dataclasses.asdict(found), file, default=lambda array: array.tolist())
        os.replace(file.name, kept)
    return found


def _some(numbers: Sequence[int] | np.ndarray) -> str:
    """Returns numbers of episodes, the first ones if they are many."""
    shown = ", ".join(str(int(n)) for n in numbers[:_SHOWN])
    return shown + (f" and {len(numbers) - _SHOWN} more" if len(numbers) > _SHOWN else "")


def _check_numbers(directory: Location, info: dict[str, Any], table: str, number: np.ndarray) -> None:
    """Raises DatasetError unless every episode is listed once. table: where. number: of those that are, ascending."""
    problems = []
    once, counts = np.unique(number, return_counts=True)
    if (counts > 1).any():
        problems.append(
            f"{table} lists {int((counts > 1).sum())} episodes more than once: {_some(once[counts > 1])}; take out the "
            "rows that are not theirs"
        )
    total = info.get("total_episodes")
    if total is not None:
        listed = once[once < total]
        if len(listed) < total:
            # As many as a message shows are looked for: a total may be any number.
            missing = np.setdiff1d(np.arange(min(total, len(once) + _SHOWN)), listed)[:_SHOWN].tolist()
            more = total - len(listed) - len(missing)
            problems.append(
                f"{table} does not list {total - len(listed)} of the {total} episodes that total_episodes of {INFO} "
                f"says: {_some(missing)}" + (f" and {more} more" if more else "")
            )
        if len(listed) < len(once):
            problems.append(
                f"{table} lists episodes that are not below the {total} that total_episodes of {INFO} says: "
                f"{_some(once[once >= total])}"
            )
    if problems:
        raise DatasetError(
            f"{directory}: " + "; ".join(problems) + "; copy the dataset again, or write meta/ again with lerobot"
        )


def _version_2(directory: Location, info: dict[str, Any], keys: list[str]) -> Episodes:
    rows = _lines(directory, "episodes", {"episode_index": int, "length": int})
    rows.sort(key=lambda row: row["episode_index"])
    number = np.array([row["episode_index"] for row in rows], np.int64)
    _check_numbers(directory, info, "meta/episodes.jsonl", number)
    chunk = number // int(info.get("chunks_size") or 1000)
    named = [dict(episode_chunk=int(c), episode_index=int(n)) for c, n in zip(chunk, number, strict=True)]
    tasks: dict[int, str] = {}
    for row in _lines(directory, "tasks", {"task_index": int, "task": str}):
        if tasks.setdefault(row["task_index"], row["task"]) != row["task"]:
            raise DatasetError(f"{directory}/meta/tasks.jsonl: two tasks have task_index {row['task_index']}")
    return Episodes(
        number=number,
        length=np.array([row["length"] for row in rows], np.int64),
        tables=[file_name(info, "data_path", **of) for of in named],
        table=np.arange(len(rows)),
        videos={key: [file_name(info, "video_path", video_key=key, **of) for of in named] for key in keys},
        video=dict.fromkeys(keys, np.arange(len(rows))),
        start=dict.fromkeys(keys, np.zeros(len(rows))),
        end=dict.fromkeys(keys, np.full(len(rows), np.inf)),
        texts={"task": tasks},
    )


def _lines(directory: Location, name: str, needed: dict[str, type]) -> list[dict[str, Any]]:
    """Returns the objects of a file of JSON lines. needed: key -> its type; integers are 0 or more."""
    path = directory / "meta" / f"{name}.jsonl"
    try:
        # Not `splitlines`: a text may hold other ends of lines, as U+2028.
        rows = [json.loads(line) for line in files.read_text(path).split("\n") if line.strip()]
    except OSError as e:
        raise DatasetError(f"cannot read {path}: {e}; copy the dataset again") from e
    except ValueError as e:
        raise DatasetError(f"{path} is not one JSON object a line: {e}; copy the dataset again") from None
    problems = []
    for i, row in enumerate(rows):
        if missing := [key for key in needed if not isinstance(row, dict) or key not in row]:
            problems.append(f"line {i + 1}: {', '.join(missing)} missing")
            continue
        for key, kind in needed.items():
            value = row[key]
            if not isinstance(value, kind) or isinstance(value, bool) or (isinstance(value, int) and value < 0):
                what = "a text" if kind is str else "an integer, 0 or more"
                problems.append(f"line {i + 1}: {key} is {json.dumps(value)}, expected {what}")
    if problems:
        more = f" and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise DatasetError(f"{path}, {'; '.join(problems[:_SHOWN])}{more}; copy the dataset again")
    return rows


def _version_3(directory: Location, info: dict[str, Any], keys: list[str]) -> Episodes:
    names = files.glob(directory / "meta", "episodes/*/*.parquet")
    if not names:
        raise DatasetError(f"{directory}/meta/episodes holds no table of episodes; copy the dataset again")
    place, span = ("chunk_index", "file_index"), ("from_timestamp", "to_timestamp")
    integers = ["episode_index", "length", *(f"data/{what}" for what in place)]
    integers += [f"videos/{key}/{what}" for key in keys for what in place]
    seconds = [f"videos/{key}/{what}" for key in keys for what in span]
    values, problems = _columns(directory, names, integers, seconds)
    if not problems:
        order = np.argsort(values["episode_index"], kind="stable")
        values = {column: of[order] for column, of in values.items()}
        number = values["episode_index"]
        for key in keys:
            start, end = (values[f"videos/{key}/{what}"] for what in span)
            if (odd := ~((start >= 0) & (end > start))).any():
                first = int(np.argmax(odd))
                problems.append(
                    f"videos/{key}: from_timestamp {start[first]:g} to to_timestamp {end[first]:g} of episode "
                    f"{number[first]} is no part of a video (episodes {_some(number[odd])})"
                )
    if problems:
        raise DatasetError(f"{directory}/meta: {'; '.join(problems)}; copy the dataset again")
    _check_numbers(directory, info, "meta/episodes", number)

    def placed(prefix: str, template: str, **more: str) -> tuple[list[str], np.ndarray]:
        pairs = np.stack([values[f"{prefix}/{what}"] for what in place], axis=1)
        unique, at = np.unique(pairs, axis=0, return_inverse=True)
        return [file_name(info, template, chunk_index=int(c), file_index=int(f), **more) for c, f in unique], at.ravel()

    tables, table = placed("data", "data_path")
    videos = {key: placed(f"videos/{key}", "video_path", video_key=key) for key in keys}
    return Episodes(
        number=number,
        length=values["length"],
        tables=tables,
        table=table,
        videos={key: names for key, (names, _) in videos.items()},
        video={key: at for key, (_, at) in videos.items()},
        start={key: values[f"videos/{key}/from_timestamp"] for key in keys},
        end={key: values[f"videos/{key}/to_timestamp"] for key in keys},
        texts={text: _texts(directory, text) for text in TEXTS if text == "task" or _has(directory, text)},
    )


def _columns(
    directory: Location, names: list[str], integers: list[str], seconds: list[str]
) -> tuple[dict[str, np.ndarray], list[str]]:
    """Returns columns of the tables of episodes, (E,) int64 and float64, and what is wrong with them."""
    parts: dict[str, list[np.ndarray]] = {column: [] for column in (*integers, *seconds)}
    problems = []
    for name in names:
        with open_parquet(join(directory / "meta", name)) as file:
            there = file.schema_arrow.names
            table = file.read([column for column in parts if column in there])
        if missing := [column for column in parts if column not in there]:
            problems.append(f"{name}: no column {missing}")
            continue
        for column, of in parts.items():
            kind = str(table[column].type)
            if not kind.lstrip("u").startswith(("int", "float", "double", "halffloat")):
                problems.append(f"{name}: column {column!r} is of type {kind}, expected numbers")
                continue
            found = table[column].to_numpy().astype(np.float64)  # null becomes NaN; integers are exact to 2^53
            odd = ~np.isfinite(found)
            what = f"missing (null or NaN) for {int(odd.sum())} of {len(found)} episodes"
            if column in integers and not odd.any():
                odd = (found < 0) | (found != np.round(found))
                what = f"{found[odd][0] if odd.any() else 0:g}, expected an integer, 0 or more"
            if odd.any():
                which = f"row {_some(np.flatnonzero(odd))}"
                problems.append(f"{name}: {column} is {what} ({which})")
            of.append(found.astype(np.int64) if column in integers and not odd.any() else found)
    return ({} if problems else {column: np.concatenate(of) for column, of in parts.items()}), problems


def _has(directory: Location, text: str) -> bool:
    return is_file(directory / "meta" / f"{text}s.parquet")


def _texts(directory: Location, text: str) -> dict[int, str]:
    """Returns number -> text of `tasks.parquet` or `subtasks.parquet`, as pandas writes them with texts as index."""
    path = directory / "meta" / f"{text}s.parquet"
    with open_parquet(path) as file:
        table = file.read()
        number, names = TEXTS[text], table.column_names
        texts = [name for name in names if name in (text, "__index_level_0__")]
        if number not in names or not texts:
            raise DatasetError(f"{path}: it has columns {names}, expected {number!r} and {text!r}; copy it again")
        rows = list(zip(table[number].to_pylist(), table[texts[0]].to_pylist(), strict=True))
    found: dict[int, str] = {}
    for row, (n, said) in enumerate(rows):
        if not isinstance(n, int) or not isinstance(said, str):
            raise DatasetError(
                f"{path}, row {row}: {number} is {n!r} and the text {said!r}, expected an integer and a text; "
                "copy the dataset again"
            )
        if found.setdefault(n, said) != said:
            raise DatasetError(f"{path}: two texts have {number} {n}: {found[n]!r} and {said!r}; copy it again")
    return found
