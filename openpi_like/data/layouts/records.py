"""Records of TFDS: one `tf.train.Example` per episode, in TFRecord or ArrayRecord files."""

import dataclasses
import math
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from openpi_like.config import near_names
from openpi_like.data import arrayrecord, tfrecord
from openpi_like.data.files import Ranges
from openpi_like.data.index_columns import IndexColumn, index_columns
from openpi_like.data.schema import Feature, Schema, Shard, Split
from openpi_like.data.storage import EncodedPictures, Pictures, Place, RecordError, Rows, StoredEpisode

Reader = Callable[[bytes, tfrecord.Span], Rows]


@dataclasses.dataclass(frozen=True)
class TfRecords:
    """TFRecord files: a picture is a range of bytes of its file."""

    name: str = "tfrecord"

    @property
    def kept(self) -> dict[str, int]:
        return {}

    def episodes(self, shard: Shard) -> Iterator[tuple[str, StoredEpisode | RecordError]]:
        examples = _Examples(shard.schema)
        for record, (offset, payload) in enumerate(tfrecord.read_records(shard.location)):
            yield f"{shard.location.name}, record {record}, byte {offset}", examples.parse(payload, offset)

    def complete(self, split: Split, parts: Path, index: Path) -> None:
        pass

    def pictures(self, split: Split, index: Path) -> Pictures:
        return _OfFiles()

    def read_bytes(self, images: dict[str, np.ndarray], key: str) -> int:
        return int(images[key][:, 1].max())


@dataclasses.dataclass(frozen=True)
class ArrayRecords:
    """ArrayRecord files: a picture is a range of bytes of its record, which is compressed as a whole."""

    name: str = "array_record"

    @property
    def kept(self) -> dict[str, int]:
        return {"records that were read last": arrayrecord.CACHE_BYTES}

    def episodes(self, shard: Shard) -> Iterator[tuple[str, StoredEpisode | RecordError]]:
        examples = _Examples(shard.schema)
        for record, payload in enumerate(arrayrecord.read_records(shard.location)):
            yield f"{shard.location.name}, record {record}", examples.parse(payload, 0)

    def complete(self, split: Split, parts: Path, index: Path) -> None:
        pass

    def pictures(self, split: Split, index: Path) -> Pictures:
        return _OfRecords()

    def read_bytes(self, images: dict[str, np.ndarray], key: str) -> int:
        # a whole record, compressed and not; most of it is pictures
        return max(2 * int(of.sum(axis=1).max()) for of in images.values())


class _OfFiles(EncodedPictures):
    def __init__(self) -> None:
        self._ranges = Ranges()

    def stored(self, place: Place) -> bytes:
        return self._ranges.read(place.shard, place.at, place.length)

    def close(self) -> None:
        self._ranges.close()


class _OfRecords(EncodedPictures):
    def __init__(self) -> None:
        self._records = arrayrecord.Records()

    def stored(self, place: Place) -> bytes:
        return self._records.read(place.shard, place.record)[place.at : place.at + place.length]

    def close(self) -> None:
        self._records.close()


class _Examples:
    """Parses the records of one dataset."""

    def __init__(self, schema: Schema) -> None:
        fields, _ = index_columns(schema)
        self._fields = [(f, _name(f), _reader(f)) for f in fields]
        self._names = {f"steps/{key}" for key in schema.steps} | set(schema.episode)

    def parse(self, data: bytes | RecordError, offset: int) -> StoredEpisode | RecordError:
        """Returns an episode. offset: of `data` in what its pictures are read from."""
        if isinstance(data, RecordError):
            return data
        try:
            features = tfrecord.parse_example(data)
        except RecordError as e:
            return e
        rows: dict[str, Rows] = {}
        problems: list[str] = []
        undecodable: dict[str, str] = {}
        for field, name, read in self._fields:
            if name not in features:
                problems.append(f"{name}: missing; {near_names(name, list(features))}")
                continue
            try:
                values = read(data, features[name])
            except RecordError as e:
                problems.append(f"{name}: {e}")
                if field.feature.kind == "text":
                    undecodable[field.column] = str(e)
                continue
            if field.folder == "image":
                assert isinstance(values, np.ndarray)  # spans
                values[:, 0] += offset
            rows[field.column] = values
        # Features of several parts (ragged ones) are stored under the name of the feature and that of the part.
        unknown = frozenset(
            u for u in features.keys() - self._names if not any(u.startswith(f"{name}/") for name in self._names)
        )
        return StoredEpisode(rows, tuple(problems), undecodable, unknown)


def _name(field: IndexColumn) -> str:
    """Returns the name of a field in a record."""
    return field.feature.key if field.folder == "episode" else f"steps/{field.feature.key}"


def _reader(field: IndexColumn) -> Reader:
    """Returns what reads the values of a field from a record."""
    feature = field.feature
    if field.folder == "image":
        return _read_image_spans
    if feature.kind == "numeric":
        return _numeric_reader(feature, field.shape)
    if feature.encoding == "code_points":
        (length,) = feature.shape
        assert length is not None  # code points are of a known length
        return _code_point_reader(length)
    return _read_texts


def _numeric_reader(feature: Feature, shape: tuple[int, ...]) -> Reader:
    dtype = np.dtype(feature.dtype)

    def read(data: bytes, span: tfrecord.Span) -> np.ndarray:
        if feature.encoding != "none":
            raws = [data[a:b] for a, b in tfrecord.read_bytes(data, span)]
            try:
                arrays = [np.frombuffer(zlib.decompress(r) if feature.encoding == "zlib" else r, dtype) for r in raws]
                return np.stack([a.reshape(shape) for a in arrays]) if arrays else np.empty((0, *shape), dtype)
            except (zlib.error, ValueError) as e:
                raise RecordError(f"cannot decode its {feature.encoding} encoding: {e}", resumable=True) from e
        values = tfrecord.read_floats(data, span) if dtype.kind == "f" else tfrecord.read_integers(data, span)
        if len(values) % math.prod(shape):
            raise RecordError(f"{len(values)} values, expected a multiple of {shape}", resumable=True)
        rows = values.astype(dtype)
        if dtype.kind != "f" and dtype.itemsize < 8 and (rows != values).any():
            wrong = int(values[rows != values][0])
            raise RecordError(f"{wrong} is not of type {dtype}", resumable=True)
        return rows.reshape(-1, *shape)

    return read


def _read_texts(data: bytes, span: tfrecord.Span) -> list[str]:
    raws = [data[a:b] for a, b in tfrecord.read_bytes(data, span)]
    try:
        return [raw.decode() for raw in raws]
    except UnicodeDecodeError as e:
        raise RecordError(f"the text {e.object!r} is not UTF-8", resumable=True) from None


def _code_point_reader(length: int) -> Reader:
    def read(data: bytes, span: tfrecord.Span) -> list[str]:
        values = tfrecord.read_integers(data, span)
        if len(values) % length:
            raise RecordError(f"{len(values)} values, expected a multiple of {length}", resumable=True)
        rows = values.reshape(-1, length)
        texts: list[str] = []
        for i, row in enumerate(rows):
            same = i > 0 and np.array_equal(row, rows[i - 1])  # as a rule it is one text for the whole episode
            texts.append(texts[-1] if same else from_code_points(row))
        return texts

    return read


def from_code_points(row: np.ndarray) -> str:
    """Returns the text of a row of code points (n,), which ends with zeros.

    Raises:
        RecordError: it is no text.
    """
    end = int(np.argmax(row == 0)) if (row == 0).any() else len(row)
    wrong = (row < 0) | (row > 0x10FFFF) | ((row >= 0xD800) & (row < 0xE000))
    wrong[end:] = row[end:] != 0
    if wrong.any():
        at = int(np.argmax(wrong))
        what = "a Unicode code point" if at < end else f"0, as the text ends at {end}"
        raise RecordError(f"value {at} of a text is {row[at]}, expected {what}", resumable=True)
    return "".join(map(chr, row[:end]))


def _read_image_spans(data: bytes, span: tfrecord.Span) -> np.ndarray:
    spans = np.array(tfrecord.read_bytes(data, span), np.int64).reshape(-1, 2)
    return np.stack([spans[:, 0], spans[:, 1] - spans[:, 0]], axis=1)
