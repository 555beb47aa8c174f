"""ArrayRecord holds the same as TFRecord; and what can be wrong with it."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from openpi_like.data import arrayrecord, files
from openpi_like.data.byte_cache import ByteCache
from openpi_like.data.index import FrameIndex, open_index
from openpi_like.data.schema import DatasetError
from tests.data.odd import DEPTH, LENGTHS, NAME, copied


def assert_same(ours: FrameIndex, theirs: FrameIndex) -> None:
    """Columns, texts and image bytes; not where they are stored."""
    for level in ("columns", "episode_columns"):
        a, b = getattr(ours, level), getattr(theirs, level)
        assert a.keys() == b.keys()
        for key in a:
            assert a[key].dtype == b[key].dtype
            np.testing.assert_array_equal(a[key], b[key], err_msg=key)
    for level in ("texts", "episode_texts"):
        a, b = getattr(ours, level), getattr(theirs, level)
        assert {k: (t.table, t.ids.tolist()) for k, t in a.items()} == {
            k: (t.table, t.ids.tolist()) for k, t in b.items()
        }
    for name in ("episode_start", "episode_shard", "episode_record"):
        np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name))
    assert (ours.left_out, ours.images.keys()) == (theirs.left_out, theirs.images.keys())
    for key in ours.images:
        assert [ours.read_image(i, key) for i in range(ours.steps)] == [
            theirs.read_image(i, key) for i in range(theirs.steps)
        ]


def test_both_file_formats_hold_the_same(odd: Path, odd_arrays: Path) -> None:
    ours, theirs = open_index(odd_arrays, "train"), open_index(odd, "train")
    assert (ours.split.storage.name, theirs.split.storage.name) == ("array_record", "tfrecord")
    assert_same(ours, theirs)


@pytest.mark.parametrize("limit", [0, 30_000, 1 << 20])
def test_records_are_kept_up_to_a_number_of_bytes(
    odd: Path, odd_arrays: Path, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    from concurrent.futures import ThreadPoolExecutor

    cache = ByteCache(limit)
    monkeypatch.setattr(arrayrecord, "_cache", cache)
    index, reference = open_index(odd_arrays, "train"), open_index(odd, "train")
    steps = [int(i) for i in np.random.default_rng(0).permutation(np.repeat(np.arange(index.steps), 4))]
    held = []

    def read(step: int) -> bytes:
        data = index.read_image(step, DEPTH)
        with cache._lock:
            held.append((cache._bytes, sum(map(len, cache._kept.values()))))
        return data

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(read, steps))
    assert found == [reference.read_image(step, DEPTH) for step in steps]
    assert all(counted == real <= limit for counted, real in held)
    assert max(real for _, real in held) > (limit // 2 if limit < 1 << 20 else 0) or limit == 0
    index.close()
    assert (cache._bytes, len(cache._kept)) == (0, 0)
    assert index.read_image(3, DEPTH) == reference.read_image(3, DEPTH)  # opens its files again


def test_more_array_records_than_may_stay_open(odd: Path, odd_arrays: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "OPEN_FILES", 1)
    index, reference = open_index(odd_arrays, "train"), open_index(odd, "train")
    for step in (0, 8, 22, 0):
        assert index.read_image(step, DEPTH) == reference.read_image(step, DEPTH)
    pictures: Any = index._pictures
    assert len(pictures._records._readers) == 1


def damaged_arrays(directory: Path, to: Path, damage: Any) -> tuple[Path, Path]:
    """Returns a copy of the dataset, and its second shard, which is damaged."""
    copy = copied(directory, to)
    path = copy / f"{NAME}-train.array_record-00001"
    path.write_bytes(damage(path.read_bytes()))
    return copy, path


def flipped(raw: bytes, at: int) -> bytes:
    return raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :]


def test_a_flipped_byte_of_an_array_record_is_located(odd: Path, odd_arrays: Path, tmp_path: Path) -> None:
    copy, path = damaged_arrays(odd_arrays, tmp_path, lambda raw: flipped(raw, 3000))
    with pytest.raises(DatasetError, match=rf"(?s)1 of 5 records .*\n  {path.name}, record 0: .*mismatch"):
        open_index(copy, "train")
    index, whole = open_index(copy, "train", max_corrupt_fraction=0.2), open_index(odd, "train")
    assert index.episodes == len(LENGTHS) - 1
    rest = np.r_[0:6, 14:23]  # the third episode, of 8 steps, is left out
    np.testing.assert_array_equal(index.columns["wide"], whole.columns["wide"][rest])
    assert [index.read_image(i, DEPTH) for i in range(index.steps)] == [whole.read_image(int(i), DEPTH) for i in rest]


@pytest.mark.parametrize(
    ("damage", "first", "second"),
    [
        (lambda raw: raw[:-10], "the file is cut or not an ArrayRecord: .*RiegeliPostscript", "behind the damage"),
        (
            lambda raw: raw[: len(raw) // 2],
            "missing, the file holds 0, .* says 2",
            "missing, the file holds 0, .* says 2",
        ),
        (lambda raw: b"", "the file is cut or not an ArrayRecord: .* at least 64KB", "behind the damage"),
    ],
    ids=["cut", "half", "empty"],
)
def test_a_cut_array_record_file(odd_arrays: Path, tmp_path: Path, damage: Any, first: str, second: str) -> None:
    copy, path = damaged_arrays(odd_arrays, tmp_path, damage)
    expected = rf"(?s)2 of 5 .*{path.name}, record 0: {first}.*{path.name}, record 1: {second}"
    with pytest.raises(DatasetError, match=expected):
        open_index(copy, "train")
    assert open_index(copy, "train", max_corrupt_fraction=0.5).episodes == 3


def test_an_array_record_that_vanishes_or_changes_later(odd_arrays: Path, tmp_path: Path) -> None:
    copy, path = damaged_arrays(odd_arrays, tmp_path, lambda raw: raw)
    index = open_index(copy, "train")
    raw = path.read_bytes()
    path.unlink()
    with pytest.raises(DatasetError, match=rf"episode 2, step 1 \({path.name}, record 0\): cannot read .*: no "):
        index.read_image(7, DEPTH)
    path.write_bytes(flipped(raw, 3000))
    with pytest.raises(DatasetError, match=r"record 0\): cannot read observation/image_with_depth: .*mismatch"):
        index.read_image(7, DEPTH)
    assert index.read_image(16, DEPTH) == open_index(odd_arrays, "train").read_image(16, DEPTH)  # another record
