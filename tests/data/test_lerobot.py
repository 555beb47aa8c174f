"""LeRobot datasets, read in place: every number and pixel, and what is said of those that are damaged."""

import dataclasses
import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from openpi_like.data.dataset import EpisodeDataset, open_dataset
from openpi_like.data.files import Ranges, locate
from openpi_like.data.index import FrameIndex, open_index
from openpi_like.data.layouts import find_datasets, split_names, video
from openpi_like.data.layouts.lerobot_storage import time_problems
from openpi_like.data.layouts.parquet_pages import find_values, hybrid, read_page
from openpi_like.data.schema import DatasetError, MissingPackageError
from tests.conftest import REPOSITORY
from tests.data.toy_lerobot import (
    ARM,
    CODECS,
    FPS,
    FRONT,
    LENGTHS,
    TASKS,
    WRIST,
    decoded,
    encode,
    pictures,
    rows,
    write_v21,
    write_v30,
)

VIDEO = {FRONT: "video", WRIST: "video"}
MIXED = {FRONT: "video", WRIST: "image"}
WRITERS: dict[str, Callable[..., Path]] = {"v2.1": write_v21, "v3.0": write_v30}


@pytest.fixture(scope="session")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One dataset of each version: a camera as video, one as pictures."""
    return {v: write(tmp_path_factory.mktemp(v) / "toy", MIXED) for v, write in WRITERS.items()}


@pytest.fixture
def copy(plain: dict[str, Path], tmp_path: Path, version: str) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(plain[version], tmp_path / "toy", ignore=shutil.ignore_patterns(".openpi*")))


def video_frames(directory: Path, version: str, key: str) -> np.ndarray:
    """Returns all frames of a camera, episode by episode, as PyAV decodes its videos from their beginning."""
    return np.concatenate([decoded(path) for path in sorted(directory.glob(f"videos/**/{key}/**/*.mp4"))])


def check(index: FrameIndex, directory: Path, version: str, kinds: dict[str, str]) -> None:
    np.testing.assert_array_equal(np.diff(index.episode_start), LENGTHS)
    for key in rows(0, 1):
        expected = np.concatenate([rows(e, n)[key] for e, n in enumerate(LENGTHS)])
        np.testing.assert_array_equal(index.columns[key], expected)
        assert index.columns[key].dtype == expected.dtype
    task = [TASKS[e % 2] for e, n in enumerate(LENGTHS) for _ in range(n)]
    assert [index.texts["task"].table[i] for i in index.texts["task"].ids] == task
    assert index.split.rate == FPS
    order = np.random.default_rng(0).permutation(index.steps)
    for key, kind in kinds.items():
        if kind == "image":
            expected = np.concatenate([pictures(e, n, key == WRIST) for e, n in enumerate(LENGTHS)])
        else:
            expected = video_frames(directory, version, key)
        assert index.schema.steps[key].shape == expected.shape[1:]
        for step in (*order.tolist(), *range(index.steps)):
            np.testing.assert_array_equal(index.read_pixels(step, key), expected[step])
        np.testing.assert_array_equal(index.read_for(3, key, "bgr")[0], expected[3][..., ::-1])


@pytest.mark.parametrize("version", WRITERS)
def test_every_number_and_pixel(plain: dict[str, Path], version: str, tmp_path: Path) -> None:
    index = open_index(plain[version], "train", index_dir=tmp_path / "one")
    check(index, plain[version], version, MIXED)
    two = open_index(f"local://{plain[version]}", "train", index_dir=tmp_path / "two", workers=2)
    check(two, plain[version], version, MIXED)
    for path in index.path.rglob("*.np[yz]"):
        assert path.read_bytes() == (two.path / path.relative_to(index.path)).read_bytes()
    assert (index.image_encoding(0, FRONT), index.image_encoding(0, WRIST)) == ("h264", "png")
    with pytest.raises(DatasetError, match=r"step 0 .*it is a frame of a video, and not stored by itself"):
        index.read_image(0, FRONT)


def test_a_process_that_trains_does_without_pyarrow(plain: dict[str, Path], tmp_path: Path) -> None:
    environment = os.environ | {"OPENPI_LIKE_CACHE": str(tmp_path), "PYTHONPATH": str(REPOSITORY)}
    program = (
        "import sys; from openpi_like.data.index import open_index; "
        f"index = open_index({str(plain['v3.0'])!r}, 'train', index_dir={str(tmp_path / 'index')!r}); "
        f"print(index.read_pixels(20, {FRONT!r}).sum(), *index.texts['task'].table, 'pyarrow' in sys.modules)"
    )
    told = [subprocess.check_output([sys.executable, "-c", program], env=environment, text=True) for _ in range(2)]
    assert told[0] == told[1].replace("False", "True")
    assert "False" in told[1]


@pytest.mark.parametrize("codec", [c for c in CODECS if c != "libx264"])
def test_codecs(tmp_path: Path, codec: str) -> None:
    directory = write_v30(tmp_path / "toy", VIDEO, codec)
    check(open_index(directory, "train"), directory, "v3.0", VIDEO)


@pytest.mark.parametrize("package", ["av", "pyarrow"])
def test_a_missing_package_is_no_damage(package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is written of it: once it is installed, the dataset is read."""
    directory = write_v30(tmp_path / "toy", {FRONT: "video"})
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, package, None)
        patch.setitem(sys.modules, f"{package}.parquet", None)
        with pytest.raises(MissingPackageError, match=r"pip install 'openpi-like\[formats\]'"):
            open_index(directory, "train", max_corrupt_fraction=1.0)
    assert open_index(directory, "train").episodes == len(LENGTHS)


def test_threads_see_the_same_pictures(plain: dict[str, Path]) -> None:
    index = open_index(plain["v3.0"], "train")
    steps = np.random.default_rng(1).integers(0, index.steps, 120).tolist()
    places = [(step, key) for step in steps for key in MIXED]
    expected = [index.read_pixels(*place) for place in places]
    index.close()
    with ThreadPoolExecutor(4) as pool:
        for found, of in zip(pool.map(lambda place: index.read_pixels(*place), places), expected, strict=True):
            np.testing.assert_array_equal(found, of)


def test_a_read_that_fails_half_way_leaves_no_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The decoder has seen some packets of a frame, and no later read may go on from where it was."""
    monkeypatch.setitem(CODECS, "libx264", {"g": "12", "bf": "0"})  # frames come one by one, so reads do go on
    directory = write_v30(tmp_path / "toy", {FRONT: "video"})
    index, expected = open_index(directory, "train"), video_frames(directory, "v3.0", FRONT)
    monkeypatch.setattr(video, "READ_BYTES", 1)  # a read for each packet
    read, left = Ranges.read, [0]

    def failing(self: Ranges, *args: Any) -> bytes:
        left[0] -= 1
        if left[0] == 0:
            raise OSError("the network is down")
        return read(self, *args)

    monkeypatch.setattr(Ranges, "read", failing)
    np.testing.assert_array_equal(index.read_pixels(1, FRONT), expected[1])
    left[0] = 4
    with pytest.raises(DatasetError, match=r"cannot read observation.images.front: the network is down"):
        index.read_pixels(6, FRONT)
    for step in (6, 7, 3):
        np.testing.assert_array_equal(index.read_pixels(step, FRONT), expected[step])


@pytest.mark.parametrize("version", WRITERS)
def test_a_robot_reads_it(plain: dict[str, Path], version: str) -> None:
    dataset = open_dataset(plain[version], ARM, "train[50%:]")
    assert len(dataset) == LENGTHS[2] + LENGTHS[3]
    actions, mask = dataset.actions(np.array([0, 4]))
    np.testing.assert_array_equal(actions[0], rows(2, LENGTHS[2])["action"][:4])
    assert mask.tolist() == [[True] * 4, [True, False, False, False]]
    assert dataset.prompts(np.array([0, 5])) == [TASKS[0], TASKS[1]]
    np.testing.assert_array_equal(dataset.image(0, ARM.cameras[1]), pictures(2, 1, 1)[0])


def test_a_robot_of_another_rate(plain: dict[str, Path]) -> None:
    with pytest.raises(DatasetError, match=r"20 steps a second, the robot 30 .* set control_hz=20, or a stri"):
        open_dataset(plain["v3.0"], dataclasses.replace(ARM, control_hz=30.0), "train")
    assert len(open_dataset(plain["v3.0"], dataclasses.replace(ARM, control_hz=10.0, stride=2), "train"))


@pytest.mark.parametrize(
    "options",
    [
        {"compression": "none"},
        {"compression": "zstd", "data_page_version": "2.0"},
        {"compression": "gzip", "use_dictionary": False},
        {"compression": "brotli", "data_page_size": 4000},
        {"dictionary_pagesize_limit": 5000, "data_page_size": 4000, "data_page_version": "2.0"},
        {"dictionary_pagesize_limit": 5000, "data_page_size": 4000, "compression": "lz4"},
    ],
)
def test_pictures_in_any_parquet(tmp_path: Path, options: dict[str, Any]) -> None:
    directory = write_v30(tmp_path / "toy", {WRIST: "image"}, **options)
    check(open_index(directory, "train"), directory, "v3.0", {WRIST: "image"})


@given(
    values=st.lists(st.integers(0, 12), max_size=300).flatmap(
        lambda x: st.just(x) | st.just([v for v in x for _ in range(20)])
    ),
    dictionary=st.booleans(),
    version=st.sampled_from(["1.0", "2.0"]),
    page=st.sampled_from([16, 200, 1 << 20]),
)
def test_values_of_a_binary_column(
    tmp_path_factory: pytest.TempPathFactory, values: list[int], dictionary: bool, version: str, page: int
) -> None:
    path = tmp_path_factory.mktemp("pages") / "x.parquet"
    expected = [bytes([v]) * v for v in values]
    pq.write_table(
        pa.table({"x": pa.array(expected, pa.binary())}), path,
        use_dictionary=dictionary, data_page_version=version, data_page_size=page, write_batch_size=10,
    )  # fmt: skip
    with pq.ParquetFile(path) as file:
        for group in range(file.num_row_groups):
            found = find_values(Ranges(), path, file.metadata.row_group(group).column(0), 1)
            pages = [read_page(Ranges(), path, p) for p in found.pages]
            assert [pages[p][at : at + n] for p, at, n in found.places.tolist()] == expected


def test_run_lengths_and_packed_bits() -> None:
    # 5 sevens, then eight numbers of three bits: the example of Parquet's documentation
    assert hybrid(bytes([5 << 1, 7, 3, 0b10001000, 0b11000110, 0b11111010]), 3, 13).tolist() == [7] * 5 + list(range(8))


# ---- What is wrong is named ------------------------------------------------------------------------------------------


def edit(path: Path, change: Callable[[pa.Table], pa.Table]) -> None:
    pq.write_table(change(pq.read_table(path)), path)


def change_info(directory: Path, **values: Any) -> None:
    path = directory / "meta" / "info.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def tables(directory: Path) -> list[Path]:
    return sorted((directory / "data").rglob("*.parquet"))


def videos(directory: Path) -> list[Path]:
    return sorted((directory / "videos").rglob("*.mp4"))


def set_column(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[pa.Table], pa.Table]:
    def edited(table: pa.Table) -> pa.Table:
        at = table.column_names.index(name)
        return table.set_column(at, name, pa.array(change(table[name].to_numpy().copy())))

    return edited


def _shifted(values: np.ndarray) -> np.ndarray:
    values[3:] += np.float32(2 / FPS)
    return values


def _cut(path: Path, keep: float) -> None:
    path.write_bytes(path.read_bytes()[: int(keep * path.stat().st_size)])


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "a column is missing": (
        lambda d: edit(tables(d)[0], lambda t: t.drop_columns(["action"])),
        r"episode 0: the file has no column 'action'",
    ),
    "steps were dropped": (
        lambda d: edit(tables(d)[0], set_column("timestamp", _shifted)),
        r"timestamp: 1 of \d+ do not follow at 20 Hz, the first from step 2 \(0.1000 s\) to the next \(0.2500 s\); "
        "about 2 steps were dropped",
    ),
    "wrong rate": (
        lambda d: edit(tables(d)[0], set_column("timestamp", lambda t: t * np.float32(2))),
        "timestamp: those of 10 Hz, meta/info.json says fps 20",
    ),
    "a time is no number": (
        lambda d: edit(tables(d)[0], set_column("timestamp", lambda t: np.where(t == 0, np.nan, t))),
        r"timestamp: \d of \d+ are not finite",
    ),
    "numbers of steps": (
        lambda d: edit(tables(d)[0], set_column("frame_index", lambda x: x + (x > 2))),
        "frame_index: step 3 has number 4; some are missing or there twice",
    ),
    "an unknown task": (
        lambda d: edit(tables(d)[0], set_column("task_index", lambda x: x + 7)),
        r"task: task_index \[7\] is not among the 2 of meta/",
    ),
    "a table that is cut": (lambda d: _cut(tables(d)[0], 0.7), "cannot be read as Parquet: .*; copy it again"),
    "a table with fewer rows": (
        lambda d: edit(tables(d)[0], lambda t: t.slice(1)),
        r"episode 0: its table has 6 rows, meta/ says 7",
    ),
    "a video that is cut": (
        lambda d: _cut(videos(d)[0], 0.7),
        r"observation.images.front: videos/\S+mp4: it (is no video, cut or damaged|is cut): .*copy it again",
    ),
    "a video that is short": (
        lambda d: encode(videos(d)[0], pictures(0, 4), "libx264"),
        r"has no frame for \d+ of \d+ steps, first for step \d at 0.200 s; its 4 frames are at 0.000 to 0.150 s",
    ),
    "a video that is none": (
        lambda d: videos(d)[0].write_bytes(b"no video"),
        "it is no video, cut or damaged: .*; copy it again",
    ),
    "a picture that is missing": (
        lambda d: edit(
            tables(d)[0],
            lambda t: t.set_column(
                t.column_names.index(WRIST), WRIST, pa.array([None, *t[WRIST].to_pylist()[1:]], t[WRIST].type)
            ),
        ),
        r"1 of \d+ pictures are missing \(null\) in one page",
    ),
}


@pytest.mark.parametrize("version", WRITERS)
@pytest.mark.parametrize("what", DAMAGE)
def test_damage_is_named_and_tolerated(copy: Path, version: str, what: str, caplog: pytest.LogCaptureFixture) -> None:
    """One episode, or those of one file: an error, unless it is tolerated; then the others are read as they are."""
    damage, message = DAMAGE[what]
    damage(copy)
    with pytest.raises(DatasetError, match=message) as error:
        open_index(copy, "train")
    assert "of 4 records are damaged, tolerated are 0" in str(error.value)
    with caplog.at_level(logging.WARNING):
        index = open_index(copy, "train", max_corrupt_fraction=0.75)
    assert f"{4 - index.episodes} of 4 records are damaged and skipped" in caplog.text
    expected = rows(3, LENGTHS[3])["action"]
    np.testing.assert_array_equal(index.columns["action"][-LENGTHS[3] :], expected)
    np.testing.assert_array_equal(index.read_pixels(index.steps - 1, WRIST), pictures(3, LENGTHS[3], 1)[-1])


@pytest.mark.parametrize("version", WRITERS)
def test_a_missing_video(copy: Path, version: str) -> None:
    path = videos(copy)[0]
    path.unlink()
    with pytest.raises(DatasetError, match=rf"1 files of split 'train' are missing: {path.relative_to(copy)}; copy"):
        open_index(copy, "train")
    index = open_index(copy, "train", max_corrupt_fraction=0.75)
    assert any("is missing" in line for line in index.skipped)
    assert index.episodes == (3 if version == "v2.1" else 1)


@pytest.mark.parametrize("version", WRITERS)
def test_a_changed_video_makes_the_index_stale(copy: Path, version: str, caplog: pytest.LogCaptureFixture) -> None:
    open_index(copy, "train")
    path = videos(copy)[0]
    encode(path, decoded(path)[..., ::-1].copy(), "libx264")
    with caplog.at_level(logging.WARNING):
        index = open_index(copy, "train")
    assert "is stale (changed: files beside the shards)" in caplog.text
    np.testing.assert_array_equal(index.read_pixels(0, FRONT), decoded(path)[0])


@pytest.mark.parametrize("version", WRITERS)
def test_a_file_cut_after_it_was_indexed(copy: Path, version: str) -> None:
    index = open_index(copy, "train")
    _cut(videos(copy)[0], 0.2)
    with pytest.raises(DatasetError, match=r"episode 0, step 5 .*the file was changed since it was indexed: copy it"):
        index.read_pixels(5, FRONT)
    _cut(tables(copy)[0], 0.2)
    with pytest.raises(DatasetError, match=r"episode 0, step 6 .*it is cut: a page needs bytes up to"):
        index.read_pixels(6, WRIST)


@pytest.mark.parametrize("version", WRITERS)
def test_a_frame_that_does_not_decode(copy: Path, version: str) -> None:
    """Its bytes are wrong, its place is right: that is a damaged image, as in RLDS."""
    index = open_index(copy, "train")
    offset, length = (int(x) for x in np.load(index.path / "video" / "packets.npy")[0, :2])
    data = bytearray(videos(copy)[0].read_bytes())
    data[offset + 4 : offset + length] = bytes(length - 4)
    videos(copy)[0].write_bytes(bytes(data))
    with pytest.raises(ValueError, match=r"cannot be decoded|gives no picture") as error:
        index.read_pixels(0, FRONT)
    assert not isinstance(error.value, DatasetError)
    with pytest.raises(DatasetError, match=r"cannot decode observation.images.front: .*\(camera 'base'\)"):
        EpisodeDataset(index, ARM)


@pytest.mark.parametrize(
    ("version", "change", "message"),
    [
        ("v2.1", {"codebase_version": "v1.6"}, r"codebase_version is 'v1.6', expected v2.0, v2.1 or v3.x; write older"),
        ("v3.0", {"codebase_version": "v4.0"}, r"codebase_version is 'v4.0', expected"),
        ("v3.0", {"fps": 0}, r"fps is 0, expected a number above 0"),
        ("v3.0", {"fps": "20"}, r"fps is '20', expected a number above 0"),
        ("v2.1", {"fps": 25}, r"timestamp: those of 20 Hz, meta/info.json says fps 25"),
        ("v2.1", {"splits": {"train": "all"}}, r"split 'train' is 'all', expected episodes like '0:50'"),
        ("v3.0", {"splits": {"train": "9:12"}}, r"split 'train' is episodes \(9, 12\), and none of them is there"),
        ("v3.0", {"video_path": None}, r"features \['observation.images.front'\] are videos, but there is no"),
    ],
)
def test_what_info_says_wrong(copy: Path, version: str, change: dict[str, Any], message: str) -> None:
    change_info(copy, **change)
    with pytest.raises(DatasetError, match=message):
        open_index(copy, "train")


@pytest.mark.parametrize(
    ("version", "name", "message"),
    [
        ("v2.1", "meta/tasks.jsonl", r"cannot read .*tasks.jsonl: .*; copy the dataset again"),
        ("v2.1", "meta/episodes.jsonl", r"cannot read .*episodes.jsonl: .*; copy the dataset again"),
        ("v3.0", "meta/tasks.parquet", r"tasks.parquet cannot be read as Parquet: .*; copy it again"),
        ("v3.0", "meta/episodes/chunk-000/file-000.parquet", r"meta/episodes holds no table of episodes; copy"),
    ],
)
def test_a_missing_table_of_meta(copy: Path, version: str, name: str, message: str) -> None:
    (copy / name).unlink()
    with pytest.raises(DatasetError, match=message):
        open_index(copy, "train")


@pytest.mark.parametrize("version", ["v2.1"])
def test_lines_that_are_not_json(copy: Path, version: str) -> None:
    path = copy / "meta" / "episodes.jsonl"
    path.write_text(path.read_text().replace('"length"', '"lengh"'))
    with pytest.raises(DatasetError, match=r"episodes.jsonl, line 1: length missing; copy the dataset again"):
        open_index(copy, "train")
    path.write_text("{")
    with pytest.raises(DatasetError, match=r"episodes.jsonl is not one JSON object a line"):
        open_index(copy, "train")


@pytest.mark.parametrize("version", WRITERS)
def test_a_state_that_is_no_number(copy: Path, version: str) -> None:
    def change(table: pa.Table) -> pa.Table:
        values = table["observation.state"].to_pylist()
        values[2][1] = float("nan")
        at = table.column_names.index("observation.state")
        return table.set_column(at, "observation.state", pa.array(values, pa.list_(pa.float32())))

    edit(tables(copy)[0], change)
    with pytest.raises(DatasetError, match=r"episode 0, step 2 .*state field 'joints' .* expected finite numbers"):
        open_dataset(copy, ARM, "train")


@pytest.mark.parametrize("version", WRITERS)
def test_shapes_that_differ(copy: Path, version: str) -> None:
    def change(table: pa.Table) -> pa.Table:
        values = [v[:2] for v in table["observation.state"].to_pylist()]
        at = table.column_names.index("observation.state")
        return table.set_column(at, "observation.state", pa.array(values, pa.list_(pa.float32())))

    edit(tables(copy)[0], change)
    with pytest.raises(
        DatasetError, match=r"observation.state: 14 values in 7 steps, meta/info.json says shape \(3,\)"
    ):
        open_index(copy, "train")


def test_splits_are_named(plain: dict[str, Path]) -> None:
    directory = plain["v3.0"]
    assert split_names(directory) == ["train"]
    assert find_datasets(locate(directory.parent)) == [directory]
    with pytest.raises(DatasetError, match=r"no split 'val'.*a part of one is a split too, as 'train\[90%:\]'"):
        open_index(directory, "val")


@given(
    length=st.integers(2, 40), rate=st.sampled_from([5.0, 20.0, 50.0]), lost=st.integers(1, 3), seed=st.integers(0, 99)
)
def test_dropped_steps_are_counted(length: int, rate: float, lost: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    seconds = np.arange(length) / rate + rng.uniform(-0.1, 0.1, length) / rate
    number = np.arange(length)
    assert time_problems(seconds, number, rate) == []
    at = int(rng.integers(1, length))
    seconds[at:] += lost / rate
    (problem,) = time_problems(seconds, number, rate)
    assert f"about {lost} steps were dropped" in problem or length <= 3  # of so few, it may as well be the rate
