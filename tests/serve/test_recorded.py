"""Recordings as RLDS: the robot reads back what was recorded, and what is unfit is named before anything is written."""

import contextlib
import dataclasses
import io
import re
import runpy
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from rich.console import Console

from openpi_like.data.dataset import EpisodeDataset, open_dataset
from openpi_like.data.rlds_writer import image_size, write_rlds
from openpi_like.data.selection import Selection
from openpi_like.robots.robot import ActionField, Camera, Gripper, Robot, StateField
from openpi_like.serve.recorded import Limits, look, to_episode
from openpi_like.serve.recorder import Recorder
from openpi_like.serve.spool import RecordingError, open_spool, pack_step

pytest.importorskip("tensorflow")
# TensorFlow, TFDS and their protos warn of their own future while they write.
pytestmark = pytest.mark.filterwarnings("ignore")

PROGRAM = runpy.run_path(str(Path(__file__).resolve().parents[2] / "serve" / "record.py"), run_name="record")

# Everything that a robot does not read as it is stored: pictures that are turned or swapped, of the past, commands that
# are derived, fields in another order, gaps, further instructions.
ODD = Robot(
    name="odd",
    cameras=(
        Camera("base", "observation/image", 12, 16),
        Camera("turned", "observation/other", channel_order="bgr", upside_down=True),
        Camera("before", "observation/image", 12, 16, steps_back=1),
    ),
    state=(
        StateField("hand", "observation/state", 2, start=3, unit="cm"),
        StateField("gripper", "observation/state", 1, gripper=Gripper(open=1.0, closed=0.0)),
    ),
    action=(
        ActionField("hand", "observation/state", 2, start=3, unit="cm", command="delta", next_step="change"),
        ActionField("wrist", "action", 2, start=1, unit="deg"),
        ActionField("gripper", "action", 1, gripper=Gripper(open=1.0, closed=-1.0, convention="trigger")),
    ),
    control_hz=10.0,
    action_horizon=4,
    execute_steps=2,
    language_key="task/said",
    language_alternatives=("task/other",),
)
# Expert's interventions of three episodes: in the middle and at the end, none, everywhere.
EXPERT = ([0, 0, 1, 1, 1, 0, 1, 1], [0] * 6, [1] * 5)
SUCCESS = (True, None, False)


def seen(episode: int, t: int) -> dict[str, Any]:
    rng = np.random.default_rng((episode, t))
    x, y = np.arange(16), np.arange(12)
    smooth = np.stack([np.add.outer(a * y, b * x) for a, b in rng.uniform(1, 6, (3, 2))], axis=2)
    images = {"base": smooth.round().astype(np.uint8), "turned": rng.integers(0, 256, (9, 7, 3), np.uint8)}
    prompt = f"do {episode}" if t < 4 else f"then {episode}"
    return {"images": images, "state": rng.normal(size=3).astype(np.float32), "prompt": prompt}


def done(episode: int, t: int) -> np.ndarray:
    rng = np.random.default_rng((episode, t, 1))
    return np.append(rng.normal(size=4), rng.choice([-1.0, 1.0])).astype(np.float32)


def record(spool: Path, episodes: range, **changes: Any) -> None:
    with Recorder(spool, ODD.name, policy=changes.get("policy"), metadata={"operator": "Ada"}) as recorder:
        for e in episodes:
            recorder.begin(f"do {e}")
            for t, expert in enumerate(EXPERT[e]):
                proposed = None if expert else done(e, t) + 1
                recorder.step(seen(e, t), done(e, t), proposed=proposed, intervened=bool(expert), time_s=100 + t / 10)
            recorder.end(SUCCESS[e])


def convert(spool: Path, out: Path | None, **options: Any) -> str:
    """Runs the program; returns what it prints."""
    (spool.parent / "odd.py").write_text("from tests.serve.test_recorded import ODD\n")
    console = Console(file=io.StringIO(), width=400, soft_wrap=True)
    robot = None if out is None else str(spool.parent / "odd.py")
    PROGRAM["main"](PROGRAM["Args"](spool=spool, out=out, robot=robot, **options), console)
    return console.file.getvalue()  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A spool of three episodes, and what the program wrote of them."""
    root = tmp_path_factory.mktemp("recorded")
    record(root / "spool", range(3))
    convert(root / "spool", root / "data")
    return root


@contextlib.contextmanager
def opened(directory: Path, split: str = "train", **selection: Any) -> Iterator[EpisodeDataset]:
    dataset = open_dataset(directory, ODD, split, selection=Selection(**selection))
    try:
        yield dataset
    finally:
        dataset.close()


def places(keep: Callable[[int, int], Any]) -> list[tuple[int, int]]:
    """Episodes and steps of frames; the last step of an episode has no command, as one is derived from the next."""
    return [(e, t) for e in range(3) for t in range(len(EXPERT[e]) - 1) if keep(e, t)]


def test_the_robot_reads_what_was_recorded(recorded: Path) -> None:
    with opened(recorded / "data" / "odd_recorded" / "1.0.0") as dataset:
        at = places(lambda e, t: True)
        frames = np.arange(len(dataset))
        assert len(dataset) == len(at)
        np.testing.assert_array_equal(dataset.state(frames), [seen(e, t)["state"] for e, t in at])
        actions, mask = dataset.actions(frames)
        for i, (e, t) in enumerate(at):
            left = min(4, len(EXPERT[e]) - 1 - t)
            np.testing.assert_array_equal(mask[i], np.arange(4) < left)
            for k in range(left):
                hand = seen(e, t + k + 1)["state"][:2].astype(np.float64) - seen(e, t + k)["state"][:2]
                np.testing.assert_allclose(actions[i, k, :2], hand, atol=1e-6)
                np.testing.assert_array_equal(actions[i, k, 2:], done(e, t + k)[2:])
            for camera in ODD.cameras[:2]:
                np.testing.assert_array_equal(dataset.image(i, camera), seen(e, t)["images"][camera.name])
            if t:
                np.testing.assert_array_equal(dataset.image(i, ODD.cameras[2]), seen(e, t - 1)["images"]["base"])
        assert dataset.prompts(frames) == [seen(e, t)["prompt"] for e, t in at]
        columns = dataset.index.columns
        np.testing.assert_array_equal(columns["intervened"], np.concatenate(EXPERT).astype(bool))
        proposed = columns["proposed_action"]
        expected = [
            np.full(5, np.nan) if acts else done(e, t) + 1
            for e, expert in enumerate(EXPERT)
            for t, acts in enumerate(expert)
        ]
        np.testing.assert_array_equal(proposed, np.array(expected, np.float32))
        np.testing.assert_allclose(columns["timestamp"][:8], np.arange(8) / 10, rtol=1e-6)
        clock = columns["wall_time_ms"].ravel()
        assert (np.diff(clock) >= 0).all()
        assert 0 <= time.time() - clock[0] / 1e3 < 600
        assert dataset.index.episode_columns["episode_metadata/success"].ravel().tolist() == [1, -1, 0]
        assert dataset.index.episode_texts["episode_metadata/operator"].table == ("Ada",)


def test_interventions_are_selected_and_chunks_end_with_them(recorded: Path) -> None:
    directory = recorded / "data" / "odd_recorded" / "1.0.0"
    with opened(directory, intervened="intervened") as dataset:
        at = places(lambda e, t: EXPERT[e][t])
        frames = np.arange(len(dataset))
        np.testing.assert_array_equal(dataset.state(frames), [seen(e, t)["state"] for e, t in at])
        assert dataset.removed["intervened says no"] == 3 + 5
        # By hand: steps 2, 3, 4 and 6 of the first episode (7 has no command), 0 to 3 of the last.
        assert dataset.actions(frames)[1].sum(axis=1).tolist() == [3, 2, 1, 1, 4, 3, 2, 1]
    with opened(directory, intervened="intervened", success="episode_metadata/success") as dataset:
        assert len(dataset) == 4
    with pytest.raises(
        ValueError, match=r"selection\.intervened: the dataset has no 'intervend'; did you mean 'interv"
    ):
        open_dataset(directory, ODD, "train", selection=Selection(intervened="intervend"))
    slow = dataclasses.replace(ODD, stride=2)
    dataset = open_dataset(directory, slow, "train", selection=Selection(intervened="intervened"))
    # Whole control steps of two alone: from 2 and 3, not 4; none from 6, as 7 has no command; 0 to 2 of the last.
    assert dataset.steps(np.arange(len(dataset))).tolist() == [2, 3, 14, 15, 16]
    dataset.close()


def test_jpeg_is_near_and_small(tmp_path: Path, recorded: Path) -> None:
    convert(recorded / "spool", tmp_path, images="jpeg", quality=95)
    with opened(tmp_path / "odd_recorded" / "1.0.0") as dataset:
        assert dataset.index.read_image(0, "observation/image").startswith(b"\xff\xd8\xff")
        for i, (e, t) in enumerate(places(lambda e, t: True)):
            near = dataset.image(i, ODD.cameras[0]).astype(int)
            exact = seen(e, t)["images"]["base"].astype(int)
            wraps = (np.abs(np.diff(exact, axis=0)).max() > 50) or (np.abs(np.diff(exact, axis=1)).max() > 50)
            assert np.abs(near - exact).mean() < (8 if wraps else 3)


def test_versions_grow_and_keep_their_splits(tmp_path: Path) -> None:
    spool, data = tmp_path / "spool", tmp_path / "data"
    record(spool, range(2))
    convert(spool, data, val=0.5)
    first, second = (r.name for r in open_spool(spool))
    record(spool, range(2, 3))
    record(spool, range(1))
    said = convert(spool, data, val=0.5)
    assert "odd_recorded/1.1.0: train 2, val 2 episodes, 2 more than 1.0.0" in said
    assert "has all 4 episodes, nothing to do" in convert(spool, data, val=0.5)
    for version, train, val in (("1.0.0", 8, 6), ("1.1.0", 13, 14)):
        with opened(data / "odd_recorded" / version) as dataset:
            assert dataset.index.steps == train
            assert dataset.index.episode_texts["episode_metadata/file_path"].table[0] == first
        with opened(data / "odd_recorded" / version, "val") as dataset:
            assert dataset.index.steps == val
            assert dataset.index.episode_texts["episode_metadata/file_path"].table[0] == second
    with pytest.raises(RecordingError, match=f"1.1.0 has 1 episodes that version 1.2.0 would not have, {first} first"):
        convert(spool, data, leave_out=(first,))
    (data / "odd_recorded" / "1.1.0" / "metadata.json").write_text("{}")
    with pytest.raises(RecordingError, match="was not written from recordings"):
        convert(spool, data)


def test_unfinished_episodes_stay_until_something_is_done(tmp_path: Path) -> None:
    spool = tmp_path / "spool"
    record(spool, range(1))
    for _ in range(2):
        with Recorder(spool, ODD.name, metadata={"operator": "Ada"}) as recorder:
            recorder.begin("do 0")
            recorder.step(seen(0, 0), done(0, 0), time_s=0.0)
            recorder.step(seen(0, 1), done(0, 1), time_s=0.1)
    _, second, third = (r.name for r in open_spool(spool))
    said = convert(spool, tmp_path / "data")
    assert f"unfinished: {second}, robot odd, 2 steps; --keep {second} or --drop {second}" in said
    assert "1.0.0: train 1 episodes" in said
    with pytest.raises(RecordingError, match="has no episode 'no', "):
        convert(spool, tmp_path / "data", keep=("no",))
    convert(spool, None, drop=(third,))
    assert (spool / f"{third}.dropped").is_file()
    assert "1.1.0: train 2 episodes, 1 more than 1.0.0" in convert(spool, tmp_path / "data", keep=("all",))


def change(path: Path, what: Callable[[dict[str, Any]], Any], name: str = "odd", start: int = 0) -> None:
    """Records an episode whose steps are changed by `what`."""
    with Recorder(path, name, metadata={"operator": "Ada"}) as recorder:
        recorder.begin("go")
        for t in range(30):
            step: dict[str, Any] = {"observation": seen(0, t % 8), "action": done(0, t % 8), "time_s": t / 10, "t": t}
            what(step)
            recorder.step(step["observation"], step["action"], time_s=step["time_s"])
        recorder.end(True)


def pack_nan(images: dict[str, bytes], numbers: dict[str, Any], **said: Any) -> bytes:
    """Packs a step as a recorder that does not look."""
    if said["time_s"] in (0.3, 0.9):
        numbers = {**numbers, "action": np.full(5, np.nan, np.float32)}
    return pack_step(images, numbers, **said)


def pause(step: dict[str, Any]) -> None:
    step["time_s"] += 0.2 * (step["t"] > 4) + 0.1 * (step["t"] > 20)


def small_pause(step: dict[str, Any]) -> None:
    step["time_s"] += 0.1 * (step["t"] > 4)


def frozen(step: dict[str, Any]) -> None:
    step["observation"]["images"]["base"] = seen(0, min(step["t"], 7))["images"]["base"]


BAD = {
    r"its steps come at 20.0 Hz, robot 'odd' expects 10 \(--limits.rate 0.05\)": lambda s: s.update(time_s=s["t"] / 20),
    r"3 frames are missing, the longest pause is 300 ms; after 2 steps \(4, 20\) \(more than --limits.missing 0": pause,
    "time stands still or goes back after 1 steps \\(0\\)": lambda s: s.update(time_s=max(s["time_s"], 0.1)),
    "its state has 4 values, robot 'odd' has 3": lambda s: s["observation"].update(state=np.zeros(4)),
    "camera 'base' is 6 x 16 at 30 steps, the robot's is 12 x 16": lambda s: s["observation"]["images"].update(
        base=np.zeros((6, 16, 3), np.uint8)
    ),
    "camera 'turned' was not recorded; there are base": lambda s: s["observation"]["images"].pop("turned"),
}


def test_unfit_episodes_are_all_named_and_nothing_is_written(tmp_path: Path, monkeypatch: Any) -> None:
    spool = tmp_path / "spool"
    for what in BAD.values():
        change(spool, what)
    with monkeypatch.context() as patch:
        patch.setattr("openpi_like.serve.recorder.pack_step", pack_nan)
        change(spool, lambda s: None)
    change(spool, lambda s: None, name="leg")
    record(spool, range(1))
    with pytest.raises(RecordingError, match="8 problems, nothing is written") as e:
        convert(spool, tmp_path / "data")
    for message in (*BAD, r"action is not finite at 2 steps \(3, 9\)", "it is of robot 'leg', not of 'odd'"):
        assert re.search(message, str(e.value)), message
    assert not (tmp_path / "data").exists()
    unfit = str(e.value).splitlines()[-1].partition("--leave-out ")[2].split()
    assert len(unfit) == 8
    assert open_spool(spool)[-1].name not in unfit
    assert "train 1 episodes" in convert(spool, tmp_path / "data", leave_out=tuple(unfit))


def test_what_has_only_to_be_known_is_a_note(tmp_path: Path) -> None:
    change(tmp_path, small_pause)
    change(tmp_path, frozen)
    change(tmp_path, lambda s: s["observation"]["images"].update(third=np.zeros((1, 1, 3), np.uint8)))
    late, still, third = (look(r, ODD, Limits(missing=0.05)) for r in open_spool(tmp_path))
    assert late.problems == still.problems == third.problems == ()
    assert late.notes == ("1 frames are missing, the longest pause is 200 ms; after 1 steps (4)",)
    more = " (more than --limits.missing 0.02 of 30)"
    assert look(late.recording, ODD).problems == tuple(note + more for note in late.notes)
    assert still.notes == ("camera 'base' shows the same picture for 23 steps from step 7 on",)
    assert "camera 'third' is not the robot's, and is not written" in third.notes


def test_pauses_between_chunks_and_a_stride_are_suspected(tmp_path: Path) -> None:
    change(tmp_path, lambda s: s.update(time_s=s["t"] / 10 + 0.1 * (s["t"] // 4)))
    (recording,) = open_spool(tmp_path)
    every_other = dataclasses.replace(ODD, stride=2, execute_steps=4, action_horizon=4)
    problems = look(recording, every_other).problems
    assert problems[0] == (
        "its steps come at 10.0 Hz, robot 'odd' expects 20, as it reads every 2. step; what is recorded at 10 Hz is of "
        "the same robot with stride 1, under a name of its own (--limits.rate 0.05)"
    )
    assert "7 frames are missing" in problems[1]
    assert "always a multiple of 4 steps apart: the robot may stand still while it waits" in problems[1]


def test_episodes_of_one_dataset_are_made_alike_or_refused(tmp_path: Path) -> None:
    """Metadata that came later, a number that was an int before, and pictures that were encoded by the camera."""
    spool, jpeg = tmp_path / "spool", cv2.imencode(".jpg", seen(0, 0)["images"]["base"])[1].tobytes()
    metadata: list[dict[str, Any]] = [
        {"weight": 3},
        {"weight": 0.1, "scene": "kitchen"},
        {"scene": "lab"},
        {"scene": 4},
    ]
    for said in metadata:
        with Recorder(spool, ODD.name, metadata=said) as recorder:
            recorder.begin("go")
            for t in range(5):
                observation = seen(0, t)
                if said.get("scene") == "lab":
                    observation["images"]["base"] = jpeg
                recorder.step(observation, done(0, t), time_s=t / 10)
            recorder.end(True)
    names = [r.name for r in open_spool(spool)]
    with pytest.raises(RecordingError, match="2 problems, nothing is written") as e:
        convert(spool, tmp_path / "data")
    text_and_number = f"'scene' is a text and a number: str in 2 episodes ({names[1]} {names[2]}), int in 1 episodes"
    assert text_and_number in str(e.value)
    assert f"camera 'base': png in 3 episodes ({names[0]} {names[1]} {names[3]}), jpeg in 1 episodes" in str(e.value)
    printed = convert(spool, tmp_path / "data", images="jpeg", leave_out=(names[3],))
    assert "'weight' is missing in 1 episodes, and NaN there" in printed
    assert "'scene' is missing in 1 episodes, and an empty text there" in printed
    import tensorflow_datasets as tfds

    stored = tfds.builder_from_directory(tmp_path / "data" / "odd_recorded" / "1.0.0").as_dataset("train")
    found = [e["episode_metadata"] for e in tfds.as_numpy(stored)]
    np.testing.assert_array_equal([e["weight"] for e in found], np.array([3, 0.1, np.nan], np.float32))
    assert [e["scene"] for e in found] == [b"", b"kitchen", b"lab"]


def test_frames_that_are_not_compressed_are_compressed(tmp_path: Path) -> None:
    with Recorder(tmp_path / "spool", ODD.name, compress=False, metadata={"operator": "Ada"}) as recorder:
        recorder.begin("go")
        for t in range(5):
            recorder.step(seen(0, t), done(0, t), time_s=t / 10)
        recorder.end(True)
    convert(tmp_path / "spool", tmp_path / "data")
    with opened(tmp_path / "data" / "odd_recorded" / "1.0.0") as dataset:
        data = dataset.index.read_image(2, "observation/image")
        assert image_size(data) == (12, 16)
        np.testing.assert_array_equal(dataset.image(2, ODD.cameras[0]), seen(0, 2)["images"]["base"])


def test_a_robot_whose_actions_cannot_be_told_is_refused(tmp_path: Path) -> None:
    record(tmp_path / "spool", range(1))
    joints = dataclasses.replace(ODD.action[0], key="observation/joints")
    blind = dataclasses.replace(ODD, action=(joints, *ODD.action[1:]))
    (recording,) = open_spool(tmp_path / "spool")
    episode = to_episode(recording, blind, None, {"operator": str})
    with pytest.raises(ValueError, match="'hand' is read out of 'observation/joints' from 3 on, which is not part of"):
        write_rlds(tmp_path, "x", blind, {"train": [episode]}, description="", metadata={})
