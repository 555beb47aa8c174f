"""Checkpoints that older code wrote (see tests/bench/make_old_checkpoint.py) load, serve, and go on."""

import dataclasses
import tarfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from openpi_like.config import from_json, to_json
from openpi_like.models.lora import Lora, LoraRule
from openpi_like.models.weights import flatten
from openpi_like.partition import ShardingRules
from openpi_like.train.checkpoints.checkpoint import Checkpointer, find_step
from openpi_like.train.checkpoints.contract import read_contract
from openpi_like.train.checkpoints.load import load_policy_parts
from openpi_like.train.optimizer import OptimizerConfig
from openpi_like.train.sharding import MeshConfig, put_batch
from openpi_like.train.state import ModelDef, Trainable, Trainer

WRITTEN = Path(__file__).parent / "written_before"


@pytest.fixture(scope="module", params=["full", "lora"])
def run(request, tmp_path_factory):
    """A run of two steps as 3157ead wrote it, and what its policy sampled: (directory, trainable, actions)."""
    directory = tmp_path_factory.mktemp(request.param)
    with tarfile.open(WRITTEN / f"{request.param}.tar.gz") as tar:
        # As `filter="data"`, which Python before 3.11.4 does not know.
        tar.extraction_filter = getattr(tarfile, "data_filter", None)
        tar.extractall(directory)
    trainable = Trainable(Lora()) if request.param == "lora" else Trainable()
    return directory, trainable, np.load(WRITTEN / "actions.npz")[request.param]


def inputs(config, B=2):
    rng = np.random.default_rng(0)

    def fill(x):
        if x.dtype == bool:
            return np.ones(x.shape, bool)
        if np.issubdtype(x.dtype, np.floating):
            return rng.standard_normal(x.shape, np.float32)
        return rng.integers(4, 200, x.shape).astype(x.dtype)

    return jax.tree.map(fill, config.batch_shapes(B)) | {"dataset_id": np.zeros(B, np.int32)}


def test_its_policy_samples_what_it_did(run):
    directory, _, expected = run
    model = load_policy_parts(directory).model
    batch = inputs(model.config)
    noise = jnp.asarray(np.random.default_rng(1).standard_normal(batch["actions"].shape, np.float32))
    seen = model.config.observation(jax.tree.map(jnp.asarray, batch))
    np.testing.assert_allclose(model.sample_actions(jax.random.key(0), seen, noise=noise), expected, atol=2e-6)


def test_its_run_goes_on(run):
    directory, trainable, _ = run
    contract = read_contract(find_step(directory))
    trainer = Trainer(
        ModelDef(contract.policy, trainable),
        OptimizerConfig(peak_lr=1e-2, warmup_steps=1, decay_steps=10).create(),
        ema_decay=None if trainable.lora else 0.9,
        seed=0,
        mesh=MeshConfig(fsdp=2).create(),
        rules=ShardingRules(),
        dataset_names=("one",),
    )
    checkpointer = Checkpointer(directory / "checkpoints", trainable=trainable)
    state, position, order = checkpointer.restore(trainer.abstract, trainer.shardings, contract=contract)
    checkpointer.close()
    assert (position, order, int(state.step)) == (4, {"seed": 0}, 2)
    assert any(np.abs(np.asarray(x)).max() > 0 for x in jax.tree.leaves(state.opt_state) if np.ndim(x) > 1)
    before = flatten(jax.device_get(state.params))
    after, metrics = trainer.train_step(state, put_batch(inputs(contract.policy, 4), trainer.mesh))
    assert np.isfinite(float(metrics["loss"]))
    assert any((before[name] != np.asarray(x)).any() for name, x in flatten(jax.device_get(after.params)).items())


def test_a_pattern_as_it_was_is_the_pattern_as_it_is():
    """In a run's config too, which may name it as it was."""
    before = LoraRule(r"^(vlm|expert)/layers/(q|kv|out|gate_up|down)$", rank=3)
    assert from_json(to_json(before)) == dataclasses.replace(before, pattern=Lora().rules[0].pattern)
    other = LoraRule("^vlm/layers/q$")
    assert from_json(to_json(other)) == other
