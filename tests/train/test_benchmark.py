"""What the benchmark's program would run fits together, and ends with what was published."""

import runpy
from pathlib import Path
from typing import Any, ClassVar

import pytest
from rich.console import Console

from openpi_like.config import load_run
from openpi_like.robots.policy_fit import policy_problems
from openpi_like.robots.sims.suites import SUITES
from openpi_like.serve.results import read_training
from tests.conftest import REPOSITORY
from tests.pages import command_problems

PROGRAM = runpy.run_path(str(REPOSITORY / "train" / "benchmark.py"), run_name="benchmark")


class Noted:
    """A job that notes its steps instead of running them."""

    steps: dict[str, tuple[Any, Any]]
    record: ClassVar = {"seconds": {"train": 90.0}}

    def __init__(self, run: Path, *_: Any) -> None:
        run.mkdir(exist_ok=True)
        Noted.steps = self.steps = {}

    def step(self, name: str, *commands: list[str], server: list[str] | None = None) -> None:
        assert name not in self.steps
        self.steps[name] = commands, server


@pytest.mark.parametrize("name", ["generalist", "mt10"])
def test_policies_have_room_for_all_of_their_robots(name: str) -> None:
    config = load_run(REPOSITORY / "configs" / f"{name}.py")
    assert sum(entry.weight for entry in config.data.entries) == pytest.approx(1.0)
    for entry in config.data.entries:
        assert policy_problems(entry.robot, config.model, drop_cameras=config.data.drop_cameras) == []


@pytest.mark.parametrize("scale", ["small", "full", "pulse"])
def test_all_commands_can_be_given(monkeypatch: Any, tmp_path: Any, scale: Any) -> None:
    of = PROGRAM["SCALES"][scale]
    monkeypatch.chdir(REPOSITORY)  # where programs go
    monkeypatch.setitem(PROGRAM["main"].__globals__, "Job", Noted)
    monkeypatch.setitem(PROGRAM["main"].__globals__, "PUBLISHED", REPOSITORY / "no_such_file")
    PROGRAM["main"](PROGRAM["Args"](scale, tmp_path), Console())
    took = read_training(tmp_path / f"{of.policy}.json")
    assert (took["seconds"], took["steps"]) == (90.0, of.steps)
    robots = {robot for name in of.suites for robot in SUITES[name].tasks}
    assert {f"demonstrations of {robot}" for robot in robots} < set(Noted.steps)
    for commands, server in Noted.steps.values():
        for command in [*commands, *([server] if server else [])]:
            assert command_problems(" ".join(["python", *command])) == []
    driven = [commands for commands, server in Noted.steps.values() if server]
    assert [len(commands) for commands in driven] == [3] * len(of.suites)  # with it, blind, and deaf


def test_it_ends_with_what_has_moved(monkeypatch: Any, tmp_path: Any) -> None:
    """Here with there being no results to compare."""
    (tmp_path / "published.json").write_text('{"suites": {}}')
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setitem(PROGRAM["main"].__globals__, "Job", Noted)
    monkeypatch.setitem(PROGRAM["main"].__globals__, "PUBLISHED", tmp_path / "published.json")
    with pytest.raises(SystemExit) as ended:
        PROGRAM["main"](PROGRAM["Args"]("pulse", tmp_path / "run"), Console())
    assert ended.value.code == 1
