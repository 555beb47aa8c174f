"""Records in HDF5 files: episodes of one group each, whose pictures are rows of a dataset."""

import contextlib
import dataclasses
import itertools
import math
import threading
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from openpi_like.data.files import Location, Ranges
from openpi_like.data.images import Target
from openpi_like.data.index_columns import IndexColumn, index_columns
from openpi_like.data.layouts.hdf5_tree import DAMAGE, Form, Hdf5, Tree, as_of_episode, damaged, describe, open_file
from openpi_like.data.schema import Feature, Shard, Split
from openpi_like.data.storage import EncodedPictures, Pictures, Place, RecordError, Rows, StoredEpisode

OPEN_FILES = 64  # that a process keeps open for pictures which only h5py can read; opening one costs about 0.1 ms
FILE_BYTES = 1 << 20  # what h5py keeps of each
BLOCK = 16 << 20  # bytes of encoded pictures that are looked at together
_CHUNK_CACHE = 1 << 20  # of HDF5, for an open dataset

# Files that all datasets of a process keep open for h5py together, with the episodes in them, those read last.
_open_files: OrderedDict[tuple[int, Location], tuple[Hdf5, list[str]]] = OrderedDict()
_owners = itertools.count()
_lock = threading.Lock()


@dataclasses.dataclass(frozen=True)
class StoredImages:
    """The pictures `key` of a dataset. shape: where they are not encoded. chunk: bytes that are unpacked to read one,
    0 where it is a range of bytes of the file."""

    key: str
    shape: tuple[int, int, int] | None
    chunk: int


@dataclasses.dataclass(frozen=True)
class Hdf5Records:
    """HDF5 files. Where a picture is, is its first byte in the file; or -1 - row, where its dataset is not stored row
    by row as it is (chunks of another shape, compression, rows of any length), which only h5py can read.

    form: how the files are arranged. reference: the file that the schema was taken from. images: of the steps.
    """

    form: Form
    reference: str
    images: tuple[StoredImages, ...]
    name: str = "hdf5"

    @property
    def kept(self) -> dict[str, int]:
        return {"HDF5 files": OPEN_FILES * FILE_BYTES} if any(i.chunk for i in self.images) else {}

    def episodes(self, shard: Shard) -> Iterator[tuple[str, StoredEpisode | RecordError]]:
        name = shard.location.name
        try:
            with open_file(shard.location) as file:
                if problem := self.form.problem(file):
                    raise RecordError(problem, resumable=False)
                for path in _paths(self.form, file, shard.split.name):
                    yield f"{name}, {path}" if path != "/" else name, self._episode(file, path, shard)
        except DAMAGE as e:
            yield name, damaged(e, resumable=False)

    def _episode(self, file: Hdf5, path: str, shard: Shard) -> StoredEpisode | RecordError:
        try:
            tree = as_of_episode(describe(file, path, self.form), shard.schema)
            problems = [*self._differences(tree, shard), *self.form.problems(tree.attributes, tree.steps)]
            if problems:
                return StoredEpisode({}, tuple(problems))
            rows: dict[str, Rows] = {}
            undecodable: dict[str, str] = {}
            for field in index_columns(shard.schema)[0]:
                try:
                    rows[field.column] = _rows(field, tree, file)
                except UnicodeError as e:
                    undecodable[field.column] = f"its text is not UTF-8: {e}"
            problems = [f"{column.partition('/')[2]}: {why}" for column, why in undecodable.items()]
            surplus = frozenset(tree.schema.episode.keys() - shard.schema.episode.keys())
            return StoredEpisode(rows, tuple(problems), undecodable, surplus)
        except DAMAGE as e:
            return damaged(e)

    def _differences(self, tree: Tree, shard: Shard) -> list[str]:
        """Returns what an episode has, or lacks, other than that which the schema was taken from."""
        wrong = [_lacks(tree, field) for field in index_columns(shard.schema)[0] if not _has(tree, field)]
        for key, expected in shard.schema.steps.items():
            found = tree.schema.steps.get(key)
            if found is not None and expected.kind != "other" and found != expected:
                wrong.append(f"{key} is {_described(found)}, expected {_described(expected)}")
        known = {*shard.schema.steps, *shard.schema.episode}
        wrong += [f"{key}, which that does not have" for key in tree.schema.steps if key not in known]
        if not wrong:
            return []
        return [
            f"other fields than in {self.reference}: {'; '.join(wrong)}; episodes with other fields are another "
            "dataset: keep their files in a directory of their own, or give one file as the dataset"
        ]

    def complete(self, split: Split, parts: Path, index: Path) -> None:
        pass

    def pictures(self, split: Split, index: Path) -> Pictures:
        return _Hdf5Pictures(self, split.name)

    def read_bytes(self, images: dict[str, np.ndarray], key: str) -> int:
        chunk = next(i.chunk for i in self.images if i.key == key)
        # A chunk as it is stored and unpacked, and what HDF5 keeps of it.
        return int(images[key][:, 1].max()) + (2 * chunk + _CHUNK_CACHE if chunk else 0)


def stored_images(tree: Tree, file: Hdf5) -> tuple[StoredImages, ...]:
    """Returns how the pictures of an episode are stored."""
    found = []
    for key, feature in tree.schema.steps.items():
        if feature.kind == "image":
            data = tree.datasets[key]
            raw = data.shape[1:] if feature.encoding == "raw" else None
            unpacked = math.prod(data.chunks or data.shape[1:]) * data.dtype.itemsize
            found.append(StoredImages(key, raw, unpacked if (_first_bytes_of_rows(data, file) < 0).any() else 0))
    return tuple(found)


def _paths(form: Form, file: Hdf5, split: str) -> list[str]:
    splits = form.splits(file)
    if split not in splits:
        raise RecordError(f"it has no split {split!r}, only {', '.join(splits)}", resumable=False)
    return splits[split]


def _has(tree: Tree, field: IndexColumn) -> bool:
    level = tree.schema.episode if field.folder == "episode" else tree.schema.steps
    return field.feature.key in level


def _lacks(tree: Tree, field: IndexColumn) -> str:
    """Returns what an episode has instead of a field, or that it does not have it."""
    key = field.feature.key
    if field.folder != "episode" and key in tree.schema.episode:
        return f"{key} is one value, expected a row for each of {tree.steps} steps"
    if field.folder == "episode" and key in tree.schema.steps:
        return f"{key} has a row for each step, expected one value"
    return f"no {key}"


def _described(feature: Feature) -> str:
    if feature.kind == "image":
        return f"raw pictures of shape {feature.shape}" if feature.encoding == "raw" else "encoded pictures"
    return f"{feature.dtype} of shape {feature.shape}"


def _rows(field: IndexColumn, tree: Tree, file: Hdf5) -> Rows:
    """Returns the values of a field, see `StoredEpisode`; raises UnicodeError where a text is none."""
    key = field.feature.key
    data = tree.datasets.get(key) if field.folder != "episode" or key not in tree.attributes else None
    if field.folder == "image":
        return _image_rows(data, file, raw=field.feature.encoding == "raw")
    values = np.asarray(tree.attributes[key] if data is None else data[()])
    if field.folder == "episode":
        values = values.reshape(1)
    if field.feature.kind == "text":
        return [_text(value) for value in values]
    if not np.can_cast(values.dtype, field.dtype, "same_kind"):
        raise RecordError(f"{key}: {values.dtype} {values.tolist()}, expected {field.dtype}", resumable=True)
    return values.astype(field.dtype)


def _text(value: Any) -> str:
    text = value.decode() if isinstance(value, bytes) else str(value)
    text.encode()  # h5py gives bytes that are no UTF-8 as characters that are none
    return text


def _image_rows(data: Hdf5, file: Hdf5, *, raw: bool) -> np.ndarray:
    """Returns where the pictures of an episode are, and their lengths, (T, 2)."""
    at = _first_bytes_of_rows(data, file)
    if raw:
        lengths = np.full(len(at), math.prod(data.shape[1:]))
    elif data.dtype.kind == "O":
        lengths = np.array([len(data[i]) for i in range(len(at))])
    else:  # rows of one length, which is that of the longest picture; shorter ones end with zeros
        step = max(1, BLOCK // _row_bytes(data))
        lengths = np.concatenate([_ends(data[i : i + step]) for i in range(0, len(at), step)] or [np.zeros(0)])
    return np.stack([at, lengths.astype(np.int64)], axis=1)


def _row_bytes(data: Hdf5) -> int:
    return math.prod(data.shape[1:]) * data.dtype.itemsize


def _ends(rows: np.ndarray) -> np.ndarray:
    """Returns where the zeros at the end of rows begin. No picture ends with a zero."""
    values = np.ascontiguousarray(rows).view(np.uint8).reshape(len(rows), -1)
    return np.where(values.any(axis=1), values.shape[1] - np.argmax(values[:, ::-1] != 0, axis=1), 0)


def _first_bytes_of_rows(data: Hdf5, file: Hdf5) -> np.ndarray:
    """Returns where in the file the rows of a dataset are, -1 - row where they are not there as they are."""
    at = -1 - np.arange(len(data), dtype=np.int64)
    if data.dtype.kind == "O" or data.external or data.file.filename != file.filename:  # of another file, by a link
        return at
    if (offset := data.id.get_offset()) is not None:
        return offset + np.arange(len(data), dtype=np.int64) * _row_bytes(data)
    if data.chunks == (1, *data.shape[1:]) and not data.id.get_create_plist().get_nfilters():

        def found(chunk: Any) -> None:
            at[chunk.chunk_offset[0]] = chunk.byte_offset

        data.id.chunk_iter(found)
    return at


class _Hdf5Pictures(EncodedPictures):
    def __init__(self, storage: Hdf5Records, split: str) -> None:
        self._shapes = {i.key: i.shape for i in storage.images}
        self._ranges, self._rows = Ranges(), _RowReader(storage.form, split)

    def stored(self, place: Place) -> bytes:
        if place.at < 0:
            return self._rows.read(place)
        return self._ranges.read(place.shard, place.at, place.length)

    def encoded(self, place: Place) -> bytes:
        if self._shapes[place.key] is not None:
            raise RecordError("its pictures are not encoded: take their pixels", resumable=True)
        return super().encoded(place)

    def pixels(self, place: Place, channel_order: str, target: Target | None) -> tuple[np.ndarray, tuple[int, int]]:
        shape = self._shapes[place.key]
        if shape is None:
            return super().pixels(place, channel_order, target)
        image: np.ndarray = np.frombuffer(super().encoded(place), np.uint8).reshape(shape)
        return np.ascontiguousarray(image[..., ::-1]) if channel_order == "bgr" else image, shape[:2]

    def encoding(self, place: Place) -> str:
        return super().encoding(place) if self._shapes[place.key] is None else "raw"

    def close(self) -> None:
        self._ranges.close()
        self._rows.close()


class _RowReader:
    """Reads rows with h5py, which serves one thread at a time. Keeps files open, see `_open_files`."""

    def __init__(self, form: Form, split: str) -> None:
        self._form, self._split = form, split
        self._owner = next(_owners)

    def read(self, place: Place) -> bytes:
        """Returns the bytes of a picture; raises OSError, RecordError."""
        with _lock:
            try:
                file, paths = self._open(place.shard)
                # Datasets are not kept open: each would hold a cache of chunks.
                row = file[paths[place.record]][place.key][-1 - place.at]
            except (*DAMAGE, IndexError) as e:
                raise damaged(e) from e
        return (row if isinstance(row, bytes) else row.tobytes())[: place.length]

    def _open(self, location: Location) -> tuple[Hdf5, list[str]]:
        key = self._owner, location
        if key not in _open_files:
            file = open_file(location)
            with contextlib.ExitStack() as stack:
                stack.callback(file.close)
                _open_files[key] = file, _paths(self._form, file, self._split)
                stack.pop_all()
            while len(_open_files) > OPEN_FILES:
                _open_files.popitem(last=False)[1][0].close()
        _open_files.move_to_end(key)
        return _open_files[key]

    def close(self) -> None:
        with _lock:
            for key in [k for k in _open_files if k[0] == self._owner]:
                _open_files.pop(key)[0].close()
