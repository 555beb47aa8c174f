"""Real-time chunking: masks as published, guidance against its formula with explicit Jacobians, delays in training."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from openpi_like.draws import row_keys, sample_keys
from openpi_like.models.backbone import masked_means
from openpi_like.models.chunking import SCHEDULES, Previous, draw_delay, guided, soft_mask
from openpi_like.models.pi0 import Pi0, Pi0Config

KEY = jax.random.key(3)
sample = nnx.jit(Pi0.sample_actions, static_argnames="num_steps")


# ---- Masks -----------------------------------------------------------------------------------------------------------


def test_a_mask_falls_from_one_to_nothing_as_published():
    linear = [1, 1, 0.8, 0.6, 0.4, 0.2, 0, 0, 0, 0]
    np.testing.assert_allclose(soft_mask(2, 6, 10, "linear"), linear, atol=1e-7)
    exp = [c * (np.exp(c) - 1) / (np.e - 1) for c in linear]
    np.testing.assert_allclose(soft_mask(2, 6, 10), exp, atol=1e-7)
    np.testing.assert_array_equal(soft_mask(2, 6, 10, "ones"), [1] * 6 + [0] * 4)
    np.testing.assert_array_equal(soft_mask(2, 6, 10, "zeros"), [1] * 2 + [0] * 8)
    np.testing.assert_array_equal(soft_mask(8, 6, 10), [1] * 6 + [0] * 4)  # nothing is left behind the delay


@given(st.integers(0, 12), st.integers(0, 12), st.sampled_from(SCHEDULES))
def test_masks_never_rise_and_are_certain_before_the_delay_alone(delay, until, schedule):
    mask = soft_mask(delay, until, 12, schedule)
    assert (np.diff(mask) <= 0).all()
    assert (mask[: min(delay, until)] == 1).all()
    assert (mask[until:] == 0).all()
    if schedule in ("exp", "linear"):
        assert (mask[delay:until] < 1).all()
        assert (mask[delay:until] > 0).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((2, 6, 10, "ex"), "did you mean 'exp'"),
        ((-1, 6, 10), "delay=-1"),
        ((2, 11, 10), "until=11, expected both in 0 .. 10"),
    ],
)
def test_masks_that_are_none_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        soft_mask(*arguments)


# ---- Guidance --------------------------------------------------------------------------------------------------------


def _formula(velocity: Any, noise: np.ndarray, old: np.ndarray, weights: np.ndarray, limit: float, steps: int) -> Any:
    """The paper's equations in its own time, tau = 0 at noise, v = dx / dtau, with Jacobians written out, float64."""
    x, (A, J) = np.asarray(noise, np.float64), noise.shape
    for i in range(steps):
        tau = i / steps
        field = lambda x, tau=tau: -velocity(x, 1 - tau)  # noqa: E731
        estimate = lambda x, tau=tau, field=field: x + (1 - tau) * field(x)  # noqa: E731
        jacobian = np.asarray(jax.jacfwd(lambda x, e=estimate: e(x.reshape(A, J)).ravel())(x.ravel()), np.float64)
        error = weights[:, None] * (old - np.asarray(estimate(x), np.float64))
        correction = (error.ravel() @ jacobian).reshape(A, J)
        with np.errstate(divide="ignore"):
            strength = np.float64(1 - tau) / np.float64(tau) * (tau**2 + (1 - tau) ** 2) / (1 - tau) ** 2
        x = x + (np.asarray(field(x), np.float64) + min(limit, strength) * correction) / steps
    return x


def _previous(actions: Any, delay: Any, weights: Any, limit: float = 5.0) -> Previous:
    B = len(actions)
    return Previous(
        jnp.asarray(actions, jnp.float32),
        jnp.broadcast_to(jnp.asarray(delay), (B,)),
        jnp.broadcast_to(jnp.asarray(weights, jnp.float32), actions.shape[:2]),
        jnp.full(B, limit, jnp.float32),
    )


@pytest.mark.parametrize(("steps", "horizon", "limit", "schedule"), [(5, 8, 5.0, "exp"), (10, 10, 10.0, "linear")])
def test_guidance_is_that_of_the_formula(steps: int, horizon: int, limit: float, schedule: str):
    """At the published settings, on a field whose Jacobian couples steps and dims."""
    rng = np.random.default_rng(0)
    mix = jnp.asarray(rng.normal(size=(horizon * 3, horizon * 3)) / 8, jnp.float32)
    field = lambda x, t: jnp.sin(mix @ x.ravel() + t).reshape(x.shape) - 0.3 * x  # noqa: E731
    noise, old = rng.normal(size=(2, 4, horizon, 3)).astype(np.float32)
    weights = np.stack([soft_mask(d, u, horizon, schedule) for d, u in ((2, 6), (1, 7), (0, 0), (3, 3))])
    previous = _previous(old, 2, weights, limit)
    velocity = guided(lambda x, t: jax.vmap(field)(x, t), previous)
    x = jnp.asarray(noise)
    for i in range(steps):
        x = x - velocity(x, jnp.full(4, 1 - i / steps)) / steps
    for row in range(4):
        expected = _formula(field, np.asarray(noise[row]), old[row], weights[row], limit, steps)
        np.testing.assert_allclose(x[row], expected, atol=1e-5)


@pytest.fixture(scope="module", params=[False, True], ids=["pi0", "pi05"])
def policy(request: Any, tiny_policy: Pi0Config) -> Pi0:
    config = dataclasses.replace(tiny_policy, pi05=request.param)
    model = config.create(jax.random.key(0))
    noisy = lambda w: w + 0.3 * jax.random.normal(jax.random.key(1), w.shape) * (w.std() + 0.1)  # noqa: E731
    nnx.update(model, jax.tree.map(noisy, nnx.state(model)))  # also what is zero at the start
    return model


@pytest.fixture
def seen(policy: Pi0, tiny_batch: Any) -> Any:
    return policy.config.observation(tiny_batch)


def test_a_policy_is_guided_through_its_network(policy: Pi0, seen: Any, tiny_batch: Any):
    """And not where nothing is left of the old chunk: those rows, and a limit of 0, are plain sampling."""
    c, steps = policy.config, 4
    noise = jax.random.normal(KEY, (8, c.action_horizon, c.action_dim))
    old = np.random.default_rng(1).normal(size=noise.shape).astype(np.float32)
    weights = np.stack([soft_mask(i % 3, i % 5, c.action_horizon) for i in range(8)])
    plain = sample(policy, KEY, seen, num_steps=steps, noise=noise)
    got = sample(policy, KEY, seen, num_steps=steps, noise=noise, previous=_previous(old, 1, weights))
    none = sample(policy, KEY, seen, num_steps=steps, noise=noise, previous=_previous(old, 1, weights, limit=0.0))
    np.testing.assert_array_equal(none, plain)
    for row in (3, 4):
        one = jax.tree.map(lambda x, row=row: jnp.asarray(x[row : row + 1]), seen)
        velocity = policy.sampler(one)
        field = lambda x, t, v=velocity: v(jnp.float32(x)[None], jnp.full(1, t, jnp.float32))[0]  # noqa: E731
        expected = _formula(field, np.asarray(noise[row]), old[row], weights[row], 5.0, steps)
        np.testing.assert_allclose(got[row], expected, atol=2e-4 * np.abs(expected).max())
        assert np.abs(got[row] - plain[row]).max() > 1e-2
    for row in (0, 5):  # with no weight at all
        np.testing.assert_allclose(got[row], plain[row], atol=1e-5)
    near = lambda x: np.abs(x - old)[weights > 0.9].mean()  # noqa: E731
    assert near(np.asarray(got)) < 0.7 * near(np.asarray(plain))


# ---- Delays in training ----------------------------------------------------------------------------------------------


def _delayed(policy: Pi0, max_delay: int) -> Pi0:
    graph, state = nnx.split(policy)
    model = nnx.merge(graph, state)
    model.config = dataclasses.replace(policy.config, max_delay=max_delay)
    return model


def test_delays_are_uniform_and_leave_something_to_learn():
    keys, mask = row_keys(KEY, 3000), np.ones((3000, 6, 2), bool)
    mask[1::3, 2:] = False
    mask[2::3] = False
    drawn = np.asarray(draw_delay(keys, jnp.asarray(mask), 4))
    assert (np.diff(drawn.astype(int), axis=1) <= 0).all()
    counts = np.bincount(drawn[0::3].sum(1), minlength=6) / 1000
    np.testing.assert_allclose(counts, [0.2] * 5 + [0], atol=0.05)
    assert set(drawn[1::3].sum(1)) == {0, 1}
    assert not drawn[2::3].any()


def test_what_is_given_is_not_learned(policy: Pi0, tiny_batch: Any):
    """The network sees the data itself there, at flow time 0; the mean is over the others."""
    model, seen_by = _delayed(policy, 2), []
    plain = model.velocity

    def velocity(prefix, observation, x, time):
        jax.debug.callback(lambda *seen: seen_by.append(tuple(map(np.asarray, seen))), x, time)
        return plain(prefix, observation, x, time)

    model.velocity = velocity  # type: ignore[method-assign]
    batch = jax.tree.map(jnp.asarray, tiny_batch)
    _, metrics = model.loss(KEY, batch)
    jax.effects_barrier()
    given_BA = np.asarray(draw_delay(sample_keys(KEY, batch["position"]), batch["action_mask"], 2))
    assert {0, 1, 2} == set(given_BA.sum(1))
    ((x, time),) = seen_by
    np.testing.assert_array_equal(time[given_BA], 0.0)
    assert (time[~given_BA] > 0).all()
    np.testing.assert_allclose(x[given_BA], np.where(batch["action_mask"], batch["actions"], 0)[given_BA], atol=1e-6)
    errors = model._flow_errors(model.training_prefix(batch)[0], batch, *_draws(model, batch), jnp.asarray(given_BA))
    expected = masked_means(errors, batch["action_mask"] & ~given_BA[..., None])[1]
    np.testing.assert_allclose(metrics["loss"], expected["loss"], rtol=1e-6)
    np.testing.assert_array_equal(model.loss_counts(batch)["flow"], expected["valid"].sum())


def _draws(model: Pi0, batch: Any) -> tuple[jax.Array, jax.Array]:
    from openpi_like.models.flow import draw_noise, draw_time

    keys = sample_keys(KEY, batch["position"])
    return draw_noise(keys, batch["actions"].shape[1:]), draw_time(keys)


def test_committed_actions_come_back_and_the_rest_sees_them(policy: Pi0, seen: Any):
    c, model = policy.config, _delayed(policy, 2)
    noise = jax.random.normal(KEY, (8, c.action_horizon, c.action_dim))
    old = np.random.default_rng(1).normal(size=noise.shape).astype(np.float32)
    delay = np.arange(8) % 3
    got = sample(model, KEY, seen, num_steps=3, noise=noise, previous=_previous(old, delay, 0.0))
    plain = sample(model, KEY, seen, num_steps=3, noise=noise)
    known = np.arange(c.action_horizon) < delay[:, None]
    np.testing.assert_array_equal(np.asarray(got)[known], old[known])
    np.testing.assert_allclose(np.asarray(got)[delay == 0], np.asarray(plain)[delay == 0], atol=1e-5)
    assert (np.abs(got - plain)[:, -1].max(1)[delay > 0] > 1e-3).all()
    # One time for all actions is the same as that time for each.
    seen = jax.tree.map(jnp.asarray, seen)
    prefix = model.prefix(seen)
    of = lambda time: model.velocity(prefix, seen, noise, time)  # noqa: E731
    np.testing.assert_allclose(of(jnp.full(8, 0.4)), of(jnp.full((8, c.action_horizon), 0.4)), atol=1e-5)


def test_a_delay_as_long_as_the_chunk_is_refused(tiny_policy: Pi0Config):
    for wrong in (-1, 4):
        with pytest.raises(ValueError, match=f"max_delay={wrong}, expected 0 to action_horizon - 1 = 3"):
            dataclasses.replace(tiny_policy, max_delay=wrong)
