"""LeRobot datasets that are written: every number, frame and statistic, and that there is all of one or none."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from openpi_like.data.index import open_index
from openpi_like.data.layouts.video import read_packets
from openpi_like.data.lerobot_stats import QUANTILES, SAMPLED, NumberFile, PixelCounts, number_stats, sampled_steps
from openpi_like.data.lerobot_writer import OWN, Column, LeRobotFormat, LeRobotWriter
from tests.data.toy_lerobot import FRONT, WRIST, pictures, png

LENGTHS = (7, 30, 5, 9, 12)
TASKS = ("put the cube into the bowl", "öffne die Schublade", "")
COLUMNS = {
    FRONT: Column("video"),
    WRIST: Column("image"),
    "state": Column("float32", (3,)),
    "grid": Column("uint8", (2, 3)),
    "force": Column("float64"),
    "count": Column("int64", (1,)),
    "done": Column("bool"),
    "note": Column("string"),
}
KB = 1 / 1024  # in MB


def numbers(episode: int, length: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng([9, episode])
    return {
        "state": rng.normal(size=(length, 3)).astype(np.float32),
        "grid": rng.integers(0, 256, (length, 2, 3), np.uint8),
        "force": rng.normal(size=length) * 1e9,
        "count": rng.integers(-(2**62), 2**62, (length, 1)),
        "done": np.arange(length) == length - 1,
    }


def values(episode: int, length: int) -> dict[str, Any]:
    of: dict[str, Any] = dict(numbers(episode, length))
    of[FRONT] = iter(pictures(episode, length))
    of[WRIST] = [png(image) for image in pictures(episode, length, 1)]
    return of | {"note": [f"{episode}/é/{t}" for t in range(length)]}


def tasks(episode: int, length: int) -> list[str]:
    """Two in each episode."""
    return [TASKS[(episode + (t > 3)) % 3] for t in range(length)]


def add(out: Path, form: LeRobotFormat, *episodes: dict[str, Any]) -> None:
    """Writes episodes of seven steps."""
    with LeRobotWriter(out, COLUMNS, form) as writer:
        for episode, of in enumerate(episodes):
            writer.add_episode(of, tasks(episode, 7))


def write(out: Path, form: LeRobotFormat, lengths: tuple[int, ...] = LENGTHS, **more: Any) -> Path:
    with LeRobotWriter(out, COLUMNS, form) as writer:
        for episode, length in enumerate(lengths):
            of = values(episode, length) | more
            writer.add_episode(of, tasks(episode, length), "train" if episode < 4 else "val")
    return out


@pytest.fixture(scope="module", params=[("libx264", 12), ("libsvtav1", 4)], ids=lambda param: param[0])
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files so small that there are several of each kind."""
    out = tmp_path_factory.mktemp("lerobot") / "toy"
    encoder, size = request.param
    return write(out, LeRobotFormat(12.5, encoder, "toy", data_mb=170 * KB, video_mb=size * KB))


def test_every_number_picture_and_text(written: Path) -> None:
    for split, part in (("train", range(4)), ("val", range(4, 5))):
        index = open_index(written, split)
        assert index.split.rate == 12.5
        assert np.diff(index.episode_start).tolist() == [LENGTHS[e] for e in part]
        for key in numbers(0, 1):
            expected = np.concatenate([numbers(e, LENGTHS[e])[key] for e in part])
            np.testing.assert_array_equal(index.columns[key], expected[:, 0] if key == "count" else expected)
        for key, expected_texts in (("note", [n for e in part for n in values(e, LENGTHS[e])["note"]]),
                                    ("task", [t for e in part for t in tasks(e, LENGTHS[e])])):  # fmt: skip
            assert [index.texts[key].table[i] for i in index.texts[key].ids] == expected_texts
        first = sum(LENGTHS[: part[0]])
        np.testing.assert_array_equal(index.columns["index"], first + np.arange(index.steps))
        np.testing.assert_array_equal(index.columns["episode_index"], np.repeat(part, [LENGTHS[e] for e in part]))
        step = 0
        for e in part:
            for t, front in enumerate(pictures(e, LENGTHS[e])):
                assert index.read_image(step, WRIST) == values(e, LENGTHS[e])[WRIST][t]
                error = index.read_pixels(step, FRONT).astype(float) - front
                assert 10 * np.log10(255**2 / np.mean(error**2)) > 36  # dB; other frames of it are below 15
                assert index.columns["timestamp"][step] == np.float32(t / 12.5)
                step += 1


def test_files_are_as_large_as_is_asked_for(written: Path) -> None:
    tables = sorted(written.glob("data/chunk-000/*.parquet"))
    assert [path.name for path in tables] == [f"file-{i:03d}.parquet" for i in range(len(tables))]
    groups = [pq.ParquetFile(path).metadata for path in tables]
    assert [m.row_group(i).num_rows for m in groups for i in range(m.num_row_groups)] == list(LENGTHS)
    videos = sorted(written.glob(f"videos/{FRONT}/chunk-000/*.mp4"))
    assert 1 < len(tables) < len(LENGTHS)
    assert 1 < len(videos) < len(LENGTHS)
    meta = pq.read_table(written / "meta" / "episodes" / "chunk-000" / "file-000.parquet").to_pylist()
    starts = {path.name: [0.0] for path in videos}
    for row, length in zip(meta, LENGTHS, strict=True):
        name = f"file-{row[f'videos/{FRONT}/file_index']:03d}.mp4"
        assert row[f"videos/{FRONT}/from_timestamp"] == pytest.approx(starts[name][-1], abs=1e-9)
        starts[name].append(row[f"videos/{FRONT}/to_timestamp"])
        assert row[f"videos/{FRONT}/to_timestamp"] == pytest.approx(starts[name][-2] + length / 12.5, abs=1e-9)
    for path in videos:
        packets = read_packets(path)
        at, far = packets.at(np.array(starts[path.name][:-1]))
        assert far.max() < 1e-6
        assert packets.rows[at, 3].tolist() == at.tolist()  # each begins with a key frame


def test_statistics(written: Path) -> None:
    stats = json.loads((written / "meta" / "stats.json").read_text())
    assert stats.keys() == COLUMNS.keys() - {"note"} | OWN.keys()
    for key in numbers(0, 1):
        every = np.concatenate([numbers(e, n)[key] for e, n in enumerate(LENGTHS)]).astype(np.float64)
        check_stats(stats[key], every, sum(LENGTHS))
    chosen = {e: sorted(sampled_steps(n)) for e, n in enumerate(LENGTHS)}
    assert {len(steps) for steps in chosen.values()} == {min(n, SAMPLED) for n in LENGTHS}
    for key, seed in ((FRONT, 0), (WRIST, 1)):
        seen = [pictures(e, n, seed)[chosen[e]].reshape(-1, 3) / 255 for e, n in enumerate(LENGTHS)]
        check_stats(stats[key], np.concatenate(seen), sum(map(len, chosen.values())))
        assert np.shape(stats[key]["q99"]) == (3, 1, 1)
    episodes = pq.read_table(written / "meta" / "episodes" / "chunk-000" / "file-000.parquet").to_pylist()
    for e, (row, length) in enumerate(zip(episodes, LENGTHS, strict=True)):
        own = {name: row[f"stats/grid/{name}"] for name in ("min", "max", "mean", "std", "count", *QUANTILES)}
        check_stats(own, numbers(e, length)["grid"].astype(np.float64), length)


def check_stats(stats: Mapping[str, Any], every: np.ndarray, count: int) -> None:
    expected = {"min": every.min(0), "max": every.max(0), "mean": every.mean(0), "std": every.std(0)}
    expected |= {name: np.quantile(every, q, axis=0) for name, q in QUANTILES.items()}
    for name, x in expected.items():
        np.testing.assert_allclose(np.reshape(stats[name], np.shape(x)), x, rtol=1e-9, atol=1e-12, err_msg=name)
    assert stats["count"] == [count]


@given(st.lists(st.integers(1, 40), min_size=1, max_size=4), st.integers(0, 99))
def test_levels_are_counted_as_numpy_has_them(sizes: list[int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    images = [rng.integers(0, 256, (size, 3, 3), np.uint8) for size in sizes]
    counts = PixelCounts()
    for image in images:
        counts.add(image)
    every = np.concatenate([image.reshape(-1, 3) for image in images]) / 255
    check_stats(
        {k: x.reshape(-1) if k != "count" else [len(images)] for k, x in counts.stats().items()}, every, len(images)
    )


def test_numbers_that_are_not_finite_are_not_counted(tmp_path: Path) -> None:
    file = NumberFile(tmp_path / "x")
    file.add(np.array([[1.0, np.nan], [3.0, np.nan]], np.float32))
    file.add(np.array([[np.inf, np.nan]], np.float32))
    found = file.stats()
    assert (found["mean"][0], found["max"][0], found["count"][0]) == (2.0, 3.0, 3)
    assert np.isnan(found["mean"][1])
    assert not (tmp_path / "x").exists()
    np.testing.assert_array_equal(number_stats(np.array([True, False]))["mean"], [0.5])


# ---- There is all of it, or none -------------------------------------------------------------------------------------


def test_a_run_that_was_stopped_leaves_no_dataset(tmp_path: Path) -> None:
    out, form = tmp_path / "toy", LeRobotFormat(10.0)

    def stops() -> Iterator[np.ndarray]:
        yield from pictures(1, 3)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        add(out, form, values(0, 7), values(1, 7) | {FRONT: stops()})
    assert [path.name for path in tmp_path.iterdir()] == ["toy.incomplete"]
    write(out, form)
    assert [path.name for path in tmp_path.iterdir()] == ["toy"]
    assert sorted(path.name for path in out.iterdir()) == ["data", "meta", "videos"]
    with pytest.raises(FileExistsError, match=r"toy exists; delete it"):
        write(out, form)


def test_an_empty_dataset_is_none(tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match="no episodes were given"),
        LeRobotWriter(tmp_path / "x", {}, LeRobotFormat(1.0)),
    ):
        pass
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"state": np.zeros((7, 2), np.float32)}, r"'state' is \('float32', \(7, 2\)\), expected .*\(7, 3\)"),
        ({"done": np.zeros(6, bool)}, r"'done' is \('bool', \(6,\)\)"),
        ({"force": np.zeros(7, np.float32)}, r"'force' is \('float32', \(7,\)\), expected \('float64', \(7,\)\)"),
        ({"note": ["x"]}, "'note' has 1 values, expected 7"),
        ({"more": np.zeros(7)}, r"columns .*'more'"),
        ({FRONT: iter(pictures(0, 6))}, "6 frames, expected 7"),
        ({FRONT: (x[:, :40] for x in pictures(0, 7))}, r"picture of \(64, 40\) .*those before have \(64, 80\)"),
        ({WRIST: [b"GIF", *[png(pictures(0, 1)[0])] * 6]}, r"episode 1, step 0, '\S+wrist': .*cannot identify"),
        ({WRIST: [png(x[:32]) for x in pictures(0, 7)]}, r"step 0.* picture of \(32, 80\) .*those before have"),
    ],
)
def test_what_does_not_fit(tmp_path: Path, change: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        add(tmp_path / "x", LeRobotFormat(10.0), values(0, 7), values(0, 7) | change)


def test_odd_sizes_are_no_video(tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match=r"frames of \(63, 80\) .*expected even numbers"),
        LeRobotWriter(tmp_path / "x", {"a": Column("video")}, LeRobotFormat(10.0)) as writer,
    ):
        writer.add_episode({"a": (x[:63] for x in pictures(0, 3))}, [""] * 3)


def test_splits_that_are_mixed(tmp_path: Path) -> None:
    with LeRobotWriter(tmp_path / "x", {}, LeRobotFormat(10.0)) as writer:
        for split in "ab":
            writer.add_episode({}, ["x"], split)
        with pytest.raises(ValueError, match="split 'a' was ended by another"):
            writer.add_episode({}, ["x"], "a")


def test_names_and_formats_that_cannot_be(tmp_path: Path) -> None:
    columns = {"index": Column("int64"), "a/b": Column("int64"), "c": Column("complex64")}
    with pytest.raises(ValueError, match=r"'index' is LeRobot's own; 'a/b' is no name .*; 'c' is of type 'complex64'"):
        LeRobotWriter(tmp_path / "x", columns, LeRobotFormat(10.0))
    with pytest.raises(
        ValueError, match=r"fps=0.0, .*; encoder 'libx256' is unknown; did you mean 'libx264'\?; data_mb=0"
    ):
        LeRobotFormat(0.0, "libx256", data_mb=0.0)
