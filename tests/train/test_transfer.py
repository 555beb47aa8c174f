"""The study of transfer between arms: no policy has seen the arm it is fine-tuned to, and the table is as by hand."""

import json
import runpy
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from rich.console import Console

from openpi_like.config import load_run, override
from openpi_like.serve.evaluation import Episode, append_episode
from openpi_like.train.config import TrainConfig
from openpi_like.train.study import Matrix, slug, unequal_parts
from tests.pages import ROOT, _program

TRANSFER = ROOT / "configs" / "studies" / "transfer.py"
NAMES = ["iiwa", "kinova3", "panda", "sawyer", "ur5e"]
COLUMNS = ["zero-shot", "10 full", "10 LoRA", "10 scratch", "50 full", "50 LoRA", "50 scratch"]


@pytest.fixture(scope="module")
def program() -> ModuleType:
    return _program(ROOT / "train" / "study.py")


@pytest.fixture(scope="module")
def matrix(program: ModuleType) -> Matrix:
    found = program.load_study(TRANSFER)
    assert isinstance(found, Matrix)
    return found


@pytest.fixture(scope="module")
def configs(matrix: Matrix) -> dict[str, dict[str, TrainConfig]]:
    """part -> arm -> run; the file is loaded once for all."""
    runs, here = runpy.run_path(str(TRANSFER))["configs"], f"{TRANSFER.relative_to(ROOT)}:"
    return {
        part: {name: override(runs[arm.config.removeprefix(here)], arm.set) for name, arm in study.arms.items()}
        for part, study in matrix.parts.items()
    }


def paths(config: TrainConfig) -> set[str]:
    return {entry.path for entry in config.data.entries}


def test_every_arm_is_new_to_the_policy_that_is_tuned_to_it(matrix: Matrix, configs: Any) -> None:
    assert list(matrix.parts) == NAMES
    for left_out, study in matrix.parts.items():
        runs = configs[left_out]
        assert list(runs) == ["pretrained", *COLUMNS]
        own = {f"runs/studies/transfer/data/{study.robot}_sim/1.0.0"}
        others = {f"runs/studies/transfer/data/robosuite_{n}_sim/1.0.0" for n in NAMES if n != left_out}
        assert study.robot == f"robosuite_{left_out}"
        assert paths(runs["pretrained"]) == paths(runs["zero-shot"]) == others
        assert all(e.robot.name in e.path for e in runs["pretrained"].data.entries)
        # What is served knows this robot, by the statistics of the others.
        assert {e.robot.name for e in runs["zero-shot"].data.entries} == {study.robot}
        assert runs["zero-shot"].steps == 0
        assert all(arm.own_statistics for arm in study.arms.values())
        for name in COLUMNS[1:]:
            episodes, kind = name.split()
            (entry,) = runs[name].data.entries
            assert ({entry.path}, entry.robot.name, entry.split) == (own, study.robot, f"train[:{episodes}]")
            scratch = kind == "scratch"
            assert study.arms[name].start == (None if scratch else "pretrained")
            assert (runs[name].warm_start is None) == scratch
            assert (runs[name].trainable.lora is not None) == (kind == "LoRA")
            assert runs[name].keep.metric == "action_error"
            assert study.arms[name].beside == (None if scratch else f"{episodes} scratch")


def test_what_is_compared_is_equal(matrix: Matrix, configs: Any) -> None:
    driven = {part: {n: c for n, c in of.items() if n != "pretrained"} for part, of in configs.items()}
    assert unequal_parts(matrix, driven) == []
    driven["panda"]["10 LoRA"] = driven["panda"]["50 LoRA"]
    assert unequal_parts(matrix, driven) == ["panda: arm '10 LoRA': data is not that of '10 scratch'"]


def without_work(program: ModuleType, monkeypatch: Any) -> dict[str, tuple[list[str], list[str] | None]]:
    """Lets the program run none of its steps; returns where they are noted: name -> command, server."""
    steps: dict[str, tuple[list[str], list[str] | None]] = {}

    class Job(program.Job):  # type: ignore[name-defined]
        def step(self, name: str, *commands: list[str], server: list[str] | None = None) -> None:
            assert name not in steps
            steps[name] = (commands[0], server)

    monkeypatch.setattr(program, "Job", Job)
    monkeypatch.setattr(program, "measured", lambda run_dir, config: {"step_ms": None, "weights": 2_000_000})
    return steps


def test_the_program_makes_the_table(program: ModuleType, matrix: Matrix, tmp_path: Path, monkeypatch: Any) -> None:
    """Of episodes by hand, whoever drove them: arm i of a column j succeeds in the first (i + j) % 3 of 2 episodes."""
    steps = without_work(program, monkeypatch)
    for i, part in enumerate(NAMES):
        (tmp_path / part).mkdir()
        for j, name in enumerate(COLUMNS):
            for seed in (100, 101):
                won = seed - 100 < (i + j) % 3
                episode = Episode(f"robosuite_{part}", "lift", "trained", seed, won, 9, "egl")
                append_episode(tmp_path / part / f"{slug(name)}.jsonl", episode)
    args = program.Args(TRANSFER, tmp_path, episodes=2)
    program.main(args, Console(quiet=True))

    table = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in (tmp_path / "study.md").read_text().splitlines()
    ]
    assert table[0] == ["policy", *COLUMNS]
    assert [row[0] for row in table[2:]] == [*NAMES, "all", "beside", "p", "ms a step", "weights"]
    assert [row[1].split()[0] for row in table[2:8]] == ["0/2", "1/2", "2/2", "0/2", "1/2", "4/10"]
    assert table[3][1] == "1/2 [0.09, 0.91]"
    assert [cell.rsplit(" [")[0] for cell in table[8][1:]] == [
        "",
        "10 scratch",
        "10 scratch",
        "zero-shot",
        "50 scratch",
        "50 scratch",
        "zero-shot",
    ]
    results = json.loads((tmp_path / "results.json").read_text())
    of = {row["arm"]: row for row in results["rows"]}
    assert {n: row["successes"] for n, row in of.items()} == dict(zip(COLUMNS, (4, 6, 5, 4, 6, 5, 4), strict=True))
    # Of 1, 2, 0, 1, 2 and 0, 1, 2, 0, 1 successes of the five arms: 4 episodes more, 2 fewer.
    assert of["10 full"]["p"] == pytest.approx(2 * (1 + 6 + 15) / 2**6)

    commands, server = steps["ur5e: drive robosuite_ur5e with 10 LoRA"]
    assert server is not None
    assert server[:2] == ["serve/policy_server.py", str(tmp_path / "ur5e" / "10_LoRA")]
    assert server[-2:] == ["--step", "best"]
    assert commands[commands.index("--robot") + 1] == "robosuite_ur5e"
    assert "best" not in (steps["ur5e: drive robosuite_ur5e with zero-shot"][1] or ())  # it is not trained
    for part in NAMES:
        for name in ("10 full", "50 LoRA", "zero-shot"):
            assert f"warm_start.checkpoint={tmp_path / part / 'pretrained'}" in steps[f"{part}: train {name}"][0]
        assert not any("warm_start" in word for word in steps[f"{part}: train 10 scratch"][0])
        assert f"{part}: drive robosuite_{part} with pretrained" not in steps
    assert len(steps) == 5 * (2 + 7 * 3)


def test_a_study_of_one_robot_keeps_its_table(program: ModuleType, tmp_path: Path, monkeypatch: Any) -> None:
    """Arms as rows, all beside the first; files directly in the directory of the run."""
    steps = without_work(program, monkeypatch)
    for name, won in (("5 episodes", (True, False)), ("10 episodes", (True, True))):
        for seed, success in enumerate(won):
            episode = Episode("sawyer", "window-open", "trained", seed, success, 9, "egl")
            append_episode(tmp_path / f"{slug(name)}.jsonl", episode)
    path = ROOT / "configs" / "studies" / "learning_curve.py"
    program.main(program.Args(path, tmp_path, only=("5 episodes", "10 episodes")), Console(quiet=True))
    assert (tmp_path / "study.md").read_text().splitlines() == [
        "| policy | window-open | all | beside | p | ms a step | weights |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        "| 5 episodes | 1/2 [0.09, 0.91] | 1/2 [0.09, 0.91] |  |  |  | 2.00 M |",
        "| 10 episodes | 2/2 [0.34, 1.00] | 2/2 [0.34, 1.00] | 5 episodes [-0.27, +0.91] | 1 |  | 2.00 M |",
    ]
    assert list(steps) == [
        f"{what} {n} episodes" for n in (5, 10) for what in ("statistics of", "train", "drive sawyer with")
    ]
    assert f"warm_start.checkpoint={tmp_path / 'pretrained'}" in steps["train 5 episodes"][0]
    assert (steps["drive sawyer with 10 episodes"][1] or ())[-2:] == ["--step", "best"]


def test_one_of_several_runs_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "two.py"
    path.write_text("configs = {'one': 1, 'other': 2}\n")
    assert load_run(f"{path}:other") == 2
    with pytest.raises(ValueError, match="has no run 'ohter' in its `configs`; did you mean 'other'"):
        load_run(f"{path}:ohter")
    with pytest.raises(ValueError, match=r"several runs; name one, .*two\.py:NAME, of one, other"):
        load_run(path)
    with pytest.raises(FileNotFoundError, match=r"no config file .*three\.py; in .*: two\.py"):
        load_run(f"{tmp_path / 'three.py'}:one")
