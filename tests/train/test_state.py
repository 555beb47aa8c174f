"""One training step against the same step written out by hand, on one device and on four."""

import copy
import dataclasses
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from openpi_like.batch import ActionTokens
from openpi_like.data.augment import Augment, augment_batch
from openpi_like.data.prompts import FastPrompt
from openpi_like.draws import named_key
from openpi_like.models.lora import Lora
from openpi_like.models.weights import flatten
from openpi_like.partition import ShardingRules
from openpi_like.train.optimizer import OptimizerConfig
from openpi_like.train.sharding import MeshConfig, put_batch
from openpi_like.train.state import ModelDef, Trainable, Trainer

OPTIMIZER = OptimizerConfig(peak_lr=1e-2, end_lr=1e-3, warmup_steps=1, decay_steps=10)


def _trainer(
    policy,
    mesh: MeshConfig,
    ema_decay: float | None = 0.9,
    augment: Augment | None = None,
    trainable: Trainable = Trainable(),
    **options,
) -> Trainer:
    return Trainer(
        ModelDef(policy, trainable),
        OPTIMIZER.create(),
        ema_decay=ema_decay,
        seed=3,
        mesh=mesh.create(),
        rules=ShardingRules(),
        dataset_names=("one", "two"),
        augment=augment,
        **options,
    )


@pytest.fixture(scope="module")
def trainer(tiny_policy):
    return _trainer(tiny_policy, MeshConfig(data=1, fsdp=2, tensor=2))


def _run(trainer, batch, steps):
    state, values = trainer.init(), None
    for _ in range(steps):
        state, values = trainer.train_step(state, put_batch(batch, trainer.mesh))
    return jax.device_get(state), jax.device_get(values)


def test_a_key_that_is_known_while_tracing_is_the_same_and_compiles_nothing():
    def known():
        with jax.ensure_compile_time_eval():
            key = jax.random.key(3)
        return jax.random.key_data(named_key(key, "vlm"))

    expected = jax.random.key_data(jax.jit(named_key, static_argnums=1)(jax.random.key(3), "vlm"))
    np.testing.assert_array_equal(jax.jit(known)(), expected)
    assert "threefry" not in jax.jit(known).lower().as_text()


def test_datasets_of_one_name_are_counted_together(trainer):
    several = copy.copy(trainer)
    several.dataset_names = ("arm", "cart", "arm")
    loss, dataset = jnp.array([1.0, 2.0, 4.0, 8.0, 16.0]), jnp.array([0, 2, 1, 2, 0])
    got = {k: float(v) for k, v in several._by_dataset({"loss": loss}, dataset).items()}
    assert got == {"loss/arm": 27 / 4, "samples/arm": 4, "loss/cart": 4, "samples/cart": 1}


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
    """Their gradients, not weights: Adam's first steps are the sign of gradients, however tiny."""
    expected, values = _first_gradient(trainer, tiny_batch)
    scale = max(np.abs(g).max() for g in expected)
    got, others = _first_gradient(_trainer(tiny_policy, MeshConfig()), tiny_batch)
    assert others["loss"] == pytest.approx(float(values["loss"]), rel=1e-6)
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6 * scale)


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


# ---- Accumulation ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def insulated(tiny_policy):
    """Both losses, each over the samples that have it."""
    tokens = ActionTokens(max_len=6, count=40, skip=2)
    return dataclasses.replace(tiny_policy, pi05=True, prompt_format=FastPrompt(), action_tokens=tokens, unroll=True)


def _with_answers(batch, policy):
    """The batch with tokens to predict in some of the samples, and actions in some."""
    rng = np.random.default_rng(4)
    B, S = len(batch["prompt"]), policy.prompt_len + policy.answer_len
    at = np.arange(S)[None]
    mask = at < rng.integers(10, S + 1, (B, 1))
    answered = np.array([1, 1, 0, 1, 1, 1, 0, 1], bool)[:, None]
    acts = np.array([1, 0, 1, 1, 0, 1, 1, 0], bool)[:, None, None]
    return batch | {
        "prompt": np.where(mask, rng.integers(4, policy.vocab_size, (B, S)), 0).astype(np.int32),
        "prompt_mask": mask,
        "prompt_causal": mask & (at >= 8),
        "prompt_loss": mask & (at >= 8) & answered,
        "prompt_action": mask & (at >= 9),
        "action_mask": batch["action_mask"] & acts,
        "actions": np.where(batch["action_mask"] & acts, batch["actions"], 0).astype(np.float32),
    }


def _first_gradient(trainer, batch):
    """Adam's first moment after a step is the gradient, but for a factor."""
    state, values = _run(trainer, batch, 1)
    return jax.tree.leaves(state.opt_state[1][0].mu), values


def test_a_batch_in_parts_makes_the_same_step(insulated, tiny_batch):
    """Of two losses. Parts have unlike numbers of samples that count: their means would be weighed wrongly."""
    policy, batch = insulated, _with_answers(tiny_batch, insulated)
    batch["action_mask"] = batch["action_mask"] & (np.arange(8) != 6)[:, None, None]
    mesh = MeshConfig(data=1, fsdp=2, tensor=2)
    expected, values = _first_gradient(_trainer(policy, mesh), batch)
    got, others = _first_gradient(_trainer(policy, mesh, accumulate=4), batch)
    scale = max(np.abs(g).max() for g in expected)
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6 * scale)
    assert set(values) == set(others)
    for name, value in values.items():
        assert others[name] == pytest.approx(float(value), rel=1e-5), name
    assert (values["samples/flow_loss"], values["samples/text_loss"]) == (4, 6)


# ---- Parts that are not trained, steps that are not made -------------------------------------------------------------


def test_what_is_trained_has_the_gradient_that_it_has_when_all_is(trainer, tiny_policy, tiny_batch):
    """And is clipped by its own norm alone."""
    some = _trainer(
        tiny_policy, MeshConfig(data=1, fsdp=2, tensor=2), trainable=Trainable(frozen=("^vision/", "^vlm/"))
    )
    (state, values), (whole, _) = _run(some, tiny_batch, 1), _run(trainer, tiny_batch, 1)
    mu, every = (flatten(of.opt_state[1][0].mu) for of in (state, whole))
    assert set(mu) == {name for name in every if not name.startswith(("vision/", "vlm/"))}
    norm = lambda of: float(np.sqrt(sum(np.square(g, dtype=np.float64).sum() for g in of.values())))  # noqa: E731
    # Moments are 0.1 of the clipped gradients: both have norm 1 before it, each over its own weights.
    assert values["grad_norm"] > 1
    assert norm(mu) == pytest.approx(norm(every), rel=1e-5) == pytest.approx(0.1, rel=1e-4)
    share = norm({name: every[name] for name in mu}) / norm(every)
    assert share < 0.99
    for name, g in mu.items():
        np.testing.assert_allclose(g * share, every[name], rtol=1e-4, atol=1e-6 * np.abs(g).max(), err_msg=name)


@pytest.mark.parametrize(
    ("trainable", "message"),
    [
        (Trainable(lora=Lora(), frozen=("^vlm/",)), "frozen '^vlm/' matches overlays, such as vlm/layers/"),
        (Trainable(frozen_dtype="int8"), "frozen_dtype='int8', but all weights are trained"),
        (Trainable(frozen=("^vison/", ".")), "frozen '^vison/' matches no weight"),
        (Trainable(frozen=(".",)), "nothing is left to train"),
    ],
)
def test_what_cannot_be_trained_is_refused(tiny_policy, trainable, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        ModelDef(tiny_policy, trainable)


def test_frozen_weights_stay_and_take_no_moments(tiny_policy, tiny_batch):
    frozen = Trainable(frozen=("^vision/", "^vlm/"), frozen_dtype="bfloat16")
    trainer = _trainer(tiny_policy, MeshConfig(data=1, fsdp=2, tensor=2), trainable=frozen)
    before = jax.device_get(trainer.init())
    after, _ = _run(trainer, tiny_batch, 2)
    jax.tree.map(np.testing.assert_array_equal, after.frozen, before.frozen)
    trained = {name.split("/")[0] for name in flatten(after.params)}
    assert trained == {"expert", "action_in", "action_out", "state_in", "action_time_in", "action_time_out"}
    assert all((a != b).any() for a, b in zip(*map(jax.tree.leaves, (after.params, before.params)), strict=True))
    assert after.frozen["vlm"]["layers"]["q"].dtype == jnp.bfloat16
    assert after.frozen["vlm"]["final_norm"]["scale"].dtype == jnp.float32
    sizes = lambda tree: sum(x.size for x in jax.tree.leaves(tree) if x.ndim)  # noqa: E731
    assert sizes(after.opt_state) == 2 * sizes(after.params) == 2 * sizes(after.ema)
    for name, sharding in flatten(trainer.shardings.frozen).items():
        assert sharding == trainer.placement[name], name
    whole = after.weights()
    jax.tree.map(np.testing.assert_array_equal, whole["expert"], after.ema["expert"])
    assert str(jax.tree.structure(whole)) == str(jax.tree.structure(trainer.model.shapes))


def test_a_step_that_is_not_finite_changes_nothing_but_the_count(tiny_policy, tiny_batch):
    trainer = _trainer(tiny_policy, MeshConfig(fsdp=2))
    bad = tiny_batch | {"state": np.where(np.arange(8)[:, None] == 5, np.nan, tiny_batch["state"]).astype(np.float32)}
    before = jax.device_get(trainer.init())
    after, values = _run(trainer, bad, 1)
    assert (values["skipped"], int(after.step)) == (1, 1)
    assert not np.isfinite(values["loss"])
    assert np.isfinite(values["loss/one"])  # sample 5 is of the other dataset
    jax.tree.map(
        np.testing.assert_array_equal,
        (after.params, after.ema, after.opt_state),
        (
            before.params,
            before.ema,
            before.opt_state,
        ),
    )
    assert _run(trainer, tiny_batch, 1)[1]["skipped"] == 0


class Brightness(nnx.Module):
    """A policy whose loss says what its images are."""

    config = types.SimpleNamespace(perception=None)

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
