"""The index against TFDS' own reader, step for step, and everything that can be wrong with a dataset."""

import json
import logging
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from openpi_like.data import tfrecord
from openpi_like.data.dataset import EpisodeDataset
from openpi_like.data.images import decode
from openpi_like.data.index import open_index
from openpi_like.data.index_columns import index_columns
from openpi_like.data.layouts.tfds import read_schema
from openpi_like.data.schema import DatasetError, Feature, Schema
from openpi_like.robots.widowx import WIDOWX
from tests.data.crosscheck import assert_same_as_tfds
from tests.data.toy import ARM, LENGTHS, change_record, shard


def test_tables_may_have_more_numbers_than_vectors() -> None:
    shapes = {"embedding": (512,), "vector": (256,), "lanes": (32, 24), "points": (1024, 3), "boxes": (2, 8, 32)}
    steps = {key: Feature(key, "numeric", "float32", shape) for key, shape in shapes.items()}
    columns, left_out = index_columns(Schema(steps, {}))
    assert {column.feature.key for column in columns} == {"vector", "lanes"}
    assert left_out == {
        "embedding": "it has 512 values, more than 256",
        "points": "it has 3072 values, more than 1024",
        "boxes": "it has 512 values, more than 256",
    }


@pytest.mark.parametrize("split", list(LENGTHS))
def test_toy_dataset_is_read_as_tfds_reads_it(tfds: Any, toy: Path, split: str) -> None:
    index = open_index(toy, split)
    assert_same_as_tfds(tfds, toy, split, index)
    assert tuple(np.diff(index.episode_start)) == LENGTHS[split]
    assert index.left_out == {"embedding": "it has 300 values, more than 256"}
    assert len(index.split.shards) == -(-len(LENGTHS[split]) // 5)


@pytest.mark.parametrize("split", ["train", "val"])
def test_bridge_is_read_as_tfds_reads_it(tfds: Any, bridge: Path, tmp_path: Path, split: str) -> None:
    index = open_index(bridge, split, index_dir=tmp_path)
    assert_same_as_tfds(tfds, bridge, split, index)
    assert (index.episodes, index.steps) == (25, 250)


def test_an_older_bridge_has_the_same_schema(bridge: Path) -> None:
    """Its features.json lists the keys in another order."""
    assert read_schema(bridge) == read_schema(bridge.parents[1] / "bridge_dataset_old_tfds" / "1.0.0")


def test_bridge_images_decode_as_opencv_and_pillow_do(bridge: Path, tmp_path: Path) -> None:
    import io

    import cv2
    from PIL import Image

    dataset = EpisodeDataset(open_index(bridge, "val", index_dir=tmp_path), WIDOWX)
    for frame in (0, 99, 249):
        data = dataset.index.read_image(frame, "observation/image_0")
        image = dataset.image(frame, WIDOWX.cameras[0])
        np.testing.assert_array_equal(image, np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))
        reference = np.asarray(cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR))[..., ::-1]
        np.testing.assert_array_equal(decode(data), reference)
        np.testing.assert_array_equal(decode(data, "bgr"), reference[..., ::-1])


def test_an_index_is_opened_without_reading_the_records(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = open_index(toy, "train")
    monkeypatch.setattr(tfrecord, "read_records", None)
    second = open_index(toy, "train")
    for key in first.columns:
        np.testing.assert_array_equal(first.columns[key], second.columns[key])
    assert isinstance(second.columns["action"].base, np.memmap)
    assert sum(p.stat().st_size for p in (toy / ".openpi_like_index").rglob("*")) < 100_000


def test_a_stale_index_is_built_again(copy: Path, caplog: pytest.LogCaptureFixture) -> None:
    before = open_index(copy, "train")
    old = before.columns["action"][0].copy()
    path, payload = shard(copy), before.columns["action"][0].tobytes()
    change_record(path, 0, lambda data: data.replace(payload, (old + 1).astype(np.float32).tobytes()))
    os.utime(path, ns=(0, 1))  # a copy may well have an older time
    with caplog.at_level(logging.WARNING):
        after = open_index(copy, "train")
    np.testing.assert_array_equal(after.columns["action"][0], old + 1)
    assert "is stale (changed: shard times), building it again" in caplog.text
    assert len(list((copy / ".openpi_like_index").iterdir())) == 1  # the old one is gone


def test_two_builders_do_not_disturb_each_other(copy: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(4) as pool:
        indexes = list(pool.map(lambda _: open_index(copy, "train"), range(4)))
    assert {i.steps for i in indexes} == {sum(LENGTHS["train"])}
    assert len(list((copy / ".openpi_like_index").iterdir())) == 1


# ---- What is wrong with the files ------------------------------------------------------------------------------------


def test_a_missing_directory_names_its_siblings(toy: Path) -> None:
    with pytest.raises(DatasetError, match=r"no dataset directory .*toy_arms/1\.0\.0; .* there is: toy_arm"):
        open_index(toy.parents[1] / "toy_arms" / "1.0.0", "train")


def test_a_directory_above_names_the_one_meant(toy: Path) -> None:
    with pytest.raises(DatasetError, match=re.escape("did you mean one of its subdirectories ['1.0.0']?")):
        open_index(toy.parent, "train")


def test_an_unknown_split_names_the_near_one(toy: Path) -> None:
    with pytest.raises(DatasetError, match="no split 'trian'; did you mean 'train'"):
        open_index(toy, "trian")


def test_all_missing_shards_are_named(copy: Path) -> None:
    names = [shard(copy, i).name for i in (0, 2)]
    for i in (0, 2):
        shard(copy, i).unlink()
    with pytest.raises(DatasetError, match=f"expects 3 shards .* missing: {names[0]}, {names[1]}; there: "):
        open_index(copy, "train")


def test_a_shard_with_other_records_than_announced(copy: Path) -> None:
    info = json.loads((copy / "dataset_info.json").read_text())
    next(s for s in info["splits"] if s["name"] == "train")["shardLengths"] = ["5", "6", "2"]
    (copy / "dataset_info.json").write_text(json.dumps(info))
    with pytest.raises(
        DatasetError,
        match=r"toy_arm-train.tfrecord-00001.*, record 5: missing, the file holds 5, the dataset says 6",
    ) as e:
        open_index(copy, "train")
    assert str(shard(copy, 1).name) in str(e.value)


def test_a_cut_shard(copy: Path) -> None:
    path = shard(copy, 1)
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-7])
    expected = f"{path.name}, record 4, byte .*the record needs bytes up to {size}, the file ends at {size - 7}"
    with pytest.raises(DatasetError, match=expected):
        open_index(copy, "train")


@pytest.mark.parametrize("record", [0, 3])
def test_a_flipped_byte_is_found_in_any_record(copy: Path, record: int) -> None:
    path = shard(copy)
    at = [offset for offset, _ in tfrecord.read_records(path)][record]
    raw = bytearray(path.read_bytes())
    raw[at + 50] ^= 1
    path.write_bytes(raw)
    expected = f"1 of 12 records are damaged.*\n  {path.name}, record {record}, byte {at}: checksum of the payload"
    with pytest.raises(DatasetError, match=expected):
        open_index(copy, "train")
    assert not list(copy.glob(".openpi_like_index/*/index.json"))  # nothing half-built is left


def test_damage_is_counted_and_reported_when_tolerated(copy: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole = open_index(copy, "train")
    path = shard(copy)
    raw = bytearray(path.read_bytes())
    raw[next(tfrecord.read_records(path))[0] + 50] ^= 1
    path.write_bytes(raw)
    with caplog.at_level(logging.WARNING):
        index = open_index(copy, "train", max_corrupt_fraction=0.1)
    assert index.episodes == whole.episodes - 1
    np.testing.assert_array_equal(index.columns["action"], whole.columns["action"][LENGTHS["train"][0] :])
    assert index.episode_record[:4].tolist() == [1, 2, 3, 4]
    assert f"1 of 12 records are damaged and skipped:\n  {path.name}, record 0" in caplog.text
    # the index is there now, but a stricter run must not get it
    with pytest.raises(DatasetError, match="1 of 12 records are damaged, tolerated are 0 of them"):
        open_index(copy, "train")


def test_records_behind_a_damaged_length_count_as_damaged(copy: Path) -> None:
    path = shard(copy)
    raw = bytearray(path.read_bytes())
    raw[list(tfrecord.read_records(path))[1][0] - 12] ^= 1
    path.write_bytes(raw)
    with pytest.raises(DatasetError, match="4 of 12 records are damaged"):
        open_index(copy, "train", max_corrupt_fraction=0.2)
    assert open_index(copy, "train", max_corrupt_fraction=0.4).episodes == 8


def test_a_record_without_a_field_names_it(copy: Path) -> None:
    change_record(shard(copy), 2, lambda data: data.replace(b"steps/count", b"steps/coUnt"))
    with pytest.raises(DatasetError, match=r"record 2, byte \d+: steps/count: missing"):
        open_index(copy, "train")


def test_fields_of_different_lengths_are_named(copy: Path) -> None:
    schema = json.loads((copy / "features.json").read_text())
    step = schema["featuresDict"]["features"]["steps"]["sequence"]["feature"]["featuresDict"]["features"]
    step["action"]["tensor"]["shape"]["dimensions"] = ["1"]
    (copy / "features.json").write_text(json.dumps(schema))
    with pytest.raises(DatasetError, match=r"(?s)12 of 12 .* differ in their number of steps \(.*action: 21, count: 7"):
        open_index(copy, "train")


def test_a_directory_that_cannot_be_written(toy: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DatasetError, match=r"cannot write the index .* give another index_dir"):
        open_index(toy, "train", index_dir=tmp_path / "file" / "x")


def test_a_file_cut_after_it_was_indexed(copy: Path) -> None:
    dataset = EpisodeDataset(open_index(copy, "train"), ARM)
    path = shard(copy, 2)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(DatasetError, match=r"episode 11, step 13 .*/image: read .* bytes; the file was changed"):
        dataset.image(len(dataset) - 1, ARM.cameras[0])
