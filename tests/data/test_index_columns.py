"""Text that is stored as code points, and what only looks like it."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from openpi_like.data.dataset import EpisodeDataset
from openpi_like.data.index import open_index
from openpi_like.data.layouts.records import from_code_points
from openpi_like.data.schema import DatasetError
from openpi_like.data.storage import RecordError
from tests.data.odd import NAME, code_points, write
from tests.data.toy import CART, change_record


@given(text=st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=80))
def test_any_text_survives_code_points(text: str) -> None:
    assert from_code_points(code_points(text, 80, np.int64)) == text


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([72, 0xD800, 0, 0], "value 1 of a text is 55296, expected a Unicode code point"),
        ([72, 0x110000, 0, 0], "value 1 of a text is 1114112, expected a Unicode code point"),
        ([-1, 72, 0, 0], "value 0 of a text is -1, expected a Unicode code point"),
        ([72, 0, 73, 0], "value 2 of a text is 73, expected 0, as the text ends at 1"),
    ],
)
def test_what_is_not_text_is_an_error(values: list[int], message: str) -> None:
    with pytest.raises(RecordError, match=message):
        from_code_points(np.array(values))


def test_a_code_point_that_is_none_is_located(odd_copy: Path) -> None:
    path = odd_copy / f"{NAME}-train.tfrecord-00001"
    # Which text comes first in a record is not fixed.
    change_record(path, 1, lambda data: data.replace(b"x" * 80, b"x" * 40 + b"\0" + b"x" * 39, 1))
    expected = (
        rf"{path.name}, record 1, byte \d+: (steps/observation/instruction|language): "
        r"value \d+ of a text is 120, expected 0, as the text ends at"
    )
    with pytest.raises(DatasetError, match=expected):
        open_index(odd_copy, "train")


@pytest.mark.parametrize("workers", [1, 2])
def test_token_ids_do_not_become_text(
    tfds: Any, tmp_path: Path, workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Integers under a name of language, after whose zeros others follow; and strings that are not UTF-8."""
    f = tfds.features
    steps = {"language_tokens": f.Tensor(shape=(80,), dtype=np.int32), "instruction": f.Text(), "x": f.Scalar(np.int64)}
    ids = np.array([101, 2009, 0, 102] * 20, np.int32)
    directory = tmp_path / "tokens" / "1.0.0"
    directory.mkdir(parents=True)
    write(
        tfds,
        directory,
        f.FeaturesDict({"steps": f.Dataset(steps), "path": f.Text()}),
        [
            {
                "steps": [{"language_tokens": ids + t, "instruction": "go", "x": 10 * e + t} for t in range(e + 1)],
                "path": b"\xff" + bytes([e]),
            }
            for e in range(5)
        ],
        "tfrecord",
    )
    index = open_index(directory, "train", workers=workers)
    assert index.left_out.keys() == {"language_tokens", "path"}
    for key, why in (
        ("language_tokens", r"value 3 of a text is 102, expected 0, as the text ends at 2"),
        ("path", r"the text b'\xff\x00' is not UTF-8"),
    ):
        assert index.left_out[key] == f"it cannot be decoded as text in any record; in the first, {why}"
    assert index.columns["x"].tolist() == [10 * e + t for e in range(5) for t in range(e + 1)]
    assert (index.texts.keys(), index.texts["instruction"].table, index.skipped) == ({"instruction"}, ("go",), ())
    assert "reading it once more, without step/language_tokens, episode/path" in caplog.text
    with pytest.raises(DatasetError, match=r"language_key: 'path' is not in the index, because it cannot be decoded"):
        EpisodeDataset(index, dataclasses.replace(CART, language_key="path"))
