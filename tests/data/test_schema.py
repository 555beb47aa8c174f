"""What dataset_info.json and features.json may and may not say."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest

from openpi_like.data.index import open_index
from openpi_like.data.layouts.tfds import _is_code_points, read_schema, split_names
from openpi_like.data.schema import DatasetError
from tests.data.odd import LEFT_OUT, LENGTHS, NAME


def edit(path: Path, change: Any) -> None:
    """Changes a JSON file; `change` works on what is in it."""
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def step_features(schema: dict[str, Any]) -> dict[str, Any]:
    return schema["featuresDict"]["features"]["steps"]["sequence"]["feature"]["featuresDict"]["features"]


def observation(schema: dict[str, Any]) -> dict[str, Any]:
    return step_features(schema)["observation"]["featuresDict"]["features"]


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


def test_a_split_without_records_is_an_error_only_when_asked_for(odd_copy: Path) -> None:
    edit(odd_copy / "dataset_info.json", lambda info: info["splits"].append({"name": "test", "shardLengths": ["0"]}))
    assert split_names(odd_copy) == ["train"]
    assert open_index(odd_copy, "train").episodes == len(LENGTHS)
    with pytest.raises(DatasetError, match=r"split 'test' has no records, says dataset_info.json"):
        open_index(odd_copy, "test")


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
            assert f"-{i:05d}: more records than expected, the file holds 2, the dataset says 1" in str(e.value)


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
    assert index.left_out == LEFT_OUT | {"flag": "the dataset's own description does not have it"}


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
