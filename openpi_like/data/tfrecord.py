"""TFRecord files and the `tf.train.Example` messages in them, read without TensorFlow.

A record is: length (uint64, little endian), masked CRC-32C of those 8 bytes, payload, masked CRC-32C of the payload.
The payload of an RLDS dataset is one episode: a `tf.train.Example`, a protobuf map from feature name to a list of
bytes, floats or integers. The parser below touches only what is asked for and reports *where* in the record values lie,
which is what lets a loader read one image later without the rest of its episode.
"""

import struct
from collections.abc import Iterator

import google_crc32c
import numpy as np

from openpi_like.data.files import Forward, Location
from openpi_like.data.storage import RecordError

_HEADER = struct.Struct("<QI")
_FOOTER = struct.Struct("<I")
_MASK_DELTA = 0xA282EAD8

Span = tuple[int, int]  # [start, end) in a record's payload


def masked_crc(data: bytes) -> int:
    """Returns the CRC-32C of `data` in the masked form that TFRecord stores."""
    crc = google_crc32c.value(data)
    return ((crc >> 15 | crc << 17) + _MASK_DELTA) & 0xFFFFFFFF


def read_records(path: Location) -> Iterator[tuple[int, bytes | RecordError]]:
    """Yields (byte offset of the payload, payload) per record, in order, with both checksums verified.

    A damaged record is yielded as a `RecordError`. If its length cannot be trusted, it is the last thing yielded.

    Raises:
        OSError: the file is not there or cannot be read.
    """
    with Forward(path) as file:
        size, at = file.size, 0
        while at < size:
            header = file.read(at, _HEADER.size)
            if len(header) < _HEADER.size:
                yield at, RecordError(f"the file is cut: it ends at byte {size}, inside a header", resumable=False)
                return
            length, crc = _HEADER.unpack(header)
            if masked_crc(header[:8]) != crc:
                got = masked_crc(header[:8])
                message = f"checksum of the length is {got:#010x}, stored is {crc:#010x}; what follows is unreadable"
                yield at, RecordError(message, resumable=False)
                return
            start = at + _HEADER.size
            at = start + length + _FOOTER.size
            if at > size:
                message = f"the file is cut: the record needs bytes up to {at}, the file ends at {size}"
                yield start, RecordError(message, resumable=False)
                return
            payload = file.read(start, length)
            (crc,) = _FOOTER.unpack(file.read(start + length, _FOOTER.size))
            if masked_crc(payload) != crc:
                message = f"checksum of the payload is {masked_crc(payload):#010x}, stored is {crc:#010x}"
                yield start, RecordError(message, resumable=True)
            else:
                yield start, payload


def read_varint(data: bytes, at: int) -> tuple[int, int]:
    """Returns the integer of variable length at a byte (protobuf's and Thrift's, not zigzag), and the byte behind it.

    Raises:
        IndexError: `data` ends inside of it.
    """
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7


def _fields(data: bytes, span: Span) -> Iterator[tuple[int, int, Span]]:
    """Yields (field number, wire type, span of the value) of one protobuf message."""
    at, end = span
    try:
        while at < end:
            tag, at = read_varint(data, at)
            kind = tag & 7
            if kind == 2:
                size, at = read_varint(data, at)
            elif kind == 0:
                size = read_varint(data, at)[1] - at
            elif kind in (1, 5):
                size = 8 if kind == 1 else 4
            else:
                raise RecordError(f"not a tf.train.Example: wire type {kind} at byte {at}", resumable=True)
            if at + size > end:
                raise RecordError(f"not a tf.train.Example: a value at byte {at} is longer than it", resumable=True)
            yield tag >> 3, kind, (at, at + size)
            at += size
    except IndexError:
        raise RecordError("not a tf.train.Example: it ends inside a number", resumable=True) from None


def parse_example(data: bytes) -> dict[str, Span]:
    """Returns feature name -> span of its `Feature` message. The order of names differs from record to record."""
    features: dict[str, Span] = {}
    for number, _, outer in _fields(data, (0, len(data))):
        if number != 1:
            continue
        for _, _, entry in _fields(data, outer):
            parts = {field: span for field, _, span in _fields(data, entry)}
            if 1 in parts:
                # A missing value means the default one, an empty Feature.
                try:
                    name = data[slice(*parts[1])].decode()
                except UnicodeDecodeError:
                    raise RecordError("not a tf.train.Example: a name in it is not UTF-8", resumable=True) from None
                features[name] = parts.get(2, (entry[1], entry[1]))
    return features


def _list(data: bytes, feature: Span, number: int, kind: str) -> Iterator[tuple[int, Span]]:
    """Yields (wire type, span) of the values of a Feature, which must hold the list `number`."""
    for got, _, span in _fields(data, feature):
        if got != number:
            names = {1: "bytes", 2: "floats", 3: "integers"}
            raise RecordError(f"holds {names.get(got, 'an unknown kind of value')}, expected {kind}", resumable=True)
        for _, wire, value in _fields(data, span):
            yield wire, value


def read_bytes(data: bytes, feature: Span) -> list[Span]:
    """Returns the span of every value of a Feature that holds bytes."""
    return [span for _, span in _list(data, feature, 1, "bytes")]


def read_floats(data: bytes, feature: Span) -> np.ndarray:
    """Returns the values of a Feature that holds floats, as float32."""
    parts = [np.frombuffer(data, "<f4", (b - a) // 4, a) for _, (a, b) in _list(data, feature, 2, "floats")]
    return parts[0] if len(parts) == 1 else np.concatenate([np.empty(0, np.float32), *parts])


def read_integers(data: bytes, feature: Span) -> np.ndarray:
    """Returns the values of a Feature that holds integers, as int64."""
    parts = [
        _decode_varints(np.frombuffer(data, np.uint8, b - a, a)) for _, (a, b) in _list(data, feature, 3, "integers")
    ]
    return parts[0] if len(parts) == 1 else np.concatenate([np.empty(0, np.int64), *parts])


def _decode_varints(raw: np.ndarray) -> np.ndarray:
    if raw.size == 0 or raw.max() < 0x80:  # flags and small numbers: one byte each
        return raw.astype(np.int64)
    ends = np.flatnonzero(raw < 0x80)
    if ends.size == 0 or ends[-1] != raw.size - 1:
        raise RecordError("a list of integers ends inside a number", resumable=True)
    starts = np.concatenate([[0], ends[:-1] + 1])
    place = np.arange(raw.size) - np.repeat(starts, ends - starts + 1)
    if place.max() > 9:
        raise RecordError("an integer has more than ten bytes", resumable=True)
    # Negative numbers take ten bytes; the bits beyond 64 fall off, as in protobuf.
    bits = (raw & 0x7F).astype(np.uint64) << (7 * place).astype(np.uint64)
    return np.bitwise_or.reduceat(bits, starts).view(np.int64)
