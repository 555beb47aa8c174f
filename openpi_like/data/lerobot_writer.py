"""Writes LeRobot datasets, version 3.0: tables of steps, pictures in them or in videos, and `meta/`.

Episodes are written as they come, so memory is that of one episode; the dataset appears when it is complete. A step
has the columns that are given, and LeRobot's own: `timestamp`, `frame_index`, `episode_index`, `index`, `task_index`.
"""

import contextlib
import dataclasses
import io
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from openpi_like.config import near_names
from openpi_like.data.images import decode
from openpi_like.data.lerobot_stats import NumberFile, PixelCounts, Stats, number_stats, sampled_steps
from openpi_like.data.video_writer import ENCODER, ENCODERS, PIXELS, Placed, VideoWriter

try:
    import pyarrow as pa
    import pyarrow.parquet as pq
except ImportError as e:
    raise ImportError(f"LeRobot datasets are written with pyarrow: {e}; pip install 'openpi-like[formats]'") from e

VERSION = "v3.0"
FILES_PER_CHUNK = 1000
DATA_MB, VIDEO_MB = 100.0, 200.0  # LeRobot's own sizes of files
OWN: dict[str, np.dtype] = {
    "timestamp": np.dtype(np.float32),
    "frame_index": np.dtype(np.int64),
    "episode_index": np.dtype(np.int64),
    "index": np.dtype(np.int64),
    "task_index": np.dtype(np.int64),
}
DTYPES = {"bool", "float16", "float32", "float64"} | {f"{s}int{b}" for s in ("", "u") for b in (8, 16, 32, 64)}
_PLACE = "chunk-{chunk:03d}/file-{file:03d}"
_ROWS = 100  # episodes whose description is written at once
_PICTURE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


@dataclasses.dataclass(frozen=True)
class Column:
    """A column of steps. dtype: of numbers, or "string", "image" (encoded pictures), "video" (pixels).

    shape: of the numbers of one step; () is written as (1,), which LeRobot does not tell apart. names: what the values
    are called, as LeRobot has it: a list, or lists by kind.
    """

    dtype: str
    shape: tuple[int, ...] = ()
    names: Any = None


@dataclasses.dataclass(frozen=True)
class LeRobotFormat:
    """fps: steps in a second. encoder: of videos, one of `video_writer.ENCODERS`. robot_type: what LeRobot shows.

    data_mb, video_mb: how large files become, in MiB; an episode that is larger is a file by itself.
    """

    fps: float
    encoder: str = ENCODER
    robot_type: str | None = None
    data_mb: float = DATA_MB
    video_mb: float = VIDEO_MB

    def __post_init__(self) -> None:
        problems = []
        if not 0 < self.fps < float("inf"):
            problems.append(f"fps={self.fps}, expected a number above 0")
        if self.encoder not in ENCODERS:
            problems.append(f"encoder {self.encoder!r} is unknown; {near_names(self.encoder, list(ENCODERS))}")
        if not (self.data_mb > 0 and self.video_mb > 0):
            problems.append(f"data_mb={self.data_mb}, video_mb={self.video_mb}, expected both above 0")
        if problems:
            raise ValueError("LeRobotFormat: " + "; ".join(problems))


Values = np.ndarray | Sequence[str] | Sequence[bytes] | Iterable[np.ndarray]


class LeRobotWriter:
    """Writes one dataset, inside `with`: it appears at `out` when the block ends without an error.

    Raises:
        FileExistsError: there is something at `out`.
        ValueError: columns have names that LeRobot cannot hold.
    """

    def __init__(self, out: Path, columns: Mapping[str, Column], form: LeRobotFormat) -> None:
        _check_columns(columns)
        if out.exists():
            raise FileExistsError(f"{out} exists; delete it to write the dataset again, or write to another directory")
        self._out, self._form, self._columns = out, form, dict(columns)
        self._rate = Fraction(form.fps).limit_denominator(10_000)
        self._part = out.with_name(f"{out.name}.incomplete")
        shutil.rmtree(self._part, ignore_errors=True)  # left by a run that was killed
        (self._part / "meta" / "episodes" / "chunk-000").mkdir(parents=True)
        (self._part / "scratch").mkdir()
        self._data = _Tables(self._part / "data", int(form.data_mb * 2**20))
        self._videos = {
            key: VideoWriter(
                str(self._part / "videos" / key.replace("{", "{{").replace("}", "}}") / f"{_PLACE}.mp4"),
                self._rate, form.encoder, int(form.video_mb * 2**20),
            )
            for key, column in columns.items()
            if column.dtype == "video"
        }  # fmt: skip
        numeric = [*(k for k, c in columns.items() if c.dtype in DTYPES), *OWN]
        self._numbers = {key: NumberFile(self._part / "scratch" / str(i)) for i, key in enumerate(numeric)}
        self._pixels = {key: PixelCounts() for key, c in columns.items() if c.dtype in ("image", "video")}
        self._sizes: dict[str, tuple[int, int]] = {}
        self._tasks: dict[str, int] = {}
        self._splits: dict[str, tuple[int, int]] = {}
        self._described: list[dict[str, Any]] = []
        self._descriptions: pq.ParquetWriter | None = None
        self._episodes, self._steps = 0, 0

    def add_episode(self, values: Mapping[str, Values], tasks: Sequence[str], split: str = "train") -> None:
        """Writes the next episode.

        values: of every column: numbers (T, *shape); T texts; T encoded pictures, which are stored as they are; or the
            frames of a video, (H, W, 3) uint8, which may be made one after the other.
        tasks: T instructions. split: those of a split follow each other.

        Raises:
            ValueError: lengths, shapes or the sizes of pictures do not fit; the dataset cannot be completed then.
        """
        length = len(tasks)
        self._check(values, length, split)
        numbers = {key: x for key, x in values.items() if isinstance(x, np.ndarray)}
        frame = np.arange(length)
        numbers |= {
            "timestamp": (frame / float(self._rate)).astype(np.float32),
            "frame_index": frame,
            "episode_index": np.full(length, self._episodes),
            "index": frame + self._steps,
            "task_index": np.array([self._tasks.setdefault(task, len(self._tasks)) for task in tasks]),
        }
        stats: dict[str, Stats] = {}
        placed: dict[str, Placed] = {}
        table: dict[str, pa.Array] = {}
        for key, column in self._columns.items():
            given: Any = values[key]
            if column.dtype == "video":
                counts = PixelCounts()
                try:
                    placed[key] = self._videos[key].add(self._seen(key, given, length, counts))
                except ValueError as e:
                    raise ValueError(f"episode {self._episodes}, {key!r}: {e}") from e
                self._pixels[key].merge(counts)
                stats[key] = counts.stats()
            elif column.dtype == "image":
                table[key] = pa.array([{"bytes": data, "path": None} for data in given], _PICTURE)
                stats[key] = self._look(key, given)
            elif column.dtype == "string":
                table[key] = pa.array(list(given), pa.string())
            else:
                table[key] = _array(given)
        for key in OWN:
            table[key] = _array(numbers[key])
        for key, x in numbers.items():
            self._numbers[key].add(x)
            stats[key] = number_stats(x)
        file = self._data.write(pa.table(table))
        self._describe(length, list(dict.fromkeys(tasks)), file, placed, stats)
        first, _ = self._splits.get(split, (self._episodes, 0))
        self._episodes += 1
        self._steps += length
        self._splits[split] = first, self._episodes

    def _check(self, values: Mapping[str, Values], length: int, split: str) -> None:
        where, problems = f"episode {self._episodes}", []
        if sorted(values) != sorted(self._columns):
            problems.append(f"columns {sorted(values)}, expected {sorted(self._columns)}")
        if length == 0:
            problems.append("it has no steps")
        if split in self._splits and split != next(reversed(self._splits)):
            problems.append(f"split {split!r} was ended by another; its episodes must follow each other")
        for key in sorted(values.keys() & self._columns.keys()):
            column, x = self._columns[key], values[key]
            if column.dtype in DTYPES:
                got = (x.dtype.name, x.shape) if isinstance(x, np.ndarray) else type(x).__name__
                if got != (column.dtype, (length, *column.shape)):
                    problems.append(f"{key!r} is {got}, expected {(column.dtype, (length, *column.shape))}")
            elif column.dtype != "video" and len(x) != length:  # type: ignore[arg-type]  # frames alone have no length
                problems.append(f"{key!r} has {len(x)} values, expected {length}")  # type: ignore[arg-type]
        if problems:
            raise ValueError(f"{where}: " + "; ".join(problems))

    def _size(self, key: str, size: tuple[int, int], step: int) -> None:
        if self._sizes.setdefault(key, size) != size:
            raise ValueError(
                f"a picture of {size} (height, width), those before have {self._sizes[key]}; LeRobot has one size for "
                "a camera"
            )

    def _seen(self, key: str, frames: Iterable[np.ndarray], length: int, counts: PixelCounts) -> Iterator[np.ndarray]:
        sampled, count = sampled_steps(length), 0
        for count, frame in enumerate(frames, start=1):
            self._size(key, (frame.shape[0], frame.shape[1]), count - 1)
            if count - 1 in sampled:
                counts.add(frame)
            yield frame
        if count != length:
            raise ValueError(f"{count} frames, expected {length}")

    def _look(self, key: str, pictures: Sequence[bytes]) -> Stats:
        counts, sampled = PixelCounts(), sampled_steps(len(pictures))
        for step, data in enumerate(pictures):
            try:
                with Image.open(io.BytesIO(data)) as header:
                    self._size(key, header.size[::-1], step)
                if step in sampled:
                    counts.add(decode(data))
            except (ValueError, UnidentifiedImageError) as e:
                raise ValueError(f"episode {self._episodes}, step {step}, {key!r}: {e}") from e
        self._pixels[key].merge(counts)
        return counts.stats()

    # ---- meta/ -------------------------------------------------------------------------------------------------------

    def _describe(
        self, length: int, tasks: list[str], file: int, placed: dict[str, Placed], stats: dict[str, Stats]
    ) -> None:
        row: dict[str, Any] = {
            "episode_index": self._episodes,
            "tasks": tasks,
            "length": length,
            "data/chunk_index": file // FILES_PER_CHUNK,
            "data/file_index": file % FILES_PER_CHUNK,
            "dataset_from_index": self._steps,
            "dataset_to_index": self._steps + length,
            "meta/episodes/chunk_index": 0,
            "meta/episodes/file_index": 0,
        }
        for key, place in placed.items():
            row[f"videos/{key}/chunk_index"] = place.file // FILES_PER_CHUNK
            row[f"videos/{key}/file_index"] = place.file % FILES_PER_CHUNK
            row[f"videos/{key}/from_timestamp"] = float(place.first / self._rate)
            row[f"videos/{key}/to_timestamp"] = float(place.end / self._rate)
        row |= {f"stats/{key}/{name}": x.tolist() for key, of in stats.items() for name, x in of.items()}
        self._described.append(row)
        if len(self._described) == _ROWS:
            self._write_descriptions()

    def _write_descriptions(self) -> None:
        table = pa.Table.from_pylist(self._described)
        if self._descriptions is None:
            path = self._part / "meta" / "episodes" / "chunk-000" / "file-000.parquet"
            self._descriptions = pq.ParquetWriter(path, table.schema)
        self._descriptions.write_table(table.cast(self._descriptions.schema))
        self._described.clear()

    def _features(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, column in self._columns.items():
            shape = list(column.shape or (1,))
            names = column.names
            if column.dtype in ("image", "video"):
                shape, names = [*self._sizes[key], 3], ["height", "width", "channels"]
            found[key] = {"dtype": column.dtype, "shape": shape, "names": names}
            if column.dtype == "video":
                found[key]["info"] = {
                    "video.height": shape[0],
                    "video.width": shape[1],
                    "video.codec": self._videos[key].codec,
                    "video.pix_fmt": PIXELS,
                    "video.is_depth_map": False,
                    "video.fps": _number(self._rate),
                    "video.channels": 3,
                    "has_audio": False,
                }
        return found | {key: {"dtype": dtype.name, "shape": [1], "names": None} for key, dtype in OWN.items()}

    def _finish(self) -> None:
        if not self._episodes:
            raise ValueError("no episodes were given, expected at least one")
        if self._described:
            self._write_descriptions()
        self._close()
        self._write_meta()
        shutil.rmtree(self._part / "scratch")
        self._part.rename(self._out)

    def _close(self) -> None:
        self._data.close()
        for video in self._videos.values():
            video.close()
        if self._descriptions is not None:
            self._descriptions.close()

    def _write_meta(self) -> None:
        meta = self._part / "meta"
        _write_tasks(meta / "tasks.parquet", list(self._tasks))
        stats = {key: numbers.stats() for key, numbers in self._numbers.items()}
        stats |= {key: counts.stats() for key, counts in self._pixels.items()}
        plain = {key: {name: x.tolist() for name, x in of.items()} for key, of in stats.items()}
        (meta / "stats.json").write_text(json.dumps(plain, indent=4))
        place = _PLACE.replace("{chunk", "{chunk_index").replace("{file", "{file_index")
        info = {
            "codebase_version": VERSION,
            "robot_type": self._form.robot_type,
            "total_episodes": self._episodes,
            "total_frames": self._steps,
            "total_tasks": len(self._tasks),
            "chunks_size": FILES_PER_CHUNK,
            "data_files_size_in_mb": _number(self._form.data_mb),
            "video_files_size_in_mb": _number(self._form.video_mb),
            "fps": _number(self._rate),
            "splits": {name: f"{first}:{end}" for name, (first, end) in self._splits.items()},
            "data_path": f"data/{place}.parquet",
            "video_path": f"videos/{{video_key}}/{place}.mp4" if self._videos else None,
            "features": self._features(),
        }
        (meta / "info.json").write_text(json.dumps(info, indent=4, ensure_ascii=False), encoding="utf-8")

    def __enter__(self) -> "LeRobotWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self._finish()
        else:
            with contextlib.suppress(Exception):  # of files that are not complete
                self._close()


def _number(x: float | Fraction) -> int | float:
    """Returns a number as LeRobot writes it: an integer where it is one."""
    return int(x) if x == int(x) else float(x)


def _check_columns(columns: Mapping[str, Column]) -> None:
    problems = []
    for key, column in columns.items():
        if key in OWN or key == "task":
            problems.append(f"{key!r} is LeRobot's own")
        if "/" in key or not key:
            problems.append(f"{key!r} is no name in LeRobot, which separates with dots")
        if column.dtype not in DTYPES | {"string", "image", "video"}:
            problems.append(f"{key!r} is of type {column.dtype!r}, expected numbers, 'string', 'image' or 'video'")
    if problems:
        raise ValueError("columns: " + "; ".join(problems))


def _array(values: np.ndarray) -> pa.Array:
    """Returns (T, *shape) as T lists of lists; (T, 1) as T numbers."""
    array = pa.array(np.ascontiguousarray(values).reshape(-1))
    for size in reversed(values.shape[1:] if values.shape[1:] != (1,) else ()):
        array = pa.FixedSizeListArray.from_arrays(array, size)
    return array


def _write_tasks(path: Path, tasks: list[str]) -> None:
    """Writes texts as a table whose index they are, as pandas has it."""
    columns = [
        {"name": name, "field_name": name, "pandas_type": kind, "numpy_type": dtype, "metadata": None}
        for name, kind, dtype in (("task_index", "int64", "int64"), ("task", "unicode", "object"))
    ]
    table = pa.table({"task_index": pa.array(range(len(tasks)), pa.int64()), "task": pa.array(tasks, pa.string())})
    index = {"index_columns": ["task"], "column_indexes": [], "columns": columns, "pandas_version": "2.2.0"}
    pq.write_table(table.replace_schema_metadata({"pandas": json.dumps(index)}), path)


class _Tables:
    """Parquet files of steps. A row group is an episode."""

    def __init__(self, directory: Path, max_bytes: int) -> None:
        self._directory, self._max_bytes = directory, max_bytes
        self._number, self._bytes = -1, 0
        self._writer: pq.ParquetWriter | None = None

    def write(self, table: pa.Table) -> int:
        """Writes an episode, and returns the number of its file."""
        if self._writer is None or self._bytes + table.nbytes > self._max_bytes:
            self.close()
            self._number, self._bytes = self._number + 1, 0
            place = _PLACE.format(chunk=self._number // FILES_PER_CHUNK, file=self._number % FILES_PER_CHUNK)
            path = self._directory / f"{place}.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            plain = [field.name for field in table.schema if field.type != _PICTURE]  # no two pictures are the same
            self._writer = pq.ParquetWriter(path, table.schema, compression="snappy", use_dictionary=plain)
        self._writer.write_table(table, row_group_size=len(table))
        self._bytes += table.nbytes
        return self._number

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
        self._writer = None
