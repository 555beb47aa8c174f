"""LeRobot datasets, versions 2.0 to 3: what `meta/` says of them. Nothing of lerobot or torch is needed.

Fields keep LeRobot's names ("observation.state", "action", "observation.images.front"). Two texts are added to every
step: "task", what `task_index` stands for, and "subtask" where there are subtasks.
"""

import contextlib
import dataclasses
import functools
import json
import math
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from openpi_like.data import files
from openpi_like.data.files import Location, Stat
from openpi_like.data.index_build import digest
from openpi_like.data.layouts.layout import is_file
from openpi_like.data.layouts.parquet_pages import pyarrow
from openpi_like.data.schema import DatasetError, Feature, Schema, with_names

INFO = "meta/info.json"
TEXTS = {"task": "task_index", "subtask": "subtask_index"}  # text that is added -> the column of its number
_NUMERIC = {"bool", "float16", "float32", "float64"} | {f"{s}int{b}" for s in ("", "u") for b in (8, 16, 32, 64)}


@dataclasses.dataclass(frozen=True)
class Episodes:
    """What `meta/` says of E episodes, in the order of their numbers.

    number, length: (E,). tables: names of data files; table: (E,), which of them holds an episode. videos: key -> names
    of files; video, start: key -> (E,), which of them and at what second an episode begins there. Names are relative to
    the dataset. texts: added text -> number -> text.
    """

    number: np.ndarray
    length: np.ndarray
    tables: list[str]
    table: np.ndarray
    videos: dict[str, list[str]]
    video: dict[str, np.ndarray]
    start: dict[str, np.ndarray]
    texts: dict[str, dict[int, str]]


def join(directory: Location, name: str) -> Location:
    """Returns the file of a name with slashes."""
    for part in name.split("/"):
        directory = directory / part
    return directory


def file_stats(directory: Location, names: list[str]) -> Iterator[tuple[str, Stat]]:
    """Yields (name, stat) of the files that are there."""
    folders: dict[str, dict[str, Stat]] = {}
    for name in names:
        folder, _, file = name.rpartition("/")
        if folder not in folders:
            try:
                folders[folder] = files.list_files(join(directory, folder))
            except OSError:
                folders[folder] = {}
        if file in folders[folder]:
            yield name, folders[folder][file]


def meta_files(directory: Location) -> list[str]:
    return [f"meta/{name}" for name in files.list_files(directory / "meta")] + [
        f"meta/{name}" for name in files.glob(directory / "meta", "episodes/*/*.parquet")
    ]


def read_info(directory: Location) -> dict[str, Any]:
    """Returns `meta/info.json`.

    Raises:
        DatasetError: it is not there, lacks something, or is of a version that cannot be read.
    """
    path = join(directory, INFO)
    try:
        info = json.loads(files.read_text(path))
    except OSError as e:
        raise DatasetError(f"cannot read {path}: {e}") from e
    except ValueError as e:
        raise DatasetError(f"{path} is not JSON: {e}; copy the dataset again") from None
    version = str(info.get("codebase_version", "")) if isinstance(info, dict) else ""
    major = re.match(r"v?(\d+)", version)
    if major is None or int(major[1]) not in (2, 3):
        raise DatasetError(
            f"{path}: codebase_version is {version or 'missing'!r}, expected v2.0, v2.1 or v3.x; "
            "write older datasets again with the conversion scripts of lerobot (v1.6 to v2.0, v2.0 to v2.1)"
        )
    needed = ["fps", "features", "data_path"]
    problems = [f"{name!r} is missing" for name in needed if name not in info]
    rate = info.get("fps", 1)
    if not isinstance(rate, int | float) or not 0 < rate < math.inf:
        problems.append(f"fps is {rate!r}, expected a number above 0")
    if problems:
        raise DatasetError(f"{path}: " + "; ".join(problems))
    return info


def read_splits(directory: Location, info: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """Returns split -> first episode and the one behind its last."""
    total = int(info.get("total_episodes", 0))
    found = {}
    for name, text in (info.get("splits") or {"train": f"0:{total}"}).items():
        match = re.fullmatch(r"(\d+):(\d+)", str(text))
        if match is None:
            raise DatasetError(f"{directory}/{INFO}: split {name!r} is {text!r}, expected episodes like '0:50'")
        found[name] = int(match[1]), int(match[2])
    return found


def read_schema(directory: Location) -> Schema:
    """Returns the fields of a step by `meta/info.json`; episodes have none."""
    steps = [_feature(key, of) for key, of in read_info(directory)["features"].items()]
    known = {f.key for f in steps}
    steps += [
        Feature(text, "text", "string", ())
        for text in read_episodes(directory).texts
        if text not in known and TEXTS[text] in known
    ]
    return Schema(steps={f.key: f for f in sorted(steps, key=lambda f: f.key)}, episode={})


def _feature(key: str, of: dict[str, Any]) -> Feature:
    dtype, shape = str(of.get("dtype")), tuple(int(d) for d in of.get("shape") or ())
    if dtype in ("video", "image"):
        names = [str(name) for name in of.get("names") or ()]
        if len(shape) == 3 and (names[:1] in (["channel"], ["channels"]) or (shape[0] in (1, 3) and shape[2] > 4)):
            shape = (*shape[1:], shape[0])
        depth = bool((of.get("info") or {}).get("video.is_depth_map")) or bool(of.get("is_depth_map"))
        return Feature(key, "other" if depth else "image", "depth map" if depth else "uint8", shape, dtype)
    if dtype == "string":
        return with_names(Feature(key, "text", "string", ()), of.get("names"))
    kind = "numeric" if dtype in _NUMERIC else "other"
    return with_names(Feature(key, kind, dtype, () if shape == (1,) else shape), of.get("names"))


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
    except (OSError, pa.ArrowException) as e:
        raise DatasetError(f"{location} cannot be read as Parquet: {e}; copy it again") from e


@functools.lru_cache(maxsize=64)
def _read_episodes(directory: Location, stamp: str) -> Episodes:
    info = read_info(directory)
    keys = [k for k, of in info["features"].items() if _feature(k, of).encoding == "video"]
    keys = [k for k in keys if _feature(k, info["features"][k]).kind == "image"]
    if keys and not info.get("video_path"):
        raise DatasetError(f"{directory}/{INFO}: features {keys} are videos, but there is no 'video_path'")
    if str(info["codebase_version"]).lstrip("v").startswith("3"):
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
    kept = files.cache_directory() / "lerobot" / f"{digest([1, files.absolute(directory), stamp])}.json"
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
            texts={text: {int(n): of for n, of in table.items()} for text, table in stored["texts"].items()},
        )
    found = read()
    with contextlib.suppress(OSError):  # who cannot write it reads it again
        kept.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=kept.parent, delete=False) as file:
            json.dump(dataclasses.asdict(found), file, default=lambda array: array.tolist())
        os.replace(file.name, kept)
    return found


def _version_2(directory: Location, info: dict[str, Any], keys: list[str]) -> Episodes:
    rows = sorted(_lines(directory, "episodes", ("episode_index", "length")), key=lambda row: row["episode_index"])
    number = np.array([row["episode_index"] for row in rows], np.int64)
    chunk = number // int(info.get("chunks_size", 1000))
    named = [dict(episode_chunk=int(c), episode_index=int(n)) for c, n in zip(chunk, number, strict=True)]
    texts = {"task": {row["task_index"]: row["task"] for row in _lines(directory, "tasks", ("task_index", "task"))}}
    return Episodes(
        number=number,
        length=np.array([row["length"] for row in rows], np.int64),
        tables=[info["data_path"].format(**of) for of in named],
        table=np.arange(len(rows)),
        videos={key: [info["video_path"].format(video_key=key, **of) for of in named] for key in keys},
        video=dict.fromkeys(keys, np.arange(len(rows))),
        start=dict.fromkeys(keys, np.zeros(len(rows))),
        texts=texts,
    )


def _lines(directory: Location, name: str, needed: tuple[str, ...]) -> list[dict[str, Any]]:
    path = directory / "meta" / f"{name}.jsonl"
    try:
        rows = [json.loads(line) for line in files.read_text(path).splitlines() if line.strip()]
    except OSError as e:
        raise DatasetError(f"cannot read {path}: {e}; copy the dataset again") from e
    except ValueError as e:
        raise DatasetError(f"{path} is not one JSON object a line: {e}; copy the dataset again") from None
    for i, row in enumerate(rows):
        if missing := [key for key in needed if not isinstance(row, dict) or key not in row]:
            raise DatasetError(f"{path}, line {i + 1}: {', '.join(missing)} missing; copy the dataset again")
    return rows


def _version_3(directory: Location, info: dict[str, Any], keys: list[str]) -> Episodes:
    names = files.glob(directory / "meta", "episodes/*/*.parquet")
    if not names:
        raise DatasetError(f"{directory}/meta/episodes holds no table of episodes; copy the dataset again")
    columns = ["episode_index", "length", "data/chunk_index", "data/file_index"]
    of_videos = ("chunk_index", "file_index", "from_timestamp")
    columns += [f"videos/{key}/{what}" for key in keys for what in of_videos]
    tables = []
    for name in names:
        with open_parquet(join(directory / "meta", name)) as file:
            if missing := [c for c in columns if c not in file.schema_arrow.names]:
                raise DatasetError(f"{directory}/meta/{name}: no column {missing}; copy the dataset again")
            tables.append(file.read(columns))
    table = pyarrow().concat_tables(tables).sort_by("episode_index")
    values = {name: table[name].to_numpy() for name in columns}

    def placed(prefix: str, template: str, **more: str) -> tuple[list[str], np.ndarray]:
        pairs = np.stack([values[f"{prefix}/{what}"] for what in of_videos[:2]], axis=1).astype(np.int64)
        unique, at = np.unique(pairs, axis=0, return_inverse=True)
        names = [template.format(chunk_index=int(c), file_index=int(f), **more) for c, f in unique]
        return names, at.reshape(-1)

    data = placed("data", info["data_path"])
    videos = {key: placed(f"videos/{key}", info["video_path"], video_key=key) for key in keys}
    return Episodes(
        number=values["episode_index"].astype(np.int64),
        length=values["length"].astype(np.int64),
        tables=data[0],
        table=data[1],
        videos={key: names for key, (names, _) in videos.items()},
        video={key: at for key, (_, at) in videos.items()},
        start={key: values[f"videos/{key}/from_timestamp"].astype(np.float64) for key in keys},
        texts={text: _texts(directory, text) for text in TEXTS if text == "task" or _has(directory, text)},
    )


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
        raise DatasetError(f"{path}: it has columns {names}, expected {number!r} and {text!r}; copy the dataset again")
    return dict(zip(table[number].to_pylist(), map(str, table[texts[0]].to_pylist()), strict=True))
