"""Datasets behind URLs are those on disk, byte for byte; stores that fail say how."""

import importlib.util
import io
import os
import re
import struct
from pathlib import Path
from typing import Any

import fsspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from openpi_like.data import files, tfrecord
from openpi_like.data.files import Forward, Ranges, Url
from openpi_like.data.index import FrameIndex, open_index
from openpi_like.data.schema import DatasetError
from tests.data.toy import LENGTHS, shard


def upload(fs: Any, directory: Path, to: str) -> str:
    for path in directory.iterdir():
        if path.is_file():
            fs.pipe_file(f"{to}/{path.name}", path.read_bytes())
    return f"memory://{to}"


def assert_same_index(ours: FrameIndex, theirs: FrameIndex) -> None:
    """Every file of the two indexes but index.json, which names the directory; and all images."""
    names = sorted(str(p.relative_to(theirs.path)) for p in theirs.path.rglob("*.npy"))
    assert names == sorted(str(p.relative_to(ours.path)) for p in ours.path.rglob("*.npy"))
    for name in names:
        assert (ours.path / name).read_bytes() == (theirs.path / name).read_bytes(), name
    for key in theirs.images:
        for step in range(theirs.steps):
            assert ours.read_image(step, key) == theirs.read_image(step, key)


@pytest.mark.parametrize("block", [64, 1 << 20])
def test_a_dataset_in_a_store_is_the_one_on_disk(
    memory: Any, toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    monkeypatch.setattr(files, "BLOCK", block)
    url = upload(memory, toy, "/bucket/toy_arm/1.0.0")
    index = open_index(url, "train")
    assert index.path.parent == tmp_path / "cache" / "index"
    assert_same_index(index, open_index(toy, "train"))
    assert isinstance(index.split.shards[0], Url)
    assert index.where(3).startswith("toy_arm/1.0.0 split 'train', episode 0, step 3 (toy_arm-train.tfrecord-00000, re")


def test_an_array_record_in_a_store_is_the_one_on_disk(memory: Any, odd_arrays: Path, tmp_path: Path) -> None:
    url = upload(memory, odd_arrays, "/bucket/odd/1.0.0")
    assert_same_index(open_index(url, "train"), open_index(odd_arrays, "train"))
    assert len(list((tmp_path / "cache" / "files").iterdir())) == 3  # one copy of each shard, nothing unfinished
    changed = sorted(memory.glob("/bucket/odd/1.0.0/*array_record*"))[0]
    memory.pipe_file(changed, b"")
    with pytest.raises(DatasetError, match="2 of 5 records are damaged"):
        open_index(url, "train")


def test_a_copy_that_is_cut_is_not_kept(
    memory: Any, odd_arrays: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = upload(memory, odd_arrays, "/bucket/odd/1.0.0")
    opened = type(memory).open

    def cut(self: Any, path: str, *args: Any, **options: Any) -> Any:
        return io.BytesIO(opened(self, path, *args, **options).read()[:-7])

    with monkeypatch.context() as patch:
        patch.setattr(type(memory), "open", cut)
        with pytest.raises(
            DatasetError, match=r"(?s)3 of 3 shards .* got \d+ of \d+ bytes, the file changes or the store"
        ):
            open_index(url, "train", max_corrupt_fraction=0.9)
    assert list((tmp_path / "cache" / "files").iterdir()) == []
    assert_same_index(open_index(url, "train"), open_index(odd_arrays, "train"))


def test_a_file_is_read_from_a_store_in_few_requests(memory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """One per block, and one more for the size; whatever the number of records."""
    out = b""
    for i in range(500):
        payload, length = bytes([i % 256]) * 100, struct.pack("<Q", 100)
        out += length + struct.pack("<I", tfrecord.masked_crc(length))
        out += payload + struct.pack("<I", tfrecord.masked_crc(payload))
    memory.pipe_file("/x", out)
    requests = []
    read = type(memory).cat_file

    def counted(self: Any, path: str, start: Any = None, end: Any = None, **options: Any) -> bytes:
        requests.append((start, end))
        return read(self, path, start, end, **options)

    monkeypatch.setattr(type(memory), "cat_file", counted)
    monkeypatch.setattr(files, "BLOCK", 10_000)
    found = list(tfrecord.read_records(Url("memory://x")))
    assert [payload for _, payload in found] == [bytes([i % 256]) * 100 for i in range(500)]
    assert len(requests) <= -(-len(out) // 10_000) + 1
    assert sum(end - start for start, end in requests) == len(out)  # and nothing twice


@given(
    content=st.binary(max_size=300),
    cuts=st.lists(st.tuples(st.integers(0, 320), st.integers(0, 120)), max_size=12),
    block=st.integers(1, 80),
)
def test_forward_reading_is_slicing(content: bytes, cuts: list[tuple[int, int]], block: int) -> None:
    fs = fsspec.filesystem("memory")
    fs.pipe_file("/forward", content)
    with pytest.MonkeyPatch.context() as patch, Forward(Url("memory://forward")) as file:
        patch.setattr(files, "BLOCK", block)
        for start, length in sorted(cuts):
            start = min(start, len(content))
            assert file.read(start, length) == content[start : start + length]


def test_ranges_of_a_local_file_are_slices(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(bytes(range(200)))
    ranges = Ranges()
    for start, length in ((0, 200), (150, 100), (200, 5), (7, 0)):
        assert ranges.read(path, start, length) == bytes(range(200))[start : start + length]
    ranges.close()


@pytest.mark.parametrize(
    ("place", "expected"),
    [
        ("data/x", Path("data/x")),
        (Path("/data/x"), Path("/data/x")),
        ("file:///data/x", Path("/data/x")),
        ("gs://bucket/x", Url("gs://bucket/x")),
        (Path("gs://bucket/x"), Url("gs://bucket/x")),
        ("local:///x", Url("local:///x")),
        (Path("file:///data/x"), Path("/data/x")),
        ("a:b/c:", Path("a:b/c:")),
        ("", Path(".")),
        (Url("s3://b"), Url("s3://b")),
    ],
)
def test_what_is_a_path_and_what_a_url(place: Any, expected: Any) -> None:
    assert files.locate(place) == expected


def test_parts_of_a_url() -> None:
    url = Url("gs://bucket/a/1.0.0/")
    assert (url.name, url.parent, url / "x") == ("1.0.0", Url("gs://bucket/a"), Url("gs://bucket/a/1.0.0/x"))
    assert url.parent.parent.parent == Url("gs://") == Url("gs://").parent


# ---- What may go wrong -----------------------------------------------------------------------------------------------


def test_a_missing_directory_of_a_store_names_its_siblings(memory: Any, toy: Path) -> None:
    upload(memory, toy, "/bucket/toy_arm/1.0.0")
    with pytest.raises(DatasetError, match=r"no dataset directory memory://bucket/toy_arm/2\.0\.0; in .* is: 1\.0\.0"):
        open_index("memory://bucket/toy_arm/2.0.0", "train")
    with pytest.raises(DatasetError, match=re.escape("did you mean one of its subdirectories ['1.0.0']?")):
        open_index("memory://bucket/toy_arm", "train")
    with pytest.raises(DatasetError, match="no split 'trian'; did you mean 'train'"):
        open_index("memory://bucket/toy_arm/1.0.0", "trian")


def test_a_missing_or_cut_shard_of_a_store(memory: Any, toy: Path) -> None:
    url = upload(memory, toy, "/bucket/toy_arm/1.0.0")
    name = f"/bucket/toy_arm/1.0.0/{shard(toy, 1).name}"
    content = memory.cat_file(name)
    memory.rm(name)
    with pytest.raises(DatasetError, match=f"missing: {shard(toy, 1).name}; there: "):
        open_index(url, "train")
    memory.pipe_file(name, content[:-7])
    with pytest.raises(DatasetError, match=r"record 4, byte \d+: the file is cut: the record needs bytes up to"):
        open_index(url, "train")
    memory.pipe_file(name, content)
    index = open_index(url, "train")
    memory.pipe_file(name, content[:100])
    step = int(index.episode_start[6])
    with pytest.raises(DatasetError, match=r"episode 6, step 0 .*/image: read .* bytes; the file was changed"):
        index.read_image(step, "observation/image")
    memory.rm(name)
    with pytest.raises(DatasetError, match=r"episode 6, step 0 .* cannot read observation/image: "):
        index.read_image(step, "observation/image")


def test_a_store_that_fails_while_a_shard_is_read(
    memory: Any, toy: Path, monkeypatch: pytest.MonkeyPatch, shards_read: list[str]
) -> None:
    """That is not damage to be skipped. What was finished is kept, and the next try goes on from there."""
    url = upload(memory, toy, "/bucket/toy_arm/1.0.0")
    read, failing = type(memory).cat_file, [True]

    def cat_file(self: Any, path: str, *args: Any, **options: Any) -> bytes:
        if failing[0] and path.endswith("train.tfrecord-00001"):
            raise RuntimeError("503 try later")
        return read(self, path, *args, **options)

    monkeypatch.setattr(type(memory), "cat_file", cat_file)
    expected = r"(?s)1 of 3 shards cannot be indexed; run again, .*00001: memory://.*: RuntimeError: 503 try later"
    with pytest.raises(DatasetError, match=expected):
        open_index(url, "train", max_corrupt_fraction=0.9)
    failing[0] = False
    shards_read.clear()
    assert open_index(url, "train").steps == sum(LENGTHS["train"])
    assert shards_read == [shard(toy, 1).name]


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("nosuch://bucket/x", "cannot read nosuch://bucket/x: .*Protocol not known: nosuch"),
        ("gs://bucket/x", "cannot read gs://bucket/x: .*ImportError: Please install gcsfs"),
    ],
)
def test_a_store_without_a_driver(url: str, message: str) -> None:
    if url.startswith("gs") and importlib.util.find_spec("gcsfs"):
        pytest.skip("gcsfs is installed")
    with pytest.raises(DatasetError, match=message):
        open_index(url, "train")


# ---- Where indexes are kept ------------------------------------------------------------------------------------------


def test_a_directory_that_cannot_be_written_has_its_index_in_the_cache(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(files.CACHE_VARIABLE, str(tmp_path / "cache"))
    (copy / ".openpi_like_index").touch()  # nobody, not even root, makes a directory of it
    index = open_index(copy, "train")
    assert index.path.parent == tmp_path / "cache" / "index"
    assert f"cannot write the index of toy_arm/1.0.0 split 'train' in {copy / '.openpi_like_index'}" in caplog.text
    assert f"it is kept in {tmp_path / 'cache' / 'index'}" in caplog.text
    monkeypatch.setattr(tfrecord, "read_records", None)
    assert open_index(copy, "train").path == index.path  # found there again


def test_an_index_beside_data_that_cannot_be_written_is_used(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = open_index(copy, "train")
    monkeypatch.setattr(Path, "mkdir", None)
    monkeypatch.setattr(tfrecord, "read_records", None)
    assert open_index(copy, "train").path == index.path


def test_the_cache_directory_is_that_of_the_user_unless_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(files.CACHE_VARIABLE, raising=False)
    assert files.cache_directory() == Path(os.path.expanduser("~/.cache/openpi_like"))
