"""Datasets that are converted: there and back without a loss, and what cannot be is said."""

import dataclasses
import io
import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from openpi_like.data.convert import Conversion, Converted, lerobot_name, rlds_name, to_lerobot, to_rlds
from openpi_like.data.files import locate
from openpi_like.data.images import decode, encoding
from openpi_like.data.index import FrameIndex, open_index
from openpi_like.data.layouts import read_dataset
from openpi_like.data.rlds_tables import RldsFormat
from openpi_like.data.schema import DatasetError
from tests.conftest import REPOSITORY
from tests.data.hdf5_files import CAMERAS, write_aloha, write_robomimic
from tests.data.toy import LENGTHS, change_record, shard
from tests.data.toy_lerobot import FPS, FRONT, TASKS, WRIST, write_v21, write_v30
from tests.data.toy_lerobot import LENGTHS as LEROBOT_LENGTHS

# TensorFlow, TFDS and their protos warn of their own future while they write.
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("tfds")]

LEFT_OUT = ("embedding", "episode_metadata/*")
OWN = {"timestamp", "frame_index", "episode_index", "index", "task_index"}
MARKS = {"is_first", "is_last", "is_terminal"}


def same(a: FrameIndex, b: FrameIndex, names: Mapping[str, str], pixels: bool = False) -> None:
    """Asserts that fields hold the same. names: key in `a` -> key in `b`. pixels: of pictures, instead of bytes."""
    np.testing.assert_array_equal(a.episode_start, b.episode_start)
    for key, name in names.items():
        if key in a.columns:
            np.testing.assert_array_equal(a.columns[key], b.columns[name])
            assert a.columns[key].dtype == b.columns[name].dtype
        elif key in a.texts:
            texts = [[i.texts[k].table[n] for n in i.texts[k].ids] for i, k in ((a, key), (b, name))]
            assert texts[0] == texts[1]
        else:
            for step in range(a.steps):
                if pixels:
                    np.testing.assert_array_equal(a.read_pixels(step, key), b.read_pixels(step, name))
                else:
                    assert a.read_image(step, key) == b.read_image(step, name)


def decibels(a: np.ndarray, b: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / np.mean((a.astype(float) - b) ** 2)))


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LeRobot dataset with one camera as video, one as pictures."""
    return write_v21(tmp_path_factory.mktemp("convert") / "videos", {FRONT: "video", WRIST: "image"})


# ---- There and back --------------------------------------------------------------------------------------------------


def test_rlds_to_lerobot_and_back(toy: Path, tmp_path: Path) -> None:
    there = to_lerobot(toy, tmp_path / "lerobot", Conversion(leave_out=LEFT_OUT), fps=5.0, videos=None)
    assert (there.episodes, there.steps) == (15, 129)
    assert there.encoded == ()
    assert set(there.left_out) == {"embedding", *open_index(toy, "train").schema.episode}
    assert there.names["observation/wrist"] == "observation.images.wrist"
    assert there.names["language_instruction"] == "task"
    back = to_rlds(tmp_path / "lerobot", tmp_path / "toy_arm" / "1.2.3", form=RldsFormat(episodes_per_shard=5))
    assert back.names["task"] == "language_instruction"
    for split, lengths in LENGTHS.items():
        source = open_index(toy, split)
        middle = open_index(tmp_path / "lerobot", split)
        result = open_index(tmp_path / "toy_arm" / "1.2.3", split)
        assert (middle.split.rate, result.split.rate) == (5.0, 5.0)
        assert (result.split.dataset, result.split.version) == ("toy_arm", "1.2.3")
        assert sum(result.split.lengths) == len(lengths)
        assert there.names.keys() == {*source.columns, *source.images, *source.texts}
        same(source, middle, there.names)
        same(source, result, {key: back.names[name] for key, name in there.names.items()})
        assert result.schema.steps.keys() == set(back.names.values()) | MARKS
        assert set(back.names.values()) == {back.names[name] for name in there.names.values()} | OWN
        start = result.episode_start
        np.testing.assert_array_equal(np.flatnonzero(result.columns["is_first"]), start[:-1])
        np.testing.assert_array_equal(np.flatnonzero(result.columns["is_last"]), start[1:] - 1)
        assert not result.columns["is_terminal"].any()


def test_tfds_reads_what_is_written(tfds: Any, videos: Path, tmp_path: Path) -> None:
    to_rlds(videos, tmp_path / "so 101" / "2.0.0", Conversion(encoding="png"), form=RldsFormat("array_record"))
    builder = tfds.builder_from_directory(tmp_path / "so 101" / "2.0.0")
    assert (builder.name, str(builder.version)) == ("so_101", "2.0.0")
    assert builder.info.metadata == {
        "converted_from": "videos",
        "fps": FPS,
        "robot_type": "toy",
        "names": {"observation/state": ["waist", "elbow", "gripper"]},
    }
    index = open_index(videos, "train")
    for e, episode in enumerate(builder.as_data_source("train")):
        for t, step in enumerate(episode["steps"]):
            at = int(index.episode_start[e]) + t
            np.testing.assert_array_equal(step["observation"]["state"], index.columns["observation.state"][at])
            np.testing.assert_array_equal(step["observation"]["images"]["front"], index.read_pixels(at, FRONT))
            assert step["reward"] == index.columns["reward"][at]  # float64, exactly
            assert step["language_instruction"].decode() == TASKS[e % 2]


def test_videos_become_pictures(videos: Path, tmp_path: Path) -> None:
    source = open_index(videos, "train")
    png = to_rlds(videos, tmp_path / "png", Conversion(encoding="png"))
    assert png.encoded == (FRONT,)
    same(source, open_index(tmp_path / "png", "train"), png.names, pixels=True)
    to_rlds(videos, tmp_path / "jpeg", Conversion(quality=90))
    jpeg = open_index(tmp_path / "jpeg", "train")
    assert [jpeg.image_encoding(0, f"observation/images/{name}") for name in ("front", "wrist")] == ["jpeg", "png"]
    for step in range(jpeg.steps):
        assert jpeg.read_image(step, "observation/images/wrist") == source.read_image(step, WRIST)
        shown = jpeg.read_pixels(step, "observation/images/front")
        assert decibels(shown, source.read_pixels(step, FRONT)) > 34


@pytest.mark.parametrize("encoder", ["libx264", "libsvtav1"])
def test_pictures_become_videos(videos: Path, tmp_path: Path, encoder: str) -> None:
    rlds = to_rlds(videos, tmp_path / "rlds", Conversion(encoding="png"))
    there = to_lerobot(tmp_path / "rlds", tmp_path / "lerobot", videos=encoder, robot_type="so101")
    assert set(there.encoded) == {rlds.names[FRONT], rlds.names[WRIST]}
    source, result = open_index(videos, "train"), open_index(tmp_path / "lerobot", "train")
    assert result.split.rate == FPS
    names = {key: there.names.get(name, name) for key, name in rlds.names.items()}
    assert names == {key: key for key in names}
    same(source, result, {key: name for key, name in names.items() if key not in (FRONT, WRIST)})
    for key in (FRONT, WRIST):
        for step in range(result.steps):
            assert decibels(result.read_pixels(step, key), source.read_pixels(step, key)) > 34
    assert json.loads((tmp_path / "lerobot" / "meta" / "info.json").read_text())["robot_type"] == "so101"


def test_lerobot_to_lerobot(tmp_path: Path) -> None:
    """An older version becomes a new one, and its pictures stay as they are."""
    old = write_v21(tmp_path / "old", {FRONT: "image", WRIST: "image"})
    done = to_lerobot(old, tmp_path / "new", videos=None)
    names = done.names | {key: key for key in OWN}
    same(open_index(old, "train"), open_index(tmp_path / "new", "train"), names)
    assert info_of(tmp_path / "new")["codebase_version"] == "v3.0"


def info_of(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "meta" / "info.json").read_text())


def test_what_values_are_called_is_kept(tmp_path: Path) -> None:
    """As it is written: by kind, of axes, of one value, in other letters; from LeRobot, and there and back by RLDS."""
    names = {
        "observation.state": {"motors": ["waist", "elbow", "gripper"]},
        "action": ["größe", "y", "z"],
        "grid": ["rows", "columns"],
        "reward": ["points"],
        "done": None,
    }
    old = write_v30(tmp_path / "old", {WRIST: "image"})
    info = info_of(old)
    for key, of in names.items():
        info["features"][key]["names"] = of
    (old / "meta" / "info.json").write_text(json.dumps(info))
    to_lerobot(old, tmp_path / "new", videos=None)
    to_lerobot(old, tmp_path / "video", Conversion(rename={"action": "target"}), robot_type="so101")
    to_rlds(old, tmp_path / "rlds")
    to_lerobot(tmp_path / "rlds", tmp_path / "back", videos=None)
    for name, robot, action in (("new", "toy", "action"), ("video", "so101", "target"), ("back", "toy", "action")):
        found = info_of(tmp_path / name)
        assert found["robot_type"] == robot
        assert {key: found["features"][action if key == "action" else key]["names"] for key in names} == names
    for name, dots in (("new", "."), ("rlds", "/")):
        steps = open_index(tmp_path / name, "train").schema.steps
        assert steps[f"observation{dots}state"].names == ("waist", "elbow", "gripper")
        assert (steps["reward"].names, steps["grid"].names) == ((), ())
        assert read_dataset(locate(tmp_path / name), "train")[0].robot_type == "toy"


def test_more_than_one_text(toy: Path, tmp_path: Path) -> None:
    """One is the task, another a column; a text of episodes may be the task."""
    rename = Conversion(leave_out=LEFT_OUT, rename={"language_instruction": "said", "action": "commands/arm"})
    to_rlds(toy, tmp_path / "a", rename, fps=5.0)
    assert {"said", "commands/arm"} <= open_index(tmp_path / "a", "train").schema.steps.keys()
    keep = tuple(f"episode_metadata/{name}" for name in ("success", "noise", "renderer"))
    done = to_lerobot(
        toy, tmp_path / "b", Conversion(leave_out=("embedding", *keep), splits=("val",)), fps=5.0,
        text="episode_metadata/file_path", videos=None,
    )  # fmt: skip
    assert done.episodes == len(LENGTHS["val"])
    index = open_index(tmp_path / "b", "val")
    assert index.texts["task"].table == ("é/0", "é/1", "é/2")
    source = open_index(toy, "val")
    same(source, index, {"language_instruction": "language_instruction"})
    to_rlds(tmp_path / "b", tmp_path / "c", Conversion(rename={"task": "path"}))
    same(source, open_index(tmp_path / "c", "val"), {"language_instruction": "language_instruction"})


def test_hdf5(tmp_path: Path) -> None:
    """Raw pictures become PNG; masks that overlap have to be chosen from; what robomimic keeps aside is named."""
    aloha = write_aloha(tmp_path / "aloha", lengths=(4, 6))
    (problem, *_) = problems(aloha, tmp_path / "x", fps=50.0)
    assert problem == "which text is the task is not known; give text, one of ['file_name'], or an instruction"
    png = Conversion(encoding="png", leave_out=("compress", "sim", "file_name"))
    there = to_lerobot(aloha, tmp_path / "lerobot", png, fps=50.0, instruction="transfer the cube", videos=None)
    assert set(there.encoded) == {f"observations/images/{name}" for name in CAMERAS}
    source, result = open_index(aloha, "train"), open_index(tmp_path / "lerobot", "train")
    assert "observation.images.cam_high" in result.images
    assert result.texts["task"].table == ("transfer the cube",)
    same(source, result, there.names, pixels=True)
    same(source, result, {key: name for key, name in there.names.items() if key in source.columns})
    path = tmp_path / "lift" / "image.hdf5"
    write_robomimic(path, (6, 4, 9), masks={"train": [0, 2], "valid": [1]})
    with pytest.raises(DatasetError, match=r"splits \['\w+', '\w+'\] share episodes; name those that are meant"):
        to_rlds(path.parent, tmp_path / "x")
    chosen = Conversion(splits=("train", "valid"), encoding="png")
    *_, last = problems(path.parent, tmp_path / "x", chosen, to=to_rlds)
    assert last.startswith(
        "to do without these, name them in leave_out: next_obs/robot0_eef_pos next_obs/robot0_gripper"
    )
    chosen = dataclasses.replace(chosen, leave_out=("next_obs/*", "states", "model_file"))
    names = to_rlds(path.parent, tmp_path / "rlds", chosen).names
    for split, lengths in (("train", [6, 9]), ("valid", [4])):
        source, result = open_index(path.parent, split), open_index(tmp_path / "rlds", split)
        assert np.diff(result.episode_start).tolist() == lengths
        same(source, result, {key: name for key, name in names.items() if key in source.schema.steps}, pixels=True)
        assert result.episode_texts["demo"].table == source.episode_texts["demo"].table
        np.testing.assert_array_equal(result.episode_columns["num_samples"], lengths)


def test_names() -> None:
    assert lerobot_name("obs/agentview_image", picture=True) == "observation.images.agentview_image"
    assert lerobot_name("observations/qpos", picture=False) == "observation.qpos"
    assert lerobot_name("observation/image_0", picture=True) == "observation.images.image_0"
    assert lerobot_name("observation/images/front", picture=True) == "observation.images.front"
    assert lerobot_name("wrist/rgb", picture=True) == "observation.images.wrist.rgb"
    assert lerobot_name("observation/state", picture=False) == "observation.state"
    assert lerobot_name("observation.image", picture=True) == "observation.image"
    assert rlds_name("observation.images.front") == "observation/images/front"
    assert rlds_name("observation/v1.5") == "observation/v1.5"


# ---- What cannot be converted ----------------------------------------------------------------------------------------


def problems(*args: Any, to: Any = to_lerobot, **options: Any) -> list[str]:
    with pytest.raises(DatasetError) as error:
        to(*args, **options)
    first, *rest = str(error.value).split("\n  ")
    assert first.endswith("cannot be converted:")
    return rest


def test_everything_that_is_wrong_is_said_at_once(toy: Path, tmp_path: Path) -> None:
    wrong = Conversion(leave_out=("episode_metadata/s*", "acton"), rename={"cuont": "n", "count": "index"})
    assert problems(toy, tmp_path / "x", wrong, text="instruction") == [
        "leave_out 'acton' is no field; did you mean 'action', 'count'?",
        "rename 'cuont' is no field; did you mean 'count', 'action'?",
        "how many steps are in a second is not known; give fps",
        "text 'instruction' is no field of text; did you mean 'language_instruction'?",
        "'count' would be called 'index', which LeRobot has for itself; give it another name with rename, or name it "
        "in leave_out",
        "'embedding' cannot be kept: it has 300 values, more than 256",
        *(
            f"'episode_metadata/{name}' cannot be kept: it is of whole episodes, LeRobot has steps"
            for name in ("file_path", "noise", "renderer")
        ),
        "to do without these, name them in leave_out: embedding episode_metadata/file_path episode_metadata/noise "
        "episode_metadata/renderer",
    ]
    assert list(tmp_path.iterdir()) == []


def test_names_that_collide(toy: Path, videos: Path, tmp_path: Path) -> None:
    same_name = Conversion(leave_out=LEFT_OUT, rename={"observation/wrist": "observation.images.image"})
    (problem,) = problems(toy, tmp_path / "x", same_name, fps=5.0)
    assert problem.startswith(
        "['observation/image', 'observation/wrist'] would all be called 'observation.images.image'"
    )
    (problem,) = problems(videos, tmp_path / "x", Conversion(rename={"reward": "observation/state/x"}), to=to_rlds)
    assert problem.startswith(
        "'reward' would be called 'observation/state/x', inside 'observation/state' ('observation.s"
    )
    (problem,) = problems(toy, tmp_path / "x", Conversion(leave_out=LEFT_OUT, rename={"label": "task"}), fps=5.0)
    assert problem.startswith("'label' would be called 'task', which LeRobot has for itself")


def test_which_text_is_the_task(videos: Path, tmp_path: Path) -> None:
    to_rlds(videos, tmp_path / "a", Conversion(rename={"task": "said"}))
    assert to_lerobot(tmp_path / "a", tmp_path / "b", videos=None).names["said"] == "task"  # the only one
    both = write_v30(tmp_path / "both", {WRIST: "image"})
    path = both / "meta" / "info.json"
    info = json.loads(path.read_text())
    info["features"]["note"] = {"dtype": "string", "shape": [1], "names": None}
    path.write_text(json.dumps(info))
    for table in both.glob("data/*/*.parquet"):
        of = pq.read_table(table)
        pq.write_table(of.append_column("note", pa.array(["é"] * len(of))), table)
    assert to_lerobot(both, tmp_path / "c", videos=None).names["note"] == "note"
    chosen = to_lerobot(both, tmp_path / "d", Conversion(rename={"task": "said"}), videos=None, text="note")
    assert (chosen.names["note"], chosen.names["task"]) == ("task", "said")
    to_rlds(both, tmp_path / "e", Conversion(rename={"task": "said"}))
    (problem,) = problems(tmp_path / "e", tmp_path / "f")
    assert problem == "which text is the task is not known; give text, one of ['note', 'said'], or an instruction"
    (problem,) = problems(both, tmp_path / "f", text="note")
    assert problem.startswith("'task' would be called 'task'")
    first, _ = problems(both, tmp_path / "f", text="note", instruction="lift")
    assert first == "text 'note' and instruction 'lift' are given, expected one of them"


def test_rates_and_time_stamps(videos: Path, tmp_path: Path) -> None:
    (problem,) = problems(videos, tmp_path / "x", fps=30.0)
    assert problem == "fps=30, but the dataset says 20; leave it out, or correct the dataset"
    uneven = write_v30(tmp_path / "uneven", {WRIST: "image"})
    for table in uneven.glob("data/*/*.parquet"):
        of = pq.read_table(table)
        seconds = of["timestamp"].to_numpy() + np.float32(0.004)
        pq.write_table(of.set_column(of.column_names.index("timestamp"), "timestamp", pa.array(seconds)), table)
    (problem,) = problems(uneven, tmp_path / "x", videos=None)
    assert problem.startswith(
        "'timestamp' is up to 0.0040 s from that of 20 steps in a second, which LeRobot needs (first"
    )
    to_lerobot(uneven, tmp_path / "a", Conversion(rename={"timestamp": "clock"}), videos=None)
    to_lerobot(uneven, tmp_path / "b", Conversion(leave_out=("timestamp",)), videos=None)
    a, b = (open_index(tmp_path / name, "train") for name in "ab")
    np.testing.assert_array_equal(a.columns["clock"], open_index(uneven, "train").columns["timestamp"])
    np.testing.assert_allclose(b.columns["timestamp"], a.columns["clock"] - 0.004, atol=1e-6)


def test_the_rate_of_rlds(toy: Path, tmp_path: Path) -> None:
    """It is what metadata.json says, and nothing where that says something else."""
    path = tmp_path / "a" / "metadata.json"
    to_rlds(toy, tmp_path / "a", Conversion(leave_out=LEFT_OUT))
    for metadata, rate in (({}, None), ({"fps": 15}, 15.0), ({"fps": "x"}, None), ({"fps": -1}, None)):
        path.write_text(json.dumps(metadata))
        assert read_dataset(locate(tmp_path / "a"), "train")[0].rate == rate


def test_text_that_cannot_be_decoded_in_one_split(tmp_path: Path) -> None:
    """An index leaves it out where no record's is text, which may be in one split only."""
    path = write_robomimic(tmp_path / "lift" / "image.hdf5", (3, 2, 4), masks={"train": [0, 1], "valid": [2]})
    with h5py.File(path, "r+") as file:
        for d in range(3):
            file[f"data/demo_{d}"].attrs["said"] = np.bytes_(b"\xff\xfe" if d == 2 else b"lift it")
    conversion = Conversion(splits=("train", "valid"), leave_out=("model_file", "states", "next_obs/*"))
    for to in (to_lerobot, to_rlds):
        with pytest.raises(
            DatasetError, match=r"'said' cannot be kept: in \['valid'\]: it cannot be decoded as text in any"
        ):
            to(path, tmp_path / "out", conversion)
    conversion = dataclasses.replace(conversion, leave_out=(*conversion.leave_out, "said"))
    assert to_rlds(path, tmp_path / "out", conversion).episodes == 3


def test_what_is_there_stays(videos: Path, tmp_path: Path) -> None:
    for convert in (to_lerobot, to_rlds):
        with pytest.raises(FileExistsError, match="exists; delete it"):
            convert(videos, tmp_path)
    with pytest.raises(DatasetError, match=r"no splits \['val'\]; known: 'train'"):
        to_rlds(videos, tmp_path / "x", Conversion(splits=("val",)))
    with pytest.raises(
        ValueError, match=r"encoding 'jpg' is unknown; did you mean 'jpeg', 'png'\?; quality 0, expected 1 to"
    ):
        Conversion(encoding="jpg", quality=0)


def test_damaged_episodes(copy: Path, tmp_path: Path) -> None:
    change_record(shard(copy, 0), 2, lambda payload: payload[:100])
    chosen = Conversion(leave_out=LEFT_OUT, splits=("train",))
    with pytest.raises(DatasetError, match="record 2"):
        to_lerobot(copy, tmp_path / "x", chosen, fps=5.0)
    some = Conversion(leave_out=LEFT_OUT, splits=("train",), max_corrupt_fraction=0.1)
    done = to_lerobot(copy, tmp_path / "x", some, fps=5.0, videos=None)
    assert (done.episodes, len(done.skipped)) == (len(LENGTHS["train"]) - 1, 1)
    assert "record 2" in done.skipped[0]
    lengths = list(LENGTHS["train"])
    del lengths[2]
    np.testing.assert_array_equal(np.diff(open_index(tmp_path / "x", "train").episode_start), lengths)


def test_a_conversion_that_is_killed(videos: Path, tmp_path: Path) -> None:
    """Nothing is at the place of the dataset until there is all of it."""
    code = f"""
import os, signal, sys, pathlib
from openpi_like.data.convert import to_lerobot
to_lerobot({str(videos)!r}, pathlib.Path({str(tmp_path)!r}) / "out",
           progress=lambda done, _: done < 2 or os.kill(os.getpid(), signal.SIGKILL))
"""
    killed = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert os.listdir(tmp_path) == ["out.incomplete"]
    (tmp_path / "out.incomplete" / "left").touch()
    to_lerobot(videos, tmp_path / "out")
    assert os.listdir(tmp_path) == ["out"]
    assert open_index(tmp_path / "out", "train").episodes == len(LEROBOT_LENGTHS)
    assert not (tmp_path / "out" / "left").exists()


def test_rlds_that_is_stopped(videos: Path, tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        to_rlds(videos, tmp_path / "out", progress=stop)
    assert os.listdir(tmp_path) == ["out.incomplete"]
    to_rlds(videos, tmp_path / "out")
    assert os.listdir(tmp_path) == ["out"]
    assert open_index(tmp_path / "out", "train").episodes == len(LEROBOT_LENGTHS)


# ---- The program -----------------------------------------------------------------------------------------------------


def run(*args: Any, **options: Any) -> str:
    program = runpy.run_path(str(REPOSITORY / "data" / "convert.py"))
    out = io.StringIO()
    program["main"](program["Args"](*map(str, args), **options), Console(file=out, width=200))
    return out.getvalue()


def test_the_program(toy: Path, videos: Path, tmp_path: Path) -> None:
    told = run(toy, "lerobot", tmp_path / "a", fps=5.0, leave_out=LEFT_OUT, videos="none", rename=("count=n",))
    assert "count -> n\n" in told
    assert "left out: episode_metadata/file_path, episode_metadata/noise" in told
    assert f"15 episodes of 129 steps written to {tmp_path / 'a'}" in told.replace("\n", " ").replace("  ", " ")
    assert json.loads((tmp_path / "a" / "meta" / "info.json").read_text())["splits"] == {
        "train": "0:12",
        "val": "12:15",
    }
    told = run(videos, "rlds", tmp_path / "b" / "1.0.0", pictures="png")
    assert f"{FRONT} -> observation/images/front, encoded again" in told
    index = open_index(tmp_path / "b" / "1.0.0", "train")
    assert encoding(index.read_image(0, "observation/images/front")) == "png"
    assert decode(index.read_image(0, "observation/images/front")).shape == (64, 80, 3)
    for options, problem in (
        ({"rename": ("count",)}, "--rename count: expected OLD=NEW"),
        ({"text": "task"}, "--text and --instruction are for LeRobot"),
    ):
        with pytest.raises(SystemExit, match=problem):
            run(videos, "rlds", tmp_path / "c", **options)
    with pytest.raises(SystemExit, match="is in a store"):
        run(videos, "rlds", "gs://bucket/x")


def test_a_report_is_plain(videos: Path, tmp_path: Path) -> None:
    shutil.copytree(videos, tmp_path / "copy", ignore=shutil.ignore_patterns(".openpi*"))
    done = to_rlds(tmp_path / "copy", tmp_path / "out", Conversion(leave_out=("grid", "done")))
    assert isinstance(done, Converted)
    assert done.left_out == ("done", "grid")
    assert open_index(tmp_path / "out", "train").schema.steps.keys().isdisjoint({"done", "grid"})
