"""One policy for all simulated arms: what its program would run fits together."""

import runpy
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from openpi_like.config import load_run
from openpi_like.robots.policy_fit import policy_problems
from openpi_like.robots.sims.suites import SUITES
from tests.conftest import REPOSITORY
from tests.pages import command_problems

PROGRAM = runpy.run_path(str(REPOSITORY / "train" / "generalist.py"), run_name="generalist")


class Noted:
    """A job that notes its steps instead of running them."""

    steps: dict[str, tuple[Any, Any]]

    def __init__(self, *_: Any) -> None:
        Noted.steps = self.steps = {}

    def step(self, name: str, *commands: list[str], server: list[str] | None = None) -> None:
        assert name not in self.steps
        self.steps[name] = commands, server


def test_the_policy_has_room_for_all_of_its_robots() -> None:
    config = load_run(REPOSITORY / "configs" / "generalist.py")
    assert sum(entry.weight for entry in config.data.entries) == pytest.approx(1.0)
    for entry in config.data.entries:
        assert policy_problems(entry.robot, config.model, drop_cameras=config.data.drop_cameras) == []


@pytest.mark.parametrize("scale", ["full", "pulse"])
def test_all_of_its_commands_can_be_given(monkeypatch: Any, scale: Any) -> None:
    monkeypatch.chdir(REPOSITORY)  # where programs go
    monkeypatch.setitem(PROGRAM["main"].__globals__, "Job", Noted)
    PROGRAM["main"](PROGRAM["Args"](scale), Console())
    robots = {robot for name in PROGRAM["Args"]().suites for robot in SUITES[name].tasks}
    assert {f"demonstrations of {robot}" for robot in robots} < set(Noted.steps)
    for commands, server in Noted.steps.values():
        for command in [*commands, *([server] if server else [])]:
            assert command_problems(" ".join(["python", *command])) == []
    driven = [name for name, (_, server) in Noted.steps.items() if server]
    assert len(driven) == 3 * len(PROGRAM["Args"]().suites)  # the policy, and without its eyes or its ears


def test_suites_without_a_robot_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none is of \['sawyer', 'pusht'.*, which configs/generalist.py learns"):
        PROGRAM["main"](PROGRAM["Args"](suites=("fetch",), run=tmp_path / "run"), Console())
    assert not (tmp_path / "run").exists()
