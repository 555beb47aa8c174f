"""The schedule and the sampler of diffusion: laws, and numbers by hand."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openpi_like.models.ddim import Ddim, step_embedding


def test_the_schedule_is_the_squared_cosine() -> None:
    kept = Ddim(100).kept()
    level = lambda t: math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2  # noqa: E731
    # Products of the ratios are the level itself, but for the last beta, which is cut at 0.999.
    expected = [level((i + 1) / 100) / level(0) for i in range(99)]
    np.testing.assert_allclose(kept[:99], expected, rtol=2e-5)
    assert kept[99] == pytest.approx(kept[98] * 0.001, rel=1e-4)
    assert (np.diff(kept) < 0).all()


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 30), st.integers(1, 30), st.integers(0, 9))
def test_who_knows_the_noise_finds_the_data(a: int, b: int, seed: int) -> None:
    ddim = Ddim(max(a, b), min(a, b))
    rng = np.random.default_rng(seed)
    data = jnp.asarray(np.clip(0.5 * rng.standard_normal((2, 3, 4)), -1, 1), jnp.float32)
    kept = jnp.asarray(ddim.kept())

    def predict(x: jax.Array, step: jax.Array) -> jax.Array:
        k = kept[step][:, None, None]
        return (x - jnp.sqrt(k) * data) / jnp.sqrt(1 - k)

    start = jnp.asarray(rng.standard_normal((2, 3, 4)), jnp.float32)
    np.testing.assert_allclose(ddim.sample(predict, start), data, atol=2e-3)


def test_noised_entries_keep_their_variance_and_data_is_kept_within_bounds() -> None:
    rng, ddim = np.random.default_rng(0), Ddim(50, 5, clip=0.5)
    data, noise = (jnp.asarray(rng.standard_normal((6, 500, 4)), jnp.float32) for _ in range(2))
    x = ddim.noised(data, noise, jnp.array([0, 9, 19, 29, 39, 49]))
    np.testing.assert_allclose(x.std((1, 2)), 1, atol=0.05)
    assert abs(np.corrcoef(x[0].ravel(), data[0].ravel())[0, 1]) > 0.99
    assert abs(np.corrcoef(x[5].ravel(), noise[5].ravel())[0, 1]) > 0.99
    got = ddim.sample(lambda x, step: -x, noise[:1])  # far beyond
    assert np.abs(got).max() == pytest.approx(0.5)
    steps = np.asarray(ddim.draw_steps(jax.random.split(jax.random.key(0), 2000)))
    assert set(steps) == set(range(50))


def test_embeddings_are_cosines_then_sines() -> None:
    got = np.asarray(step_embedding(jnp.array([0, 7]), 6))
    np.testing.assert_allclose(got[0], [1, 1, 1, 0, 0, 0])
    phase = 7 * 10_000.0 ** (-np.arange(3) / 3)
    np.testing.assert_allclose(got[1], np.concatenate([np.cos(phase), np.sin(phase)]), rtol=1e-5)


@pytest.mark.parametrize(("wrong", "said"), [((5, 6), "sample_steps=6"), ((5, 0), "sample_steps=0")])
def test_schedules_that_are_none_are_named(wrong: tuple[int, int], said: str) -> None:
    assert said in Ddim(*wrong).problems()[0]
    assert "clip=0" in Ddim(clip=0.0).problems()[0]
