"""Datasets in HDF5: every number and picture is what h5py reads, however it is stored; samples and their resuming."""

import dataclasses
import io
import pickle
import re
import runpy
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import h5py
import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from rich.console import Console

from openpi_like.data.config import DataConfig, MixtureEntry
from openpi_like.data.damage import check_images
from openpi_like.data.dataset import EpisodeDataset, open_dataset
from openpi_like.data.images import Target, decode
from openpi_like.data.index import FrameIndex, open_index
from openpi_like.data.layouts import find_datasets, hdf5_records, split_names
from openpi_like.data.layouts.robomimic_hdf5 import natural
from openpi_like.data.loader import Loader, make_loader
from openpi_like.data.schema import DatasetError
from openpi_like.data.stats import compute_normalization
from openpi_like.data.text import TextTokenizer
from tests.conftest import REPOSITORY
from tests.data import hdf5_files, toy_lerobot
from tests.data.hdf5_files import (
    ALOHA,
    ALOHA_LENGTHS,
    DEMO_LENGTHS,
    PANDA,
    write_aloha,
    write_libero,
    write_robomimic,
)
from tests.data.samples import rows
from tests.data.test_index_build import contents
from tests.data.toy import CART, SOME, TOLD, Shapes


def episodes(index: FrameIndex, group: Any) -> Iterator[tuple[slice, h5py.Group]]:
    """Yields the steps of each episode, and what h5py has of it. group: (file, episode of the index) -> its group."""
    for e in range(index.episodes):
        with h5py.File(index.split.shards[index.episode_shard[e]]) as file:
            yield slice(*index.episode_start[e : e + 2].tolist()), group(file, e)


def check_columns(index: FrameIndex, group: Any, keys: set[str]) -> None:
    """All numbers, their types, and which fields there are."""
    assert index.columns.keys() == keys
    for steps, stored in episodes(index, group):
        for key, column in index.columns.items():
            assert column.dtype == stored[key].dtype
            np.testing.assert_array_equal(column[steps], stored[key][...])


def check_pictures(index: FrameIndex, group: Any, *, encoded: bool) -> None:
    """All pictures, forwards and backwards."""
    for steps, stored in episodes(index, group):
        for key in index.images:
            for i in (*range(steps.start, steps.stop), *range(steps.stop - 1, steps.start - 1, -1)):
                row = stored[key][i - steps.start]
                if encoded:
                    data = bytes(row).rstrip(b"\0")
                    assert index.read_image(i, key) == data
                    row = decode(data)
                np.testing.assert_array_equal(index.read_pixels(i, key), row)
                swapped, size = index.read_for(i, key, "bgr", Target(224, 224))
                np.testing.assert_array_equal(swapped, row[..., ::-1])
                assert size == row.shape[:2]


def by_number(file: h5py.File, e: int) -> h5py.Group:
    return file[f"data/demo_{e}"]


@pytest.mark.parametrize(
    ("stored", "encoding", "in_place"),
    [
        ("contiguous", "raw", True), ("frames", "raw", True), ("unwritten", "raw", None),
        ("gzip_frames", "raw", False), ("gzip", "raw", False), ("jpeg", "jpeg", True), ("png", "png", True),
        ("jpeg_whole", "jpeg", True), ("jpeg_gzip", "jpeg", False), ("jpeg_text", "jpeg", True),
        ("jpeg_lists", "jpeg", False),
    ],
)  # fmt: skip
def test_aloha_is_read_as_h5py_reads_it(tmp_path: Path, stored: str, encoding: str, in_place: bool | None) -> None:
    """in_place: whether pictures are ranges of bytes of the file."""
    directory = write_aloha(tmp_path / "cube", stored)
    index = open_index(directory, "train")
    assert str(index.split) == "cube/aloha_hdf5 split 'train'"
    assert [s.name for s in index.split.shards] == [f"episode_{e}.hdf5" for e in range(len(ALOHA_LENGTHS))]
    assert np.diff(index.episode_start).tolist() == list(ALOHA_LENGTHS)
    numbers = {"action", "observations/qpos", "observations/qvel", "observations/effort"}
    check_columns(index, lambda file, e: file, numbers)
    assert index.images.keys() == {f"observations/images/{camera}" for camera in hdf5_files.CAMERAS}
    check_pictures(index, lambda file, e: file, encoded=encoding != "raw")
    assert {index.image_encoding(i, key) for i in range(4) for key in index.images} == {encoding}
    if in_place is not None:
        assert {bool((of[:, 0] >= 0).all()) for of in index.images.values()} == {in_place}
        assert bool(index.split.storage.kept) is not in_place
    assert index.episode_columns["sim"].tolist() == [e % 2 == 0 for e in range(len(ALOHA_LENGTHS))]
    assert index.episode_texts["file_name"].table == tuple(s.name for s in index.split.shards)
    assert index.left_out.keys() == ({"compress_len"} if "jpeg" in stored else set())
    checked = check_images(index, workers=2)
    assert (checked.checked, checked.damaged) == (True, {})
    index.close()
    check_pictures(checked, lambda file, e: file, encoded=encoding != "raw")  # its files are opened again


def test_robomimic_is_read_as_h5py_reads_it(tmp_path: Path) -> None:
    masks = {"train": [0, 10, 2, 5], "valid": [1, 11]}
    path = write_robomimic(tmp_path / "lift" / "image.hdf5", masks=masks)
    assert split_names(path.parent) == ["all", "train", "valid"]
    for split, numbers in (("all", list(range(len(DEMO_LENGTHS)))), ("train", [0, 2, 5, 10]), ("valid", [1, 11])):
        for directory in (path.parent, path):  # a file is a dataset, too
            index = open_index(directory, split)
            lengths = [DEMO_LENGTHS[d] for d in numbers]
            assert (np.diff(index.episode_start).tolist(), index.split.lengths) == (lengths, (len(numbers),))

            def group(file: h5py.File, e: int, numbers: list[int] = numbers) -> h5py.Group:
                return file[f"data/demo_{numbers[e]}"]

            numeric = {"actions", "rewards", "dones", "obs/robot0_eef_pos", "obs/robot0_gripper_qpos"}
            check_columns(index, group, numeric)
            check_pictures(index, group, encoded=False)
            texts = {k: [t.table[i] for i in t.ids] for k, t in index.episode_texts.items()}
            assert texts["demo"] == [f"demo_{d}" for d in numbers]
            assert set(texts["env_name"]) == {"Lift"}
            assert index.episode_columns["num_samples"].tolist() == lengths
            assert index.split.rate == 20.0
            assert index.left_out.keys() == {
                "states", "next_obs/robot0_eef_pos", "next_obs/robot0_gripper_qpos", "model_file",
            }  # fmt: skip
    assert str(open_index(path, "all").split) == "image.hdf5/robomimic_hdf5 split 'all'"
    assert sorted(p.name for p in path.parent.iterdir()) == [".openpi_like_index", "image.hdf5"]
    assert find_datasets(tmp_path) == [path.parent]
    assert find_datasets(path) == [path]


def test_libero_tells_what_to_do(tmp_path: Path) -> None:
    """Three tasks are one dataset, although the states of their simulators have other sizes."""
    directory = write_libero(tmp_path / "libero_goal")
    assert split_names(directory) == ["train"]
    index = open_index(directory, "train")
    check_pictures(index, lambda file, e: by_number(file, e % 3), encoded=False)
    texts = index.episode_texts["language_instruction"]
    tasks = ("open the drawer", "put the bowl on the plate", "turn on the stove")
    assert [texts.table[i] for i in texts.ids] == [task for task in tasks for _ in range(3)]
    assert {"states", "init_state"} <= index.left_out.keys()
    robot = dataclasses.replace(PANDA, language_key="language_instruction")
    dataset = open_dataset(directory, robot, "train[3:]")
    assert dataset.prompts(np.array([0, 9])) == ["put the bowl on the plate", "turn on the stove"]
    with h5py.File(directory / "task_1_demo.hdf5") as file:
        turned = file["data/demo_0/obs/agentview_image"][0][::-1, ::-1]
    np.testing.assert_array_equal(dataset.image(0, robot.cameras[0]), turned)


def test_robocasa_tells_what_to_do(tmp_path: Path) -> None:
    path = write_robomimic(tmp_path / "demo.hdf5", (2, 3))
    with h5py.File(path, "r+") as file:
        for d, lang in enumerate(("close the door", "open it")):
            file[f"data/demo_{d}"].attrs["ep_meta"] = f'{{"lang": "{lang}", "layout_id": 3}}'
    texts = open_index(path, "train").episode_texts["language_instruction"]
    assert [texts.table[i] for i in texts.ids] == ["close the door", "open it"]


def test_texts_and_numbers_beside_the_steps(tmp_path: Path) -> None:
    """Instructions per step, per episode, as a list of one, as an attribute of either type; numbers as they are."""
    for e, n in enumerate((3, 4)):
        with h5py.File(tmp_path / f"episode_{e}.h5", "w") as file:
            file["action"] = np.arange(n * 2, dtype=">f4").reshape(n, 2)
            file["observations/count"] = np.arange(n, dtype=np.uint8)
            file["observations/flag"] = np.arange(n) % 2 == 0
            file["observations/embedding"] = np.zeros((n, 300), np.float32)
            file["observations/camera_pose"] = np.zeros((n, 4, 4))
            file["said"] = [f"é {t}" for t in range(n)]
            file["task"], file["instruction"] = f"task {e}", np.array([f"do {e}".encode()])
            file["seed"] = e
            file.attrs["operator"], file.attrs["site"] = np.bytes_(b"anna"), "Łódź"
            file.attrs["weights"] = np.zeros(5)
            file.attrs["hz"] = np.float32(50)
            file["observations/nothing"] = h5py.Empty("f4")
            file["observations/points"] = np.zeros(n, [("x", "f4"), ("y", "f4")])
    index = open_index(tmp_path, "train")
    assert {k: (c.dtype.str, c.shape) for k, c in index.columns.items()} == {
        "action": ("<f4", (7, 2)),
        "observations/count": ("|u1", (7,)),
        "observations/flag": ("|b1", (7,)),
        "observations/camera_pose": ("<f8", (7, 4, 4)),
    }
    assert index.columns["action"].tolist() == [[2 * t, 2 * t + 1] for n in (3, 4) for t in range(n)]
    texts = {k: [t.table[i] for i in t.ids] for k, t in {**index.texts, **index.episode_texts}.items()}
    assert texts == {
        "said": [f"é {t}" for n in (3, 4) for t in range(n)],
        "task": ["task 0", "task 1"],
        "instruction": ["do 0", "do 1"],
        "operator": ["anna"] * 2,
        "site": ["Łódź"] * 2,
        "file_name": ["episode_0.h5", "episode_1.h5"],
    }
    assert {k: v.tolist() for k, v in index.episode_columns.items()} == {"seed": [0, 1], "hz": [50.0, 50.0]}
    assert index.left_out.keys() == {
        "observations/embedding", "observations/nothing", "observations/points", "weights",
    }  # fmt: skip


def test_lists_of_one_value_are_that_value(tmp_path: Path) -> None:
    """Of the whole episode, as numbers and texts, as datasets and attributes; episodes of one step are no others."""
    lengths = (1, 3, 1, 4)
    for e, n in enumerate(lengths):
        with h5py.File(tmp_path / f"episode_{e}.h5", "w") as file:
            file["action"] = np.full((n, 2), e, np.float32)
            file["observations/count"] = np.arange(n)
            file["success"], file["task"] = np.array([e % 2 == 0]), np.array([f"do {e}".encode()])
            file.attrs["score"], file.attrs["operator"] = np.array([e / 2]), np.array([b"anna"])
            file.attrs["site"] = np.array(["Łódź"], object)
    index = open_index(tmp_path, "train")
    assert np.diff(index.episode_start).tolist() == list(lengths)
    assert {k: v.tolist() for k, v in index.episode_columns.items()} == {
        "success": [True, False, True, False], "score": [0.0, 0.5, 1.0, 1.5],
    }  # fmt: skip
    texts = {k: [t.table[i] for i in t.ids] for k, t in index.episode_texts.items() if k != "file_name"}
    assert texts == {"task": [f"do {e}" for e in range(4)], "operator": ["anna"] * 4, "site": ["Łódź"] * 4}
    assert index.columns["observations/count"].tolist() == [0, 0, 1, 2, 0, 0, 1, 2, 3]
    with h5py.File(tmp_path / "episode_3.h5", "r+") as file:
        del file["success"]
        file["success"] = np.zeros(4, bool)
    with pytest.raises(DatasetError, match=r"episode_3.h5: other fields .*: success has a row for each step, exp"):
        open_index(tmp_path, "train")


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_way_of_storing_gives_the_same_pictures(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Whatever HDF5 offers: chunks of any shape, filters, a block before the file, datasets that lie outside."""
    steps, height, width = (data.draw(st.integers(1, n)) for n in (6, 5, 7))
    shape = (steps, height, width, 3)
    frames = hdf5_files.pictures(np.random.default_rng(data.draw(st.integers(0, 99))), steps, height, width)
    directory = tmp_path_factory.mktemp("any")
    options: dict[str, Any] = {}
    kind = data.draw(st.sampled_from(["plain", "chunks", "frames", "outside", "linked", "virtual"]))
    if kind in ("chunks", "frames"):
        whole = (1, height, width, 3)
        chunks = tuple(data.draw(st.integers(1, side)) for side in shape)
        options = {
            "chunks": whole if kind == "frames" else chunks,
            "compression": data.draw(st.sampled_from([None, "gzip", "lzf"])),
            "shuffle": data.draw(st.booleans()),
            "fletcher32": data.draw(st.booleans()),
            "maxshape": data.draw(st.sampled_from([None, (None, height, width, 3)])),
        }
    elif kind == "outside":
        options = {"external": [(str(directory / "pixels.bin"), 0, h5py.h5f.UNLIMITED)]}
    block = data.draw(st.sampled_from([0, 512, 1024]))
    name = "observations/images/top"
    with h5py.File(directory / "episode_0.hdf5", "w", userblock_size=block) as file:
        file["action"] = np.zeros((steps, 2))
        if kind in ("linked", "virtual"):
            with h5py.File(directory / "pixels.bin", "w") as other:
                other["pixels"] = frames
        if kind == "linked":
            file[name] = h5py.ExternalLink("pixels.bin", "pixels")
        elif kind == "virtual":
            layout = h5py.VirtualLayout(shape, np.uint8)
            layout[:] = h5py.VirtualSource(str(directory / "pixels.bin"), "pixels", shape)
            file.create_virtual_dataset(name, layout)
        else:
            file.create_dataset(name, shape, np.uint8, **options)[...] = frames
    index = open_index(directory, "train")
    for i in range(steps):
        np.testing.assert_array_equal(index.read_pixels(i, name), frames[i])
    index.close()


@given(st.lists(st.binary(max_size=9).map(lambda b: b.rstrip(b"\0")), min_size=1), st.integers(1, 5))
def test_pictures_end_where_the_zeros_begin(encoded: list[bytes], more: int) -> None:
    stored = hdf5_files.padded(encoded, max(map(len, encoded)) + more)
    assert hdf5_records._ends(stored).tolist() == [len(e) for e in encoded]
    assert hdf5_records._ends(np.array(encoded, f"S{stored.shape[1]}")).tolist() == [len(e) for e in encoded]


@given(st.sets(st.integers(0, 10**6)), st.text(max_size=5).filter(lambda t: re.search(r"\d", t) is None))
def test_names_are_sorted_by_their_numbers(numbers: set[int], name: str) -> None:
    names = [f"{name}_{n}.hdf5" for n in numbers]
    assert sorted(names, key=natural) == [f"{name}_{n}.hdf5" for n in sorted(numbers)]


def test_rows_are_read_by_many_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With h5py, from more files than all datasets of a process keep open."""
    monkeypatch.setattr(hdf5_records, "OPEN_FILES", 2)
    other = open_index(write_robomimic(tmp_path / "lift.hdf5", stored="gzip"), "train")
    other.read_pixels(0, "obs/agentview_image")
    index = open_index(write_aloha(tmp_path / "cube", "gzip"), "train")
    key = "observations/images/cam_low"
    expected = [stored[key][...] for _, stored in episodes(index, lambda file, e: file)]
    flat = np.concatenate(expected)
    order = np.random.default_rng(0).permutation(np.tile(np.arange(index.steps), 4))
    with ThreadPoolExecutor(4) as pool:
        for i, image in zip(order, pool.map(lambda i: index.read_pixels(int(i), key), order), strict=True):
            np.testing.assert_array_equal(image, flat[i])
    assert len(hdf5_records._open_files) == 2
    other.read_pixels(1, "obs/agentview_image")
    index.close()
    assert [location.name for _, location in hdf5_records._open_files] == ["lift.hdf5"]
    other.close()
    assert not hdf5_records._open_files


def test_processes_share_an_index_and_build_the_same(tmp_path: Path) -> None:
    directory = write_libero(tmp_path / "goal")
    alone = open_index(directory, "train", index_dir=tmp_path / "one")
    together = open_index(directory, "train", index_dir=tmp_path / "two", workers=2)
    assert contents(together.path) == contents(alone.path)
    copy = pickle.loads(pickle.dumps(alone))
    assert copy.split == alone.split
    np.testing.assert_array_equal(
        copy.read_pixels(7, "obs/agentview_image"), alone.read_pixels(7, "obs/agentview_image")
    )


def test_a_file_that_changes_is_indexed_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_robomimic(tmp_path / "lift.hdf5", (3, 4), masks={"train": [0]})
    assert open_index(path, "train").steps == 3
    with h5py.File(path, "r+") as file:
        del file["mask/train"]
        file["mask/train"] = [b"demo_1"]
    index = open_index(path, "train")
    assert index.steps == 4
    assert "is stale (changed: shard" in caplog.text
    np.testing.assert_array_equal(index.columns["actions"], h5py.File(path)["data/demo_1/actions"][...])


@pytest.fixture
def mixed(toy: Path, lerobots: dict[str, Path], tmp_path: Path, tokenizer: TextTokenizer) -> Iterator[Any]:
    """Makes loaders of a mixture of RLDS, ALOHA, robomimic and both versions of LeRobot, and closes them."""
    aloha = write_aloha(tmp_path / "cube", "jpeg")
    raw = write_aloha(tmp_path / "raw", "frames")
    lift = write_robomimic(tmp_path / "lift.hdf5", stored="gzip", masks={"train": list(range(9)), "valid": [9, 10, 11]})
    config = DataConfig(
        entries=(
            MixtureEntry(TOLD, str(toy), selection=SOME),
            MixtureEntry(CART, str(toy), split="val", val_split=None),
            MixtureEntry(ALOHA, str(aloha), weight=2.0, val_split=None),
            MixtureEntry(ALOHA, str(raw), val_split=None),
            MixtureEntry(PANDA, str(lift), val_split="valid"),
            *(MixtureEntry(toy_lerobot.ARM, str(directory), val_split=None) for directory in lerobots.values()),
        ),
        seed=9,
        camera_dropout=0.3,
        group_episodes=3,
    )
    normalizations = {
        e.robot.name: compute_normalization(EpisodeDataset(open_index(e.path, e.split), e.robot))
        for e in config.entries
    }
    made: list[Loader] = []

    def make(**options: Any) -> Loader:
        changes = {k: options.pop(k) for k in list(options) if k in {f.name for f in dataclasses.fields(DataConfig)}}
        of: dict[str, Any] = dict(tokenizer=tokenizer, normalizations=normalizations)
        of["policy"] = Shapes(state_dim=8, action_dim=6)
        made.append(make_loader(dataclasses.replace(config, **changes), **{"batch_size": 8, **of, **options}))
        return made[-1]

    yield make
    for loader in made:
        loader.close()


def test_samples_of_a_mixture_are_the_same_however_they_are_read(mixed: Any, capsys: pytest.CaptureFixture) -> None:
    """Resumed anywhere, by hosts, threads and workers."""
    loader = mixed()
    batches = [next(loader) for _ in range(6)]
    whole = rows(batches)
    assert {int(i) for b in batches for i in b["dataset_id"]} == set(range(7))
    assert "HDF5 files" in capsys.readouterr().out  # is part of the memory that is announced
    resumed = mixed(start=13, batch_size=7, num_threads=3)
    assert rows([next(resumed) for _ in range(5)]) == whole[13:48]
    for start in range(0, 48, 11):
        single = mixed(start=start, batch_size=1)
        assert rows([next(single) for _ in range(2)]) == whole[start : start + 2]
    hosts = [mixed(process_index=h, process_count=2, start=16) for h in range(2)]
    parts = [rows([next(part) for _ in range(4)]) for part in hosts]
    assert [row for samples in zip(*parts, strict=True) for row in samples] == whole[16:48]
    workers = mixed(num_workers=2, num_threads=2, start=8)
    assert rows([next(workers) for _ in range(5)]) == whole[8:]


def test_samples_are_what_is_stored(tmp_path: Path) -> None:
    directory = write_aloha(tmp_path / "cube", "contiguous")
    dataset = open_dataset(directory, ALOHA, "train")
    assert len(dataset) == sum(ALOHA_LENGTHS)
    frames = np.arange(len(dataset))
    chunks, mask = dataset.actions(frames)
    at = 0
    for e, n in enumerate(ALOHA_LENGTHS):
        with h5py.File(directory / f"episode_{e}.hdf5") as file:
            for t in range(n):
                taken = np.minimum(t + np.arange(6), n - 1)
                np.testing.assert_array_equal(chunks[at], file["action"][...][taken])
                assert mask[at].tolist() == [t + a < n for a in range(6)]
                np.testing.assert_array_equal(
                    dataset.state(frames[at : at + 1])[0], file["observations/qpos"][t].astype(np.float32)
                )
                left = file["observations/images/cam_left_wrist"][t]
                np.testing.assert_array_equal(dataset.image(at, ALOHA.cameras[1]), left[..., ::-1])
                at += 1
    assert dataset.prompts(frames[:2]) == ["transfer the cube"] * 2


def run(program: str, *args: Any, **options: Any) -> str:
    names, shown = runpy.run_path(str(REPOSITORY / "data" / program)), io.StringIO()
    names["main"](names["Args"](*args, **options), Console(file=shown, width=300))
    return shown.getvalue()


def test_programs_take_hdf5(tmp_path: Path) -> None:
    """The report of a dataset, which looks at all that is stored, and the draft of a robot."""
    data = str(write_robomimic(tmp_path / "image.hdf5"))
    text = run("show.py", data, out=tmp_path / "report.html")
    assert re.search(r"obs/agentview_image \S raw +\S 8 x 10 +\S 240 .. 240 ", text), text
    text = run("draft_robot.py", data, tmp_path / "panda.py")
    assert 'Camera("base", "obs/agentview_image", 8, 10),' in text
    assert 'StateField("robot0_eef_pos", "obs/robot0_eef_pos", 3, unit="?"),' in text
    assert "control_hz=20.0" in text
    assert "absent" not in text  # raw pictures are of one length
