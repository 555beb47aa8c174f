"""Where the values of a binary column lie in a Parquet file, so that one picture can be read without its row group.

Pages of a column are found by their headers (Apache Parquet's `PageHeader`, Thrift's compact protocol). A value is then
a page, which is decompressed as a whole, about a megabyte, and a range of it. pyarrow reads the rest of the file.
"""

import dataclasses
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int64

from openpi_like.data.files import Location, Ranges
from openpi_like.data.schema import MissingPackageError
from openpi_like.data.storage import RecordError
from openpi_like.data.tfrecord import read_varint

_DATA, _DICTIONARY, _DATA_V2 = 0, 2, 3  # PageType
_PLAIN, _PLAIN_DICTIONARY, _RLE_DICTIONARY = 0, 2, 8  # Encoding
_HEADER = 1 << 16  # bytes read for a header; statistics of pictures make it long, larger ones are read again


class Page(NamedTuple):
    """What has to be read of a page: byte in the file, length, length when it is decompressed, Parquet's codec."""

    start: int
    length: int
    size: int
    codec: str


@dataclasses.dataclass(frozen=True)
class Values:
    """The values of a column of one row group. pages: which there are. places: (n, 3): page, byte in it, length."""

    pages: list[Page]
    places: Int64[np.ndarray, "n 3"]


def pyarrow() -> Any:
    """Returns the package `pyarrow`.

    Raises:
        MissingPackageError: it is not installed.
    """
    try:
        import pyarrow as package
    except ImportError as e:
        raise MissingPackageError(f"Parquet is read with pyarrow: {e}; pip install 'openpi-like[formats]'") from e
    return package


def read_page(ranges: Ranges, location: Location, page: Page) -> bytes:
    """Returns the content of a page.

    Raises:
        OSError: the file cannot be read.
        RecordError: it is cut or damaged.
    """
    data = ranges.read(location, page.start, page.length)
    if len(data) < page.length:
        raise RecordError(
            f"it is cut: a page needs bytes up to {page.start + page.length}; copy the file again", resumable=True
        )
    if page.codec == "UNCOMPRESSED":
        return data
    codec = {"LZ4": "lz4_raw"}.get(page.codec, page.codec.lower())  # Parquet's own name is LZ4_RAW
    pa = pyarrow()
    try:
        return pa.decompress(data, decompressed_size=page.size, codec=codec, asbytes=True)
    except (pa.ArrowException, OSError, ValueError, SystemError, MemoryError) as e:  # the last two of a wrong size
        raise RecordError(f"a page of its column is damaged: {e}; copy the file again", resumable=True) from e


def find_values(ranges: Ranges, location: Location, column: Any, max_definition: int) -> Values:
    """Returns where the values of a column of one row group are. No value may be null.

    column: pyarrow's `ColumnChunkMetaData`. max_definition: definition level of a value that is there.

    Raises:
        OSError: the file cannot be read.
        RecordError: it is damaged, has nulls, or is encoded in a way that has no byte for a value.
    """
    try:
        return _find_values(ranges, location, column, max_definition)
    except RecordError:
        raise
    except (LookupError, TypeError, ValueError, ArithmeticError, MemoryError) as e:  # of a header that lacks something
        raise RecordError(
            f"a page has a damaged header ({type(e).__name__}: {e}); copy the file again", resumable=True
        ) from e


def _find_values(ranges: Ranges, location: Location, column: Any, max_definition: int) -> Values:
    at, end = column.data_page_offset, 0
    if column.has_dictionary_page:
        at = min(at, column.dictionary_page_offset)
    end = at + column.total_compressed_size
    pages: list[Page] = []
    places: list[np.ndarray] = []
    dictionary: np.ndarray | None = None
    found = 0
    while at < end and found < column.num_values:
        header, begin = _read_header(ranges, location, at, end)
        kind, size, length = header[1], header[2], header[3]
        at = begin + length
        if kind == _DICTIONARY:
            page = Page(begin, length, size, column.compression)
            count = header[7][1]
            starts, lengths = _plain(read_page(ranges, location, page), 0, count)
            dictionary = np.stack([np.full(count, len(pages)), starts, lengths], axis=1)
            pages.append(page)
            continue
        if kind not in (_DATA, _DATA_V2):
            continue
        if kind == _DATA:
            count, encoding, levels = header[5][1], header[5][2], 0
            page = Page(begin, length, size, column.compression)
            content = read_page(ranges, location, page)
            if max_definition:
                levels = 4 + int.from_bytes(content[:4], "little")
                defined = hybrid(content[4:levels], max_definition.bit_length(), count)
            else:
                defined = np.full(count, max_definition)
        else:
            head = header[8]
            count, encoding = head[1], head[4]
            before = head[5] + head[6]
            raw = ranges.read(location, begin, before)
            defined = hybrid(raw[head[6] :], max_definition.bit_length(), count) if max_definition else np.zeros(count)
            codec = column.compression if head.get(7, True) else "UNCOMPRESSED"
            page, levels = Page(begin + before, length - before, size - before, codec), 0
            content = read_page(ranges, location, page)
        if missing := int((defined != max_definition).sum()):
            raise RecordError(f"{missing} of {count} pictures are missing (null) in one page", resumable=True)
        if encoding == _PLAIN:
            starts, lengths = _plain(content, levels, count)
            places.append(np.stack([np.full(count, len(pages)), starts, lengths], axis=1))
            pages.append(page)
        elif encoding in (_PLAIN_DICTIONARY, _RLE_DICTIONARY) and dictionary is not None:
            ids = hybrid(content[levels + 1 :], content[levels], count)
            if len(ids) and ids.max() >= len(dictionary):
                raise RecordError("a page points to a value that its dictionary does not have", resumable=True)
            places.append(dictionary[ids])
        else:
            raise RecordError(f"encoding {encoding} of Parquet cannot be read in place; write PLAIN", resumable=True)
        found += count
    if found != column.num_values:
        raise RecordError(f"{found} of {column.num_values} values are there; copy the file again", resumable=True)
    return Values(pages, np.concatenate(places) if places else np.zeros((0, 3), np.int64))


def _plain(content: bytes, at: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns starts and lengths of byte arrays in PLAIN encoding: each behind its length, four bytes."""
    starts, lengths = np.empty(count, np.int64), np.empty(count, np.int64)
    for i in range(count):
        length = int.from_bytes(content[at : at + 4], "little")
        at += 4
        starts[i], lengths[i] = at, length
        at += length
    if at > len(content):
        raise RecordError(f"a page holds {len(content)} bytes, its values need {at}", resumable=True)
    return starts, lengths


def hybrid(data: bytes, width: int, count: int) -> Int64[np.ndarray, "count"]:
    """Returns `count` numbers of `width` bits from Parquet's mixture of run lengths and packed bits.

    Raises:
        RecordError: they end early.
    """
    if width == 0:
        return np.zeros(count, np.int64)
    parts: list[np.ndarray] = []
    at = found = 0
    while found < count:
        if at >= len(data):
            raise RecordError(f"a page says {found} of {count} levels", resumable=True)
        head, at = read_varint(data, at)
        if head & 1:  # groups of eight, packed from the lowest bit
            raw = np.frombuffer(data, np.uint8, min((head >> 1) * width, len(data) - at), at)
            at += (head >> 1) * width
            bits = np.unpackbits(raw, bitorder="little")
            values = bits[: len(bits) // width * width].reshape(-1, width).astype(np.int64) @ (1 << np.arange(width))
        else:
            size = (width + 7) // 8
            values = np.full(head >> 1, int.from_bytes(data[at : at + size], "little"), np.int64)
            at += size
        parts.append(values)
        found += len(values)
        if not len(values):
            raise RecordError("a page has a run of no values", resumable=True)
    return np.concatenate([np.zeros(0, np.int64), *parts])[:count]


def _read_header(ranges: Ranges, location: Location, at: int, end: int) -> tuple[dict[int, Any], int]:
    """Returns the header of the page at a byte, field number -> value, and the byte behind it."""
    size = _HEADER
    while True:
        data = ranges.read(location, at, min(size, end - at))
        try:
            header, used = _struct(data, 0)
        except IndexError:
            if len(data) < size:
                raise RecordError("a page has no whole header; copy the file again", resumable=True) from None
            size *= 16
            continue
        if not {1, 2, 3} <= header.keys():
            raise RecordError("a page has no header; copy the file again", resumable=True)
        return header, at + used


def _struct(data: bytes, at: int) -> tuple[dict[int, Any], int]:
    """Returns a struct of Thrift's compact protocol, and the byte behind it. Raises IndexError where it ends early."""
    fields: dict[int, Any] = {}
    number = 0
    while True:
        byte = data[at]
        at += 1
        if byte == 0:
            return fields, at
        if byte >> 4:
            number += byte >> 4
        else:
            raw, at = read_varint(data, at)
            number = (raw >> 1) ^ -(raw & 1)
        fields[number], at = _value(data, at, byte & 15)


def _value(data: bytes, at: int, kind: int) -> tuple[Any, int]:
    if kind in (1, 2):  # true, false
        return kind == 1, at
    if kind == 3:
        return data[at], at + 1
    if kind in (4, 5, 6):  # integers, zigzag
        raw, at = read_varint(data, at)
        return (raw >> 1) ^ -(raw & 1), at
    if kind == 7:
        data[at + 7]
        return data[at : at + 8], at + 8
    if kind == 8:
        length, at = read_varint(data, at)
        if at + length > len(data):
            raise IndexError
        return data[at : at + length], at + length
    if kind == 9:
        head = data[at]
        count, at = (read_varint(data, at + 1)) if head >> 4 == 15 else (head >> 4, at + 1)
        values = []
        for _ in range(count):
            value, at = _value(data, at, head & 15)
            values.append(value)
        return values, at
    if kind == 12:
        return _struct(data, at)
    raise RecordError(f"a page has a header of unknown form (kind {kind}); copy the file again", resumable=True)
