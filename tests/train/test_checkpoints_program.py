"""The program for checkpoints: each damage is named, differences are those that numpy finds, rules decide what goes."""

import collections
import dataclasses
import hashlib
import io
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore as ts
from rich.console import Console

from openpi_like.data.loader import DataConfig, MixtureEntry
from openpi_like.models.arrays import OrbaxArrays
from openpi_like.models.lora import Lora, LoraRule
from openpi_like.models.pi0 import Pi0Config
from openpi_like.models.weights import flatten, unflatten
from openpi_like.robots.sawyer import SAWYER
from openpi_like.train.checkpoint import Checkpointer, Keep, save_policy
from openpi_like.train.comparison import by_module, compare
from openpi_like.train.config import TrainConfig
from openpi_like.train.contract import CheckpointError, Contract
from openpi_like.train.lock import RunLock, RunLockedError
from openpi_like.train.state import ModelDef, Trainable
from openpi_like.train.warm_start import WarmStart
from tests.conftest import REPOSITORY
from tests.train.conftest import ORDER

LORA = Lora((LoraRule("^(vlm|expert)/layers/down$", rank=2, alpha=6.0),))
LORA_BASE = {"kept": Trainable(LORA, frozen_dtype="int8"), "noted": Trainable(LORA)}
KEEP = Keep(newest=1, best=1, every=20)


def config(run_dir: Path, policy: Pi0Config, **changes: Any) -> TrainConfig:
    data = DataConfig((MixtureEntry(SAWYER, "data"),))
    options: dict[str, Any] = {
        "stats": "stats",
        "tokenizer": "t",
        "batch_size": 8,
        "steps": 30,
        "keep": KEEP,
        **changes,
    }
    return TrainConfig(str(run_dir), policy, data, **options)


@pytest.fixture(scope="module")
def program() -> SimpleNamespace:
    return SimpleNamespace(**runpy.run_path(str(REPOSITORY / "train" / "checkpoints.py")))


@pytest.fixture
def call(program: SimpleNamespace) -> Callable[..., tuple[int, str]]:
    def run(*arguments: Any) -> tuple[int, str]:
        text = io.StringIO()
        status = program.main([str(a) for a in arguments], Console(file=text, width=250))
        return status, text.getvalue()

    return run


@pytest.fixture(scope="module")
def runs(
    tmp_path_factory: pytest.TempPathFactory,
    policy: Pi0Config,
    contract_of: Callable[[Any], Contract],
    random_state: Callable[..., Any],
) -> Path:
    """ "base", of three steps, of which two are kept; "kept" and "noted", of LoRA on it; "imported"."""
    root, contract = tmp_path_factory.mktemp("runs"), contract_of(policy)

    def save(checkpointer: Checkpointer, config: TrainConfig, state: Any, score: float | None = None) -> None:
        step = int(state.step)
        checkpointer.save(state, position=8 * step, order=ORDER, contract=contract, config=config, score=score)
        checkpointer.wait()

    run = config(root / "base", policy)
    checkpointer = Checkpointer(root / "base" / "checkpoints", keep=run.keep)
    model, optimizer = ModelDef(policy), run.optimizer.create()
    for step, score in ((10, 2.0), (20, 3.0), (30, None)):
        save(checkpointer, run, random_state(model, optimizer, step=step, seed=step), score)
    checkpointer.close()
    base = unflatten(_read(root / "base" / "checkpoints" / "30" / "ema"))
    for name, trainable in LORA_BASE.items():
        run = config(root / name, policy, trainable=trainable)
        model = ModelDef(policy, trainable)
        state = random_state(model, optimizer, step=5, seed=1)
        frozen = {k: model.hold(k, jnp.asarray(v)) for k, v in flatten(base).items() if k not in model.trained}
        state = dataclasses.replace(state, frozen=unflatten(frozen))
        checkpointer = Checkpointer(root / name / "checkpoints", trainable=trainable)
        checkpointer.begin(state, source=None if name == "kept" else WarmStart(str(root / "base")))
        save(checkpointer, run, state)
        checkpointer.close()
    bfloat16 = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), base)
    save_policy(root / "imported", bfloat16, contract=contract, origin="a test")
    return root


@pytest.fixture
def copy(runs: Path, tmp_path: Path) -> Callable[[str], Path]:
    """Returns a function that copies a run, to damage it."""

    def make(name: str) -> Path:
        shutil.copytree(runs / name, tmp_path / name)
        return tmp_path / name

    return make


def _shapes(item: Path) -> dict[str, tuple[int, ...]]:
    return OrbaxArrays(item).shapes


def _read(item: Path) -> dict[str, np.ndarray]:
    arrays = OrbaxArrays(item)
    return {name: arrays.read(name) for name in arrays.shapes}


def _rewrite(item: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    weights = _read(item)
    change(weights)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(item, unflatten(weights), force=True)


def _edit(step: Path, change: Callable[[dict[str, Any]], Any], *, sign: bool = False) -> None:
    path = step / "contract" / "metadata"
    record = json.loads(path.read_text())
    change(record)
    if sign:
        record["hash"] = hashlib.sha256(json.dumps(record["contract"], sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps(record))


def _lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if re.match("step [0-9]+, ", line)]


# ---- ls --------------------------------------------------------------------------------------------------------------


def test_ls_lists_steps_and_what_is_none(call, copy, tmp_path):
    run = copy("base")
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
    _edit(steps / "20", lambda record: record.update(format=2))
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


# ---- verify ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["base", "kept", "noted", "imported"])
def test_a_sound_run(call, runs, name):
    step = max((runs / name / "checkpoints").iterdir(), key=lambda p: int(p.name))
    status, text = call("verify", runs / name, "--step", step.name)
    assert (status, _lines(text)) == (0, [])
    items = {p.name: set(_shapes(p)) for p in step.iterdir() if p.name in ("params", "ema", "opt_state")}
    of_base = set(_shapes(runs / "base" / "checkpoints" / "30" / "ema")) - items["params"]
    count = len(of_base) + sum(map(len, items.values()))
    assert f"step {step.name}: sound; {count} arrays read, " in text


def test_arrays_that_cannot_be_read_are_those_that_tensorstore_cannot_read(call, copy):
    run = copy("base")
    step = run / "checkpoints" / "20"
    for chunk in (step / "ema" / "ocdbt.process_0").glob("d/*"):
        chunk.write_bytes(chunk.read_bytes()[: chunk.stat().st_size // 2])
    names, lost = _shapes(step / "ema"), set()
    for name in names:
        store = {"driver": "ocdbt", "base": f"file://{step / 'ema'}", "path": name.replace("/", ".") + "/"}
        try:
            ts.open({"driver": "zarr", "kvstore": store}).result().read().result()
        except ValueError:
            lost.add(name)
    assert 0 < len(lost) < len(names)
    status, text = call("verify", run, "--step", 20)
    assert status == 1
    found = [re.fullmatch("step 20, ema, ([^:]*): cannot be read: .+", line) for line in _lines(text)]
    assert sorted(match[1] for match in found if match) == sorted(lost)
    assert len(found) == len(lost)
    assert (
        f"step 20: problems: {len(lost)}; {4 * len(names) + 2 - len(lost)} arrays read" in text
    )  # ema, params, mu, nu
    with pytest.raises(CheckpointError, match=r"has no step 25; steps there: \[10, 20, 30\]"):
        call("verify", run, "--step", 25)


WEIGHTS = {
    "vlm/layers/gate_up": r"3 of [0-9,]+ values are not finite",
    "action_in/kernel": r"got shape \(16, 4\), expected \(4, 16\)",
    "expert/layers/q": "got bfloat16, expected float32",
    "action_out/bias": "missing, did you mean '(1/0/nu/)?action_out/bais'.*",
    "action_out/bais": "not part of this model",
}


def _damage_weights(weights: dict[str, Any]) -> None:
    nan, shape, half, lost, extra = WEIGHTS
    weights[nan] = weights[nan].copy()
    weights[nan].flat[:3] = np.nan, np.inf, -np.inf
    weights[shape] = weights[shape].T.copy()
    weights[half] = jnp.asarray(weights[half], jnp.bfloat16)
    weights[extra] = weights.pop(lost)


def _damage_arrays(step: Path) -> None:
    """Of all three items; the optimiser's are in the tuples that optax has."""
    _rewrite(step / "params", _damage_weights)
    _rewrite(step / "ema", _damage_weights)
    checkpointer = ocp.PyTreeCheckpointer()
    stored = checkpointer.metadata(step / "opt_state").item_metadata.tree
    arrays = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), stored)
    tree = checkpointer.restore(step / "opt_state", args=ocp.args.PyTreeRestore(restore_args=arrays))
    nu = flatten(tree[1][0]["nu"])
    _damage_weights(nu)
    tree[1][0]["nu"] = unflatten(nu)
    tree[1][0]["count"] = np.float32(np.nan)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(step / "opt_state", tree, force=True)


def _lose_items(step: Path) -> None:
    shutil.rmtree(step / "ema")
    (step / "params" / "_METADATA").unlink()
    _edit(step, lambda record: record.update(step=7))


def _lose_list(step: Path) -> None:
    shutil.rmtree(step / "params")
    shutil.rmtree(step / "ema")
    (step / "_CHECKPOINT_METADATA").unlink()


def _edited(change: Callable[[dict[str, Any]], Any], *, sign: bool = False) -> Callable[[Path], None]:
    return lambda step: _edit(step, change, sign=sign)


def _in_base(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    return lambda step: _rewrite(step.parents[1] / "base", change)


NOT_TRAINED_ON = "cannot be read: .*: {0} is not what was trained on; restore the base of this run"
DAMAGES: dict[str, tuple[str, Callable[[Path], Any], list[str]]] = {
    "arrays": (
        "base",
        _damage_arrays,
        ["opt_state, 1/0/count: got float32, expected int32", "opt_state, 1/0/count: 1 of 1 values are not finite"]
        + [f"{i}{k}: {what}" for i in ("params, ", "ema, ", "opt_state, 1/0/nu/") for k, what in WEIGHTS.items()],
    ),
    "items": ("base", _lose_items, ["ema: no weights at .*", "params: no weights .*", "contract: it is of step 7; .*"]),
    "no list of items": ("base", _lose_list, ["_CHECKPOINT_METADATA: missing or unread.*", "params: no weights at .*"]),
    "no optimiser": ("kept", lambda step: shutil.rmtree(step / "opt_state"), ["opt_state: no weights at .*"]),
    "no contract": ("imported", lambda step: shutil.rmtree(step / "contract"), ["contract: missing: .* in part; .*"]),
    "contract changed": (
        "imported",
        _edited(lambda record: record["contract"]["normalizations"]["sawyer"].update(mode="quantile")),
        ["contract: .*: contract hash .*; the contract was changed after training.*"],
    ),
    "contract cut": (
        "imported",
        lambda step: (step / "contract" / "metadata").write_text('{"format"'),
        ["contract: cannot read the contract of .*; the checkpoint is damaged"],
    ),
    "contract emptied": (
        "imported",
        lambda step: (step / "contract" / "metadata").write_text("{}"),
        ["contract: the contract of .* lacks contract, format, hash; the checkpoint is damaged"],
    ),
    "newer": (
        "imported",
        _edited(lambda record: record.update(format=2)),
        ["contract: .*: format 2, expected 1; another version of openpi_like wrote it .*"],
    ),
    "newer class": (
        "imported",
        _edited(lambda record: record["contract"]["policy"].update(width=3), sign=True),
        [r"contract: .*Pi0Config: stored fields do not match this version: unknown \['width'\].*"],
    ),
    "robots and tokenizer": (
        "imported",
        _edited(lambda record: record["contract"].update(normalizations={}, tokenizer="eHk="), sign=True),
        ["contract: robot 'sawyer': .*", r"contract: not a SentencePiece model \(2 bytes\).*"],
    ),
    "no base": (
        "kept",
        lambda step: shutil.rmtree(step.parents[1] / "base"),
        ["base: .*base is missing: the weights that this run does not train; .*"],
    ),
    "another base": (
        "kept",
        _in_base(lambda weights: weights.update({"vlm/final_norm/scale": weights["vlm/final_norm/scale"] + 1})),
        ["base, vlm/final_norm/scale: " + NOT_TRAINED_ON.format("vlm/final_norm/scale")],
    ),
    "part of a base": (
        "kept",
        _in_base(lambda weights: weights.pop("vlm/layers/q/scale")),
        ["base, vlm/layers/q/scale: missing, .*", "base, vlm/layers/q: cannot be read: .*"],
    ),
    "another noted base": (
        "noted",
        _edited(lambda record: record["base"]["digest"].update({"vlm/layers/q": 0})),
        ["base, vlm/layers/q: " + NOT_TRAINED_ON.format("vlm/layers/q")],
    ),
    "noted base gone": (
        "noted",
        _edited(lambda record: record["base"]["source"].update(checkpoint="nowhere")),
        ["base: no weights at nowhere: .*"],
    ),
    "overlay": (
        "noted",
        lambda step: _rewrite(step / "ema", lambda weights: weights.pop("vlm/layers/down_lora/b")),
        ["ema, vlm/layers/down_lora/b: missing, .*"],
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_every_damage_is_named(call, copy, damage):
    name, do, expected = DAMAGES[damage]
    run = copy(name)
    step = max((run / "checkpoints").iterdir(), key=lambda p: int(p.name))
    for other in set((run / "checkpoints").iterdir()) - {step}:
        shutil.rmtree(other)
    if damage == "no contract":  # there is another step
        shutil.copytree(step, step.parent / "1")
        _edit(step.parent / "1", lambda record: record.update(step=1))
    do(step)
    status, text = call("verify", run)
    assert status == 1
    lines = _lines(text)
    assert len(lines) == len(expected), text
    for pattern in expected:
        assert any(re.fullmatch(f"step {step.name}, {pattern}", line) for line in lines), (pattern, text)


def test_what_cannot_be_compared_is_said_and_read(call, copy):
    """The config of the record names no optimiser, and slots that the policy does not see are no problem."""
    run = copy("kept")
    step = run / "checkpoints" / "5"

    def more(record: dict[str, Any]) -> None:
        robot = record["contract"]["robots"][0]
        robot["cameras"].append({**robot["cameras"][0], "name": "roof"})
        del record["config"]["optimizer"]

    _edit(step, more, sign=True)
    status, text = call("verify", run)
    assert status == 1
    assert _lines(text) == [
        "step 5, contract: robot 'sawyer': camera 'roof' is not a slot of the policy (known: 'base'); add it to the "
        "policy's cameras, or to drop_cameras"
    ]
    assert "step 5: opt_state was read, but the config in the record does not say what belongs in it" in text
    _edit(step, lambda record: record["config"]["data"].update(drop_cameras=["roof"]))
    shutil.move(step, run / "checkpoints" / "best")  # a copy of a step under another name
    assert "step best: sound" in call("verify", run / "checkpoints" / "best")[1]


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
    of = {item: [_read(step / item) for step in (first, last)] for item in ("ema", "params")}
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
    overlay = _read(runs / "noted" / "checkpoints" / "5" / "ema")
    before = _read(runs / "base" / "checkpoints" / "30" / "ema")
    after = before | {name: value for name, value in overlay.items() if name in before}
    for name in ("vlm/layers/down", "expert/layers/down"):
        a, b = (np.float64(overlay[f"{name}_lora/{end}"]) for end in "ab")
        after[name] = before[name] + 6.0 / 2 * np.einsum("lfr,lrd->lfd", a, b)
    rows, expected = _rows(text), _changes(before, after)
    assert rows.keys() == expected.keys()
    _check(rows, expected)
    changed = {name for name in before if rows[name][2] == "0 of 1"}
    assert changed == {name for name in before if name in overlay or name.endswith("layers/down")}


def test_diff_names_what_only_one_has(call, runs, copy):
    base = runs / "base"
    run = copy("base")
    step = run / "checkpoints" / "30"

    def change(weights: dict[str, Any]) -> None:
        weights["new/kernel"] = weights.pop("state_in/kernel")
        weights["action_in/kernel"] = weights["action_in/kernel"].T.copy()

    _rewrite(step / "ema", change)
    _edit(step, lambda record: record["contract"]["policy"].update(action_horizon=9), sign=True)
    _edit(step, lambda record: record["versions"].update(jax="9.9"))
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
    run = config(root, policy, keep=Keep(newest=2, best=2, every=3))
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


def test_prune_refuses(call, many, runs, program, monkeypatch):
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
    _edit(many / "checkpoints" / "7", lambda record: record["contract"].update(tokenizer=""))
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
