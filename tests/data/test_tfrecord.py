"""Records and Examples against TensorFlow's own writer and protobuf."""

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from openpi_like.data import tfrecord
from openpi_like.data.storage import RecordError

FLOATS = st.lists(st.floats(width=32, allow_nan=False), max_size=20)
INTEGERS = st.lists(st.integers(-(2**63), 2**63 - 1), max_size=20)
SMALL = st.lists(st.integers(0, 1), max_size=20)
BYTES = st.lists(st.binary(max_size=300), max_size=5)


def test_masked_crc_is_that_of_the_published_vector() -> None:
    """CRC-32C of 32 zero bytes is 0x8A9136AA (RFC 3720, B.4)."""
    crc = 0x8A9136AA
    assert tfrecord.masked_crc(bytes(32)) == (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    features=st.dictionaries(
        st.text(max_size=12),
        st.one_of(
            st.tuples(st.just("float"), FLOATS),
            st.tuples(st.just("int"), st.one_of(INTEGERS, SMALL)),
            st.tuples(st.just("bytes"), BYTES),
        ),
        max_size=6,
    )
)
def test_examples_are_parsed_as_protobuf_does(tfds: Any, features: dict[str, tuple[str, list]]) -> None:
    import tensorflow as tf

    example = tf.train.Example()
    for name, (kind, values) in features.items():
        target = example.features.feature[name]
        lists = {"float": target.float_list, "int": target.int64_list, "bytes": target.bytes_list}
        lists[kind].SetInParent()
        lists[kind].value.extend(values)
    data = example.SerializeToString()
    spans = tfrecord.parse_example(data)
    assert set(spans) == set(features)
    for name, (kind, values) in features.items():
        if kind == "float":
            np.testing.assert_array_equal(tfrecord.read_floats(data, spans[name]), np.array(values, np.float32))
        elif kind == "int":
            np.testing.assert_array_equal(tfrecord.read_integers(data, spans[name]), np.array(values, np.int64))
        else:
            assert [data[a:b] for a, b in tfrecord.read_bytes(data, spans[name])] == values


@settings(max_examples=200, deadline=None)
@given(data=st.binary(max_size=60))
def test_garbage_is_an_error_or_an_example_never_anything_else(data: bytes) -> None:
    try:
        spans = tfrecord.parse_example(data)
        for span in spans.values():
            for read in (tfrecord.read_bytes, tfrecord.read_floats, tfrecord.read_integers):
                read(data, span)
    except (RecordError, UnicodeDecodeError):
        pass


def test_the_wrong_kind_of_list_is_named(tfds: Any) -> None:
    import tensorflow as tf

    example = tf.train.Example()
    example.features.feature["x"].float_list.value.append(1)
    data = example.SerializeToString()
    with pytest.raises(RecordError, match="holds floats, expected integers"):
        tfrecord.read_integers(data, tfrecord.parse_example(data)["x"])


def test_records_are_those_that_tensorflow_wrote(tfds: Any, tmp_path: Path) -> None:
    import tensorflow as tf

    payloads = [b"", b"a", bytes(range(256)) * 40]
    with tf.io.TFRecordWriter(str(tmp_path / "x")) as writer:
        for payload in payloads:
            writer.write(payload)
    found = list(tfrecord.read_records(tmp_path / "x"))
    assert [p for _, p in found] == payloads
    raw = (tmp_path / "x").read_bytes()
    assert all(raw[at : at + len(p)] == p for at, p in found if isinstance(p, bytes))


@pytest.mark.parametrize(
    ("damage", "message", "read"),
    [
        (lambda b: b[:-1], "the file is cut: the record needs bytes up to 60, the file ends at 59", 2),
        (lambda b: b[:44], "the file is cut: it ends at byte 44, inside a header", 2),
        (lambda b: b[:33] + b"!" + b[34:], "checksum of the payload", 3),
        (lambda b: b[:20] + b"!" + b[21:], "checksum of the length", 1),
    ],
)
def test_damage_is_found(tmp_path: Path, damage: Any, message: str, read: int) -> None:
    """Three records of four bytes, 20 bytes each. After a damaged payload reading goes on, after a length it cannot."""
    out = b""
    for payload in (b"aaaa", b"bbbb", b"cccc"):
        length = struct.pack("<Q", 4)
        out += length + struct.pack("<I", tfrecord.masked_crc(length))
        out += payload + struct.pack("<I", tfrecord.masked_crc(payload))
    (tmp_path / "x").write_bytes(damage(out))
    found = list(tfrecord.read_records(tmp_path / "x"))
    errors = [x for _, x in found if isinstance(x, RecordError)]
    assert len(errors) == 1
    assert message in str(errors[0])
    assert sum(isinstance(x, bytes) for _, x in found) == (2 if read == 3 else read)
    assert errors[0].resumable == (read == 3)
