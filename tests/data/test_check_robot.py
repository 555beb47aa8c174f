"""The program that checks a robot: what it prints and writes; and simulated robots, which are as they are described."""

import dataclasses
import importlib.util
import io
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from openpi_like.data.index import FrameIndex, open_index
from openpi_like.data.robot_check import RobotSample, check_robot
from openpi_like.data.robot_check.sim_replay import SimReplay
from openpi_like.robots.find import find_robot
from tests.conftest import REPOSITORY
from tests.data.robot_check.faults import inverted, late, suspected

PROGRAM = REPOSITORY / "data" / "check_robot.py"
TASKS = {"sawyer": ("drawer-open", "coffee-button"), "pusht": (), "aloha": ()}
EACH = {"sawyer": 2, "pusht": 2, "aloha": 1}
# That of the Sawyer is hardly used in these tasks
GRIPPERS = {"sawyer": (), "pusht": (), "aloha": ("left_gripper", "right_gripper")}


@pytest.fixture(scope="module")
def program() -> SimpleNamespace:
    return SimpleNamespace(**runpy.run_path(str(PROGRAM)))


def run(program: SimpleNamespace, data: Path, robot: str, **options: Any) -> tuple[bool, str]:
    text = io.StringIO()
    clean = program.main(program.Args(str(data), robot, **options), Console(file=text, width=300))
    return clean, text.getvalue()


@pytest.fixture(scope="module", params=list(TASKS))
def simulated(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, FrameIndex]:
    """A robot's name and demonstrations of it, made as users make them."""
    if any(importlib.util.find_spec(p) is None for p in ("metaworld", "tensorflow")):
        pytest.skip("needs the sim and rlds extras")
    robot, out = request.param, tmp_path_factory.mktemp("demos")
    options = ["--out", str(out), "--episodes-per-task", str(EACH[robot]), "--val-episodes-per-task", "0"]
    options += ["--tasks", *TASKS[robot]] if TASKS[robot] else []
    command = [sys.executable, "data/make_demos.py", "--robot", robot, "--workers", "1", *options]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    subprocess.run(command, cwd=REPOSITORY, env=environment, check=True, capture_output=True, timeout=300)
    return robot, open_index(out / f"{robot}_sim" / "1.0.0", "train")


def test_simulated_robots_are_as_described(simulated: tuple[str, FrameIndex]) -> None:
    """Nothing is suspected, and executed once more in the simulator, recorded actions give the recorded states."""
    name, index = simulated
    robot = dataclasses.replace(find_robot(name), normalization="quantile")
    found = check_robot(RobotSample.take(index, robot, simulate=1))
    assert [f for findings in found.values() for f in findings if f.level != "found"] == []
    (replay,) = found["Replay in a simulator"]
    undisturbed = (np.asarray(index.episode_columns["episode_metadata/noise"]) == 0).any()
    expected = (
        r"seed \d+: at most 0\.\d% of its range off, .*; and succeeds" if undisturbed else "not replayed: what was"
    )
    assert re.search(expected, replay.message)


def test_faults_in_simulated_robots_are_found(simulated: tuple[str, FrameIndex]) -> None:
    name, index = simulated
    robot = find_robot(name)
    assert "Commands" in {check for check, _ in suspected(late(index, 4), robot)}
    for gripper in GRIPPERS[name]:
        found = suspected(index, inverted(robot, "action", gripper))
        assert [(check, f.about) for check, f in found] == [("Grippers", f"action {gripper}")]
    clean = dataclasses.replace(
        index,
        episode_columns={
            **index.episode_columns,
            "episode_metadata/noise": np.zeros(index.episodes),
            "episode_metadata/seed": np.asarray(index.episode_columns["episode_metadata/seed"]) + 1,
        },
    )
    (replay,) = SimReplay().findings(RobotSample.take(late(clean, 4), robot, simulate=1))
    assert replay.level == "suspect"
    assert "the actions are not what was executed" in replay.advice


def test_the_page_and_the_terminal_say_the_same(program: SimpleNamespace, arm_directory: Path, tmp_path: Path) -> None:
    """Of a robot whose gripper is inverted, in a file."""
    out, robot = tmp_path / "check.html", tmp_path / "my_arm.py"
    robot.write_text(
        "from tests.data.robot_check.arm import ARM\n"
        "from tests.data.robot_check.faults import inverted\n"
        "MY_ARM = inverted(ARM, 'action')\n"
        "del ARM\n"
    )
    clean, text = run(program, arm_directory, str(robot), out=out)
    assert not clean
    page = out.read_text()
    for shown in (text, page):
        for part in ("action gripper", "looks inverted: swap open= and closed= there", "2 different instructions"):
            assert part in shown
    assert text.splitlines()[-2].startswith("suspect: action gripper: command and state 'gripper' correlate by -")
    assert "http:" not in page  # "http" alone may stand in base64
    assert "https:" not in page
    assert "<b>1</b>suspicions" in page
    assert "<b>12 of 12</b>episodes looked at" in page
    assert page.count("data:image/jpeg;base64,") == 2 * 4 * 3
    assert page.count("data:image/png;base64,") == 3  # grippers, lags, replay
    assert len(page) < 600_000
    assert page.count('class="suspect"') == 2  # on top, and where it was found


def test_a_healthy_robot(program: SimpleNamespace, arm_directory: Path, tmp_path: Path) -> None:
    robot = tmp_path / "my_arm.py"
    robot.write_text("from tests.data.robot_check.arm import ARM\n")
    clean, text = run(program, arm_directory, str(robot))
    assert clean
    assert text.splitlines()[-1] == "nothing looks wrong"


def test_strict_is_for_scripts(arm_directory: Path, tmp_path: Path) -> None:
    robot = tmp_path / "my_arm.py"
    robot.write_text("from tests.data.robot_check.arm import ARM\n")
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}

    def start(*options: str) -> subprocess.CompletedProcess:
        command = [sys.executable, str(PROGRAM), str(arm_directory), "--robot", str(robot), *options]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    assert start("--strict").returncode == 0
    wrong = start("--rate", "5", "--strict")
    assert wrong.returncode == 1
    assert "set control_hz=5" in " ".join(wrong.stdout.split())
    missing = start("--split", "tset")
    assert missing.returncode == 1
    assert "no split 'tset'" in missing.stderr
    assert "Traceback" not in missing.stderr


def test_refusals(program: SimpleNamespace, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--rate nan, expected a number above 0"):
        program.Args("data", "arm", rate=float("nan"))
    with pytest.raises(ValueError, match=r"--steps 0, .*; --rate -1, .*; --simulate -1, .*; --out .*x.png, expected"):
        program.Args("data", "arm", steps=0, rate=-1, simulate=-1, out=tmp_path / "x.png")
    with pytest.raises(ValueError, match=r"--image-size \(0, 224\), .*; --out .*: there is no directory"):
        program.Args("data", "arm", image_size=(0, 224), out=tmp_path / "no" / "x.html")
