"""What is said of cameras: those that work, and those with each fault; on the pictures that the policy sees."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from openpi_like.data.images import decode, fit
from openpi_like.data.index import FrameIndex, open_index
from openpi_like.data.robot_check import Finding, RobotSample
from openpi_like.data.robot_check.cameras import Cameras
from openpi_like.data.robot_check.rates import Rates
from openpi_like.data.schema import DatasetError
from openpi_like.robots import Camera
from openpi_like.robots.widowx import WIDOWX
from tests.data import toy_lerobot
from tests.data.robot_check.arm import ARM, EPISODES, STEPS

HALF = dataclasses.replace(toy_lerobot.ARM, control_hz=toy_lerobot.FPS / 2)


def look(index: FrameIndex, *cameras: Camera, **options: int) -> list[Finding]:
    robot = dataclasses.replace(ARM, cameras=cameras)
    return Cameras().findings(RobotSample.take(index, robot, image_size=(16, 16), **options))


def suspicions(findings: list[Finding]) -> list[str]:
    return [f"{f.about}: {f.message}; {f.advice}" for f in findings if f.level != "found"]


def camera(name: str, min_bytes: int = 0) -> Camera:
    return Camera(name, f"observation/{name}", min_bytes=min_bytes)


def test_pictures_are_those_that_the_policy_sees(arm_index: FrameIndex) -> None:
    found = look(arm_index, camera("base"), camera("wrist"))
    assert suspicions(found) == []
    view = found[0]
    assert view.message == "observation/base, 24 x 32 pixels, seen at 16 x 16 by fit='pad'"
    assert [p.caption for p in view.pictures[:4]] == [
        "base, episode 1, step 0",
        "base, episode 1, step 20",
        "base, episode 1, step 39",
        "base, episode 5, step 0",
    ]
    expected = np.zeros((16, 16, 3), np.uint8)
    fit(decode(arm_index.read_image(4 * STEPS, "observation/base")), expected)
    np.testing.assert_array_equal(view.pictures[3].image, expected)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("black", "black: black camera: 24 of 24 sampled images are black; 100% of all"),
        ("half", "half: black camera: 12 of 24 sampled images are black; 50% of all"),
        ("frozen", "frozen: 100% of 32 frames repeat the one before although the robot moves; it froze"),
        ("slow", "slow: 75% of 32 frames repeat the one before although the robot moves"),
        ("dark", "dark: too dark: mean brightness 1"),
        ("bright", "bright: too bright: mean brightness 25"),
        ("flat", "flat: it shows one colour: standard deviation 0.0 of 255; is it covered?"),
    ],
)
def test_faults(arm_index: FrameIndex, name: str, text: str) -> None:
    found = suspicions(look(arm_index, camera("base"), camera(name)))
    assert any(line.startswith(text) for line in found), found
    assert all(line.startswith(name) for line in found)


def test_absent_cameras(arm_index: FrameIndex) -> None:
    """By the size of their images, or because the episode had not begun."""
    small = int(arm_index.images["observation/half"][:, 1].min())
    found = look(arm_index, camera("base"), camera("half", min_bytes=small + 1))
    assert suspicions(found) == []
    assert "absent in 50% of the steps" in {f.message for f in found}
    (gone,) = suspicions(look(arm_index, camera("base"), camera("black", min_bytes=10_000)))
    assert gone.startswith("black: absent in 100% of the steps; leave it out")
    (far,) = suspicions(look(arm_index, camera("base"), Camera("past", "observation/base", steps_back=30)))
    assert far.startswith("past: absent in 75% of the steps")
    past = look(arm_index, Camera("past", "observation/base", steps_back=2))[0].pictures[0]
    expected = np.zeros((16, 16, 3), np.uint8)
    fit(decode(arm_index.read_image(0, "observation/base")), expected)
    assert past.caption == "past, episode 1, step 2"
    np.testing.assert_array_equal(past.image, expected)


def test_two_names_for_one_camera(arm_index: FrameIndex) -> None:
    (same,) = suspicions(look(arm_index, camera("base"), Camera("wrist", "observation/base")))
    assert same == "wrist: shows the same pictures as base; look at the keys of both cameras"


def test_a_camera_that_stands_still_with_the_robot_is_not_frozen(arm_index: FrameIndex) -> None:
    state = np.array(arm_index.columns["observation/state"])
    state[:] = state[0]
    index = dataclasses.replace(arm_index, columns={**arm_index.columns, "observation/state": state})
    assert suspicions(look(index, camera("frozen"))) == []


def test_few_images_are_decoded(arm_index: FrameIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    read = []
    original = FrameIndex.read_for

    def counted(self: FrameIndex, step: int, *options: Any) -> Any:
        read.append(step)
        return original(self, step, *options)

    monkeypatch.setattr(FrameIndex, "read_for", counted)
    look(arm_index, camera("frozen"))
    assert len(read) == 1 + 24 + 12 + 2 * 32 < EPISODES * STEPS  # the first by `check_dataset`


def test_sizes_that_are_not_those_of_the_robot(arm_index: FrameIndex) -> None:
    with pytest.raises(DatasetError, match="24 x 32 pixels, camera 'base' of robot 'arm' expects 48 x 64"):
        look(arm_index, Camera("base", "observation/base", 48, 64))


@pytest.mark.parametrize(
    ("told", "advice"), [("rgb", 'set channel_order="bgr"'), ("bgr", 'leave out channel_order="bgr"')]
)
def test_the_swapped_channels_of_bridge(
    bridge: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: str, advice: str
) -> None:
    """In the data of a robot that says nothing of it, and by a robot that says it of data that are right."""
    index = open_index(bridge, "train", index_dir=tmp_path)
    sample = RobotSample.take(index, dataclasses.replace(WIDOWX, cameras=WIDOWX.cameras[:1]))
    assert suspicions(Cameras().findings(sample)) == []
    if told == "rgb":
        original = FrameIndex.read_for
        monkeypatch.setattr(FrameIndex, "read_for", lambda self, i, key, _, *more: original(self, i, key, "bgr", *more))
    camera = dataclasses.replace(WIDOWX.cameras[0], channel_order=told)
    robot = dataclasses.replace(sample.robot, cameras=(camera,))
    (found,) = suspicions(Cameras().findings(dataclasses.replace(sample, robot=robot)))
    assert re.match(
        rf"{camera.name}: swapped channels: coloured pixels are more blue than red \(warmth -0\.\d\d", found
    )
    assert advice in found


def test_the_absent_camera_of_bridge(bridge: Path, tmp_path: Path) -> None:
    index = open_index(bridge, "train", index_dir=tmp_path)
    robot = dataclasses.replace(WIDOWX, cameras=(*WIDOWX.cameras, Camera("wrist", "observation/image_3")))
    (black,) = suspicions(Cameras().findings(RobotSample.take(index, robot)))
    assert black.startswith("wrist: black camera: 24 of 24 sampled images are black; 100% of all")


def test_videos_of_a_lerobot_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that moves, and one that froze and was encoded so; the rate is that of the dataset."""
    moving = toy_lerobot.pictures

    def pictures(episode: int, length: int, seed: int = 0) -> np.ndarray:
        frames = moving(episode, length, seed)
        return np.broadcast_to(frames[:1], frames.shape) if seed else frames

    monkeypatch.setattr(toy_lerobot, "pictures", pictures)
    cameras = {toy_lerobot.FRONT: "video", toy_lerobot.WRIST: "video"}
    index = open_index(toy_lerobot.write_v30(tmp_path / "toy", cameras), "train")
    sample = RobotSample.take(index, toy_lerobot.ARM)
    (frozen,) = suspicions(Cameras().findings(sample))
    # At a key frame the codec changes it by more than it does between two
    assert re.match(r"wrist: (7|8|9)\d% of 29 frames repeat the one before", frozen)
    rate, *_ = Rates().findings(sample)
    assert rate.message == "20 steps per second by the dataset's description, as the robot says"
    (wrong,) = (f for f in Rates().findings(dataclasses.replace(sample, robot=HALF)) if f.level != "found")
    assert wrong.advice == "set control_hz=20, or keep 10 and set stride=2"
