"""The program `train/plan.py`: what it says, its exit codes, and a TPU that is not there."""

import dataclasses
import importlib.util
import io
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from openpi_like.train.config import TrainConfig
from openpi_like.train.planning.plan import Plan
from openpi_like.train.planning.topology import Target
from tests.conftest import REPOSITORY

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: pip install -e '.[plan]'"
)

# Programs are compiled once, see `compile_once`.
pytestmark = pytest.mark.usefixtures("compile_once")


@pytest.fixture(scope="module")
def program() -> SimpleNamespace:
    return SimpleNamespace(**runpy.run_path(str(REPOSITORY / "train" / "plan.py")))


def run(program: SimpleNamespace, *arguments: Any, **options: Any) -> tuple[int, str]:
    console = Console(record=True, width=120, file=io.StringIO())
    args = program.Args(REPOSITORY / "configs" / "studies" / "pi0.py", tuple(arguments), **options)
    code = program.main(args, console)
    return code, console.export_text()


def test_the_program_says_whether_it_fits(
    program: SimpleNamespace, config: TrainConfig, step: Plan, machine: Target, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr("openpi_like.config.load_run", lambda path: config)
    monkeypatch.setattr("openpi_like.train.planning.topology.find_target", lambda topology, slices: machine)
    code, text = run(program, sampler=(1,), json=tmp_path / "plan.json", samples=1000)
    assert code == 0
    assert "mesh data 2 x fsdp 2 x tensor 1, batch 8" in text
    assert f"{step.parameters:,} parameters" in text
    assert "all-gather over fsdp" in text
    assert "MFU at most" in text
    assert "1,000 samples take at least" in text
    train, sample = json.loads((tmp_path / "plan.json").read_text())
    assert (train["what"], train["flops"], sample["what"]) == ("training step", step.flops, "sampler")
    assert step.memory is not None
    small = dataclasses.replace(machine, limit=step.memory.peak - 1)
    monkeypatch.setattr("openpi_like.train.planning.topology.find_target", lambda topology, slices: small)
    code, text = run(program, sampler=())
    assert code == 1
    assert "it does not fit: needs" in text
    assert "try " in text


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere.py"], "no config file nowhere.py"),
        (["configs/studies/pi0.py", "batchsize=8"], "'batchsize': TrainConfig has no field 'batchsize'; did you"),
        (["configs/studies/pi0.py", "--topology", "v5e:7x7"], "there is no such slice"),
        (["configs/studies/pi0.py", "--search", "3"], "needs published peaks"),
    ],
)
def test_bad_input_is_one_line_and_code_2(arguments: list[str], said: str) -> None:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "XLA_FLAGS": ""}
    done = subprocess.run(
        [sys.executable, "train/plan.py", *arguments], cwd=REPOSITORY, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr


@needs_libtpu
@pytest.mark.slow
def test_a_tpu_that_is_not_there(tmp_path: Path) -> None:
    """The whole program, with the TPU compiler: a policy of two layers on two slices of four chips."""
    (tmp_path / "run.py").write_text(
        "import dataclasses\n"
        "from openpi_like.config import load_run\n"
        "from openpi_like.train.sharding import MeshConfig\n"
        "from tests.train.planning.batch_moves import policies\n"
        f"base = load_run({str(REPOSITORY / 'configs' / 'studies' / 'pi0.py')!r})\n"
        "config = dataclasses.replace(base, model=policies()['pi0'], mesh=MeshConfig(fsdp=4))\n"
    )
    command = [sys.executable, "train/plan.py", str(tmp_path / "run.py"), "--topology", "v5e:2x2", "--slices", "2"]
    command += ["--sampler", "--json", str(tmp_path / "plan.json")]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "XLA_FLAGS": ""}
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    (plan,) = json.loads((tmp_path / "plan.json").read_text())
    assert (plan["target"], plan["mesh"]) == ("2 x v5e:2x2", {"data": 2, "fsdp": 4, "tensor": 1})
    assert 1 < plan["flops"] / plan["model_flops"] < 1.6  # what is computed again, and so small matrices are padded
    assert 0 < plan["mfu"] < 1
    seconds = {tuple(t["axes"]): t["nbytes"] / t["seconds"] for t in plan["collectives"]}
    assert seconds["fsdp",] == pytest.approx(100e9)  # the links of a slice
    assert all(
        rate == pytest.approx(3.125e9 * (4 if "fsdp" in axes else 1))
        for axes, rate in seconds.items()
        if "data" in axes
    )
