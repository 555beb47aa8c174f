"""Verifying runs: sound ones are, and each damage is named."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore as ts

from openpi_like.models.weights import flatten, unflatten
from openpi_like.train.checkpoints.contract import CheckpointError
from tests.train.run_files import edit, lines, rewrite, shapes


@pytest.mark.parametrize("name", ["base", "kept", "noted", "imported"])
def test_a_sound_run(call, runs, name):
    step = max((runs / name / "checkpoints").iterdir(), key=lambda p: int(p.name))
    status, text = call("verify", runs / name, "--step", step.name)
    assert (status, lines(text)) == (0, [])
    items = {p.name: set(shapes(p)) for p in step.iterdir() if p.name in ("params", "ema", "opt_state")}
    of_base = set(shapes(runs / "base" / "checkpoints" / "30" / "ema")) - items["params"]
    count = len(of_base) + sum(map(len, items.values()))
    assert f"step {step.name}: sound; {count} arrays read, " in text


def test_arrays_that_cannot_be_read_are_those_that_tensorstore_cannot_read(call, copy_run):
    run = copy_run("base")
    step = run / "checkpoints" / "20"
    for chunk in (step / "ema" / "ocdbt.process_0").glob("d/*"):
        chunk.write_bytes(chunk.read_bytes()[: chunk.stat().st_size // 2])
    names, lost = shapes(step / "ema"), set()
    for name in names:
        store = {"driver": "ocdbt", "base": f"file://{step / 'ema'}", "path": name.replace("/", ".") + "/"}
        try:
            ts.open({"driver": "zarr", "kvstore": store}).result().read().result()
        except ValueError:
            lost.add(name)
    assert 0 < len(lost) < len(names)
    status, text = call("verify", run, "--step", 20)
    assert status == 1
    found = [re.fullmatch("step 20, ema, ([^:]*): cannot be read: .+", line) for line in lines(text)]
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
    rewrite(step / "params", _damage_weights)
    rewrite(step / "ema", _damage_weights)
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
    edit(step, lambda record: record.update(step=7))


def _lose_list(step: Path) -> None:
    shutil.rmtree(step / "params")
    shutil.rmtree(step / "ema")
    (step / "_CHECKPOINT_METADATA").unlink()


def _edited(change: Callable[[dict[str, Any]], Any], *, sign: bool = False) -> Callable[[Path], None]:
    return lambda step: edit(step, change, sign=sign)


def _in_base(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    return lambda step: rewrite(step.parents[1] / "base", change)


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
        lambda step: rewrite(step / "ema", lambda weights: weights.pop("vlm/layers/down_lora/b")),
        ["ema, vlm/layers/down_lora/b: missing, .*"],
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_every_damage_is_named(call, copy_run, damage):
    name, do, expected = DAMAGES[damage]
    run = copy_run(name)
    step = max((run / "checkpoints").iterdir(), key=lambda p: int(p.name))
    for other in set((run / "checkpoints").iterdir()) - {step}:
        shutil.rmtree(other)
    if damage == "no contract":  # there is another step
        shutil.copytree(step, step.parent / "1")
        edit(step.parent / "1", lambda record: record.update(step=1))
    do(step)
    status, text = call("verify", run)
    assert status == 1
    found = lines(text)
    assert len(found) == len(expected), text
    for pattern in expected:
        assert any(re.fullmatch(f"step {step.name}, {pattern}", line) for line in found), (pattern, text)


def test_what_cannot_be_compared_is_said_and_read(call, copy_run):
    """The config of the record names no optimiser, and slots that the policy does not see are no problem."""
    run = copy_run("kept")
    step = run / "checkpoints" / "5"

    def more(record: dict[str, Any]) -> None:
        robot = record["contract"]["robots"][0]
        robot["cameras"].append({**robot["cameras"][0], "name": "roof"})
        del record["config"]["optimizer"]

    edit(step, more, sign=True)
    status, text = call("verify", run)
    assert status == 1
    assert lines(text) == [
        "step 5, contract: robot 'sawyer': camera 'roof' is not a slot of the policy (known: 'base'); add it to the "
        "policy's cameras, or to drop_cameras"
    ]
    assert "step 5: opt_state was read, but the config in the record does not say what belongs in it" in text
    edit(step, lambda record: record["config"]["data"].update(drop_cameras=["roof"]))
    shutil.move(step, run / "checkpoints" / "best")  # a copy of a step under another name
    assert "step best: sound" in call("verify", run / "checkpoints" / "best")[1]
