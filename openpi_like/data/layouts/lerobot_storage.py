"""Records of LeRobot datasets: rows of Parquet files, pictures in them or in videos."""

import dataclasses
import functools
import itertools
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from openpi_like.config import near_names
from openpi_like.data import files
from openpi_like.data.byte_cache import ByteCache
from openpi_like.data.files import Location, Ranges
from openpi_like.data.images import Target
from openpi_like.data.index_build import digest
from openpi_like.data.index_columns import IndexColumn, file_name, index_columns
from openpi_like.data.layouts.lerobot_info import INFO, file_stats, join, read_info, read_splits
from openpi_like.data.layouts.lerobot_meta import TEXTS, Episodes, open_parquet, read_episodes
from openpi_like.data.layouts.parquet_pages import Page, find_values, read_page
from openpi_like.data.layouts.video import (
    DECODER_BYTES,
    DECODERS,
    READ_BYTES,
    Codec,
    Packets,
    VideoFrames,
    VideoTable,
    read_packets,
)
from openpi_like.data.schema import DatasetError, Feature, MissingPackageError, Shard, Split
from openpi_like.data.storage import EncodedPictures, Pictures, Place, RecordError, Rows, StoredEpisode, pack, unpack

CACHE_BYTES = 64 << 20  # pages of pictures that were decompressed last
PAGE_BYTES = 2 << 20  # what writers make a page of pictures: a megabyte and the picture that ends it
_CODECS = ("UNCOMPRESSED", "SNAPPY", "GZIP", "BROTLI", "ZSTD", "LZ4")
_CHANNELS = ((1,), (3,), (4,))  # what a shape ends with that is (H, W, C)
_NEAR = 0.25  # of the time between two steps: a frame or step further away than this is not that step's
_RATE = 0.02  # part by which the time of a whole episode may differ from what its rate says
_FEW = 5  # steps that, evenly apart, have a rate of their own
_MANY = 50  # steps whose mean says something of their rate, whatever the jitter


@dataclasses.dataclass(frozen=True)
class LeRobotStorage:
    """One or more episodes a Parquet file; videos beside it, or pictures in it."""

    directory: Location
    name: str = "lerobot"

    @property
    def kept(self) -> dict[str, int]:
        return {"video decoders": DECODERS * DECODER_BYTES, "pages that were read last": CACHE_BYTES}

    def episodes(self, shard: Shard) -> Iterator[tuple[str, StoredEpisode | RecordError]]:
        try:
            table = _Table(self.directory, shard)
        except MissingPackageError:
            raise
        except DatasetError as e:
            yield shard.location.name, RecordError(str(e), resumable=False)
            return
        for number, i in table.wanted:
            yield f"{table.name}, episode {number}", table.episode(number, i)
        for number in table.strays:  # more than meta/ says, so the dataset is refused
            why = "the file has it, but meta/ does not list it there; copy the dataset again"
            yield f"{table.name}, episode {number}", RecordError(why, resumable=True)

    def complete(self, split: Split, parts: Path, index: Path) -> None:
        meta = read_episodes(self.directory)
        names = video_names(meta)
        stats = dict(file_stats(self.directory, names))
        VideoTable.write(index / "video", names, (_kept_packets(parts, name, stats) for name in names))
        _write_pages(parts, len(split.shards), index / "pages")

    def pictures(self, split: Split, index: Path) -> Pictures:
        return _Pictures(self.directory, split, index)

    def read_bytes(self, images: dict[str, np.ndarray], key: str) -> int:
        largest = int(images[key][:, 1].max())
        return max(largest, READ_BYTES) + 2 * max(largest, PAGE_BYTES)


def video_names(meta: Episodes) -> list[str]:
    """Returns all videos of a dataset, camera by camera: a video is known by its place in this list."""
    return [name for key in meta.videos for name in meta.videos[key]]


class _Table:
    """One Parquet file, without its pictures."""

    def __init__(self, directory: Location, shard: Shard) -> None:
        self._directory, self._shard = directory, shard
        info, self._meta = read_info(directory), read_episodes(directory)
        self._rate = float(info["fps"])
        self.name = next(name for name in self._meta.tables if join(directory, name) == shard.location)
        first, end = read_splits(directory, info)[shard.split.name]
        here = self._meta.table == self._meta.tables.index(self.name)
        mine = here & (self._meta.number >= first) & (self._meta.number < end)
        self.wanted = [(int(self._meta.number[i]), int(i)) for i in np.flatnonzero(mine)]
        self._fields, _ = index_columns(shard.schema)
        firsts = np.cumsum([0, *map(len, self._meta.videos.values())])
        self._first_video = dict(zip(self._meta.videos, firsts.tolist(), strict=False))
        pictures = [f.feature.key for f in self._fields if f.folder == "image" and f.feature.encoding == "image"]
        with open_parquet(shard.location) as file:
            there = file.schema_arrow.names
            needed = {f.feature.key for f in self._fields if f.folder != "image"} - self._meta.texts.keys()
            needed |= {TEXTS[text] for text in self._meta.texts if text in shard.schema.steps}
            needed |= {"episode_index", "frame_index", "timestamp"}
            self._problems = [
                f"the file has no column {key!r} ({near_names(key, there)})"
                for key in sorted(needed | set(pictures))
                if key not in there
            ]
            self._table = file.read(sorted(needed.intersection(there)))
            places = {key: self._find_pictures(file, key) for key in pictures if key in there}
        self._number, self.strays = np.zeros(0, np.int64), list[int]()
        try:
            if "episode_index" in there:
                self._number = _values(self._table["episode_index"], np.dtype(np.int64), ())
        except RecordError as e:
            self._problems.append(f"episode_index: {e}")
        else:
            self.strays = np.setdiff1d(self._number, self._meta.number[here]).tolist()
        self._places = {key: rows for key, (rows, _) in places.items()}
        _save(shard.part.with_suffix(".pages"), {key: pages for key, (_, pages) in places.items()})

    def _find_pictures(self, file: Any, key: str) -> tuple[np.ndarray | RecordError, np.ndarray]:
        """Returns (rows, 2), where the pictures of a column are, or why that is unknown; and their pages."""
        pages: list[Page] = []
        found = [np.zeros((0, 2), np.int64)]
        ranges = Ranges()
        try:
            for group in range(file.num_row_groups):
                meta = file.metadata.row_group(group)
                at = [i for i in range(meta.num_columns) if meta.column(i).path_in_schema == f"{key}.bytes"]
                if not at:
                    raise RecordError("its pictures are not in the table", resumable=True)
                column = file.schema.column(at[0])
                values = find_values(ranges, self._shard.location, meta.column(at[0]), column.max_definition_level)
                page, start, length = values.places.T
                found.append(np.stack([pack(page + len(pages), start), length], axis=1))
                pages += values.pages
                if unknown := sorted({page.codec for page in values.pages}.difference(_CODECS)):
                    raise RecordError(f"compression {unknown} of Parquet cannot be read; write ZSTD", resumable=True)
        except (RecordError, OSError) as e:
            return RecordError(str(e), resumable=True), np.zeros((0, 4), np.int64)
        finally:
            ranges.close()
        told = [(page.start, page.length, page.size, _CODECS.index(page.codec)) for page in pages]
        return np.concatenate(found), np.array(told, np.int64).reshape(-1, 4)

    def episode(self, number: int, i: int) -> StoredEpisode | RecordError:
        """Returns an episode. i: its place in `meta/`."""
        if self._problems:
            return RecordError("; ".join(self._problems), resumable=True)
        rows = np.flatnonzero(self._number == number)
        length = int(self._meta.length[i])
        if len(rows) != length or (length and rows[-1] - rows[0] + 1 != length):
            message = f"its table has {len(rows)} rows"
            message += " that do not follow each other" if len(rows) == length else f", meta/ says {length}"
            return RecordError(message, resumable=True)
        if not length:
            return RecordError("it has no steps, says meta/; take it out of the dataset", resumable=True)
        span = slice(int(rows[0]), int(rows[0]) + length)
        table = self._table.slice(span.start, length)
        values: dict[str, Rows] = {}
        problems: list[str] = []
        undecodable: dict[str, str] = {}
        own: dict[str, np.ndarray] = {}
        for key, dtype in (("timestamp", np.float64), ("frame_index", np.int64)):
            try:
                own[key] = _values(table[key], np.dtype(dtype), ())
            except RecordError as e:
                problems.append(f"{key}: {e}")
        if problems:
            return StoredEpisode({}, tuple(problems))
        seconds = own["timestamp"]
        problems += time_problems(seconds, own["frame_index"], self._rate)
        for field in self._fields:
            key = field.feature.key
            try:
                if field.folder != "image":
                    values[field.column] = self._rows(table, field)
                elif field.feature.encoding == "video":
                    values[field.column] = self._frames(field.feature, i, seconds)
                else:
                    places = self._places[key]
                    if isinstance(places, RecordError):
                        raise places
                    values[field.column] = places[span]
            except MissingPackageError:
                raise  # no damage, which would be remembered with the index
            except (RecordError, DatasetError, OSError) as e:
                problems.append(f"{key}: {e}")
            except UnicodeDecodeError as e:
                undecodable[field.column] = f"its text is not UTF-8: {e}"
        problems += [f"{column.partition('/')[2]}: {why}" for column, why in undecodable.items()]
        return StoredEpisode(values, tuple(problems), undecodable)

    def _rows(self, table: Any, field: IndexColumn) -> Rows:
        key = field.feature.key
        texts = self._meta.texts.get(key)
        if texts is not None and key not in table.column_names:
            numbers = table[TEXTS[key]].to_pylist()
            if unknown := sorted({n for n in numbers if n not in texts}, key=str):
                raise RecordError(f"{TEXTS[key]} {unknown} is not among the {len(texts)} of meta/", resumable=True)
            return [texts[n] for n in numbers]
        if field.feature.kind == "text":
            found = table[key].to_pylist()
            odd = [step for step, text in enumerate(found) if not isinstance(text, str)]
            if odd:
                what = "is missing (null)" if found[odd[0]] is None else f"is {type(found[odd[0]]).__name__}"
                raise RecordError(
                    f"{len(odd)} of {len(found)} are no text, the first {what}, of step {odd[0]}", resumable=True
                )
            return found
        return _values(table[key], field.dtype, field.shape)

    def _frames(self, feature: Feature, i: int, seconds: np.ndarray) -> np.ndarray:
        """Returns (T, 2), the address and the length of the frame of each step of an episode."""
        key = feature.key
        video = int(self._meta.video[key][i])
        name = self._meta.videos[key][video]
        packets = _packets(self._directory, name, self._shard.part.parent)
        start, end = float(self._meta.start[key][i]), float(self._meta.end[key][i])
        shown = seconds + start
        at, far = packets.at(shown)
        near = _NEAR / self._rate
        problems = []
        if feature.shape[2:] in _CHANNELS and packets.size != feature.shape[:2]:
            got, expected = (f"{height} x {width}" for height, width in (packets.size, feature.shape[:2]))
            problems.append(
                f"{name} has pictures of {got} pixels, {INFO} says {expected}; copy the video again, or put shape "
                "right there if all of this camera's are so"
            )
        # Not `far > near`: that is false for NaN.
        if (missing := ~(far <= near)).any():
            first = int(np.argmax(missing))
            there = packets.seconds[np.isfinite(packets.seconds)]
            problems.append(
                f"{name} has no frame for {int(missing.sum())} of {len(seconds)} steps, first for step {first} at "
                f"{shown[first]:.3f} s; its {len(there)} frames are at {there.min():.3f} to {there.max():.3f} s"
            )
        if (behind := ~(shown < end - near)).any():
            first = int(np.argmax(behind))
            problems.append(
                f"meta/episodes says that the episode is at {start:.3f} to {end:.3f} s of {name}, but "
                f"{int(behind.sum())} of {len(seconds)} steps are behind that, first step {first} at "
                f"{shown[first]:.3f} s: these frames are of another episode; copy the dataset again"
            )
        if problems:
            raise RecordError("; ".join(problems), resumable=True)
        return np.stack([pack(self._first_video[key] + video, at), packets.rows[at, 1]], axis=1)


def _values(column: Any, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    """Returns a column of numbers, or of lists of them, (T, *shape).

    Raises:
        RecordError: some are missing, or are no numbers of this shape and type.
    """
    from pyarrow import compute

    flat = column.combine_chunks()
    steps, each = len(flat), 1  # lists of `each` step are beside each other
    while True:
        if flat.null_count:
            first = flat.is_null().to_numpy(zero_copy_only=False).argmax() // each
            where = f"{flat.null_count} of {len(flat)} values are missing (null), the first of step {first}"
            raise RecordError(where, resumable=True)
        if not hasattr(flat.type, "value_type") or not hasattr(flat, "flatten"):
            break
        lengths = compute.list_value_length(flat).to_numpy(zero_copy_only=False)
        if len(lengths) and (odd := lengths != lengths[0]).any():
            first = int(np.argmax(odd))
            raise RecordError(
                f"rows differ in length: {lengths[0]} values in step 0, {lengths[first]} in step {first // each}, "
                f"meta/info.json says shape {shape}",
                resumable=True,
            )
        each *= int(lengths[0]) if len(lengths) else 1
        flat = flat.flatten()
    stored = flat.to_numpy(zero_copy_only=False)
    if stored.dtype.kind not in "biuf":
        raise RecordError(f"values are of type {flat.type}, expected {dtype}", resumable=True)
    if len(stored) != steps * int(np.prod(shape, dtype=np.int64)):
        raise RecordError(f"{len(stored)} values in {steps} steps, meta/info.json says shape {shape}", resumable=True)
    with np.errstate(invalid="ignore"):  # NaN as an integer, which is told below
        rows = stored.astype(dtype)
    if dtype.kind in "iu" and (rows != stored).any():
        raise RecordError(f"{stored[rows != stored][0]} is not of type {dtype}", resumable=True)
    return rows.reshape(-1, *shape)


def time_problems(seconds: Float[np.ndarray, "T"], number: Int[np.ndarray, "T"], rate: float) -> list[str]:
    """Returns what of the time stamps of an episode's steps does not fit its rate.

    seconds: (T,), when the steps were. number: (T,), their numbers. rate: steps in a second.
    """
    if not np.isfinite(seconds).all():
        return [f"timestamp: {int((~np.isfinite(seconds)).sum())} of {len(seconds)} are not finite"]
    problems = []
    between = np.diff(seconds) * rate
    even = len(between) >= _FEW and bool(np.ptp(between) < _RATE * np.abs(between).max())
    if (even or _drifts(between)) and abs(float(np.median(between)) - 1) > _RATE:
        took = np.median(np.diff(seconds))
        real = f"{1 / took:.4g} Hz" if took > 0 else f"{took:g} s from one to the next"
        problems.append(f"timestamp: those of {real}, meta/info.json says fps {rate:g}")
    elif (odd := np.abs(between - 1) > _NEAR).any():
        first = int(np.argmax(odd))
        lost = int(np.maximum(np.round(between[odd]) - 1, 0).sum())
        problems.append(
            f"timestamp: {int(odd.sum())} of {len(between)} do not follow at {rate:g} Hz, the first from step {first} "
            f"({seconds[first]:.4f} s) to the next ({seconds[first + 1]:.4f} s)"
            + (f"; about {lost} steps were dropped" if lost else "")
        )
    if (number != np.arange(len(number))).any():
        first = int(np.argmax(number != np.arange(len(number))))
        problems.append(f"frame_index: step {first} has number {int(number[first])}; some are missing or there twice")
    return problems


def _drifts(between: np.ndarray) -> bool:
    """Whether many steps are at another rate on the whole. between: their distances, 1 is what is right."""
    return len(between) >= _MANY and abs(float(between.mean()) - 1) > _RATE


# ---- What is found while an index is built, and kept with it ---------------------------------------------------------


def _save(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes arrays to a file, which is there whole or not at all."""
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        try:
            np.savez(file, **arrays)  # type: ignore[arg-type]  # numpy's stub takes the names for its own options
            file.flush()
            os.replace(file.name, path)
        finally:
            Path(file.name).unlink(missing_ok=True)


def _packets_file(parts: Path, name: str, stat: files.Stat) -> Path:
    return parts / f"packets-{digest([name, stat.size, stat.stamp])}.npz"


def _packets(directory: Location, name: str, parts: Path) -> Packets:
    """Returns the packets of a video. Found once for all processes: a file in `parts` keeps them."""
    stat = dict(file_stats(directory, [name])).get(name)
    if stat is None:
        raise RecordError(f"{name} is missing", resumable=True)
    path = _packets_file(parts, name, stat)
    if not path.is_file():
        try:
            found = read_packets(join(directory, name))
        except RecordError as e:
            raise RecordError(f"{name}: {e}", resumable=True) from e
        codec = np.array(json.dumps(dataclasses.astuple(found.codec)))
        _save(path, {"rows": found.rows, "seconds": found.seconds, "codec": codec, "size": np.array(found.size)})
    return _load_packets(path, path.stat().st_mtime_ns)


@functools.lru_cache(maxsize=8)  # several episodes are in one video
def _load_packets(path: Path, _: int) -> Packets:
    with np.load(path) as arrays:
        height, width = arrays["size"].tolist()
        codec = Codec(*json.loads(str(arrays["codec"])))
        return Packets(arrays["rows"], arrays["seconds"], codec, (height, width))


def _kept_packets(parts: Path, name: str, stats: Mapping[str, files.Stat]) -> Packets | None:
    path = _packets_file(parts, name, stats[name]) if name in stats else None
    return _load_packets(path, path.stat().st_mtime_ns) if path is not None and path.is_file() else None


def _write_pages(parts: Path, shards: int, directory: Path) -> None:
    """Writes which pages the pictures of each file are in: <key>.npy (P, 4) and <key>.start.npy (shards + 1,)."""
    directory.mkdir()
    rows: dict[str, list[np.ndarray]] = {}
    start: dict[str, np.ndarray] = {}
    for path in sorted(parts.glob("*.pages")):
        with np.load(path) as arrays:
            for key in arrays.files:
                rows.setdefault(key, [np.zeros((0, 4), np.int64)]).append(arrays[key])
                start.setdefault(key, np.zeros(shards + 1, np.int64))[int(path.name[:5]) + 1] = len(arrays[key])
    for key, found in rows.items():
        np.save(directory / file_name(key), np.concatenate(found))
        np.save(directory / f"start-{file_name(key)}", np.cumsum(start[key]))


# ---- Reading pictures ------------------------------------------------------------------------------------------------

_cache = ByteCache(CACHE_BYTES)
_owners = itertools.count()


class _Pictures(EncodedPictures):
    def __init__(self, directory: Location, split: Split, index: Path) -> None:
        self._videos = VideoFrames(VideoTable(index / "video", directory))
        self._ranges, self._owner = Ranges(), next(_owners)
        self._number = {location: i for i, location in enumerate(split.shards)}
        self._pages = {}
        for path in sorted((index / "pages").glob("start-*.npy")):
            name = path.name.removeprefix("start-")
            self._pages[name] = tuple(np.asarray(np.load(path.with_name(n), mmap_mode="r")) for n in (name, path.name))

    def stored(self, place: Place) -> bytes:
        name = file_name(place.key)
        if name not in self._pages:
            raise RecordError("it is a frame of a video, and not stored by itself; ask for its pixels", resumable=True)
        rows, start = self._pages[name]
        at, offset = unpack(place.at)
        row = int(start[self._number[place.shard]]) + at

        def read() -> bytes:
            begin, length, size, codec = rows[row].tolist()
            return read_page(self._ranges, place.shard, Page(begin, length, size, _CODECS[codec]))

        page = _cache.get((self._owner, (name, row)), read)
        return page[offset : offset + place.length]

    def pixels(self, place: Place, channel_order: str, target: Target | None) -> tuple[np.ndarray, tuple[int, int]]:
        if file_name(place.key) in self._pages:
            return super().pixels(place, channel_order, target)
        image = self._videos.pixels(place.at, channel_order)
        return image, image.shape[:2]

    def encoding(self, place: Place) -> str:
        if file_name(place.key) in self._pages:
            return super().encoding(place)
        return self._videos.codec(place.at)

    def close(self) -> None:
        self._videos.close()
        self._ranges.close()
        _cache.forget(self._owner)
