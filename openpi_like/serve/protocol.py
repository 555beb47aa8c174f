"""The wire: msgpack with numpy arrays, as the PyPI package `openpi-client` speaks it. Bytes to objects; no sockets.

On connection the server sends one binary message, the handshake metadata. A request is one binary message, an
observation:

    {"images": {camera: uint8 (H, W, 3) RGB}, "state": float (Ds,), "prompt": str, "robot": str, "seed": int}

where "prompt" may be left out if the robot has a default, "robot" if the server has only one, and "seed" always. State
is in the robot's own units. Images are as the policy saw them in training: RGB, and turned as in its dataset after what
`channel_order` and `upside_down` of `openpi_like.robots.Camera` correct. The reply is one binary message, {"actions":
float32 (A, J), "timing_ms": {...}}, ready to be executed; or one text message, which says why there is none. The
connection stays usable after it.
"""

import math
from typing import Any

import msgpack
import numpy as np

PROTOCOL = 2
MAX_MESSAGE_BYTES = 64 * 2**20
_ARRAY, _SCALAR = b"__ndarray__", b"__npgeneric__"
# What an observation is made of; never objects, which would need pickle.
_NUMBERS = ("i2", "i4", "i8", "u2", "u4", "u8", "f2", "f4", "f8")
_DTYPES = {
    name: np.dtype(name) for name in ("|b1", "|i1", "|u1", *(order + name for order in "<>" for name in _NUMBERS))
}
MAX_DEPTH, MAX_DIMS = 16, 8
MAX_ENTRIES = 1000  # of one list or dict


class ProtocolError(ValueError):
    """A message does not follow the protocol."""


def pack(message: Any) -> bytes:
    """Returns a message of dicts, lists, strings, numbers and arrays as bytes.

    Raises:
        ProtocolError: an array's dtype, or an object, has no place on the wire.
    """
    try:
        return msgpack.packb(message, default=_encode)
    except ProtocolError:
        raise
    except (TypeError, ValueError) as e:
        raise ProtocolError(f"cannot send this message: {e}") from e


def _encode(value: Any) -> Any:
    if isinstance(value, np.ndarray | np.generic) and value.dtype.str not in _DTYPES:
        raise ProtocolError(f"array of dtype {value.dtype}, expected booleans, integers or floats; convert it first")
    if isinstance(value, np.ndarray):
        return {_ARRAY: True, b"data": value.tobytes(), b"dtype": value.dtype.str, b"shape": value.shape}
    if isinstance(value, np.generic):
        return {_SCALAR: True, b"data": value.item(), b"dtype": value.dtype.str}
    raise ProtocolError(f"object of type {type(value).__name__}, expected dict, list, string, number or numpy array")


def unpack(data: bytes, *, containers: int = 100_000) -> Any:
    """Inverse of `pack`. Arrays are read-only views of `data`.

    Nothing is allocated for what a message only says that it holds; it is compared with what is there before.
    containers: lists, dicts and arrays that there may be: what is made of a byte each costs time and memory.

    Raises:
        ProtocolError: not msgpack, too large, too deep or of too many parts, or an array whose dtype, shape and size do
            not agree.
    """
    if len(data) > MAX_MESSAGE_BYTES:
        raise ProtocolError(f"message of {len(data)} bytes, expected at most {MAX_MESSAGE_BYTES}; send smaller images")
    left = containers

    def count(value: Any) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            raise ProtocolError(f"more than {containers} lists and dicts in one message")
        return _decode(value) if isinstance(value, dict) else value

    try:
        message = msgpack.unpackb(
            data,
            object_hook=count,
            list_hook=count,
            ext_hook=_refuse_extension,
            max_array_len=MAX_ENTRIES,
            max_map_len=MAX_ENTRIES,
            max_ext_len=0,
        )
    except ProtocolError:
        raise
    except (ValueError, TypeError, OverflowError, RecursionError, msgpack.UnpackException) as e:
        raise ProtocolError(f"not a msgpack message ({len(data)} bytes): {type(e).__name__} {e}") from e
    _check_depth(message, MAX_DEPTH)
    return message


def _refuse_extension(code: int, data: bytes) -> Any:
    raise ProtocolError(f"extension type {code}, expected none")


def _check_depth(value: Any, left: int) -> None:
    if isinstance(value, dict | list):
        if left == 0:
            raise ProtocolError(f"lists and dicts nested deeper than {MAX_DEPTH}")
        for inner in value.values() if isinstance(value, dict) else value:
            _check_depth(inner, left - 1)


def _decode(value: dict) -> Any:
    if _ARRAY not in value and _SCALAR not in value:
        return value
    name = value.get(b"dtype")
    dtype = _DTYPES.get(name) if isinstance(name, str) else None
    if dtype is None:
        raise ProtocolError(
            f"array of dtype {name!r}, expected booleans, integers or floats, one of {', '.join(_DTYPES)}"
        )
    if _SCALAR in value:
        number = value.get(b"data")
        if not isinstance(number, bool | int | float):
            raise ProtocolError(f"number of dtype {name} that is a {type(number).__name__}")
        with np.errstate(over="ignore"):
            held = dtype.type(number)
        if isinstance(number, float) and math.isfinite(number) and not np.isfinite(held):
            raise ProtocolError(f"number {number:g} that does not fit {name}")
        return held
    shape, data = value.get(b"shape"), value.get(b"data")
    if not isinstance(data, bytes) or not isinstance(shape, list):
        raise ProtocolError("array without data or shape")
    sizes = len(shape) <= MAX_DIMS and all(type(n) is int and 0 <= n <= MAX_MESSAGE_BYTES for n in shape)
    if not sizes or math.prod(shape) * dtype.itemsize != len(data):
        raise ProtocolError(
            f"array of shape {tuple(shape)} and dtype {dtype} with {len(data)} bytes, which do not agree"
        )
    return np.frombuffer(data, dtype).reshape(shape)
