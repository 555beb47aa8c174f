"""Runs that train a part of the weights: their checkpoints hold that part, and the rest is found and checked."""

import dataclasses
import io
import json
import runpy
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qwix
from rich.console import Console

from openpi_like.models.arrays import OrbaxArrays, open_arrays
from openpi_like.models.lora import Lora, LoraRule
from openpi_like.models.weights import WeightsError, flatten, plan_load, read_weights, unflatten
from openpi_like.partition import ShardingRules
from openpi_like.train.checkpoints.base import bit_sum, digest
from openpi_like.train.checkpoints.checkpoint import Checkpointer
from openpi_like.train.checkpoints.contract import CheckpointError, read_record
from openpi_like.train.checkpoints.load import load_policy_parts
from openpi_like.train.checkpoints.warm_start import WarmStart, frozen_from, open_weights, warm_start
from openpi_like.train.optimizer import OptimizerConfig
from openpi_like.train.sharding import MeshConfig, put_batch
from openpi_like.train.state import ModelDef, Trainable, Trainer
from tests.merged import merged

LORA = Lora((LoraRule("^(vlm|expert)/layers/(q|out|down)$", rank=2),))
SAVED: dict[str, Any] = {"order": {"seed": 0}, "config": OptimizerConfig()}


def _trainer(policy, trainable, mesh=MeshConfig(fsdp=2, tensor=2)):
    optimizer = OptimizerConfig(peak_lr=1e-2, warmup_steps=1, decay_steps=10).create()
    return Trainer(
        ModelDef(policy, trainable),
        optimizer,
        ema_decay=0.5,
        seed=1,
        mesh=mesh.create(),
        rules=ShardingRules(),
        dataset_names=("one", "two"),
    )


@pytest.fixture(scope="module")
def base_run(tmp_path_factory, tiny_policy, contract_of):
    """A run of ours whose weights others start from."""
    directory = tmp_path_factory.mktemp("base") / "checkpoints"
    trainer = _trainer(tiny_policy, Trainable(), MeshConfig())
    checkpointer = Checkpointer(directory)
    state = trainer.init()
    checkpointer.save(state, position=0, contract=contract_of(tiny_policy), **SAVED)
    checkpointer.close()
    return directory.parent


@pytest.fixture(scope="module")
def tuned(tmp_path_factory, base_run, tiny_policy, tiny_batch, contract_of):
    """Two steps of LoRA from it, on a base in 8 bits that is kept, and noted only: (run dirs, trainer, state)."""
    trainable = Trainable(LORA, frozen_dtype="int8")
    trainer = _trainer(tiny_policy, trainable)
    start = WarmStart(str(base_run))
    dirs = {}
    for name, source in (("kept", None), ("noted", start)):
        weights, plan = warm_start(start, trainer)
        state = trainer.init_from(weights)
        dirs[name] = tmp_path_factory.mktemp(name)
        checkpointer = Checkpointer(dirs[name] / "checkpoints", trainable=trainable)
        checkpointer.begin(state, source=source)
        for _ in range(2):
            state, _ = trainer.train_step(state, put_batch(tiny_batch, trainer.mesh))
        checkpointer.save(state, position=16, contract=contract_of(tiny_policy), **SAVED)
        checkpointer.close()
    fresh = {row["weight"] for row in plan.report if row["from"] == "fresh"}
    assert fresh == {name for name in flatten(trainer.model.shapes) if "_lora/" in name}
    return dirs, trainer, state


def test_a_checkpoint_holds_what_is_trained_alone(tuned):
    dirs, trainer, _ = tuned
    for item in ("params", "ema"):
        stored = OrbaxArrays(dirs["kept"] / "checkpoints" / "2" / item)
        assert set(stored.shapes) == trainer.trained
    assert (dirs["kept"] / "base").is_dir()
    assert not (dirs["noted"] / "base").exists()
    held = OrbaxArrays(dirs["kept"] / "base")
    assert held.read("vlm/layers/gate_up/qvalue").dtype == np.int8


@pytest.mark.parametrize("name", ["kept", "noted"])
def test_it_goes_on_with_the_same_base_on_another_mesh(tuned, tiny_policy, contract_of, name):
    dirs, trainer, state = tuned
    other = _trainer(tiny_policy, trainer.model.trainable, MeshConfig(data=4))
    checkpointer = Checkpointer(dirs[name] / "checkpoints", trainable=trainer.model.trainable)
    restored, position, _ = checkpointer.restore(
        other.abstract,
        other.shardings,
        contract=contract_of(tiny_policy),
        frozen_from=lambda start: frozen_from(start, other),
    )
    assert (position, int(restored.step)) == (16, 2)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(restored), jax.device_get(state))
    placed = jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), restored, other.shardings)
    assert all(jax.tree.leaves(placed))
    # What it notes of its base, it notes again.
    later = dataclasses.replace(restored, step=jnp.int32(3))
    checkpointer.save(later, position=24, contract=contract_of(tiny_policy), **SAVED)
    checkpointer.close()
    before, after = (read_record(dirs[name] / "checkpoints" / step)["base"] for step in "23")
    assert before == after
    assert after["digest"].keys() == flatten(other.model.shapes).keys() - other.model.trained


@pytest.mark.parametrize("name", ["kept", "noted"])
def test_it_is_served_merged(tuned, tiny_policy, tiny_batch, name):
    """What is served computes what was trained; and so does a run that starts from it."""
    dirs, trainer, state = tuned
    parts = load_policy_parts(dirs[name])
    plain = flatten(merged(trainer.model, _dequantized(state.weights())))
    served = flatten(ModelDef(tiny_policy).shapes)
    arrays = open_weights(dirs[name])
    got = read_weights(arrays, plan_load(tiny_policy, arrays))
    assert set(got) == set(served)
    for key, value in got.items():
        np.testing.assert_allclose(value, plain[key], atol=1e-6, err_msg=key)
    observation = {k: v for k, v in tiny_batch.items() if k not in ("actions", "action_mask", "dataset_id", "position")}
    sample = jax.jit(lambda model, obs: model.sample_actions(jax.random.key(0), obs, num_steps=1))
    trained = jax.jit(lambda w, obs: trainer.model.bind(w).sample_actions(jax.random.key(0), obs, num_steps=1))
    expected = np.asarray(trained(jax.device_get(state.weights()), observation))
    np.testing.assert_allclose(sample(parts.model, observation), expected, atol=1e-3 * np.abs(expected).max())


def _dequantized(weights):

    leaves = {k: qwix.dequantize(v) if isinstance(v, qwix.QArray) else v for k, v in flatten(weights).items()}
    return unflatten({k: jnp.asarray(jax.device_get(v)) for k, v in leaves.items()})


def test_another_base_is_refused(tuned, base_run, tiny_policy, contract_of, tmp_path):
    """Of both kinds: when a run goes on, and when it is served."""
    dirs, trainer, _ = tuned
    kept = tmp_path / "kept"
    shutil.copytree(dirs["kept"], kept)
    shutil.rmtree(kept / "base")
    with pytest.raises(CheckpointError, match="base is missing: the weights that this run does not train"):
        load_policy_parts(kept)
    checkpointer = Checkpointer(kept / "checkpoints", trainable=trainer.model.trainable)
    with pytest.raises(CheckpointError, match="base is missing"):
        checkpointer.restore(trainer.abstract, trainer.shardings, contract=contract_of(tiny_policy))
    checkpointer.close()

    other = _trainer(dataclasses.replace(tiny_policy), Trainable(), MeshConfig())
    moved = jax.tree.map(lambda x: x + 1e-3, other.init())
    moved = dataclasses.replace(moved, step=np.int32(0))
    directory = tmp_path / "other" / "checkpoints"
    checkpointer = Checkpointer(directory)
    checkpointer.save(moved, position=0, contract=contract_of(tiny_policy), **SAVED)
    checkpointer.close()
    noted = tmp_path / "noted"
    shutil.copytree(dirs["noted"], noted)
    for step in (noted / "checkpoints").glob("[0-9]*"):
        path = step / "contract" / "metadata"
        record = json.loads(path.read_text())
        record["base"]["source"]["checkpoint"] = str(directory.parent)
        path.write_text(json.dumps(record))
    with pytest.raises(CheckpointError, match="is not what was trained on"):
        load_policy_parts(noted)
    checkpointer = Checkpointer(noted / "checkpoints", trainable=trainer.model.trainable)
    with pytest.raises(CheckpointError, match=r"is not what was trained on: \d+ of \d+ weights differ: expert"):
        checkpointer.restore(
            trainer.abstract,
            trainer.shardings,
            contract=contract_of(tiny_policy),
            frozen_from=lambda start: frozen_from(start, trainer),
        )
    checkpointer.close()


def test_other_weights_cannot_be_trained_halfway(tuned, tiny_policy, contract_of):
    dirs, _, _ = tuned
    trainer = _trainer(tiny_policy, Trainable(LORA))
    checkpointer = Checkpointer(dirs["kept"] / "checkpoints", trainable=trainer.model.trainable)
    with pytest.raises(CheckpointError, match="this run differs in trainable"):
        checkpointer.restore(trainer.abstract, trainer.shardings, contract=contract_of(tiny_policy))
    checkpointer.close()


def test_fresh_weights_cannot_be_noted(base_run, tiny_policy):
    """They are nowhere to be read again."""
    start = WarmStart(str(base_run), reinitialize=("^vision/",))
    with pytest.raises(CheckpointError, match=r"frozen weights that .* does not have: vision/.* save_frozen=True"):
        frozen_from(start, _trainer(tiny_policy, Trainable(LORA)))
    with pytest.raises(CheckpointError, match="does not have: vision/"):
        warm_start(start, _trainer(tiny_policy, Trainable(LORA)), again=True)
    with pytest.raises(WeightsError, match="matches no weight"):
        warm_start(WarmStart(str(base_run), reinitialize=("^visoin/",)), _trainer(tiny_policy, Trainable(LORA)))
    # Unless they are somewhere else.
    whole, trainer = WarmStart(str(base_run)), _trainer(tiny_policy, Trainable(LORA))
    both = dataclasses.replace(start, beside=whole)
    expected, got = (flatten(jax.device_get(frozen_from(s, trainer))) for s in (whole, both))
    assert expected.keys() == got.keys()
    jax.tree.map(np.testing.assert_array_equal, got, expected)


def test_sums_over_bits_see_every_change():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(4, 6)).astype(np.float32)
    before = int(bit_sum(jnp.asarray(x)))
    one = x.copy()
    one[2, 3] = np.nextafter(one[2, 3], np.float32(9))
    swapped = x.copy()
    swapped[[0, 1]] = swapped[[1, 0]]
    assert len({before, *(int(bit_sum(jnp.asarray(y))) for y in (one, swapped, -x))}) == 4
    mesh = MeshConfig(fsdp=2, tensor=2).create()
    spread = jax.device_put(x, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp", "tensor")))
    assert int(bit_sum(spread)) == before

    def mixed(word: int, place: int) -> int:
        h = word ^ (place * 0x9E3779B9 % 2**32)
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
            h = (h ^ h >> shift) * factor % 2**32
        return h ^ h >> 16

    words = x.view(np.uint32).ravel().tolist()
    assert before == sum(map(mixed, words, range(24))) % 2**32
    assert digest({"a": {"b": jnp.asarray(x)}}) == {"a/b": before}
    assert int(bit_sum(jnp.asarray([1, -2, 7], jnp.int4))) == sum(map(mixed, (1, 254, 7), range(3))) % 2**32


def test_it_is_converted_merged_and_with_its_overlay(tuned, tiny_policy, tmp_path):
    """Both are read back and compared by the program itself; openpi would merge the second into the first."""
    dirs, trainer, state = tuned
    program = SimpleNamespace(**runpy.run_path(str(Path(__file__).parents[3] / "train" / "convert.py")))
    console = Console(file=io.StringIO(), width=200)

    def convert(name: str, **options: Any) -> Any:
        assert program.main(program.Args(dirs["kept"], tmp_path / name, "openpi", **options), console) == 0
        return open_arrays(tmp_path / name, lora_scale=1.0 if options else None)

    whole, beside = convert("merged"), convert("beside", keep_lora=True)
    expected = flatten(merged(trainer.model, _dequantized(state.weights())))
    for arrays in (whole, beside):
        got = read_weights(arrays, plan_load(tiny_policy, arrays))
        for name, value in expected.items():
            np.testing.assert_allclose(got[name], value, atol=1e-6, err_msg=name)
    with pytest.raises(ValueError, match="--keep-lora is for a run with LoRA and --to openpi"):
        program.main(program.Args(dirs["kept"], tmp_path / "other", "lerobot", keep_lora=True), console)
