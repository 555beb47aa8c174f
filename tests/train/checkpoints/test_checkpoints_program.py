"""The program for checkpoints: what is there, differences that numpy finds too, and rules that decide what goes."""

import collections
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from openpi_like.models.pi0 import Pi0Config
from openpi_like.robots.sawyer import SAWYER
from openpi_like.train.checkpoints.checkpoint import Checkpointer, Keep, find_step
from openpi_like.train.checkpoints.compare import by_module, compare
from openpi_like.train.checkpoints.contract import CheckpointError
from openpi_like.train.checkpoints.load import load_policy_parts
from openpi_like.train.checkpoints.warm_start import open_weights
from openpi_like.train.hosts.lock import RunLock, RunLockedError
from tests.conftest import REPOSITORY
from tests.train.run_files import edit, read, rewrite, run_config

# ---- ls --------------------------------------------------------------------------------------------------------------


def test_ls_lists_steps_and_what_is_none(call, copy_run, tmp_path):
    run = copy_run("base")
    steps = run / "checkpoints"
    (steps / "40" / "params").mkdir(parents=True)
    (steps / "40" / "params" / "x").write_bytes(bytes(300))
    for left in (steps / "50.orbax-checkpoint-tmp", run / "base.orbax-checkpoint-tmp-7"):
        left.mkdir()
        (left / "x").write_bytes(bytes(200))
    with RunLock(run, lost=print, say=print):
        (info,) = json.loads(call("ls", "--json", run)[1])
        assert f"in use by host {os.uname().nodename}, pid {os.getpid()}" in call("ls", run)[1]
    size = lambda step: sum(p.stat().st_size for p in (steps / step).rglob("*") if p.is_file())  # noqa: E731
    common = {"trained": "all", "base": None, "problem": None}
    assert [{k: v for k, v in step.items() if k != "written"} for step in info["steps"]] == [
        {"step": 10, "position": 80, "scores": {"loss": 2.0}, "kept_by": ["best"], "bytes": size("10"), **common},
        {"step": 20, "position": 160, "scores": {"loss": 3.0}, "kept_by": ["every"], "bytes": size("20"), **common},
        {"step": 30, "position": 240, "scores": {}, "kept_by": ["newest"], "bytes": size("30"), **common},
    ]
    written = [step["written"] for step in info["steps"]]
    assert written == sorted(written)
    assert abs(written[2] - (steps / "30" / "commit_success.txt").stat().st_mtime) < 5
    assert info["incomplete"] == {"checkpoints/40": 300}
    assert info["temporary"] == {"base.orbax-checkpoint-tmp-7": 200, "checkpoints/50.orbax-checkpoint-tmp": 200}
    assert info["in_use"].startswith("host ")
    assert info["free_bytes"] > 0
    edit(steps / "20", lambda record: record.update(format=2))
    status, text = call("ls", run)
    assert status == 0
    rows = {line.split("│")[1].strip(): line for line in text.splitlines() if line.startswith("│")}
    assert list(rows) == ["10", "20", "30"]
    assert "unreadable" in rows["20"]
    assert "loss 2" in rows["10"]
    assert "step 20: " in text
    assert "format 2, expected 1; another version of openpi_like wrote it" in text
    assert "checkpoints/40: not a complete step, 300 B" in text
    assert "checkpoints/50.orbax-checkpoint-tmp: temporary, 200 B; left behind, stale" in text


def test_ls_says_what_is_trained_and_on_what(call, runs):
    with pytest.raises(CheckpointError, match=rf"no checkpoint directory {runs}/bsae; in {runs}: did you mean 'base'"):
        call("ls", runs / "kept", runs / "bsae")
    kept, noted, imported = json.loads(call("ls", "--json", runs / "kept", runs / "noted", runs / "imported")[1])
    assert [s["trained"] for run in (kept, noted, imported) for s in run["steps"]] == ["LoRA 2", "LoRA 2", "all"]
    assert [s["base"] for run in (kept, noted) for s in run["steps"]] == ["int8, kept", f"float32, {runs / 'base'}"]
    assert kept["base_bytes"] > 0 == noted["base_bytes"]
    assert imported["steps"][0]["kept_by"] is None  # it has no rules
    with pytest.raises(
        CheckpointError, match=r"holds no complete checkpoint; .*; runs in it: base, imported, kept, not"
    ):
        call("ls", runs)


# ---- diff ------------------------------------------------------------------------------------------------------------


def _rows(text: str) -> dict[str, tuple[float, float, str]]:
    """The rows of a table of weights, by module, and by the whole name of a weight."""
    rows, module = {}, ""
    for line in text.splitlines():
        if line.startswith("│") and " more " not in line:
            name, relative, largest, equal = line.strip("│").split("│")
            module = module if name.startswith("   ") else name.strip()
            whole = f"{module}/{name.strip()}" if name.startswith("   ") else module
            rows[whole] = (float(relative), float(largest), equal.strip())
    return rows


def _changes(a: dict[str, Any], b: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """What a table of weights should say, by numpy."""
    groups = {name: [name] for name in a}
    for name in a:
        groups.setdefault(name.rpartition("/")[0], []).append(name)
    found = {}
    for group, names in groups.items():
        before, after = (np.concatenate([np.float64(of[name]).ravel() for name in names]) for of in (a, b))
        apart = before - after
        found[group] = (np.linalg.norm(apart) / np.linalg.norm(before), np.abs(apart).max())
    return found


def _check(rows: dict[str, tuple[float, float, str]], expected: dict[str, tuple[Any, Any]]) -> None:
    for name, row in rows.items():
        np.testing.assert_allclose(row[:2], expected[name], rtol=6e-3, err_msg=name)  # three digits are printed


def test_diff_of_two_steps(call, runs):
    same = runs / "imported"
    status, text = call("diff", same, same / "checkpoints" / "0")
    assert status == 0
    assert text.splitlines() == [
        f"a: {same / 'checkpoints' / '0'}: step 0, 0 samples, raw weights",
        f"b: {same / 'checkpoints' / '0'}: step 0, 0 samples, raw weights",
        *("contract: equal", "trainable: equal", "config: equal", "versions: equal", "weights: 50 of 50 equal"),
    ]
    first, last = (runs / "base" / "checkpoints" / step for step in ("10", "30"))
    of = {item: [read(step / item) for step in (first, last)] for item in ("ema", "params")}
    sizes = collections.Counter(name.rpartition("/")[0] for name in of["ema"][0])
    status, text = call("diff", first, runs / "base", "--all")
    assert status == 1
    assert f"b: {last}: step 30, 240 samples, averaged weights" in text
    rows, expected = _rows(text), _changes(*of["ema"])
    assert rows.keys() == expected.keys()
    _check(rows, expected)
    modules = [rows[name][0] for name in rows if name in sizes]
    assert modules == sorted(modules, reverse=True)

    text = call("diff", first, last, "--raw")[1]
    assert "step 30, 240 samples, raw weights" in text
    _check(_rows(text), _changes(*of["params"]))
    assert len(_rows(text)) == sum(1 + min(3, size) for size in sizes.values())
    more = [int(n) for n in re.findall("and ([0-9]+) more", text)]
    assert sorted(more) == sorted(size - 3 for size in sizes.values() if size > 3)


def test_diff_merges_lora(call, runs):
    status, text = call("diff", runs / "base", runs / "noted", "--all")
    assert status == 1
    assert "contract: equal" in text
    assert "trainable: fields that differ: 1" in text
    assert "  run_dir: '" in text
    overlay = read(runs / "noted" / "checkpoints" / "5" / "ema")
    before = read(runs / "base" / "checkpoints" / "30" / "ema")
    after = before | {name: value for name, value in overlay.items() if name in before}
    for name in ("vlm/layers/down", "expert/layers/down"):
        a, b = (np.float64(overlay[f"{name}_lora/{end}"]) for end in "ab")
        after[name] = before[name] + 6.0 / 2 * np.einsum("lfr,lrd->lfd", a, b)
    rows, expected = _rows(text), _changes(before, after)
    assert rows.keys() == expected.keys()
    _check(rows, expected)
    changed = {name for name in before if rows[name][2] == "0 of 1"}
    assert changed == {name for name in before if name in overlay or name.endswith("layers/down")}


def test_diff_names_what_only_one_has(call, runs, copy_run):
    base = runs / "base"
    run = copy_run("base")
    step = run / "checkpoints" / "30"

    def change(weights: dict[str, Any]) -> None:
        weights["new/kernel"] = weights.pop("state_in/kernel")
        weights["action_in/kernel"] = weights["action_in/kernel"].T.copy()

    rewrite(step / "ema", change)
    edit(step, lambda record: record["contract"]["policy"].update(action_horizon=9), sign=True)
    edit(step, lambda record: record["versions"].update(jax="9.9"))
    status, text = call("diff", base, run)
    assert status == 1
    lines = [line.strip() for line in text.splitlines()]
    horizon = SAWYER.action_horizon
    for line in (
        f"policy.action_horizon: {horizon} -> 9", f"jax: '{jax.__version__}' -> '9.9'", "weights: 48 of 48 equal",
        "only in a: state_in/kernel", "only in b: new/kernel", "action_in/kernel: (4, 16) -> (16, 4)",
    ):  # fmt: skip
        assert line in lines, text
    assert call("diff", base, run, "--no-weights")[0] == 1


def test_relative_change_by_hand():
    """Of parts, so that large weights are compared in little memory, and with values that are not finite."""
    rng = np.random.default_rng(0)
    a = rng.normal(size=(3, 5)).astype(np.float32)
    change = compare("m/w", a, a * np.float32(1.5))
    assert change.relative == pytest.approx(0.5, rel=1e-6)
    assert change.largest == pytest.approx(0.5 * np.abs(a).max(), rel=1e-6)
    assert (compare("m/x", a, a).equal, compare("m/x", a, a).relative) == (1, 0)
    zero = compare("n/zero", np.zeros(3), np.ones(3))
    assert (zero.relative, zero.largest, zero.equal) == (np.inf, 1, 0)
    lost = compare("o/nan", a, np.where(a == a[1, 1], np.nan, a))
    assert np.isnan([lost.relative, lost.largest]).all()
    bits = a.astype(jnp.bfloat16)
    assert compare("m/b", bits, bits).equal == 1
    small = compare("m/small", np.full(4, 4.0), np.full(4, 5.0))
    rows = by_module([small, change, lost, compare("m/same", np.full(4, 3.0), np.full(4, 3.0))])
    assert [(module.name, [w.name for w in of]) for module, of in rows] == [
        ("o", ["o/nan"]),
        ("m", ["m/w", "m/small", "m/same"]),
    ]
    module = rows[1][0]
    assert (module.arrays, module.equal) == (3, 1)
    expected = np.sqrt((np.sum((0.5 * a) ** 2) + 4) / (np.sum(a**2) + 64 + 36))
    assert module.relative == pytest.approx(expected, rel=1e-6)


# ---- prune -----------------------------------------------------------------------------------------------------------

SCORES = {1: 3.0, 2: 0.5, 3: 2.0, 4: 1.0, 5: 4.0, 6: None, 7: 5.0}


@pytest.fixture(scope="module")
def seven(tmp_path_factory: pytest.TempPathFactory, policy: Pi0Config, small: Callable[..., dict[str, Any]]) -> Path:
    """A run of seven steps that are all there, whose rules keep five."""
    root = tmp_path_factory.mktemp("seven")
    run = run_config(root, policy, keep=Keep(newest=2, best=2, every=3))
    checkpointer = Checkpointer(root / "checkpoints", keep=Keep(newest=9))
    for step, score in SCORES.items():
        checkpointer.save(**small(step, config=run), score=score)
    checkpointer.close()
    return root


@pytest.fixture
def many(seven: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(seven, tmp_path / "many"))


def _left(run: Path) -> list[int]:
    return sorted(int(p.name) for p in (run / "checkpoints").iterdir() if p.name.isdigit())


@pytest.mark.parametrize(
    ("options", "left"),
    [
        ((), [2, 3, 4, 6, 7]),  # 2 and 4 are the best, 3 and 6 multiples, 6 and 7 the newest
        (("--newest", 1, "--every", 0), [2, 4, 7]),
        (("--best", 0), [3, 6, 7]),
        (("--newest", 1, "--best", 1, "--every", 5), [2, 5, 7]),
        (("--newest", 1, "--best", 0, "--every", 0), [7]),
    ],
)
def test_prune_keeps_what_the_rules_keep(call, many, options, left):
    stale = many / "checkpoints" / "8.orbax-checkpoint-tmp"
    stale.mkdir()
    (stale / "x").write_bytes(bytes(500))
    (many / "checkpoints" / "9").mkdir()  # not complete: not known what it is
    files = sorted(p for p in many.rglob("*"))
    sizes = {
        s: sum(p.stat().st_size for p in (many / "checkpoints" / str(s)).rglob("*") if p.is_file()) for s in SCORES
    }
    status, planned = call("prune", many, *options, "--dry-run")
    assert (status, sorted(many.rglob("*"))) == (0, files)
    status, text = call("prune", many, *options, "--yes")
    assert status == 0
    assert _left(many) == [*left, 9]
    assert not stale.exists()
    freed = 500 + sum(size for step, size in sizes.items() if step not in left)
    assert text.splitlines()[-1] == f"{freed / 1000:.3g} kB freed"
    assert planned == text.replace("removed", "would be removed").replace("freed", "would be freed")
    assert f"{stale}: removed, 500 B" in text
    assert call("verify", many)[1].count("cannot be read") == 0


def test_the_best_step_is_that_with_the_lowest_score(call, copy_run, runs):
    run = copy_run("base")  # of scores 2 at step 10 and 3 at step 20; 30, the newest, has none
    assert find_step(run, "best").name == "10"
    assert load_policy_parts(run, "best").step == 10
    assert open_weights(find_step(run, "best")).shapes == open_weights(run).shapes
    assert call("verify", run, "--step", "best")[1].startswith("step 10: sound")
    shutil.rmtree(run / "checkpoints" / "10")
    assert find_step(run, "best").name == "20"
    shutil.rmtree(run / "checkpoints" / "20")
    with pytest.raises(
        CheckpointError, match=r"none of its steps \[30\] has a score \(loss\), so none is the best; give"
    ):
        find_step(run, "best")
    with pytest.raises(CheckpointError, match="none of its steps"):
        find_step(runs / "imported", "best")


def test_prune_refuses(call, many, runs):
    with pytest.raises(ValueError, match="give --dry-run to see what would go, or --yes"):
        call("prune", many)
    with pytest.raises(ValueError, match="newest=0, expected at least 1"):
        call("prune", many, "--newest", 0, "--yes")
    with RunLock(many, lost=print, say=print):
        with pytest.raises(RunLockedError, match=r"in use by another run \(host .*, pid "):
            call("prune", many, "--newest", 1, "--yes")
        assert "in use by host" in call("prune", many, "--newest", 1, "--dry-run")[1]
    with pytest.raises(CheckpointError, match="says nothing of which steps are kept; give at least --newest"):
        call("prune", runs / "imported", "--yes")
    for step in (many / "checkpoints").iterdir():
        (step / "metrics" / "metrics").write_text('{"action_mae": 1.0}')
    with pytest.raises(CheckpointError, match=r"best=2 ranks steps by 'loss', .* \(measured: \['action_mae'\]\); give"):
        call("prune", many, "--yes")
    assert _left(many) == list(SCORES)
    edit(many / "checkpoints" / "7", lambda record: record["contract"].update(tokenizer=""))
    with pytest.raises(CheckpointError, match="7: contract hash"):  # whether it can be gone on from is not known
        call("prune", many, "--newest", 1, "--yes")
    assert _left(many) == list(SCORES)


def test_a_prune_that_fails_halfway_leaves_no_half_step(call, many, monkeypatch):
    def full(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(shutil, "rmtree", full)
    with pytest.raises(
        CheckpointError, match=r"could not be removed:\n.*/1: Permission denied\n.*/5: Permission denied$"
    ):
        call("prune", many, "--yes")
    monkeypatch.undo()
    assert _left(many) == [2, 3, 4, 6, 7]
    temporary = [f"checkpoints/{step}.orbax-checkpoint-tmp" for step in (1, 5)]
    assert list(json.loads(call("ls", "--json", many)[1])[0]["temporary"]) == temporary
    call("prune", many, "--yes")
    assert not list((many / "checkpoints").glob("*tmp*"))


def test_it_runs_as_a_program(many):
    """With the exit status that says what it found, and errors without a trace."""
    command = [sys.executable, str(REPOSITORY / "train" / "checkpoints.py")]
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY), "COLUMNS": "200"}
    done = subprocess.run([*command, "ls", str(many), "nowhere"], capture_output=True, text=True, env=env)
    assert done.returncode == 1
    assert re.search("7 +│ .* │ newest", done.stdout)
    assert re.fullmatch(r"no checkpoint directory /.*/nowhere; in .*\n", done.stderr)
