"""pi0 itself: masks, loss denominators, sampling, determinism, trainability, and what it refuses."""

import copy
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.stats
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from openpi_like.draws import named_key, row_keys, sample_keys
from openpi_like.models.backbone import masked_means
from openpi_like.models.flow import draw_noise, draw_time
from openpi_like.models.gemma import rope, rotate
from openpi_like.models.pi0 import Pi0, Pi0Config
from openpi_like.models.weights import flat_weights
from tests.models.other_parts import PARTS, with_other

KEY = jax.random.key(7)


@pytest.fixture(scope="module")
def model(tiny_policy: Pi0Config) -> Pi0:
    return tiny_policy.create(jax.random.key(0))


@pytest.fixture(scope="module")
def draws(tiny_policy: Pi0Config, tiny_batch: Any) -> tuple[jax.Array, jax.Array]:
    """Noise and flow times of the samples."""
    return drawn(KEY, tiny_policy, tiny_batch)


def drawn(key: jax.Array, policy: Pi0Config, batch: Any) -> tuple[jax.Array, jax.Array]:
    keys = sample_keys(key, jnp.asarray(batch["position"]))
    return draw_noise(keys, (policy.action_horizon, policy.action_dim)), draw_time(keys)


flow_loss = nnx.jit(Pi0.flow_loss)
loss = nnx.jit(Pi0.loss)
sample = nnx.jit(Pi0.sample_actions, static_argnames="num_steps")


def observation_of(batch: Any) -> Any:
    return {k: v for k, v in batch.items() if k not in ("actions", "action_mask", "dataset_id", "position")}


def rows(batch: Any, index: Any) -> Any:
    return jax.tree.map(lambda x: x[index], batch)


# ---- What is masked has no effect ------------------------------------------------------------------------------------


def test_content_of_masked_entries_changes_nothing(model: Pi0, tiny_batch: Any, draws: Any) -> None:
    changed = copy.deepcopy(tiny_batch)
    for name, image in changed["images"].items():
        image[~changed["image_mask"][name]] = 200
    changed["prompt"][~changed["prompt_mask"]] = 5
    changed["actions"][~changed["action_mask"]] = 1e3
    assert any((changed["images"][c] != tiny_batch["images"][c]).any() for c in changed["images"])
    np.testing.assert_array_equal(flow_loss(model, changed, *draws), flow_loss(model, tiny_batch, *draws))
    a, b = (sample(model, KEY, observation_of(x)) for x in (changed, tiny_batch))
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("part", PARTS)
def test_content_of_valid_entries_changes_fresh_predictions(model: Pi0, tiny_batch: Any, draws: Any, part: str) -> None:
    changed = flow_loss(model, with_other(tiny_batch, part), *draws)
    difference = np.abs(changed - flow_loss(model, tiny_batch, *draws))
    assert (difference.max((1, 2)) > 1e-4).all()


# ---- Loss ------------------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 5), st.integers(1, 4), st.integers(1, 3), st.floats(0, 1), st.integers(0, 2**31))
def test_loss_is_the_mean_over_samples_of_means_over_valid_entries(B: int, A: int, J: int, p: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    error, mask = rng.normal(size=(B, A, J)).astype(np.float32) ** 2, rng.random((B, A, J)) < p
    error[~mask] = np.inf  # whatever is masked must not reach the sums
    scalar, metrics = masked_means(jnp.asarray(error), jnp.asarray(mask))
    means = [e[m].mean(dtype=np.float64) for e, m in zip(error, mask, strict=True) if m.any()]
    np.testing.assert_allclose(scalar, np.mean(means) if means else 0.0, rtol=1e-5)
    np.testing.assert_array_equal(metrics["valid"], mask.any((1, 2)).astype(np.float32))
    np.testing.assert_allclose(metrics["loss"][mask.any((1, 2))], np.asarray(means, np.float32), rtol=1e-5)


def test_loss_is_flow_loss_at_its_own_draws(model: Pi0, tiny_batch: Any, draws: Any) -> None:
    error = np.asarray(flow_loss(model, tiny_batch, *draws))
    scalar, metrics = loss(model, KEY, tiny_batch)
    mask = tiny_batch["action_mask"]
    expected = [error[i][mask[i]].mean() for i in range(8)]
    # Two programs round flow time differently in the last bit, and its embedding has phases up to 1571 rad.
    np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-4)
    np.testing.assert_allclose(scalar, np.mean(expected), rtol=1e-4)


def test_several_draws_are_averaged(model: Pi0, tiny_policy: Pi0Config, tiny_batch: Any, draws: Any) -> None:
    graph, state = nnx.split(model, nnx.Param)
    several = nnx.merge(graph, state)
    several.config = dataclasses.replace(tiny_policy, flow_draws=2)
    other = drawn(named_key(KEY, "draw 1"), tiny_policy, tiny_batch)
    errors = [flow_loss(model, tiny_batch, *d) for d in (draws, other)]
    expected = [masked_means(error, jnp.asarray(tiny_batch["action_mask"]))[0] for error in errors]
    assert abs(expected[0] - expected[1]) > 1e-3
    np.testing.assert_allclose(loss(several, KEY, tiny_batch)[0], np.mean(expected), rtol=1e-4)


def test_compatible_loss_counts_padding(model: Pi0, tiny_policy: Pi0Config, tiny_batch: Any, draws: Any) -> None:
    graph, state = nnx.split(model, nnx.Param)
    compatible = nnx.merge(graph, state)
    compatible.config = dataclasses.replace(tiny_policy, train_on_padding=True)
    scalar, _ = loss(compatible, KEY, tiny_batch)
    np.testing.assert_allclose(scalar, flow_loss(model, tiny_batch, *draws).mean(), rtol=1e-4)


def test_draws_belong_to_the_sample(model: Pi0, tiny_batch: Any) -> None:
    """Whatever its row and whatever else is in the batch; other keys and positions draw others."""
    whole = loss(model, KEY, tiny_batch)[1]["loss"]
    for order in (np.array([5, 2, 7, 0, 1, 6, 3, 4]), np.arange(4), np.arange(4, 8)):
        part = loss(model, KEY, rows(tiny_batch, order))[1]["loss"]
        np.testing.assert_allclose(part, whole[order], rtol=1e-4)
    np.testing.assert_array_equal(whole, loss(model, KEY, tiny_batch)[1]["loss"])
    elsewhere = tiny_batch | {"position": tiny_batch["position"] + np.array([1, 0], np.uint32)}
    for key, of in ((jax.random.key(8), tiny_batch), (KEY, elsewhere)):
        assert (np.abs(whole - loss(model, key, of)[1]["loss"]) > 1e-3).all()


def test_flow_times_follow_the_beta_distribution() -> None:
    time = np.asarray(jax.jit(draw_time)(row_keys(KEY, 20_000)))
    assert time.min() >= 0.001
    assert time.max() <= 1.0
    assert scipy.stats.kstest((time - 0.001) / 0.999, scipy.stats.beta(1.5, 1).cdf).statistic < 0.015


def test_noise_is_standard_normal_and_independent_of_times() -> None:
    keys = row_keys(KEY, 4000)
    noise, time = np.asarray(draw_noise(keys, (3, 2))), np.asarray(draw_time(keys))
    assert scipy.stats.kstest(noise.ravel(), "norm").statistic < 0.015
    assert abs(np.corrcoef(noise[:, 0, 0], time)[0, 1]) < 0.05
    assert abs(np.corrcoef(noise[:-1, 0, 0], noise[1:, 0, 0])[0, 1]) < 0.05


# ---- One model, however it is compiled -------------------------------------------------------------------------------


def test_unrolled_and_recomputed_layers_give_the_same_loss_and_gradients(
    tiny_policy: Pi0Config, filled: Any, batch: Any, draws: Any
) -> None:
    def evaluate(unroll: bool, remat: str | None) -> tuple[jax.Array, list[jax.Array]]:
        config = dataclasses.replace(tiny_policy, unroll=unroll, remat=remat)
        objective = nnx.value_and_grad(lambda model, *inputs: model.flow_loss(*inputs).mean())
        value, gradients = nnx.jit(objective)(filled(lambda: config.create(KEY)), batch, *draws)
        return value, jax.tree.leaves(gradients)

    value, gradients = evaluate(False, None)
    # Some gradients are zero but for rounding (a bias of keys shifts all logits alike), so the scale is that of all.
    scale = max(float(jnp.abs(g).max()) for g in gradients)
    for unroll, remat in ((True, None), (False, "nothing_saveable")):
        other_value, others = evaluate(unroll, remat)
        np.testing.assert_allclose(value, other_value, rtol=1e-5)
        for ours, theirs in zip(gradients, others, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-5 * scale)


def test_weights_of_the_shared_parts_are_drawn_alike_in_pi0_and_pi05(model: Pi0, tiny_policy: Pi0Config) -> None:
    config = dataclasses.replace(tiny_policy, pi05=True)
    ours, theirs = flat_weights(model), flat_weights(config.create(jax.random.key(0)))
    shared = ours.keys() & theirs.keys()
    assert {"vision/head/kernel", "vlm/layers/q", "expert/layers/kv", "action_in/kernel"} <= shared
    for name in shared:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)


def test_thirty_steps_overfit_one_batch(model: Pi0, batch: Any, draws: Any) -> None:
    graph, state = nnx.split(model, nnx.Param)
    optimizer = optax.adam(1e-2)

    def objective(weights: Any, batch: Any, draws: Any) -> jax.Array:
        return masked_means(nnx.merge(graph, weights).flow_loss(batch, *draws), batch["action_mask"])[0]

    @jax.jit
    def step(weights: Any, moments: Any, batch: Any, draws: Any) -> tuple[Any, Any, jax.Array, Any]:
        value, gradients = jax.value_and_grad(objective)(weights, batch, draws)
        updates, moments = optimizer.update(gradients, moments, weights)
        return optax.apply_updates(weights, updates), moments, value, gradients

    moments, values = optimizer.init(state), []
    for i in range(30):
        state, moments, value, gradients = step(state, moments, batch, draws)
        values.append(float(value))
        if i == 0:
            norms = {k: float(jnp.abs(v.get_value()).max()) for k, v in nnx.to_flat_state(gradients)}
    # Every weight learns from the first step, except those behind the last keys and values of the language model.
    assert {k for k, norm in norms.items() if norm == 0.0} == {("backbone", "vlm", "final_norm", "scale")}
    assert values[-1] < 0.2 * values[0]


# ---- Sampling --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 3, 10])
def test_euler_on_the_exact_linear_field_returns_the_data(
    monkeypatch: pytest.MonkeyPatch, model: Pi0, batch: Any, draws: Any, steps: int
) -> None:
    noise, data = draws[0], batch["actions"]
    monkeypatch.setattr(Pi0, "sampling_velocity", lambda self, prefix, x, time: noise - data)
    out = model.sample_actions(KEY, observation_of(batch), num_steps=steps, noise=noise)
    np.testing.assert_allclose(out, data, atol=1e-5)


def test_cached_prefix_equals_recomputing_it_at_every_step(model: Pi0, tiny_batch: Any, draws: Any) -> None:
    observation, steps = observation_of(tiny_batch), 4
    x, t = draws[0], np.float32(1)
    for _ in range(steps):
        v = joint_velocity(model, observation, x, jnp.full(8, t))
        x, t = x - v / steps, t - np.float32(1 / steps)
    np.testing.assert_allclose(sample(model, KEY, observation, num_steps=steps, noise=draws[0]), x, atol=2e-4)


@nnx.jit
def joint_velocity(model: Pi0, observation: Any, x: jax.Array, t: jax.Array) -> jax.Array:
    """Joint attention of both experts over all tokens at once, layer by layer, without any cache."""
    prefix, valid, _ = model.backbone.embed_prefix(observation)
    streams = [prefix, model.embed_suffix(observation, x, t)[0]]
    mask, positions = model.masks(valid)
    angles, S = rope(positions, model.config.backbone.language.head_dim)[:, :, :, None], prefix.shape[1]
    stacks: Any = (model.backbone.vlm, model.expert)
    for i in range(model.config.backbone.language.depth):
        layers = [jax.tree.map(lambda w, i=i: w[i], e.layers) for e in stacks]
        ys = [layer.attn_norm(tokens, None)[0] for layer, tokens in zip(layers, streams, strict=True)]
        parts = list(zip(layers, ys, strict=True))
        q = jnp.concatenate([jnp.einsum("BSD,NDH->BSNH", y, layer.q[...]) for layer, y in parts], axis=1)
        k, v = jnp.concatenate([jnp.einsum("BSD,CKDH->CBSKH", y, layer.kv[...]) for layer, y in parts], axis=2)
        q, k = rotate(q, angles), jnp.repeat(rotate(k, angles), q.shape[2] // k.shape[2], axis=2)
        v = jnp.repeat(v, q.shape[2] // v.shape[2], axis=2)
        logits = jnp.einsum("BSNH,BTNH->BNST", q, k) / jnp.sqrt(q.shape[-1])
        probs = jax.nn.softmax(jnp.where(mask[:, None], logits, -1e30), axis=-1)
        seen = jnp.einsum("BNST,BTNH->BSNH", probs, v)
        for e, (layer, part) in enumerate(zip(layers, (seen[:, :S], seen[:, S:]), strict=True)):
            tokens = streams[e] + jnp.einsum("BSNH,NHD->BSD", part, layer.out[...])
            y, _ = layer.mlp_norm(tokens, None)
            gate, up = jnp.einsum("BSD,CDF->CBSF", y, layer.gate_up[...])
            streams[e] = tokens + jnp.einsum("BSF,FD->BSD", jax.nn.gelu(gate) * up, layer.down[...])
    out, _ = model.expert.final_norm(streams[1], None)
    return model.action_out(out[:, -model.config.action_horizon :])


def test_samples_depend_on_the_key_and_the_row_only(model: Pi0, tiny_batch: Any) -> None:
    observation = observation_of(tiny_batch)
    eight, again = sample(model, KEY, observation), sample(model, KEY, observation)
    np.testing.assert_array_equal(eight, again)
    np.testing.assert_allclose(sample(model, KEY, rows(observation, np.s_[:2])), eight[:2], atol=1e-5)
    assert np.abs(sample(model, jax.random.key(8), observation) - eight).max() > 0.1
    assert eight.dtype == jnp.float32


def test_dims_a_robot_lacks_follow_the_path_of_padding(
    monkeypatch: pytest.MonkeyPatch, model: Pi0, batch: Any, draws: Any
) -> None:
    """The network sees t * noise there, as in training, whatever velocity it predicts; the result is zero."""
    noise, steps = draws[0], 4
    dims = np.arange(4) < np.array([4, 3] * 4)[:, None]
    mask = jnp.asarray(np.broadcast_to(dims[:, None], noise.shape))
    # The velocity of all dims is the last dim of x, so what is seen in the last dim shows in the others.
    wrong = lambda self, prefix, x, time: jnp.broadcast_to(x[..., 3:] + 1, x.shape)  # noqa: E731
    monkeypatch.setattr(Pi0, "sampling_velocity", wrong)
    out = model.sample_actions(KEY, observation_of(batch), num_steps=steps, noise=noise, action_mask=mask)
    times = 1 - np.arange(steps) / steps
    moved = noise[1::2, :, :3] - sum((t * noise[1::2, :, 3:] + 1) / steps for t in times)
    np.testing.assert_allclose(out[1::2, :, :3], moved, atol=1e-5)
    np.testing.assert_array_equal(out[1::2, :, 3], 0.0)
    assert (np.abs(out[0::2, :, 3]) > 0).all()


# ---- What is refused -------------------------------------------------------------------------------------------------


def test_every_misfit_of_a_batch_is_in_one_error(model: Pi0, tiny_batch: Any) -> None:
    bad = copy.deepcopy(tiny_batch)
    bad["images"]["wrist_rigth"] = bad["images"].pop("wrist_right")
    bad["images"]["base"] = bad["images"]["base"][:, :8].astype(np.float64)
    bad["image_mask"]["base"] = bad["image_mask"]["base"].astype(np.float32)
    bad["state"] = bad["state"][:, :3]
    bad["prompt"] = np.zeros((8, 9), np.int32)
    bad["actions"] = bad["actions"][:, :2]
    del bad["state_mask"], bad["position"]
    with pytest.raises(ValueError, match="inputs do not fit") as caught:
        model.loss(KEY, bad)
    expected = [
        "images['base']: got float64 (8, 8, 16, 3), expected uint8 or float32 (8, 16, 16, 3)",
        "images['wrist_right']: missing; did you mean 'wrist_rigth'?",
        "images['wrist_rigth']: the policy has no such camera; did you mean 'wrist_right'?; leave it out",
        "image_mask['base']: got float32 (8,), expected bool (8,)",
        "state: got float32 (8, 3), expected float32 (8, 4)",
        "state_mask: missing",
        "position: missing",
        "prompt: got int32 (8, 9), expected int32 (8, 8)",
        "actions: got float32 (8, 2, 4), expected float32 (8, 4, 4)",
    ]
    message = str(caught.value)
    assert [line for line in expected if line not in message] == []
    assert len(message.splitlines()) == len(expected) + 1


def test_an_observation_needs_no_actions_and_a_batch_does(model: Pi0, tiny_policy: Pi0Config, tiny_batch: Any) -> None:
    observation, empty = observation_of(tiny_batch), observation_of({})
    tiny_policy.check_inputs(observation, actions=False)
    with pytest.raises(ValueError, match=r"actions: missing(.|\n)*action_mask: missing"):
        tiny_policy.check_inputs(observation, actions=True)
    with pytest.raises(ValueError, match=r"state: missing(.|\n)*images: missing"):
        tiny_policy.check_inputs(empty, actions=False)


def test_every_impossible_option_is_in_one_error(tiny_policy: Pi0Config) -> None:
    expert = dataclasses.replace(tiny_policy.expert, depth=3, head_dim=10, width=15)
    with pytest.raises(ValueError, match="Pi0Config") as caught:
        dataclasses.replace(
            tiny_policy,
            expert=expert,
            image_size=(16, 20),
            cameras=("a", "a"),
            dtype="float16",
            remat="some",
            prompt_len=0,
        )
    for part in ("expert.depth=3", "expert.head_dim=10", "image_size=(16, 20)", "cameras=('a', 'a')"):
        assert part in str(caught.value)
    for part in ("expert.width=15", "dtype='float16'", "remat='some'", "prompt_len=0"):
        assert part in str(caught.value)
