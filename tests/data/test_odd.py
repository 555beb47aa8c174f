"""Each odd kind of field that published datasets have, against TFDS' own reader; and what can be wrong with them."""

import dataclasses
import importlib.util
import json
import logging
import os
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any
from unittest import mock

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from openpi_like.data import arrayrecord, files
from openpi_like.data.dataset import EpisodeDataset
from openpi_like.data.images import decode, decode_depth
from openpi_like.data.index import FrameIndex, _from_code_points, open_index
from openpi_like.data.schema import DatasetError, _is_code_points, read_schema
from openpi_like.data.tfrecord import RecordError
from tests.data.crosscheck import assert_same_as_tfds
from tests.data.odd import (
    DEPTH,
    DEPTH_16,
    FOLDER,
    IMAGES,
    INSTRUCTIONS,
    LEFT_OUT,
    LENGTHS,
    NAME,
    code_points,
    episode,
    write,
)
from tests.data.toy import CART, change_record


@pytest.fixture
def odd_copy(odd: Path, tmp_path: Path) -> Path:
    return copied(odd, tmp_path)


def copied(directory: Path, to: Path) -> Path:
    return Path(shutil.copytree(directory, to / FOLDER / "1.0.0", ignore=shutil.ignore_patterns(".openpi*")))


def edit(path: Path, change: Any) -> None:
    """Changes a JSON file; `change` works on what is in it."""
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def step_features(schema: dict[str, Any]) -> dict[str, Any]:
    return schema["featuresDict"]["features"]["steps"]["sequence"]["feature"]["featuresDict"]["features"]


def observation(schema: dict[str, Any]) -> dict[str, Any]:
    return step_features(schema)["observation"]["featuresDict"]["features"]


def test_it_is_read_as_tfds_reads_it(tfds: Any, odd: Path) -> None:
    index = open_index(odd, "train")
    assert_same_as_tfds(tfds, odd, "train", index)
    assert index.left_out == LEFT_OUT
    assert tuple(np.diff(index.episode_start)) == LENGTHS
    assert (odd.parent.name, index.split.dataset) == (FOLDER, NAME)
    assert set(index.images) == set(IMAGES)


def test_steps_are_those_of_the_rlds_package(
    tfds: Any, bridge: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its windows of steps, statistics, last steps and lengths of episodes, against slices of the columns."""
    if importlib.util.find_spec("reverb") is None:
        # The package imports it to write patterns of steps to a Reverb server, and cannot be imported without.
        monkeypatch.setitem(sys.modules, "reverb", mock.MagicMock())
    rlds = pytest.importorskip("rlds", reason="the cross-check needs the rlds extra")
    index, window = open_index(bridge, "train", index_dir=tmp_path), 4
    columns = {key: index.columns[key] for key in ("action", "observation/state", "is_first", "is_last")}
    state, text = columns["observation/state"], index.texts["language_instruction"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        builder = tfds.builder_from_directory(os.fspath(bridge))
        decoders = {"steps": {"observation": {k.partition("/")[2]: tfds.decode.SkipDecoding() for k in index.images}}}
        episodes = builder.as_dataset(
            split="train",
            shuffle_files=False,
            decoders=decoders,
            read_config=tfds.ReadConfig(interleave_cycle_length=1),
        )
        transform, steps = rlds.transformations, lambda e: e[rlds.STEPS]
        for e, episode in enumerate(episodes.take(5)):
            first, end = (int(x) for x in index.episode_start[e : e + 2])
            assert int(transform.episode_length(steps(episode))) == end - first
            last = transform.final_step(steps(episode))
            np.testing.assert_array_equal(last[rlds.OBSERVATION]["state"], state[end - 1])
            total = transform.sum_dataset(steps(episode), lambda step: step[rlds.ACTION])
            np.testing.assert_allclose(total, columns["action"][first:end].sum(axis=0), atol=1e-5)
            windows = transform.batch(steps(episode), window, shift=1, drop_remainder=True)
            starts = range(first, end - window + 1)
            for at, found in zip(starts, tfds.as_numpy(windows), strict=True):
                rows = slice(at, at + window)
                np.testing.assert_array_equal(found[rlds.ACTION], columns["action"][rows])
                np.testing.assert_array_equal(found[rlds.OBSERVATION]["state"], state[rows])
                np.testing.assert_array_equal(found[rlds.IS_FIRST], columns["is_first"][rows])
                np.testing.assert_array_equal(found[rlds.IS_LAST], columns["is_last"][rows])
                assert [t.decode() for t in found["language_instruction"]] == [text.table[i] for i in text.ids[rows]]
                for key in index.images:
                    images = found[rlds.OBSERVATION][key.partition("/")[2]]
                    assert list(images) == [index.read_image(i, key) for i in range(at, at + window)]
        states = episodes.map(
            lambda e: {rlds.STEPS: e[rlds.STEPS].map(lambda s: {"state": s[rlds.OBSERVATION]["state"]})}
        )
        mean, std = transform.mean_and_std(states, lambda step: (step, {"state": True}))
    np.testing.assert_allclose(mean["state"], state.mean(axis=0), atol=1e-5)
    np.testing.assert_allclose(std["state"], state.std(axis=0, ddof=1), rtol=1e-4)


def test_it_holds_what_was_written(odd: Path) -> None:
    """Against the values themselves: TFDS and we could agree on something wrong."""
    index = open_index(odd, "train")
    at = 0
    for e, length in enumerate(LENGTHS):
        for step in episode(e, length)["steps"]:
            for key, column in index.columns.items():
                top, _, rest = key.partition("/")
                value = step[key] if key in step else step[top][rest]
                np.testing.assert_array_equal(column[at], value, err_msg=key)
            for key, dtype in ((DEPTH, "float32"), (DEPTH_16, "uint16")):
                depth = decode_depth(index.read_image(at, key), dtype)
                np.testing.assert_array_equal(depth, step["observation"][key.partition("/")[2]][..., 0])
            undeclared = decode(index.read_image(at, "observation/undeclared"))
            np.testing.assert_array_equal(undeclared, step["observation"]["undeclared"])
            text = index.texts["observation/instruction"]
            assert text.table[text.ids[at]] == INSTRUCTIONS[e % len(INSTRUCTIONS)]
            at += 1


def test_decoded_images_are_those_of_tensorflow(tfds: Any, odd: Path, bridge: Path, tmp_path: Path) -> None:
    """PNG and depth exactly; JPEG exactly where TensorFlow is told to be accurate, else within 38 dB."""
    import tensorflow as tf

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for directory, keys in ((odd, IMAGES), (bridge, {"observation/image_0": "jpeg"})):
            index = open_index(directory, "train", index_dir=tmp_path)
            builder = tfds.builder_from_directory(os.fspath(directory))
            config = tfds.ReadConfig(interleave_cycle_length=1)
            episodes = builder.as_dataset(split="train", shuffle_files=False, read_config=config).take(3)
            steps = [step for e in tfds.as_numpy(episodes) for step in e["steps"]]
            for at, step in enumerate(steps):
                for key, kind in keys.items():
                    theirs = step["observation"][key.partition("/")[2]]
                    data = index.read_image(at, key)
                    if kind == "depth":
                        ours = decode_depth(data, index.schema.steps[key].dtype)[..., None]
                        assert ours.dtype == theirs.dtype
                    else:
                        ours = decode(data)
                    rmse = np.sqrt(np.mean((ours.astype(np.float64) - theirs) ** 2))
                    assert rmse <= (3.2 if kind == "jpeg" else 0.0), key
                    if kind == "jpeg":
                        accurate = tf.io.decode_jpeg(data, dct_method="INTEGER_ACCURATE").numpy()
                        np.testing.assert_array_equal(ours, accurate)


@given(text=st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=80))
def test_any_text_survives_code_points(text: str) -> None:
    assert _from_code_points(code_points(text, 80, np.int64)) == text


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
        _from_code_points(np.array(values))


@pytest.mark.parametrize(
    ("path", "dtype", "shape", "expected"),
    [
        ("observation/instruction", "int32", (512,), True),
        ("language_instruction", "int64", (65,), True),
        ("observation/natural_language", "int32", (128,), True),
        ("observation/instruction", "int32", (64,), False),  # too short: token ids or the like
        ("observation/instruction", "float32", (512,), False),  # an embedding
        ("observation/instruction", "int32", (2, 512), False),
        ("observation/instruction", "int32", (None,), False),
        ("instruction/tokens", "int32", (512,), False),
        ("observation/state", "int32", (512,), False),
    ],
)
def test_which_integers_are_text(path: str, dtype: str, shape: tuple[int | None, ...], expected: bool) -> None:
    assert _is_code_points(path, dtype, shape) == expected


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


# ---- Depth -----------------------------------------------------------------------------------------------------------


def png(image: np.ndarray) -> bytes:
    return cv2.imencode(".png", image)[1].tobytes()


def test_depth_of_special_floats(tfds: Any) -> None:
    depth = np.array([[np.nan, np.inf, -np.inf], [-0.0, 1e-40, 3.4e38]], np.float32)
    data = tfds.features.Image(shape=(2, 3, 1), dtype=np.float32).encode_example(depth[..., None])
    assert decode_depth(data, "float32").tobytes() == depth.tobytes()


@pytest.mark.parametrize(
    ("data", "dtype", "message"),
    [
        (b"", "uint16", "not an image: 0 bytes"),
        (b"\x89PNG but no more", "float32", "not an image: 16 bytes"),
        (
            png(np.zeros((2, 3), np.uint8)),
            "uint16",
            r"an image of shape \(2, 3\) and type uint8; expected \(H, W\) uint16",
        ),
        (png(np.zeros((2, 3), np.uint16)), "float32", r"shape \(2, 3\) and type uint16; .* asked for is 'float32'"),
        (png(np.zeros((2, 3, 3), np.uint8)), "float32", r"an image of shape \(2, 3, 3\) and type uint8"),
        (png(np.zeros((2, 3), np.uint16)), "uint8", "asked for is 'uint8'"),
    ],
)
def test_what_is_not_depth_is_an_error(data: bytes, dtype: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decode_depth(data, dtype)


# ---- What dataset_info.json and features.json may and may not say ----------------------------------------------------


def test_without_a_template_the_old_names_are_expected(odd_copy: Path) -> None:
    def change(info: dict[str, Any]) -> None:
        del info["splits"][0]["filepathTemplate"]

    edit(odd_copy / "dataset_info.json", change)
    with pytest.raises(
        DatasetError, match=f"missing: {NAME}-train.tfrecord-00000-of-00003, .*there: {NAME}-train.tfrec"
    ):
        open_index(odd_copy, "train")
    for i in range(3):
        path = odd_copy / f"{NAME}-train.tfrecord-{i:05d}"
        path.rename(f"{path}-of-00003")
    assert open_index(odd_copy, "train").steps == sum(LENGTHS)


def test_the_old_bridge_names_its_shards_by_the_count(shared: Path) -> None:
    """Metadata of an older TFDS, without the records."""
    directory = shared / "data" / "bridge_dataset_old_tfds" / "1.0.0"
    assert {"action", "observation/state", "language_instruction"} <= set(read_schema(directory).steps)
    with pytest.raises(DatasetError, match=r"missing: bridge_dataset-train.tfrecord-00000-of-00001; there: none"):
        open_index(directory, "train")


def test_a_missing_split_names_those_that_are_there(odd: Path) -> None:
    with pytest.raises(DatasetError, match="no split 'test'; known: 'train'"):
        open_index(odd, "test")


def test_files_that_are_not_among_the_shards_are_named(odd_copy: Path, caplog: pytest.LogCaptureFixture) -> None:
    shutil.copy(odd_copy / f"{NAME}-train.tfrecord-00002", odd_copy / f"{NAME}-train.tfrecord-00007-of-00008")
    with caplog.at_level(logging.WARNING):
        assert open_index(odd_copy, "train").episodes == len(LENGTHS)
    assert (
        f"knows 3 shards of split 'train'; these files are not among them and are not read: {NAME}-train" in caplog.text
    )


def test_more_records_than_announced_in_two_shards_are_both_named(odd_copy: Path) -> None:
    edit(odd_copy / "dataset_info.json", lambda info: info["splits"][0].update(shardLengths=["1", "1", "1"]))
    for fraction in (0.0, 0.9):  # not damage that may be tolerated: the description is wrong
        with pytest.raises(DatasetError) as e:
            open_index(odd_copy, "train", max_corrupt_fraction=fraction)
        for i in (0, 1):
            assert f"-{i:05d}: more records than expected, the file holds 2, dataset_info.json says 1" in str(e.value)


def test_a_field_that_no_record_has(odd_copy: Path) -> None:
    def change(schema: dict[str, Any]) -> None:
        features = step_features(schema)
        features["flags"] = features.pop("flag")

    edit(odd_copy / "features.json", change)
    with pytest.raises(DatasetError, match=r"(?s)5 of 5 records .*steps/flags: missing; did you mean 'steps/flag'"):
        open_index(odd_copy, "train", max_corrupt_fraction=1.0)  # a dataset without episodes is none


def test_a_field_that_features_json_does_not_have(odd_copy: Path) -> None:
    edit(odd_copy / "features.json", lambda schema: step_features(schema).pop("flag"))
    index = open_index(odd_copy, "train")
    assert index.left_out == LEFT_OUT | {"flag": "features.json does not have it"}


@pytest.mark.parametrize(
    ("key", "dtype", "message"),
    [
        ("state", "int64", "steps/observation/state: holds floats, expected integers"),
        ("packed", "float64", "cannot decode its bytes encoding: cannot reshape|buffer size must be a multiple"),
        ("zipped", "float64", "steps/observation/zipped: cannot decode its zlib encoding"),
    ],
)
def test_a_type_that_the_records_do_not_have(odd_copy: Path, key: str, dtype: str, message: str) -> None:
    edit(odd_copy / "features.json", lambda schema: observation(schema)[key]["tensor"].update(dtype=dtype))
    with pytest.raises(DatasetError, match=message):
        open_index(odd_copy, "train")


def test_a_number_too_large_for_its_type_is_not_wrapped(odd_copy: Path) -> None:
    edit(odd_copy / "features.json", lambda s: step_features(s)["offset"]["tensor"].update(dtype="uint8"))
    with pytest.raises(DatasetError, match=r"steps/offset: -\d+ is not of type uint8"):
        open_index(odd_copy, "train")


def test_a_file_format_that_cannot_be_read(odd_copy: Path) -> None:
    edit(odd_copy / "dataset_info.json", lambda info: info.update(fileFormat="parquet"))
    with pytest.raises(DatasetError, match="file format 'parquet', expected 'tfrecord' or 'array_record'"):
        open_index(odd_copy, "train")


# ---- ArrayRecord -----------------------------------------------------------------------------------------------------


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
    assert (ours.split.file_format, theirs.split.file_format) == ("array_record", "tfrecord")
    assert_same(ours, theirs)


@pytest.mark.parametrize("limit", [0, 30_000, 1 << 20])
def test_records_are_kept_up_to_a_number_of_bytes(
    odd: Path, odd_arrays: Path, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    from concurrent.futures import ThreadPoolExecutor

    cache = arrayrecord._Cache(limit)
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
    assert len(index._records._readers) == 1


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
