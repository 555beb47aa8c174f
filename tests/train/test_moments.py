"""Moments in fewer bits: close to float32 in value and in what they make of a problem, and unbiased."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from openpi_like.train.moments import BFloat16Moments, EightBitMoments, Float32Moments
from openpi_like.train.optimizer import OptimizerConfig

KEY = jax.random.key(0)
FEW = [BFloat16Moments(), EightBitMoments(block=8), EightBitMoments()]


def _spread(*shape):
    """Values over ten powers of ten, as second moments are; one row of zeros."""
    x = 10.0 ** np.random.default_rng(0).uniform(-12, -2, shape)
    x[0] = 0
    return jnp.asarray(x, jnp.float32)


@pytest.mark.parametrize(("moments", "bits"), [(FEW[0], 2**-7), (FEW[1], 2 ** (1 / 8) - 1)])
def test_second_moments_keep_their_relative_size(moments, bits):
    """Each is rounded to one of its two neighbours, at most a step away."""
    v = _spread(5, 32)
    held = moments.encode_second(KEY, v)
    got = np.asarray(moments.decode_second(*held))
    v = np.asarray(v)
    blocks = v.reshape(5, -1, 8).max(-1).repeat(8, axis=1) if held[1] is not None else v
    kept = v >= blocks * 2.0**-31
    assert kept.mean() > 0.9
    np.testing.assert_allclose(got[kept], v[kept], rtol=bits * 1.01)
    assert (got[0] == 0).all()
    assert (got[1:] > 0).all()  # Adam divides by them


def test_first_moments_are_within_a_step_of_their_block():
    m = jnp.asarray(np.random.default_rng(1).normal(size=(3, 2, 16)), jnp.float32)
    moments = EightBitMoments(block=8)
    values, scales = moments.encode_first(KEY, m)
    assert scales is not None
    assert (values.dtype, values.shape, scales.shape) == (jnp.int8, m.shape, (3, 2, 2))
    step = np.abs(np.asarray(m)).reshape(3, 2, 2, 8).max(-1).repeat(8, axis=-1) / 127
    assert (np.abs(np.asarray(moments.decode_first(values, scales) - m)) <= step * 1.001).all()
    whole = moments.encode_first(KEY, m[..., :-1])  # 8 does not divide 15
    assert whole[1] is not None
    assert whole[1].shape == (3, 2, 1)


@pytest.mark.parametrize("moments", FEW)
def test_rounding_is_unbiased(moments):
    """The mean over many draws is the value, which rounding to the nearest never gives."""
    m = jnp.asarray([[0.3, -0.7001, 0.01234, 1.0] * 4], jnp.float32)
    draw = jax.jit(jax.vmap(lambda key: moments.decode_first(*moments.encode_first(key, m))))
    mean = np.asarray(draw(jax.random.split(KEY, 20_000))).mean(0)
    np.testing.assert_allclose(mean, m, atol=2e-4)


def _train(moments, steps=400):
    """A regression that Adam solves, with a weight whose gradients are a thousand times smaller than the others'."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(64, 16)) * np.where(np.arange(16) < 4, 1e-3, 1.0), jnp.float32)
    truth = jnp.asarray(rng.normal(size=(16, 3)), jnp.float32)
    y = x @ truth
    optimizer = OptimizerConfig(
        peak_lr=1e-1, end_lr=1e-3, warmup_steps=1, decay_steps=steps, moments=moments, b2=0.999
    ).create()
    params = {"a": {"w": jnp.zeros((16, 3))}, "b": jnp.zeros(3)}
    loss = lambda p: jnp.mean(jnp.square(x @ p["a"]["w"] + p["b"] - y))  # noqa: E731

    def step(carry, _):
        params, state = carry
        value, grads = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), value

    (params, state), losses = jax.lax.scan(step, (params, optimizer.init(params)), None, length=steps)
    return losses, params, state


def test_they_solve_what_float32_solves():
    losses, params, _ = _train(Float32Moments())
    assert losses[-1] < 1e-3 * losses[0]
    for moments in FEW:
        few, weights, state = _train(moments)
        np.testing.assert_allclose(np.log(few[-20:]), np.log(losses[-20:]), atol=0.1)
        np.testing.assert_allclose(weights["a"]["w"], params["a"]["w"], atol=0.15)
        held = sum(x.nbytes for x in jax.tree.leaves(state) if x.ndim)
        assert held < sum(x.nbytes for x in jax.tree.leaves(_train(Float32Moments(), 2)[2]) if x.ndim) * 0.75


def test_the_state_of_float32_is_that_of_optax():
    params = {"w": jnp.ones((2, 3))}
    ours = OptimizerConfig(weight_decay=0.1).create().init(params)
    theirs = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(lambda step: 1e-3)).init(params)
    assert str(jax.tree.structure(ours)) == str(jax.tree.structure(theirs))


def test_a_block_of_nothing_is_refused():
    with pytest.raises(ValueError, match="block=0, expected at least 1"):
        EightBitMoments(block=0)
