"""LeRobot datasets, read in place: every number and pixel, and what is said of those that are damaged."""

import dataclasses
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from openpi_like.data.dataset import open_dataset
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
    MIXED,
    TASKS,
    WRIST,
    WRITERS,
    decoded,
    pictures,
    rows,
    write_v30,
)

VIDEO = {FRONT: "video", WRIST: "video"}


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
def test_every_number_and_pixel(lerobots: dict[str, Path], version: str, tmp_path: Path) -> None:
    index = open_index(lerobots[version], "train", index_dir=tmp_path / "one")
    check(index, lerobots[version], version, MIXED)
    two = open_index(f"local://{lerobots[version]}", "train", index_dir=tmp_path / "two", workers=2)
    check(two, lerobots[version], version, MIXED)
    for path in index.path.rglob("*.np[yz]"):
        assert path.read_bytes() == (two.path / path.relative_to(index.path)).read_bytes()
    assert (index.image_encoding(0, FRONT), index.image_encoding(0, WRIST)) == ("h264", "png")
    with pytest.raises(DatasetError, match=r"step 0 .*it is a frame of a video, and not stored by itself"):
        index.read_image(0, FRONT)


def test_a_process_that_trains_does_without_pyarrow(lerobots: dict[str, Path], tmp_path: Path) -> None:
    environment = os.environ | {"OPENPI_LIKE_CACHE": str(tmp_path), "PYTHONPATH": str(REPOSITORY)}
    program = (
        "import sys; from openpi_like.data.index import open_index; "
        f"index = open_index({str(lerobots['v3.0'])!r}, 'train', index_dir={str(tmp_path / 'index')!r}); "
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


def test_threads_see_the_same_pictures(lerobots: dict[str, Path]) -> None:
    index = open_index(lerobots["v3.0"], "train")
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
def test_a_robot_reads_it(lerobots: dict[str, Path], version: str) -> None:
    dataset = open_dataset(lerobots[version], ARM, "train[50%:]")
    assert len(dataset) == LENGTHS[2] + LENGTHS[3]
    actions, mask = dataset.actions(np.array([0, 4]))
    np.testing.assert_array_equal(actions[0], rows(2, LENGTHS[2])["action"][:4])
    assert mask.tolist() == [[True] * 4, [True, False, False, False]]
    assert dataset.prompts(np.array([0, 5])) == [TASKS[0], TASKS[1]]
    np.testing.assert_array_equal(dataset.image(0, ARM.cameras[1]), pictures(2, 1, 1)[0])


def test_a_robot_of_another_rate(lerobots: dict[str, Path]) -> None:
    with pytest.raises(DatasetError, match=r"20 steps a second, the robot 30 .* set control_hz=20, or a stri"):
        open_dataset(lerobots["v3.0"], dataclasses.replace(ARM, control_hz=30.0), "train")
    assert len(open_dataset(lerobots["v3.0"], dataclasses.replace(ARM, control_hz=10.0, stride=2), "train"))


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


def test_splits_are_named(lerobots: dict[str, Path]) -> None:
    directory = lerobots["v3.0"]
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
