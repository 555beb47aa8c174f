"""The seam of policies: one that is defined here, and nowhere else, trains, is saved, goes on, is loaded and served."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from openpi_like import config as configs
from openpi_like.config import trust
from openpi_like.draws import named_key
from openpi_like.models.backbone import masked_means
from openpi_like.models.param import Linear, memory
from openpi_like.models.policy import Model, PolicyConfig
from openpi_like.models.weights import flatten
from openpi_like.partition import ShardingRules
from openpi_like.robots.sawyer import SAWYER
from openpi_like.serve.client import PolicyClient
from openpi_like.serve.policies import Policies
from openpi_like.serve.policy import Policy
from openpi_like.train.checkpoints.checkpoint import Checkpointer
from openpi_like.train.checkpoints.load import load_policy_parts
from openpi_like.train.optimizer import OptimizerConfig
from openpi_like.train.sharding import MeshConfig, put_batch
from openpi_like.train.state import ModelDef, Trainer
from openpi_like.train.validation import held_out_losses
from tests.serve.running import serving
from tests.train.run_files import ORDER


@dataclasses.dataclass(frozen=True, kw_only=True)
class ToyConfig(PolicyConfig):
    """A line from the mean of what the backbone sees, and the state, to a chunk."""

    gain: float = 1.0

    def create(self, key: jax.Array) -> "Toy":
        return Toy(self, key)


class Toy(Model):
    config: ToyConfig

    def __init__(self, config: ToyConfig, key: jax.Array) -> None:
        super().__init__(config, key)
        c = config
        width = c.backbone.language.width + c.state_dim
        shape = (width, c.action_horizon, c.action_dim)
        self.line = Linear(named_key(key, "line"), "BD,DAJ->BAJ", shape, ("embed", None, "action"))
        # The mean of all actions that it was trained on, and how many samples that was.
        self.mean = memory((c.action_horizon, c.action_dim), (None, "action"))
        self.count = memory((), ())

    def predict(self, observation: Any) -> jax.Array:
        seen = self.backbone.embed_prefix(observation)
        mean = (seen.tokens * seen.valid[..., None]).sum(1) / seen.valid.sum(1, keepdims=True)
        line = self.line(jnp.concatenate([mean.astype(jnp.float32), observation["state"]], axis=-1))
        return self.mean[...] + self.config.gain * line

    def loss(self, key: jax.Array, batch: Any, *, counts: Any = None) -> Any:
        error = jnp.abs(self.predict(batch) - jnp.where(batch["action_mask"], batch["actions"], 0.0))
        return masked_means(error, batch["action_mask"], None if counts is None else counts["chunks"])

    def remember(self, key: jax.Array, batch: Any) -> Any:
        n = batch["actions"].shape[0]
        count = self.count[...] + n
        mean = self.mean[...] + (batch["actions"].sum(0) - n * self.mean[...]) / count
        return {"mean": mean, "count": count}

    def loss_counts(self, batch: Any) -> Any:
        return {"chunks": batch["action_mask"].any((1, 2)).sum().astype(jnp.float32)}

    def validation_losses(self, key: jax.Array, batch: Any) -> Any:
        return {"loss": self.loss(key, batch)[0]}

    def sample_actions(self, key: jax.Array, observation: Any, *, action_mask: Any = None) -> jax.Array:
        actions = self.predict(observation)
        return actions if action_mask is None else jnp.where(action_mask, actions, 0.0)


@pytest.fixture
def trusted(monkeypatch: Any) -> None:
    monkeypatch.setattr(configs, "_trusted", set(configs._trusted))
    trust(__name__.split(".")[0])


def _trainer(toy: ToyConfig, *, weight_decay: float = 0.0, ema_decay: float | None = None) -> Trainer:
    return Trainer(
        ModelDef(toy),
        OptimizerConfig(peak_lr=3e-2, end_lr=1e-3, warmup_steps=2, decay_steps=60, weight_decay=weight_decay).create(),
        ema_decay=ema_decay,
        seed=0,
        mesh=MeshConfig(fsdp=2, tensor=2).create(),
        rules=ShardingRules(),
        dataset_names=("one", "two"),
    )


def test_a_policy_of_ones_own(tmp_path: Any, policy: Any, contract_of: Any, tiny_batch: Any, trusted: None) -> None:
    fields = {f.name: getattr(policy, f.name) for f in dataclasses.fields(ToyConfig) if hasattr(policy, f.name)}
    toy = ToyConfig(**fields, gain=2.0)
    batch = _batch(toy, tiny_batch)

    # It trains, and is validated.
    trainer = _trainer(toy, ema_decay=0.5)
    state, losses = trainer.init(), []
    placed = put_batch(batch, trainer.mesh)
    for _ in range(60):
        state, metrics = trainer.train_step(state, placed)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0] / 4
    held_out = jax.jit(held_out_losses, static_argnums=0)(trainer, state.params, placed, jax.random.key(0))
    assert float(held_out["loss"]) == pytest.approx(losses[-1], rel=0.5)

    # What it keeps is not trained but written, and the same everywhere.
    assert float(state.params["count"]) == 480
    np.testing.assert_allclose(state.params["mean"], batch["actions"].mean(0), atol=1e-5)
    assert metrics["grad_norm"] > 0

    # It is saved, and the run goes on from there, on another mesh.
    contract = contract_of(toy)
    checkpointer = Checkpointer(tmp_path / "checkpoints")
    checkpointer.save(state, position=480, order=ORDER, contract=contract, config=OptimizerConfig())
    checkpointer.close()
    again = Checkpointer(tmp_path / "checkpoints")
    restored, position, _ = again.restore(trainer.abstract, trainer.shardings, contract=contract)
    again.close()
    assert position == 480
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(restored.params), jax.device_get(state.params))

    # It is served, with averaged weights, but for what it keeps.
    parts = load_policy_parts(tmp_path)
    np.testing.assert_allclose(parts.model.mean[...], batch["actions"].mean(0), atol=1e-5)
    served = Policy(parts)
    observation = {
        "images": {"base": np.full((64, 64, 3), 100, np.uint8)},
        "state": np.zeros(SAWYER.state_size, np.float32),
        "prompt": "press the button",
        "robot": SAWYER.name,
    }
    expected = served.infer(observation)["actions"]
    assert expected.shape == (SAWYER.action_horizon, SAWYER.action_size)
    with serving(Policies({"toy": served})) as server:
        client = PolicyClient(port=server.port)
        np.testing.assert_array_equal(client.infer(observation)["actions"], expected)
        client.close()


def test_it_cannot_be_stored_without_trust(policy: Any) -> None:
    fields = {f.name: getattr(policy, f.name) for f in dataclasses.fields(ToyConfig) if hasattr(policy, f.name)}
    with pytest.raises(TypeError, match="OPENPI_LIKE_TRUST"):
        configs.to_json(ToyConfig(**fields))


def _batch(toy: ToyConfig, tiny_batch: Any) -> Any:
    """`tiny_batch` in the shapes of this policy, its actions a function of its states."""
    rng = np.random.default_rng(0)
    shapes = toy.batch_shapes(8)

    def fill(x: jax.ShapeDtypeStruct) -> np.ndarray:
        if x.dtype == bool:
            return np.ones(x.shape, bool)
        if np.issubdtype(x.dtype, np.floating):
            return rng.standard_normal(x.shape).astype(np.float32)
        return rng.integers(4, 200, x.shape).astype(x.dtype)

    batch = jax.tree.map(fill, shapes) | {"dataset_id": tiny_batch["dataset_id"]}
    batch["actions"] = np.broadcast_to(np.tanh(batch["state"])[:, None], batch["actions"].shape).copy()
    return batch


class Reader(Toy):
    def remember(self, key: jax.Array, batch: Any) -> Any:
        return {"count": self.count[...].astype(jnp.bfloat16) + 1}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReaderConfig(ToyConfig):
    def create(self, key: jax.Array) -> "Reader":
        return Reader(self, key)


def test_memory_that_is_not_written_stays(policy: Any, tiny_batch: Any) -> None:
    """The optimiser would let it decay: it has none of it, nor has the average. Written in another type, it keeps its
    own."""
    fields = {f.name: getattr(policy, f.name) for f in dataclasses.fields(ToyConfig) if hasattr(policy, f.name)}
    trainer = _trainer(ReaderConfig(**fields), weight_decay=0.5, ema_decay=0.9)
    state = trainer.init()
    state.params["mean"] = state.params["mean"] + 2.0
    before = np.asarray(state.params["mean"])
    state, _ = trainer.train_step(state, put_batch(_batch(ReaderConfig(**fields), tiny_batch), trainer.mesh))
    for kept in (state.params, state.weights()):
        np.testing.assert_array_equal(kept["mean"], before)
        assert (float(kept["count"]), kept["count"].dtype) == (1.0, jnp.float32)
    learned = flatten(trainer.model.shapes).keys() - {"mean", "count"}
    adam = state.opt_state[1][0]
    assert all(flatten(of).keys() == learned for of in (state.ema, adam.mu, adam.nu))


class Wrong(Toy):
    def remember(self, key: jax.Array, batch: Any) -> Any:
        return {"count": jnp.zeros(2), "line/bias": jnp.zeros(())}


@dataclasses.dataclass(frozen=True, kw_only=True)
class WrongConfig(ToyConfig):
    def create(self, key: jax.Array) -> "Wrong":
        return Wrong(self, key)


def test_only_memory_is_written(policy: Any, tiny_batch: Any) -> None:
    fields = {f.name: getattr(policy, f.name) for f in dataclasses.fields(ToyConfig) if hasattr(policy, f.name)}
    trainer = _trainer(WrongConfig(**fields))
    batch = put_batch(_batch(WrongConfig(**fields), tiny_batch), trainer.mesh)
    with pytest.raises(ValueError, match=r"count: \(2,\), expected \(\); line/bias: \(\), expected no such memory"):
        trainer.train_step.lower(trainer.abstract, batch)
