"""HDF5 files that are cut, odd or of something else: told with what to do; damage is counted where tolerated."""

import dataclasses
import json
import logging
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from openpi_like.data.dataset import open_dataset
from openpi_like.data.index import open_index
from openpi_like.data.layouts import read_dataset, split_names
from openpi_like.data.schema import DatasetError
from tests.data.hdf5_files import (
    ALOHA,
    ALOHA_LENGTHS,
    CAMERAS,
    PANDA,
    padded,
    pictures,
    pngs,
    write_aloha,
    write_robomimic,
)

CAMERA = "observations/images/cam_high"


@pytest.fixture(scope="session")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_aloha(tmp_path_factory.mktemp("aloha") / "cube", "frames")


@pytest.fixture
def aloha(good: Path, tmp_path: Path) -> Path:
    """Twelve episodes that a test may damage."""
    return Path(shutil.copytree(good, tmp_path / "cube"))


@pytest.fixture
def lift(tmp_path: Path) -> Path:
    """A file of robomimic that a test may damage."""
    return write_robomimic(tmp_path / "lift" / "image.hdf5", masks={"train": [0, 1, 2, 3], "valid": [4]})


def change(path: Path, do: Callable[[h5py.File], Any]) -> None:
    with h5py.File(path, "r+") as file:
        do(file)


def put(path: str, value: Any) -> Callable[[h5py.File], None]:
    """Replaces a dataset."""

    def do(file: h5py.File) -> None:
        if path in file:
            del file[path]
        file[path] = value

    return do


def refused(directory: Path, split: str = "train") -> str:
    with pytest.raises(DatasetError) as e:
        open_index(directory, split)
    return str(e.value)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def overwritten(path: Path) -> None:
    """As a disk leaves it: right at both ends, zeros in the middle, where the groups are."""
    data = bytearray(path.read_bytes())
    data[700:-700] = bytes(len(data) - 1400)
    path.write_bytes(data)


def without_steps(file: h5py.File) -> None:
    for path in ("action", *(f"observations/{q}" for q in ("qpos", "qvel", "effort"))):
        put(path, file[path][:0])(file)
    for camera in CAMERAS:
        put(f"observations/images/{camera}", np.zeros((0, 12, 16, 3), np.uint8))(file)


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "cut": (cut, r"it is no HDF5 file, or only a part of one: .*truncated file"),
    "empty": (lambda p: p.write_bytes(b""), "the file is empty"),
    "text": (lambda p: p.write_text("hello" * 99), r"it is no HDF5 file, .*signature not found"),
    "overwritten": (overwritten, "HDF5 cannot read it"),
    "no action": (lambda p: change(p, lambda f: f.__delitem__("action")), "it has no 'action', .*it has observations"),
    "no observations": (
        lambda p: change(p, lambda f: f.__delitem__("observations")),
        "it has no 'observations', which files of ALOHA have",
    ),
    "no steps": (lambda p: change(p, put("action", np.float32(0))), "no dataset 'action' with a row per step"),
    "length": (
        lambda p: change(p, put("observations/qvel", np.zeros((8, 4)))),
        r"fields differ in their number of steps \(action: 4, .*observations/qpos: 4, observations/qvel: 8\)",
    ),
    "pictures": (
        lambda p: change(p, put(CAMERA, np.zeros((3, 12, 16, 3), np.uint8))),
        rf"fields differ in their number of steps \(action: 4, .*{CAMERA}: 3",
    ),
    "shape": (
        lambda p: change(p, put("observations/qpos", np.zeros((4, 7)))),
        r"other fields than in episode_0.hdf5: observations/qpos is float64 of shape \(7,\), expected float64 of shape "
        r"\(4,\); .*keep their files in a directory of their own",
    ),
    "type": (
        lambda p: change(p, put("action", np.zeros((4, 4)))),
        r"action is float64 of shape \(4,\), expected float32 of shape \(4,\)",
    ),
    "size": (
        lambda p: change(p, put(CAMERA, pictures(np.random.default_rng(0), 4, 24, 16))),
        rf"{CAMERA} is raw pictures of shape \(24, 16, 3\), expected raw pictures of shape \(12, 16, 3\)",
    ),
    "encoding": (
        lambda p: change(p, put(CAMERA, padded(pngs(pictures(np.random.default_rng(0), 4))))),
        rf"{CAMERA} is encoded pictures, expected raw pictures",
    ),
    "rank": (
        lambda p: change(p, put(CAMERA, np.zeros((4, 576), np.uint8))),
        rf"{CAMERA} is pictures of type uint8 \(expected rows of JPEG",
    ),
    "one value": (
        lambda p: change(p, put("observations/qvel", np.zeros(1))),
        r"other fields than .*: observations/qvel is one value, expected a row for each of 4 steps; episodes with",
    ),
    "missing": (lambda p: change(p, lambda f: f.__delitem__("observations/qvel")), "no observations/qvel"),
    "more": (
        lambda p: change(p, put("observations/base", np.zeros((4, 2)))),
        "observations/base, which that does not have",
    ),
    "no attribute": (lambda p: change(p, lambda f: f.attrs.__delitem__("sim")), "no sim"),
    "no step": (lambda p: change(p, without_steps), "it has no steps"),
}


@pytest.mark.parametrize("kind", list(DAMAGE))
def test_a_damaged_episode_is_named_or_tolerated(aloha: Path, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    do, message = DAMAGE[kind]
    do(aloha / "episode_3.hdf5")
    text = refused(aloha)
    assert re.search(f"\n  episode_3.hdf5: .*{message}", text), text
    assert "1 of 12 records are damaged" in text
    assert "or tolerate them" in text
    with caplog.at_level(logging.WARNING):
        index = open_index(aloha, "train", max_corrupt_fraction=0.1)
    assert np.diff(index.episode_start).tolist() == [n for e, n in enumerate(ALOHA_LENGTHS) if e != 3]
    (skipped,) = index.skipped
    assert skipped.startswith("episode_3.hdf5: ")
    assert "1 of 12 records are damaged and skipped" in caplog.text
    with h5py.File(aloha / "episode_4.hdf5") as file:
        np.testing.assert_array_equal(index.read_pixels(int(index.episode_start[3]), CAMERA), file[CAMERA][0])


def test_the_first_episode_may_be_damaged(aloha: Path) -> None:
    cut(aloha / "episode_0.hdf5")
    assert "1 of 12 records are damaged" in refused(aloha)
    assert open_index(aloha, "train", max_corrupt_fraction=0.1).episodes == 11


def test_all_are_damaged(aloha: Path) -> None:
    for path in aloha.glob("*.hdf5"):
        cut(path)
    text = refused(aloha)
    assert "none of its HDF5 files can be read; copy or write them again" in text
    assert text.count("truncated") == 12
    with pytest.raises(DatasetError, match="none of its HDF5 files"):
        open_index(aloha, "train", max_corrupt_fraction=1.0)


def test_files_of_something_else_say_what_is_expected(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "weights.h5", "w") as file:
        file["layer/kernel"] = np.zeros((3, 3))
        file["layer/bias"] = np.zeros(3)
    text = refused(tmp_path)
    assert "weights.h5: it has layer; expected 'data/demo_0', ... (robomimic, LIBERO) or 'observations' and" in text


def test_pictures_of_another_type_are_left_out_and_named(tmp_path: Path) -> None:
    directory = write_aloha(tmp_path / "cube", lengths=(3, 4))
    for number, n in enumerate((3, 4)):
        change(directory / f"episode_{number}.hdf5", put(CAMERA, np.zeros((n, 12, 16, 3), np.float32)))
    with pytest.raises(DatasetError) as e:
        open_dataset(directory, ALOHA, "train")
    assert f"camera 'base': '{CAMERA}' is not in the index, because fields of kind pictures of type float32" in str(
        e.value
    )
    assert "expected rows of JPEG or PNG, or uint8 of shape (T, H, W, 3)" in str(e.value)


def test_values_that_are_not_finite_are_named(tmp_path: Path) -> None:
    directory = write_aloha(tmp_path / "cube", lengths=(3, 4))
    change(directory / "episode_1.hdf5", lambda f: f["observations/qpos"].__setitem__((2, 1), np.nan))
    with pytest.raises(DatasetError, match=r"episode 1, step 2 \(episode_1.hdf5, record 0\): state field 'joints'"):
        open_dataset(directory, ALOHA, "train")


def test_a_picture_that_is_cut_is_named(tmp_path: Path) -> None:
    """And an empty one, a row of zeros."""
    directory = write_aloha(tmp_path / "cube", "jpeg", (3, 4))

    def damage(file: h5py.File) -> None:
        file[CAMERA][2, 200:] = 0
        file[CAMERA][3] = 0

    change(directory / "episode_1.hdf5", damage)
    index = open_index(directory, "train")
    assert index.images[CAMERA][[5, 6], 1].tolist() == [200, 0]
    for step, why in ((5, "JPEG"), (6, "not an image: 0 bytes")):
        with pytest.raises(ValueError, match=why):
            index.read_pixels(step, CAMERA)
    dataset = open_dataset(directory, ALOHA, "train")
    with pytest.raises(DatasetError, match=r"episode 1, step 2 \(episode_1.hdf5, record 0\): cannot decode"):
        dataset.image(5, ALOHA.cameras[0])


@pytest.mark.parametrize("stored", ["frames", "gzip"])
def test_a_file_that_is_cut_after_it_was_indexed(tmp_path: Path, stored: str) -> None:
    directory = write_aloha(tmp_path / "cube", stored, (3, 4))
    index = open_index(directory, "train")
    data = (directory / "episode_1.hdf5").read_bytes()
    (directory / "episode_1.hdf5").write_bytes(data[:3000])
    with pytest.raises(DatasetError, match=r"episode 1, step 1 \(episode_1.hdf5, record 0\): cannot read observations"):
        index.read_pixels(4, CAMERA)
    with pytest.raises(DatasetError, match="pictures are not encoded"):
        index.read_image(0, CAMERA)
    index.close()
    (directory / "episode_1.hdf5").unlink()
    with pytest.raises(DatasetError, match="No such file"):
        index.read_pixels(4, CAMERA)


ROBOMIMIC: dict[str, tuple[Callable[[h5py.File], Any], str]] = {
    "no env_args": (
        lambda f: f["data"].attrs.__delitem__("env_args"),
        r"group 'data' has no attribute 'env_args'.*convert_robosuite.py.*file\['data'\].attrs\['env_args'\] = ",
    ),
    "env_args": (lambda f: f["data"].attrs.__setitem__("env_args", "{'a'"), "attribute 'env_args' is not JSON"),
    "env_args list": (lambda f: f["data"].attrs.__setitem__("env_args", "[1]"), "is JSON, but not an object"),
    "no data": (lambda f: f.__delitem__("data"), r"it has mask; expected 'data/demo_0'"),
    "no demos": (lambda f: [f["data"].__delitem__(k) for k in list(f["data"])], "its group 'data' is empty"),
    "mask twice": (
        put("mask/train", [b"demo_0", b"demo_1", b"demo_0", b"demo_1", b"demo_2"]),
        r"its mask 'train' names demo_0, demo_1 more than once; write each name once",
    ),
    "mask": (lambda f: f["mask"].create_group("third"), "group 'mask' has something other than lists of names"),
}


@pytest.mark.parametrize("kind", list(ROBOMIMIC))
def test_a_file_of_robomimic_that_cannot_be_used(lift: Path, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    """Alone; and beside others, where it is counted with as many episodes as the largest of these has."""
    do, message = ROBOMIMIC[kind]
    change(lift, do)
    text = refused(lift)
    assert re.search(f"none of its HDF5 files can be read.*\n  image.hdf5: .*{message}", text), text
    for name in ("a", "c"):
        write_robomimic(lift.parent / f"{name}.hdf5", (3, 2, 4), masks={"train": [0, 1]})
    text = refused(lift.parent)
    message = message if kind != "no data" else "it has no group 'data', which files of robomimic have"
    assert re.search(f"1 of its HDF5 files cannot be read.*max_corrupt_fraction.*\n  image.hdf5: .*{message}", text), (
        text
    )
    with pytest.raises(DatasetError, match="1 of its HDF5 files"):
        split_names(lift.parent)
    index = open_index(lift.parent, "train", max_corrupt_fraction=0.4)
    assert (index.episodes, len(index.skipped), sum(index.split.lengths)) == (4, 2, 6)
    assert index.episode_shard.tolist() == [0, 0, 1, 1]
    with pytest.raises(DatasetError, match="2 of 6 records are damaged"):
        open_index(lift.parent, "train", max_corrupt_fraction=0.3)


DEMOS: dict[str, tuple[Callable[[h5py.File], Any], str]] = {
    "no num_samples": (
        lambda f: f["data/demo_2"].attrs.__delitem__("num_samples"),
        r"no attribute 'num_samples'; if its 9 steps are all of it, .*attrs\['num_samples'\] = len",
    ),
    "num_samples": (
        lambda f: f["data/demo_2"].attrs.__setitem__("num_samples", 12),
        "attribute num_samples is 12, but 'actions' has 9 steps",
    ),
    "no actions": (
        lambda f: f["data/demo_2"].__delitem__("actions"),
        "no dataset 'actions' with a row per step; there",
    ),
    "mask": (
        put("mask/train", [b"demo_0", b"demo_1", b"demo_77", b"demo_3"]),
        "there is no 'data/demo_77' in the file",
    ),
    "no camera": (
        lambda f: f["data/demo_2/obs"].__delitem__("agentview_image"),
        "no obs/agentview_image; episodes with",
    ),
    "metadata": (
        lambda f: f["data/demo_2"].attrs.__setitem__("ep_meta", '{"lang'),
        "attribute 'ep_meta' is not JSON: .*; write it again",
    ),
}


@pytest.mark.parametrize("kind", list(DEMOS))
def test_a_damaged_demonstration_is_named_or_tolerated(lift: Path, kind: str) -> None:
    do, message = DEMOS[kind]
    change(lift, do)
    demo = "demo_77" if kind == "mask" else "demo_2"
    text = refused(lift)
    assert re.search(f"1 of 4 records are damaged.*\n  image.hdf5, data/{demo}: .*{message}", text), text
    index = open_index(lift, "train", max_corrupt_fraction=0.25)
    texts = index.episode_texts["demo"]
    assert [texts.table[i] for i in texts.ids] == ["demo_0", "demo_1", "demo_3"]
    assert open_index(lift, "valid").episodes == 1  # has nothing to do with it


def test_text_that_is_not_utf8_is_left_out(lift: Path) -> None:
    change(lift, lambda f: f["data"].attrs.__setitem__("tag", np.bytes_(b"\xff\xfe")))
    index = open_index(lift, "train")
    assert "tag" not in index.episode_texts
    assert "cannot be decoded as text in any record" in index.left_out["tag"]


def test_files_with_other_fields_in_one_directory(lift: Path) -> None:
    """robomimic keeps files without pictures beside those with them."""
    low = Path(shutil.copy(lift, lift.parent / "low_dim.hdf5"))
    change(low, lambda f: [demo["obs"].__delitem__("agentview_image") for demo in f["data"].values()])
    text = refused(lift.parent)
    assert "low_dim.hdf5, data/demo_0: other fields than in image.hdf5: no obs/agentview_image" in text
    assert "or give one file as the dataset" in text
    assert open_index(lift, "train").episodes == open_index(low, "train").episodes == 4


def test_files_with_other_masks(lift: Path) -> None:
    write_robomimic(lift.parent / "more.hdf5", (3,))
    assert open_index(lift.parent, "train").episodes == 5  # without a mask all of it is for training
    assert "did you mean" in refused(lift.parent, "vald")
    assert "1 of 2 files have no split 'valid'; write the mask in all, " in refused(lift.parent, "valid")
    change(lift, put("mask/none", np.array([], "S8")))
    assert "split 'none' has no episodes" in refused(lift, "none")
    assert split_names(lift) == ["all", "train", "valid"]


def test_a_robot_of_other_fields(lift: Path) -> None:
    with pytest.raises(DatasetError, match=r"camera 'base': the dataset has no 'observations/images/cam_high'"):
        open_dataset(lift, ALOHA, "train")
    with pytest.raises(DatasetError, match="language_key: the dataset has no 'language_instruction'"):
        open_dataset(lift, dataclasses.replace(PANDA, language_key="language_instruction"), "train")


def test_h5py_is_asked_for(lift: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(DatasetError, match=r"needs h5py: pip install -e '.\[formats\]'"):
        read_dataset(lift, "train")


def test_files_in_a_store_are_to_be_copied(memory: Any, lift: Path) -> None:
    memory.pipe("/lift/image.hdf5", lift.read_bytes())
    for place in ("memory://lift", "memory://lift/image.hdf5"):
        with pytest.raises(DatasetError, match=r"memory://lift/image.hdf5: HDF5 files are read from disk; copy the"):
            open_index(place, "train")


def test_a_file_that_may_not_be_read_is_no_damage(lift: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(path: Path, mode: str) -> Any:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(h5py, "File", denied)
    with pytest.raises(DatasetError, match=r"cannot read .*image.hdf5: .*Permission denied"):
        open_index(lift, "train", max_corrupt_fraction=1.0)


def test_groups_that_lead_back_are_an_error(lift: Path) -> None:
    change(lift, lambda f: f["data/demo_1"].__setitem__("again", f["data/demo_1"]))
    assert "nested more than 16 deep; does a link lead back?" in refused(lift)


@pytest.mark.parametrize(
    ("rate", "shown"),
    [(0, "0"), (-20.0, "-20.0"), (np.nan, "NaN"), (np.inf, "Infinity"), ("20", '"20"'), (True, "true")],
)
def test_a_rate_that_is_none(tmp_path: Path, rate: Any, shown: str) -> None:
    """Of files all of which are named; and tolerated as other damage is."""
    for name, of in (("a", rate), ("b", 20)):
        env_args = {"env_name": "Lift", "env_kwargs": {"control_freq": of}}
        write_robomimic(tmp_path / f"{name}.hdf5", (3,), env_args=env_args)
    with pytest.raises(DatasetError) as error:
        open_index(tmp_path, "train")
    assert f"a.hdf5: its 'env_args' say control_freq {shown}, expected how many steps are in a second" in str(
        error.value
    )
    assert "b.hdf5" not in str(error.value)
    assert open_index(tmp_path, "train", max_corrupt_fraction=0.6).split.rate == 20.0


def test_env_args_without_a_rate(tmp_path: Path) -> None:
    path = write_robomimic(tmp_path / "a.hdf5", (3,), env_args={"env_name": "Lift", "env_kwargs": None})
    assert open_index(path, "train").split.rate is None
    assert json.loads(open_index(path, "train").episode_texts["env_args"].table[0])["env_name"] == "Lift"
