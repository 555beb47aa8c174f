"""One training step against the same step written out by hand, on one device and on four."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from openpi_like.data.augment import Augment, augment_batch
from openpi_like.draws import named_key
from openpi_like.partition import ShardingRules
from openpi_like.train.optimizer import OptimizerConfig
from openpi_like.train.sharding import MeshConfig, put_batch
from openpi_like.train.state import ModelDef, Trainer

OPTIMIZER = OptimizerConfig(peak_lr=1e-2, end_lr=1e-3, warmup_steps=1, decay_steps=10)


def _trainer(policy, mesh: MeshConfig, ema_decay: float | None = 0.9, augment: Augment | None = None) -> Trainer:
    return Trainer(
        ModelDef(policy),
        OPTIMIZER.create(),
        ema_decay=ema_decay,
        seed=3,
        mesh=mesh.create(),
        rules=ShardingRules(),
        dataset_names=("one", "two"),
        augment=augment,
    )


@pytest.fixture(scope="module")
def trainer(tiny_policy):
    return _trainer(tiny_policy, MeshConfig(data=1, fsdp=2, tensor=2))


def _run(trainer, batch, steps):
    state, values = trainer.init(), None
    for _ in range(steps):
        state, values = trainer.train_step(state, put_batch(batch, trainer.mesh))
    return jax.device_get(state), jax.device_get(values)


def test_a_step_is_what_it_says(trainer, tiny_batch):
    state, values = _run(trainer, tiny_batch, 1)
    params = jax.device_get(trainer.init().params)
    key = named_key(jax.random.key(3), "loss")
    loss_fn = lambda p, batch: trainer.model.bind(p).loss(key, batch)  # noqa: E731
    (loss, per_sample), grads = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))(params, tiny_batch)
    norm = float(optax.tree.norm(grads))
    assert values["loss"] == pytest.approx(float(loss), rel=1e-5)
    assert values["grad_norm"] == pytest.approx(norm, rel=1e-4)
    per_sample = np.asarray(per_sample["loss"])
    assert values["loss/one"] == pytest.approx(per_sample[::2].mean(), rel=1e-5)
    assert values["loss/two"] == pytest.approx(per_sample[1::2].mean(), rel=1e-5)
    assert (values["samples/one"], values["samples/two"]) == (4, 4)
    # First Adam step after clipping to norm 1: moments cancel, so each weight moves by lr * g / (|g| + eps).
    clip = min(1.0, 1.0 / norm)
    for old, new, average, g in zip(*map(jax.tree.leaves, (params, state.params, state.ema, grads)), strict=True):
        g = np.asarray(g) * clip
        expected = old - 0.5e-2 * (g / (np.abs(g) + 1e-8) + 1e-10 * old)
        sure = np.abs(g) > 1e-5  # below, rounding of g decides its sign
        np.testing.assert_allclose(new[sure], expected[sure], atol=2e-5)
        np.testing.assert_allclose(average, 0.9 * old + 0.1 * new, atol=1e-6)


def test_four_devices_compute_what_one_does(trainer, tiny_policy, tiny_batch):
    for mesh in (MeshConfig(), MeshConfig(fsdp=4)):
        other = _trainer(tiny_policy, mesh)
        a, _ = _run(trainer, tiny_batch, 2)
        b, _ = _run(other, tiny_batch, 2)
        for x, y in zip(jax.tree.leaves(a.ema), jax.tree.leaves(b.ema), strict=True):
            np.testing.assert_allclose(x, y, atol=2e-3)  # Adam's first steps are the sign of tiny gradients


def test_the_state_is_sharded_like_its_weights(trainer):
    state = trainer.init()
    weight = state.params["vlm"]["embedding"]
    moments = [x for x in jax.tree.leaves(state.opt_state) if x.shape == weight.shape]
    assert len(moments) >= 2
    for x in (weight, state.ema["vlm"]["embedding"], *moments):
        assert {s.data.shape for s in x.addressable_shards} == {(150, 8)}  # vocab over tensor, embed over fsdp


def test_draws_belong_to_the_sample_and_not_to_the_step_or_the_row(trainer, tiny_batch):
    """Rows in another order, as another number of hosts gives them, make the same step."""
    order = np.array([0, 4, 1, 5, 2, 6, 3, 7])  # those of two hosts
    turned = jax.tree.map(lambda x: x[order], tiny_batch)
    state, values = _run(trainer, tiny_batch, 1)
    other, got = _run(trainer, turned, 1)
    for name, value in values.items():
        assert got[name] == pytest.approx(float(value), rel=1e-4)
    # The optimiser's first moments are the gradients, but for a factor.
    gradients, others = ([x for x in jax.tree.leaves(s.opt_state) if x.ndim] for s in (state, other))
    scale = max(np.abs(g).max() for g in gradients)
    for g, same in zip(gradients, others, strict=True):
        np.testing.assert_allclose(same, g, rtol=1e-3, atol=1e-5 * scale)
    later = dataclasses.replace(trainer.init(), step=jnp.int32(7))
    assert trainer.train_step(later, put_batch(tiny_batch, trainer.mesh))[1]["loss"] == values["loss"]
    elsewhere = tiny_batch | {"position": tiny_batch["position"] + np.uint32(1)}
    assert abs(_run(trainer, elsewhere, 1)[1]["loss"] - values["loss"]) > 1e-3


def test_without_average_none_is_kept(tiny_policy):
    trainer = _trainer(tiny_policy, MeshConfig(), ema_decay=None)
    assert trainer.abstract.ema is None
    assert jnp.isfinite(optax.tree.norm(trainer.init().params))


class Brightness(nnx.Module):
    """A policy whose loss says what its images are."""

    def __init__(self) -> None:
        self.weight = nnx.Param(jnp.ones(3), axes=("embed",))

    def loss(self, key, batch):
        image = batch["images"]["base"]
        image = image / 127.5 - 1 if image.dtype == jnp.uint8 else image
        per_sample = ((image * self.weight[...]) ** 3).mean(axis=(1, 2, 3))
        return per_sample.mean(), {"loss": per_sample, "valid": jnp.ones(len(per_sample))}


def test_images_are_changed_in_the_step_by_their_position(tiny_batch):
    """A step with augmentation on four devices is a step without it on images that were changed before, on one."""
    policy = types.SimpleNamespace(create=lambda key: Brightness())
    config = Augment.octo()
    key, batch = named_key(jax.random.key(3), "augment"), tiny_batch
    changed = jax.device_get(jax.jit(lambda key, batch: augment_batch(key, batch, config))(key, batch))
    plain = _run(_trainer(policy, MeshConfig(data=1, fsdp=1, tensor=4)), tiny_batch, 1)[1]
    expected = _run(_trainer(policy, MeshConfig(data=1, fsdp=1, tensor=4)), changed, 1)[1]
    got = _run(_trainer(policy, MeshConfig(data=4), augment=config), batch, 1)[1]
    for name in ("loss", "loss/one", "loss/two", "grad_norm"):
        assert got[name] == pytest.approx(expected[name], rel=1e-5)
        assert got[name] != pytest.approx(plain[name], rel=1e-3)
