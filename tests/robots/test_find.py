"""Robots by name, and those that users have written in files."""

import json
import pickle

import pytest

from openpi_like.config import from_json, to_json
from openpi_like.robots.find import find_robot

FILE = """
import dataclasses
from openpi_like.robots import ActionField, Camera, Robot, StateField

MINE = Robot(
    name="mine",
    cameras=(Camera("base", "image"),),
    state=(StateField("hand", "state", 3, unit="m"),),
    action=(ActionField("hand", "action", 3, unit="m"),),
    control_hz=10.0,
    action_horizon=4,
    execute_steps=2,
)
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "my-robots" / "mine.v2.py"  # no name that could be imported
    path.parent.mkdir()
    path.write_text(FILE)
    return path


def test_a_robot_of_a_file(file, monkeypatch):
    robot = find_robot(str(file))
    assert (robot.name, robot.control_hz) == ("mine", 10.0)
    assert find_robot(f"{file}:MINE") == robot
    monkeypatch.chdir(file.parent)
    assert find_robot("mine.v2.py") == find_robot("./mine.v2.py:MINE") == robot
    # A run stores the robot, not the file: it is read where there is no such file.
    stored = json.dumps(to_json(robot))
    assert "mine.v2" not in stored
    file.unlink()
    assert from_json(json.loads(stored)) == robot == pickle.loads(pickle.dumps(robot))


def test_a_file_with_several_robots(file):
    file.write_text(FILE + "OTHER = dataclasses.replace(MINE, name='other')\n")
    with pytest.raises(ValueError, match=r"has several robots; give one of .*mine.v2.py:MINE, .*mine.v2.py:OTHER"):
        find_robot(str(file))
    assert find_robot(f"{file}:OTHER").name == "other"
    with pytest.raises(ValueError, match=r"mine.v2.py has no robot 'OTHRE'; did you mean 'OTHER'"):
        find_robot(f"{file}:OTHRE")


def test_a_file_without_a_robot(file, tmp_path):
    with pytest.raises(ValueError, match=r"no robot file .*mime.v2.py; in .*my-robots: did you mean 'mine.v2.py'"):
        find_robot(str(file.with_name("mime.v2.py")))
    with pytest.raises(ValueError, match=r"no robot file .*/my_robot.py; in .*: no Python files"):
        find_robot(str(tmp_path / "my_robot.py"))
    with pytest.raises(ValueError, match=r"no robot file .*nowhere/my_robot.py; in .*nowhere: no Python files"):
        find_robot(str(tmp_path / "nowhere" / "my_robot.py:MINE"))
    file.write_text("MINE = 'a robot'\n")
    with pytest.raises(ValueError, match=r"mine.v2.py has no robot, expected an object like MY_ROBOT = Robot"):
        find_robot(f"{file}:MINE")
    file.write_text(FILE.replace("control_hz=10.0", "control_hz=0.0"))
    with pytest.raises(ValueError, match=r"mine.v2.py, line \d+: Robot 'mine': control_hz 0.0, expected > 0"):
        find_robot(str(file))
    file.write_text("int('x')\n")
    with pytest.raises(ValueError, match=r"mine.v2.py, line 1: invalid literal for int"):
        find_robot(str(file))
    with pytest.raises(ValueError, match=r"no robot file .*/my-robots/mine.v2; in .*: did you mean 'mine.v2.py'"):
        find_robot(str(file.with_suffix("")))
