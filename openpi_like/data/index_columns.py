"""The columns of an index: which fields of a dataset have one, and how their values are read from a record."""

import dataclasses
import math
import zlib
from collections.abc import Callable

import numpy as np

from openpi_like.data import tfrecord
from openpi_like.data.schema import Feature, Schema

# Step fields with more values than this (sentence embeddings, point clouds) would dwarf the rest of the index.
MAX_STEP_VALUES = 256

Rows = np.ndarray | list[str]
Reader = Callable[[bytes, tfrecord.Span], Rows]


@dataclasses.dataclass(frozen=True)
class IndexColumn:
    """A column of the index. folder: "step", "image" or "episode". read: a record's values, texts as strings."""

    folder: str
    feature: Feature
    dtype: np.dtype
    shape: tuple[int, ...]
    read: Reader

    @property
    def column(self) -> str:
        """Name in the index."""
        return f"{self.folder}/{self.feature.key}"

    @property
    def name(self) -> str:
        """Name in a record."""
        return self.feature.key if self.folder == "episode" else f"steps/{self.feature.key}"


def index_columns(schema: Schema) -> tuple[list[IndexColumn], dict[str, str]]:
    """Returns the columns, and key -> why a field has none."""
    fields: list[IndexColumn] = []
    left_out: dict[str, str] = {}
    for level, features in (("step", schema.steps), ("episode", schema.episode)):
        for key, f in features.items():
            shape = tuple(d for d in f.shape if d is not None)
            if f.kind == "numeric" and not 0 < math.prod(shape) <= MAX_STEP_VALUES:
                left_out[key] = f"it has {math.prod(shape)} values, more than {MAX_STEP_VALUES}"
                if not math.prod(shape):
                    left_out[key] = f"it has no values, its shape is {shape}"
            elif f.kind == "numeric":
                fields.append(IndexColumn(level, f, np.dtype(f.dtype), shape, _numeric_reader(f, shape)))
            elif f.kind == "text":
                read = _code_point_reader(shape[0]) if f.encoding == "code_points" else _read_texts
                fields.append(IndexColumn(level, f, np.dtype(np.int32), (), read))
            elif f.kind == "image" and level == "step":
                fields.append(IndexColumn("image", f, np.dtype(np.int64), (2,), _read_image_spans))
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
        raise tfrecord.RecordError(f"value {at} of a text is {row[at]}, expected {what}", resumable=True)
    return "".join(map(chr, row[:end]))


def _read_image_spans(data: bytes, span: tfrecord.Span) -> np.ndarray:
    spans = np.array(tfrecord.read_bytes(data, span), np.int64).reshape(-1, 2)
    return np.stack([spans[:, 0], spans[:, 1] - spans[:, 0]], axis=1)


def file_name(key: str) -> str:
    """Returns the name of a column's file."""
    return key.replace("%", "%25").replace("/", "%2F") + ".npy"
