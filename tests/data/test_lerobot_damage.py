"""LeRobot datasets that are damaged: named by episode, and fatal or tolerated."""

import logging
import struct
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq
import pytest

from openpi_like.data.dataset import EpisodeDataset, open_dataset
from openpi_like.data.index import open_index
from openpi_like.data.layouts.video import read_packets
from openpi_like.data.schema import DatasetError
from tests.data.toy_lerobot import (
    ARM,
    EPISODES,
    FPS,
    FRONT,
    HEIGHT,
    LENGTHS,
    MIXED,
    VIDEO_SPAN,
    WIDTH,
    WRIST,
    WRITERS,
    change_info,
    decoded,
    edit,
    encode,
    features,
    pictures,
    put_column,
    rows,
    set_column,
    tables,
    videos,
)
from tests.data.toy_lerobot import table as pa_table


def _shifted(values: np.ndarray) -> np.ndarray:
    values[3:] += np.float32(2 / FPS)
    return values


def _cut(path: Path, keep: float) -> None:
    path.write_bytes(path.read_bytes()[: int(keep * path.stat().st_size)])


def _trim(path: Path, start: float, length: float) -> None:
    """Makes the edit list of a video show a part of it, in seconds; all of it stays in the file."""
    data = bytearray(path.read_bytes())
    with av.open(str(path)) as container:
        ticks = 1 / (container.streams.video[0].time_base or 1)
    at = data.index(b"elst") + 12  # behind name, version and number of entries: length in ms, and beginning
    (first,) = struct.unpack(">i", data[at + 4 : at + 8])
    data[at : at + 8] = struct.pack(">Ii", round(length * 1000), first + round(start * ticks))
    path.write_bytes(bytes(data))


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
    "numbers of steps that are missing": (
        lambda d: edit(tables(d)[0], put_column("frame_index", lambda x: [None, *x[1:]])),
        r"episode 0: frame_index: 1 of 7 values are missing \(null\), the first of step 0",
    ),
    "times as lists of two": (
        lambda d: edit(tables(d)[0], put_column("timestamp", lambda x: [[t, t] for t in x])),
        r"episode 0: timestamp: 14 values in 7 steps, meta/info.json says shape \(\)",
    ),
    "numbers of episodes that are missing": (
        lambda d: edit(tables(d)[0], put_column("episode_index", lambda x: [*x[:3], None, *x[4:]])),
        r"episode_index: 1 of \d+ values are missing \(null\), the first of step 3",
    ),
    "values that are missing in a row": (
        lambda d: edit(tables(d)[0], put_column("action", lambda x: [*x[:2], [1.0, None, 2.0], *x[3:]])),
        r"episode 0: action: 1 of 21 values are missing \(null\), the first of step 2",
    ),
    "rows of other lengths": (  # as many values as expected, each in the row of another
        lambda d: edit(tables(d)[0], put_column("action", lambda x: [x[0][:2], [*x[1], 7.0], *x[2:]])),
        r"episode 0: action: rows differ in length: 2 values in step 0, 4 in step 1, meta/info.json says shape \(3,\)",
    ),
    "rows of rows of other lengths": (
        lambda d: edit(tables(d)[0], put_column("grid", lambda x: [*x[:3], [[1.0, 2.0, 3.0], [4.0]], *x[4:]])),
        r"episode 0: grid: rows differ in length: 2 values in step 0, 3 in step 3, meta/info.json says shape \(2, 2\)",
    ),
    "words for numbers": (
        lambda d: edit(tables(d)[0], put_column("reward", lambda x: [str(r) for r in x])),
        r"episode 0: reward: values are of type string, expected float64",
    ),
    "names of columns that are no text": (
        lambda d: tables(d)[0].write_bytes(tables(d)[0].read_bytes().replace(b"reward", b"\xff\xfeward")),
        r"cannot be read as Parquet: 'utf-8' codec .*; copy it again",
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
    "a video of an unknown codec": (
        lambda d: videos(d)[0].write_bytes(videos(d)[0].read_bytes().replace(b"avc1", b"zzz9")),
        r"mp4: its codec is not one that PyAV decodes here; write it again as H.264, HEVC or AV1",
    ),
    "a video whose edit list hides its end": (
        lambda d: _trim(videos(d)[0], 0.0, 4 / FPS),
        r"has no frame for \d+ of \d+ steps, first for step \d at 0.200 s; its 4 frames are at 0.000 to 0.150 s",
    ),
    "a video with pictures of another size": (
        lambda d: encode(videos(d)[0], decoded(videos(d)[0])[:, ::2, ::2], "libx264"),
        r"episode 0: observation.images.front: videos/\S+mp4 has pictures of 32 x 40 pixels, meta/info.json says "
        r"64 x 80; copy the video again, or put shape right there if all of this camera's are so",
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
def test_damage_is_named_and_tolerated(
    lerobot: Path, version: str, what: str, caplog: pytest.LogCaptureFixture
) -> None:
    """One episode, or those of one file: an error, unless it is tolerated; then the others are read as they are."""
    damage, message = DAMAGE[what]
    damage(lerobot)
    with pytest.raises(DatasetError, match=message) as error:
        open_index(lerobot, "train")
    assert "of 4 records are damaged, tolerated are 0" in str(error.value)
    with caplog.at_level(logging.WARNING):
        index = open_index(lerobot, "train", max_corrupt_fraction=0.75)
    assert f"{4 - index.episodes} of 4 records are damaged and skipped" in caplog.text
    expected = rows(3, LENGTHS[3])["action"]
    np.testing.assert_array_equal(index.columns["action"][-LENGTHS[3] :], expected)
    np.testing.assert_array_equal(index.read_pixels(index.steps - 1, WRIST), pictures(3, LENGTHS[3], 1)[-1])


@pytest.mark.parametrize("version", WRITERS)
@pytest.mark.parametrize(
    ("shape", "names"),
    [
        ([HEIGHT, WIDTH, 3], None),
        ([3, HEIGHT, WIDTH], None),
        ([WIDTH, HEIGHT, 3], ["width", "height", "channels"]),
        (None, None),
    ],
)
def test_however_the_size_of_pictures_is_told_it_is_theirs(
    lerobot: Path, version: str, shape: list[int] | None, names: list[str] | None
) -> None:
    of = {"dtype": "video", "shape": shape, "names": names}
    change_info(lerobot, features=features(MIXED) | {FRONT: of})
    index = open_index(lerobot, "train")
    assert index.episodes == 4
    assert index.schema.steps[FRONT].shape == ((HEIGHT, WIDTH, 3) if shape else ())
    assert index.read_pixels(0, FRONT).shape == (HEIGHT, WIDTH, 3)


def test_a_video_that_was_trimmed(tmp_path: Path) -> None:
    """An edit list at the beginning: what is shown begins behind it, and nothing is cut."""
    encode(tmp_path / "x.mp4", pictures(0, 12), "libx264")
    whole = read_packets(tmp_path / "x.mp4")
    _trim(tmp_path / "x.mp4", 8 / FPS, 4 / FPS)
    packets = read_packets(tmp_path / "x.mp4")
    assert len(packets.rows) == 6  # from the key frame before
    shown = np.arange(4) / FPS
    np.testing.assert_allclose(np.sort(packets.seconds[np.isfinite(packets.seconds)]), shown)
    at, far = packets.at(np.array([*shown, np.nan]))
    expected, _ = whole.at(shown + 8 / FPS)
    np.testing.assert_array_equal(packets.rows[at[:4], :2], whole.rows[expected, :2])
    np.testing.assert_allclose(far, [0, 0, 0, 0, np.nan], atol=1e-9)


@pytest.mark.parametrize("version", WRITERS)
def test_a_missing_video(lerobot: Path, version: str) -> None:
    path = videos(lerobot)[0]
    path.unlink()
    with pytest.raises(DatasetError, match=rf"1 files of split 'train' are missing: {path.relative_to(lerobot)}; "):
        open_index(lerobot, "train")
    index = open_index(lerobot, "train", max_corrupt_fraction=0.75)
    assert any("is missing" in line for line in index.skipped)
    assert index.episodes == (3 if version == "v2.1" else 1)


@pytest.mark.parametrize("version", WRITERS)
def test_a_changed_video_makes_the_index_stale(lerobot: Path, version: str, caplog: pytest.LogCaptureFixture) -> None:
    open_index(lerobot, "train")
    path = videos(lerobot)[0]
    encode(path, decoded(path)[..., ::-1].copy(), "libx264")
    with caplog.at_level(logging.WARNING):
        index = open_index(lerobot, "train")
    assert "is stale (changed: files beside the shards)" in caplog.text
    np.testing.assert_array_equal(index.read_pixels(0, FRONT), decoded(path)[0])


@pytest.mark.parametrize("version", WRITERS)
def test_a_file_cut_after_it_was_indexed(lerobot: Path, version: str) -> None:
    index = open_index(lerobot, "train")
    _cut(videos(lerobot)[0], 0.2)
    with pytest.raises(DatasetError, match=r"episode 0, step 5 .*the file was changed since it was indexed: copy it"):
        index.read_pixels(5, FRONT)
    _cut(tables(lerobot)[0], 0.2)
    with pytest.raises(DatasetError, match=r"episode 0, step 6 .*it is cut: a page needs bytes up to"):
        index.read_pixels(6, WRIST)


@pytest.mark.parametrize("version", WRITERS)
def test_a_frame_that_does_not_decode(lerobot: Path, version: str) -> None:
    """Its bytes are wrong, its place is right: that is a damaged image, as in RLDS."""
    index = open_index(lerobot, "train")
    offset, length = (int(x) for x in np.load(index.path / "video" / "packets.npy")[0, :2])
    data = bytearray(videos(lerobot)[0].read_bytes())
    data[offset + 4 : offset + length] = bytes(length - 4)
    videos(lerobot)[0].write_bytes(bytes(data))
    with pytest.raises(ValueError, match=r"cannot be decoded|gives no picture") as error:
        index.read_pixels(0, FRONT)
    assert not isinstance(error.value, DatasetError)
    with pytest.raises(DatasetError, match=r"cannot decode observation.images.front: .*\(camera 'base'\)"):
        EpisodeDataset(index, ARM)


@pytest.mark.parametrize("version", WRITERS)
def test_episodes_that_meta_does_not_have(lerobot: Path, version: str, caplog: pytest.LogCaptureFixture) -> None:
    """In a table that is read: an error. A table of its own, as a recording that was stopped leaves it: a warning."""
    stray = tables(lerobot)[0].with_name("stray.parquet")
    stray.write_bytes(tables(lerobot)[0].read_bytes())
    with caplog.at_level(logging.WARNING):
        assert open_index(lerobot, "train").episodes == 4
    assert f"in these tables, which are not read:\n  {stray.relative_to(lerobot)}" in caplog.text
    stray.unlink()
    more = pa.concat_tables([pq.read_table(tables(lerobot)[0]), pa_table([7, 9], [2, 1], [WRIST])])
    pq.write_table(more, tables(lerobot)[0])
    with pytest.raises(DatasetError) as error:
        open_index(lerobot, "train", max_corrupt_fraction=0.9)
    assert "more records than expected" in str(error.value)
    with pytest.raises(DatasetError, match=r"episode 7: the file has it, but meta/ does not list it there; copy"):
        open_index(lerobot, "train")


@pytest.mark.parametrize("version", WRITERS)
def test_times_as_lists_of_one(lerobot: Path, version: str) -> None:
    expected = open_index(lerobot, "train").columns["timestamp"]
    for path in tables(lerobot):
        edit(path, put_column("timestamp", lambda x: [[np.float32(t)] for t in x]))
    np.testing.assert_array_equal(open_index(lerobot, "train").columns["timestamp"], expected)


@pytest.mark.parametrize("version", WRITERS)
def test_texts_that_are_missing(lerobot: Path, version: str) -> None:
    change_info(lerobot, features=features(MIXED) | {"note": {"dtype": "string", "shape": [1]}})
    for path in tables(lerobot):
        edit(path, lambda t: t.append_column("note", pa.array(["a"] * 3 + [None] + ["b"] * (len(t) - 4), pa.string())))
    with pytest.raises(DatasetError, match=r"note: 1 of \d+ are no text, the first is missing \(null\), of step 3"):
        open_index(lerobot, "train")


@pytest.mark.parametrize("version", WRITERS)
def test_an_episode_without_steps(lerobot: Path, version: str) -> None:
    edit(tables(lerobot)[0], lambda t: t.filter(pa.compute.not_equal(t["episode_index"], 0)))
    if version == "v2.1":
        path = lerobot / "meta" / "episodes.jsonl"
        path.write_text(path.read_text().replace('"length": 7', '"length": 0'))
    else:
        meta = lerobot / EPISODES
        edit(meta, put_column("length", lambda x: [0, *x[1:]]))
    with pytest.raises(DatasetError, match=r"episode 0: it has no steps, says meta/; take it out of the dataset"):
        open_index(lerobot, "train")
    assert open_index(lerobot, "train", max_corrupt_fraction=0.25).episodes == 3


@pytest.mark.parametrize("version", ["v3.0"])
def test_a_part_of_a_video_that_is_too_short(lerobot: Path, version: str) -> None:
    """Its last steps would show the first frames of the next episode."""
    shorter = put_column(f"{VIDEO_SPAN}/to_timestamp", lambda x: [x[0] - 1 / FPS, *x[1:]])
    edit(lerobot / EPISODES, shorter)
    with pytest.raises(DatasetError) as error:
        open_index(lerobot, "train")
    assert (
        f"{FRONT}: meta/episodes says that the episode is at 0.000 to 0.300 s of {VIDEO_SPAN}/chunk-000/file-000.mp4, "
        "but 1 of 7 steps are behind that, first step 6 at 0.300 s: these frames are of another episode"
    ) in str(error.value)
    assert open_index(lerobot, "train", max_corrupt_fraction=0.25).episodes == 3


@pytest.mark.parametrize("version", WRITERS)
def test_a_state_that_is_no_number(lerobot: Path, version: str) -> None:
    def change(table: pa.Table) -> pa.Table:
        values = table["observation.state"].to_pylist()
        values[2][1] = float("nan")
        at = table.column_names.index("observation.state")
        return table.set_column(at, "observation.state", pa.array(values, pa.list_(pa.float32())))

    edit(tables(lerobot)[0], change)
    with pytest.raises(DatasetError, match=r"episode 0, step 2 .*state field 'joints' .* expected finite numbers"):
        open_dataset(lerobot, ARM, "train")


@pytest.mark.parametrize("version", WRITERS)
def test_shapes_that_differ(lerobot: Path, version: str) -> None:
    def change(table: pa.Table) -> pa.Table:
        values = [v[:2] for v in table["observation.state"].to_pylist()]
        at = table.column_names.index("observation.state")
        return table.set_column(at, "observation.state", pa.array(values, pa.list_(pa.float32())))

    edit(tables(lerobot)[0], change)
    with pytest.raises(
        DatasetError, match=r"observation.state: 14 values in 7 steps, meta/info.json says shape \(3,\)"
    ):
        open_index(lerobot, "train")


@pytest.mark.parametrize("version", WRITERS)
@pytest.mark.parametrize("all_of_them", [False, True])
def test_texts_that_are_not_utf8(lerobot: Path, version: str, all_of_them: bool) -> None:
    """Some: these episodes are damaged. All: the field is no text, and is left out, as it is of other layouts."""
    change_info(lerobot, features=features(MIXED) | {"note": {"dtype": "string", "shape": [1]}})
    for i, path in enumerate(tables(lerobot)):
        edit(path, lambda t: t.append_column("note", pa.array(["a-word"] * len(t), pa.string())))
        if all_of_them or i == 0:
            path.write_bytes(path.read_bytes().replace(b"a-word", b"\xff\xfeword"))
    if all_of_them:
        index = open_index(lerobot, "train")
        assert index.episodes == 4
        assert "cannot be decoded as text in any record; in the first, its text is not UTF-8" in index.left_out["note"]
    else:
        with pytest.raises(DatasetError, match=r"episode 0: note: its text is not UTF-8: 'utf-8' codec can't decode"):
            open_index(lerobot, "train")
