"""What `meta/` of a LeRobot dataset says wrong, or of another version: an error that says where."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute
import pytest

from openpi_like.data.index import open_index
from openpi_like.data.layouts import find_datasets, read_schema, split_names
from openpi_like.data.schema import DatasetError
from tests.data.toy_lerobot import (
    EPISODES,
    FRONT,
    MIXED,
    VIDEO_SPAN,
    WRIST,
    WRITERS,
    change_info,
    edit,
    features,
    put_column,
)


@pytest.mark.parametrize(
    ("version", "change", "message"),
    [
        ("v2.1", {"codebase_version": "v1.6"}, r"codebase_version is 'v1.6', expected v2.0, v2.1 or v3.x; write older"),
        ("v3.0", {"codebase_version": "v4.0"}, r"codebase_version is 'v4.0', expected"),
        ("v3.0", {"fps": 0}, r"fps is 0, expected a number above 0"),
        ("v3.0", {"fps": "20"}, r"fps is '20', expected a number above 0"),
        ("v2.1", {"fps": 25}, r"timestamp: those of 20 Hz, meta/info.json says fps 25"),
        ("v2.1", {"splits": {"train": "all"}}, r"split 'train' is 'all', expected episodes like '0:50'"),
        ("v2.1", {"splits": {"train": "all", "val": 3}}, r"'train' is 'all', .*; split 'val' is 3, expected"),
        ("v3.0", {"splits": {"train": "0:60"}}, r"is episodes 0:60 by .*, of which meta/ lists 4, the last is 3; put"),
        ("v3.0", {"splits": {"train": "2:2"}}, r"split 'train' is empty, 2:2 by meta/info.json; take another"),
        ("v3.0", {"splits": ["train"]}, r"splits is \['train'\], expected an object like \{'train': '0:50'\}"),
        ("v3.0", {"splits": None, "total_episodes": None}, r"'total_episodes' and 'splits' are missing"),
        ("v2.1", {"total_episodes": "4"}, r"total_episodes is '4', expected an integer, at least 0"),
        (
            "v2.1",
            {"chunks_size": 0, "fps": None},
            r"fps is None, .*; chunks_size is 0, expected an integer",
        ),
        ("v2.1", {"features": ["action"]}, r"features is list, expected an object"),
        (
            "v3.0",
            {"features": {"a": "float32", "b": {"dtype": "float32", "shape": 3}}},
            r"feature 'a' is 'float32', expected an object with 'dtype' .*; feature 'b': shape is 3, expected a list",
        ),
        (
            "v2.1",
            {"data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"},
            r"data_path is 'data/chunk-\{chunk_index:03d\}\S+', which is not made of \{episode_chunk\}, "
            r"\{episode_index\}, as in v2.1; it is a path of version 3: are files of two versions mixed\? ",
        ),
        (
            "v3.0",
            {"video_path": "videos/{"},
            r"video_path is .* not made of \{chunk_index\}, \{file_index\}, \{vide",
        ),
        (
            "v3.0",
            {"data_path": 3},
            r"data_path is 3, which is not made of \{chunk_index\}, \{file_index\}, as in ",
        ),
        (
            "v2.1",
            {"total_episodes": 9, "splits": {"train": "0:4"}},
            r"episodes.jsonl does not list 5 of the 9 episodes that total_episodes of meta/info.json says: 4, 5, 6, ",
        ),
        (
            "v3.0",
            {"total_episodes": 10**15},
            r"does not list 999999999999996 of .* says: 4, 5, 6, 7, 8 and 999999",
        ),
        (
            "v3.0",
            {"total_episodes": 3},
            r"lists episodes that are not below the 3 that total_episodes .* says: 3; ",
        ),
        ("v3.0", {"splits": {"train": "9:12"}}, r"split 'train' is episodes \(9, 12\), and none of them is there"),
        ("v3.0", {"video_path": None}, r"features \['observation.images.front'\] are videos, but there is no"),
    ],
)
def test_what_info_says_wrong(lerobot: Path, version: str, change: dict[str, Any], message: str) -> None:
    change_info(lerobot, **change)
    with pytest.raises(DatasetError, match=message):
        open_index(lerobot, "train")


@pytest.mark.parametrize(
    ("version", "name", "message"),
    [
        ("v2.1", "meta/tasks.jsonl", r"cannot read .*tasks.jsonl: .*; copy the dataset again"),
        ("v2.1", "meta/episodes.jsonl", r"cannot read .*episodes.jsonl: .*; copy the dataset again"),
        ("v3.0", "meta/tasks.parquet", r"tasks.parquet cannot be read as Parquet: .*; copy it again"),
        ("v3.0", "meta/episodes/chunk-000/file-000.parquet", r"meta/episodes holds no table of episodes; copy"),
    ],
)
def test_a_missing_table_of_meta(lerobot: Path, version: str, name: str, message: str) -> None:
    (lerobot / name).unlink()
    with pytest.raises(DatasetError, match=message):
        open_index(lerobot, "train")


@pytest.mark.parametrize("version", ["v2.1"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.replace('"length"', '"lengh"'),
            r"episodes.jsonl, line 1: length missing; line 2: length missing",
        ),
        (lambda t: "{", r"episodes.jsonl is not one JSON object a line"),
        (
            lambda t: t.replace("12", "null"),
            r"line 2: length is null, expected an integer, 0 or more; copy ",
        ),
        (lambda t: t.replace("12", "12.5"), r"line 2: length is 12.5, expected an integer, 0 or more"),
        (
            lambda t: t + t.split("\n")[2] + "\n",
            r"meta/episodes.jsonl lists 1 episodes more than once: 2; take out the rows that are not theirs",
        ),
        (
            lambda t: t.partition("\n")[2],
            r"meta/episodes.jsonl does not list 1 of the 4 episodes that total_episodes of meta/info.json says: 0; ",
        ),
    ],
)
def test_lines_of_episodes(lerobot: Path, version: str, change: Callable[[str], str], message: str) -> None:
    path = lerobot / "meta" / "episodes.jsonl"
    path.write_text(change(path.read_text()))
    with pytest.raises(DatasetError, match=message):
        open_index(lerobot, "train")


@pytest.mark.parametrize("version", ["v2.1"])
def test_lines_end_only_where_they_end(lerobot: Path, version: str) -> None:
    """Texts may hold other separators of lines, and what is not ASCII is UTF-8."""
    said = "eins\u2028zwei\x85drei \u00f6"
    path = lerobot / "meta" / "tasks.jsonl"
    path.write_bytes(
        json.dumps({"task_index": 0, "task": said}, ensure_ascii=False).encode()
        + b"\r\n"
        + (json.dumps({"task_index": 1, "task": "b"}).encode())
    )
    assert open_index(lerobot, "train").texts["task"].table == (said, "b")
    path.write_bytes(path.read_bytes().replace("\u00f6".encode(), "\u00f6".encode("latin-1")))
    with pytest.raises(DatasetError, match=r"tasks.jsonl is not one JSON object a line: 'utf-8' codec"):
        open_index(lerobot, "train")


@pytest.mark.parametrize("version", ["v2.1"])
def test_two_tasks_of_one_number(lerobot: Path, version: str) -> None:
    path = lerobot / "meta" / "tasks.jsonl"
    path.write_text(path.read_text().replace('"task_index": 1', '"task_index": 0'))
    with pytest.raises(DatasetError, match=r"meta/tasks.jsonl: two tasks have task_index 0"):
        open_index(lerobot, "train")


@pytest.mark.parametrize("version", WRITERS)
@pytest.mark.parametrize(("text", "message"), [("{", "is not JSON: .*; copy"), ("[1]", "is JSON, but list, ")])
def test_an_info_that_is_none(lerobot: Path, version: str, text: str, message: str) -> None:
    (lerobot / "meta" / "info.json").write_text(text)
    with pytest.raises(DatasetError, match=f"info.json {message}"):
        open_index(lerobot, "train")


OF_EPISODES: dict[str, tuple[Callable[[pa.Table], pa.Table], str]] = {
    "null": (
        lambda t: put_column("data/file_index", lambda x: [0, None, 1, 1])(
            put_column("length", lambda x: [7, 12, None, 9])(t)
        ),
        r"meta: episodes/\S+parquet: length is missing \(null or NaN\) for 1 of 4 episodes \(row 2\); "
        r"\S+: data/file_index is missing \(null or NaN\) for 1 of 4 episodes \(row 1\); copy the dataset again",
    ),
    "no beginning": (
        put_column(f"{VIDEO_SPAN}/from_timestamp", lambda x: [None, *x[1:3], float("nan")]),
        rf"{VIDEO_SPAN}/from_timestamp is missing \(null or NaN\) for 2 of 4 episodes \(row 0, 3\)",
    ),
    "no number": (
        put_column("length", lambda x: [7, 12.5, 5, 9]),
        r"length is 12.5, expected an integer, 0 or more \(row 1\)",
    ),
    "words": (put_column("length", lambda x: list(map(str, x))), "column 'length' is of type string, expected numbers"),
    "no column": (
        lambda t: t.drop_columns([f"{VIDEO_SPAN}/to_timestamp"]),
        rf"no column \['{VIDEO_SPAN}/to_timestamp'\]; copy",
    ),
    "backwards": (
        put_column(f"{VIDEO_SPAN}/to_timestamp", lambda x: [x[0], 0.2, *x[2:]]),
        rf"{VIDEO_SPAN}: from_timestamp 0.35 to to_timestamp 0.2 of episode 1 is no part of a video \(episodes 1\)",
    ),
    "twice": (
        lambda t: pa.concat_tables([t, t.slice(1, 2)]),
        r"meta/episodes lists 2 episodes more than once: 1, 2; take out",
    ),
    "not listed": (lambda t: t.slice(0, 3), r"meta/episodes does not list 1 of the 4 episodes that .* says: 3; copy"),
}


@pytest.mark.parametrize("version", ["v3.0"])
@pytest.mark.parametrize("what", OF_EPISODES)
def test_tables_of_episodes(lerobot: Path, version: str, what: str) -> None:
    change, message = OF_EPISODES[what]
    edit(lerobot / EPISODES, change)
    with pytest.raises(DatasetError, match=message):
        open_index(lerobot, "train")


@pytest.mark.parametrize("version", ["v3.0"])
@pytest.mark.parametrize("name", [EPISODES, "meta/tasks.parquet"])
def test_names_of_columns_that_are_damaged(lerobot: Path, version: str, name: str) -> None:
    data = (lerobot / name).read_bytes()
    (lerobot / name).write_bytes(data.replace(b"_index", b"\xff\xfendex"))
    with pytest.raises(DatasetError, match=rf"{name} cannot be read as Parquet: 'utf-8' codec .*; copy it again"):
        open_index(lerobot, "train")


@pytest.mark.parametrize("version", ["v3.0"])
def test_a_table_of_tasks_with_gaps(lerobot: Path, version: str) -> None:
    edit(lerobot / "meta" / "tasks.parquet", put_column("__index_level_0__", lambda x: [x[0], None]))
    with pytest.raises(DatasetError, match=r"tasks.parquet, row 1: task_index is 1 and the text None, expected an int"):
        open_index(lerobot, "train")


@pytest.mark.parametrize(("version", "told"), [("v2.1", "video_info"), ("v2.1", "info"), ("v3.0", "info")])
def test_depth_is_no_colour(lerobot: Path, version: str, told: str) -> None:
    """Version 2.0 says it under another name."""
    of = features(MIXED)
    of[FRONT][told] = {"video.is_depth_map": True}
    change_info(lerobot, features=of)
    index = open_index(lerobot, "train")
    assert index.images.keys() == {WRIST}
    assert index.left_out[FRONT] == "fields of kind depth map and shape (64, 80, 3) cannot be read here"


@pytest.mark.parametrize("version", WRITERS)
def test_a_split_that_is_empty_is_none(lerobot: Path, version: str) -> None:
    change_info(lerobot, splits={"train": "0:4", "test": "4:4"})
    assert split_names(lerobot) == ["train"]
    assert open_index(lerobot, "train").episodes == 4
    with pytest.raises(DatasetError, match=r"split 'test' is empty, 4:4 by meta/info.json; take another"):
        open_index(lerobot, "test")


def test_version_1_is_told_apart(tmp_path: Path) -> None:
    """As the hub has it, and as it was saved to disk, where `train` looks like a directory of TFDS."""
    (tmp_path / "old" / "meta_data").mkdir(parents=True)
    (tmp_path / "old" / "train").mkdir()
    (tmp_path / "old" / "train" / "dataset_info.json").write_text("{}")
    (tmp_path / "old" / "meta_data" / "info.json").write_text('{"codebase_version": "v1.6", "fps": 10, "video": true}')
    message = (
        r"is a LeRobot dataset of version v1.6 \(it has meta_data/info.json\), expected v2.0, v2.1 or v3.x; convert it "
        r"with lerobot 0.3.3.*convert_dataset_v1_to_v2 --repo-id"
    )
    for read in (split_names, read_schema, lambda directory: open_index(directory, "train")):
        with pytest.raises(DatasetError, match=message):
            read(tmp_path / "old")
    assert tmp_path / "old" in find_datasets(tmp_path)
