"""Rewritten datasets: the same numbers and texts, smaller images, read by us and by TFDS, and safe to kill."""

import io
import json
import os
import runpy
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
import simplejpeg
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from openpi_like.data import tfrecord
from openpi_like.data.images import decode
from openpi_like.data.index import FrameIndex, open_index
from openpi_like.data.prepare import Prepare, plan, prepare_shard, rewrite_example, write_info, write_shards
from openpi_like.data.schema import DatasetError
from openpi_like.data.storage import RecordError
from tests.conftest import REPOSITORY
from tests.data.beam import BEAM, import_beam
from tests.data.toy import LENGTHS, change_record, shard

PROGRAM = REPOSITORY / "data" / "prepare.py"
BOX = Prepare(height=8, width=8)  # the toy's images are 12 x 16 PNG and 24 x 16 JPEG


@pytest.fixture(scope="module")
def program() -> SimpleNamespace:
    return SimpleNamespace(**runpy.run_path(str(PROGRAM)))


def run(program: SimpleNamespace, data: Path, out: Path, **options: Any) -> str:
    text = io.StringIO()
    program.main(program.Args(str(data), out, height=8, width=8, **options), Console(file=text, width=300))
    return text.getvalue()


def assert_same_but_images(before: FrameIndex, after: FrameIndex, config: Prepare = BOX) -> None:
    assert before.split.lengths == after.split.lengths
    for name in ("episode_start", "episode_shard", "episode_record"):
        np.testing.assert_array_equal(getattr(before, name), getattr(after, name))
    for name in ("columns", "episode_columns"):
        ours, theirs = getattr(after, name), getattr(before, name)
        assert ours.keys() == theirs.keys()
        for key in theirs:
            assert ours[key].dtype == theirs[key].dtype
            assert ours[key].tobytes() == theirs[key].tobytes(), key
    for name in ("texts", "episode_texts"):
        for key, text in getattr(before, name).items():
            other = getattr(after, name)[key]
            assert [other.table[i] for i in other.ids] == [text.table[i] for i in text.ids]
    assert before.images.keys() == after.images.keys()
    for key in before.images:
        for step in range(0, before.steps, 7):
            assert after.read_image(step, key) == config.image(before.read_image(step, key))


# ---- Images ----------------------------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(*(st.integers(1, 700) for _ in range(4)))
def test_sizes_fit_and_keep_their_proportions(height: int, width: int, high: int, wide: int) -> None:
    h, w = Prepare(high, wide).size(height, width)
    assert 1 <= h <= high
    assert 1 <= w <= wide
    if height <= high and width <= wide:
        assert (h, w) == (height, width)
    else:
        assert h == high or w == wide
        scale = min(high / height, wide / width)
        assert abs(h - height * scale) <= 0.5 or h == 1
        assert abs(w - width * scale) <= 0.5 or w == 1


def test_images_are_decoded_shrunk_and_encoded() -> None:
    grey = cv2.resize(np.random.default_rng(0).integers(0, 256, (6, 8), np.uint8), (64, 48))
    x = (grey[..., None] * np.array([1.0, 0.8, 0.5])).astype(np.uint8)
    png = cv2.imencode(".png", x[..., ::-1])[1].tobytes()
    jpeg = simplejpeg.encode_jpeg(x, quality=95)
    small = cv2.resize(x, (32, 24), interpolation=cv2.INTER_AREA)
    np.testing.assert_array_equal(decode(Prepare(32, 32, encoding="png").image(png)), small)
    assert Prepare(32, 32, quality=80).image(png) == simplejpeg.encode_jpeg(small, 80, "RGB", "420")
    assert np.abs(decode(Prepare(32, 32).image(png)).astype(int) - small).mean() < 4
    # small enough: only the encoding is changed, and where that is right too, nothing
    assert Prepare(64, 64).image(jpeg) == jpeg
    assert Prepare(64, 64, encoding="png").image(png) == png
    np.testing.assert_array_equal(decode(Prepare(64, 64, encoding="png").image(jpeg)), decode(jpeg))
    assert Prepare(32, 32).image(b"") == b""
    with pytest.raises(ValueError, match="not an image"):
        Prepare().image(b"no image")


def test_examples_keep_all_other_bytes(toy: Path, tfds: Any) -> None:
    import tensorflow as tf

    (_, data), *_ = tfrecord.read_records(shard(toy))
    assert isinstance(data, bytes)
    name = "steps/observation/wrist"
    same, before, after = rewrite_example(data, [], lambda x: b"")
    assert (same, before, after) == (data, 0, 0)
    changed, before, after = rewrite_example(data, [name], lambda x: x + b"!" * 300)
    old, new = (tf.train.Example.FromString(x).features.feature for x in (data, changed))
    assert list(new) == list(old)
    images = old[name].bytes_list.value
    assert list(new[name].bytes_list.value) == [x + b"!" * 300 for x in images]
    assert (before, after) == (sum(map(len, images)), sum(map(len, images)) + 300 * len(images))
    for key in old:
        assert key == name or new[key].SerializeToString() == old[key].SerializeToString()
    with pytest.raises(RecordError, match="has no steps/x"):
        rewrite_example(data, ["steps/x"], lambda x: x)


# ---- Datasets --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file_format", ["tfrecord", "array_record"])
@pytest.mark.parametrize("encoding", ["jpeg", "png"])
def test_prepared_dataset_is_the_same_but_for_images(
    program: SimpleNamespace, toy: Path, tmp_path: Path, file_format: str, encoding: str
) -> None:
    out = tmp_path / "toy_arm" / "1.0.0"
    text = run(program, toy, out, file_format=file_format, encoding=encoding)
    assert "15 episodes in 4 shards; colour images had" in text
    for split in LENGTHS:
        after = open_index(out, split)
        assert_same_but_images(open_index(toy, split), after, Prepare(8, 8, encoding))
        assert after.schema.steps["observation/image"].shape == (6, 8, 3)
        assert after.schema.steps["observation/wrist"].shape == (None, None, 3)
        after.close()
    info = json.loads((out / "dataset_info.json").read_text())
    assert info["fileFormat"] == file_format
    if file_format == "tfrecord":
        records = [p for f in out.glob("*-train.*") for _, p in tfrecord.read_records(f)]
        assert info["splits"][0]["numBytes"] == str(sum(len(p) for p in records if isinstance(p, bytes)))


@pytest.mark.parametrize("file_format", ["tfrecord", "array_record"])
def test_tfds_reads_it(program: SimpleNamespace, toy: Path, tmp_path: Path, tfds: Any, file_format: str) -> None:
    out = tmp_path / "toy_arm" / "1.0.0"
    run(program, toy, out, file_format=file_format, splits=("val",), encoding="png")
    builder = tfds.builder_from_directory(out)
    assert set(builder.info.splits) == {"val"}
    assert builder.info.splits["val"].num_examples == 3
    original = list(tfds.builder_from_directory(toy).as_dataset(split="val"))
    index = open_index(out, "val")
    if file_format == "tfrecord":
        episodes = [list(e["steps"].as_numpy_iterator()) for e in builder.as_dataset(split="val")]
    else:
        episodes = [list(e["steps"]) for e in builder.as_data_source(split="val")]
    step = 0
    for ours, theirs in zip(episodes, original, strict=True):
        for a, b in zip(ours, theirs["steps"].as_numpy_iterator(), strict=True):
            np.testing.assert_array_equal(a["action"], b["action"])
            np.testing.assert_array_equal(a["observation"]["joints"], b["observation"]["joints"])
            assert a["observation"]["image"].shape == (6, 8, 3)
            for key in ("image", "wrist"):
                got = decode(index.read_image(step, f"observation/{key}"))
                np.testing.assert_array_equal(a["observation"][key], got)
            step += 1


def test_bridge_is_left_as_it_is_when_it_fits(bridge: Path, tmp_path: Path) -> None:
    tasks = plan(bridge, tmp_path / "b", Prepare(), ["train"])
    write_shards(tasks)
    (done,) = write_info(bridge, tmp_path / "b", Prepare(), tasks)
    assert done.records == 25
    assert done.images_before == done.images_after
    (name,) = bridge.glob("*-train.tfrecord-*")
    assert (tmp_path / "b" / name.name).read_bytes() == name.read_bytes()


def test_done_shards_are_kept_and_half_ones_are_not(toy: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    tasks = plan(toy, out, BOX)
    assert [t.target.name for t in tasks][:2] == [f"toy_arm-train.tfrecord-0000{i}-of-00003" for i in (0, 1)]
    assert prepare_shard(tasks[0]) == []
    with pytest.raises(DatasetError, match="3 of 4 shards are not written; run it again"):
        write_info(toy, out, BOX, tasks)
    first = tasks[0].target.stat().st_mtime_ns
    # killed while a shard was written, and between the shard and its note
    (out / f".part-{tasks[1].target.name}").write_bytes(b"half")
    tasks[2].target.write_bytes(b"whole, perhaps")
    seen: list[tuple[int, int]] = []
    write_shards(plan(toy, out, BOX), workers=2, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
    write_info(toy, out, BOX, tasks)
    assert tasks[0].target.stat().st_mtime_ns == first
    assert not list(out.glob(".part-*"))
    assert_same_but_images(open_index(toy, "train"), open_index(out, "train"))


def test_killed_runs_go_on(toy: Path, tmp_path: Path) -> None:
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    command = [sys.executable, str(PROGRAM), str(toy), "--height", "8", "--width", "8", "--out"]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    subprocess.run([*command, str(straight)], env=environment, check=True, capture_output=True)
    process = subprocess.Popen([*command, str(killed)], env=environment, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not list(killed.glob("*.tfrecord-*")) and process.poll() is None and time.monotonic() < deadline:
        pass  # until the first shard is there
    process.kill()
    process.wait()
    subprocess.run([*command, str(killed)], env=environment, check=True, capture_output=True)
    names = sorted(p.name for p in straight.iterdir() if p.is_file())
    assert names == sorted(p.name for p in killed.iterdir() if p.is_file())
    for name in names:
        assert (straight / name).read_bytes() == (killed / name).read_bytes()


@pytest.mark.parametrize("workers", [1, 2])
def test_a_shard_that_cannot_be_read_or_written_is_located(copy: Path, tmp_path: Path, workers: int) -> None:
    tasks = plan(copy, tmp_path / "out", BOX)
    shard(copy, 1).unlink()  # after the plan, as when a store fails
    (tmp_path / "out" / tasks[2].target.name).mkdir()
    with pytest.raises(DatasetError) as e:
        write_shards(tasks, workers=workers)
    text = str(e.value)
    assert text.startswith("2 problems; these shards are not written")
    assert f"{tasks[1].source.name}, after 0 records" in text
    assert f"{tasks[2].source.name}, after {tasks[2].expected} records" in text
    assert [t.target.is_file() for t in tasks] == [True, False, False, True]
    assert not list((tmp_path / "out").rglob(".part-*"))


def test_a_changed_source_is_written_again(copy: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    tasks = plan(copy, out, BOX)
    write_shards(tasks)
    again = tasks[1].target.stat().st_mtime_ns
    os.utime(shard(copy, 1), ns=(1, 1))
    assert prepare_shard(plan(copy, out, BOX)[1]) == []
    assert tasks[1].target.stat().st_mtime_ns != again


def test_damage_is_located(copy: Path, tmp_path: Path) -> None:
    path = shard(copy, 0)
    raw = bytearray(path.read_bytes())
    raw[-20] ^= 1  # in the last record
    path.write_bytes(raw)
    shard_2 = shard(copy, 2)
    change_record(shard_2, 1, lambda x: x.replace(b"\x89PNG", b"\x89PMG"))
    tasks = plan(copy, tmp_path / "out", BOX)
    with pytest.raises(DatasetError) as e:
        write_shards(tasks, workers=2)
    text = str(e.value)
    assert "2 problems; these shards are not written" in text
    last = tasks[0].expected - 1
    assert f"{path.name}, record {last}: checksum of the payload" in text
    assert f"{shard_2.name}, record 1: not an image" in text
    assert sorted(t.target.is_file() for t in tasks) == [False, False, True, True]
    with pytest.raises(DatasetError, match="2 of 4 shards are not written"):
        write_info(copy, tmp_path / "out", BOX, tasks)
    info = json.loads((copy / "dataset_info.json").read_text())
    info["splits"][0]["shardLengths"][1] = "9"
    (copy / "dataset_info.json").write_text(json.dumps(info))
    (wrong,) = prepare_shard(plan(copy, tmp_path / "other", BOX)[1])
    assert wrong.endswith("records, dataset_info.json says 9")


def test_refusals(program: SimpleNamespace, toy: Path, copy: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"box of 0 x 5.*'gif'.*quality 101.*'parquet'"):
        Prepare(0, 5, "gif", 101, "parquet")
    with pytest.raises(DatasetError, match="nowhere"):
        run(program, tmp_path / "nowhere", tmp_path / "out")
    with pytest.raises(DatasetError, match="no split 'tset'"):
        run(program, toy, tmp_path / "out", splits=("tset",))
    run(program, toy, tmp_path / "out")
    with pytest.raises(DatasetError, match=r"begun in another way.*quality was 95 and is 50"):
        run(program, toy, tmp_path / "out", quality=50)
    with pytest.raises(DatasetError, match="is not empty, and not a dataset that was begun here"):
        run(program, toy, copy)
    (tmp_path / "file").touch()
    with pytest.raises(DatasetError, match=r"cannot write .*file.*; give another directory"):
        run(program, toy, tmp_path / "file" / "out")
    with pytest.raises(ValueError, match="workers=0, expected at least 1"):
        write_shards([], workers=0)
    features = json.loads((copy / "features.json").read_text())
    steps = features["featuresDict"]["features"]["steps"]["sequence"]["feature"]["featuresDict"]["features"]
    for name in ("image", "wrist"):
        del steps["observation"]["featuresDict"]["features"][name]
    (copy / "features.json").write_text(json.dumps(features))
    with pytest.raises(DatasetError, match="has no colour images, so there is nothing to prepare"):
        run(program, copy, tmp_path / "none")


@pytest.mark.parametrize("file_format", ["tfrecord", "array_record"])
def test_beam_writes_the_same_and_goes_on(
    program: SimpleNamespace, toy: Path, tmp_path: Path, file_format: str
) -> None:
    import_beam()
    here, there = tmp_path / "here", tmp_path / "there"
    config = Prepare(8, 8, file_format=file_format)
    text = run(program, toy, here, file_format=file_format)
    first, *_ = plan(toy, there, config)
    assert prepare_shard(first) == []  # of a run that was killed
    written = first.target.stat().st_mtime_ns
    (there / ".part-0-shard").write_bytes(b"half")
    beam = tuple(option.removeprefix("--") for option in BEAM)
    told = run(program, toy, there, file_format=file_format, beam=beam)
    assert told.strip().replace(str(there), str(here)) == text.strip()
    assert first.target.stat().st_mtime_ns == written
    names = sorted(str(p.relative_to(here)) for p in here.rglob("*"))
    assert names == sorted(str(p.relative_to(there)) for p in there.rglob("*"))
    for name in names:
        if (here / name).is_file():
            assert (here / name).read_bytes() == (there / name).read_bytes(), name


def test_beam_locates_damage(copy: Path, tmp_path: Path) -> None:
    beam = import_beam()
    for number, record in ((0, 2), (2, 1)):
        change_record(shard(copy, number), record, lambda x: x.replace(b"\x89PNG", b"\x89PMG"))
    here = plan(copy, tmp_path / "here", BOX)
    with pytest.raises(DatasetError, match="2 problems; these shards are not written") as expected:
        write_shards(here)
    there = plan(copy, tmp_path / "there", BOX)
    with pytest.raises(DatasetError) as found:
        beam.write_shards(there, BEAM)
    assert str(found.value) == str(expected.value)
    assert [t.target.is_file() for t in there] == [t.target.is_file() for t in here] == [False, True, False, True]
    assert not list((tmp_path / "there").rglob(".part-*"))
