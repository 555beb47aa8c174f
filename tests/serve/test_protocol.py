"""The wire without sockets: round trips, equality with the PyPI client's bytes, and malformed messages."""

import hypothesis.extra.numpy as hnp
import msgpack
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from openpi_client import msgpack_numpy

from openpi_like.serve.protocol import MAX_MESSAGE_BYTES, ProtocolError, pack, unpack

DTYPES = st.one_of(
    hnp.boolean_dtypes(), hnp.integer_dtypes(), hnp.unsigned_integer_dtypes(), hnp.floating_dtypes(sizes=(16, 32, 64))
)
ARRAYS = DTYPES.flatmap(lambda dtype: hnp.arrays(dtype, hnp.array_shapes(min_dims=0, min_side=0)))
MESSAGES = st.recursive(
    ARRAYS | st.text() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | st.booleans() | st.none(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


def _assert_same(a, b):
    if isinstance(a, np.ndarray):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert a.tobytes() == b.tobytes()
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for k in a:
            _assert_same(a[k], b[k])
    elif isinstance(a, list):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            _assert_same(x, y)
    else:
        assert a == b


@given(MESSAGES)
def test_messages_come_back(message):
    _assert_same(message, unpack(pack(message)))


@given(MESSAGES)
def test_the_pypi_client_reads_and_writes_the_same_bytes(message):
    assert msgpack_numpy.packb(message) == pack(message)
    _assert_same(message, msgpack_numpy.unpackb(pack(message)))


@pytest.mark.parametrize("value", [np.float32(1.5), np.int64(-3), np.bool_(True)])
def test_numpy_scalars_come_back(value):
    back = unpack(pack({"x": value}))["x"]
    assert back == value
    assert back.dtype == value.dtype


@pytest.mark.parametrize("array", [np.array([{}]), np.array([1j]), np.array(["a"]), np.zeros(2, "V3")])
def test_arrays_that_would_need_pickle_are_refused(array):
    with pytest.raises(ProtocolError, match="expected booleans, integers or floats"):
        pack({"x": array})


def test_objects_are_refused():
    with pytest.raises(ProtocolError, match="object of type object"):
        pack({"x": object()})
    with pytest.raises(ProtocolError, match="object of type int"):
        pack({"x": 2**70})
    with pytest.raises(ProtocolError, match="cannot send"):
        pack({"x": "\ud800"})  # half a character has no UTF-8


def _array(**changes):
    fields = {b"__ndarray__": True, b"data": bytes(8), b"dtype": "<f4", b"shape": [2]}
    fields.update({k.encode(): v for k, v in changes.items()})
    return msgpack.packb({"x": fields})


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\xc1", "not a msgpack message"),
        (b"", "not a msgpack message"),
        (pack({"x": 1})[:-1], "not a msgpack message"),
        (_array(shape=[3]), "with 8 bytes, which do not agree"),
        (_array(shape=[-2]), "with 8 bytes, which do not agree"),
        (_array(shape=[2**40, 2**40]), "with 8 bytes, which do not agree"),
        (_array(shape=None), "without data or shape"),
        (_array(data="text"), "without data or shape"),
        (_array(dtype="|O"), "expected booleans, integers or floats"),
        (_array(dtype="rabbit"), "expected booleans, integers or floats"),
        (b"\x91" * 100_000, "not a msgpack message"),
        (bytes(MAX_MESSAGE_BYTES + 1), "expected at most"),
    ],
)
def test_malformed_messages_are_named(data, message):
    with pytest.raises(ProtocolError, match=message):
        unpack(data)
