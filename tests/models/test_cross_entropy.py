"""The loss in parts of the vocabulary against the whole formulation, its gradients, and what it keeps in memory."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from openpi_like.models.cross_entropy import cross_entropy


def whole(x: jax.Array, table: jax.Array, targets: jax.Array) -> jax.Array:
    logits = jnp.einsum("TD,VD->TV", x, table.astype(x.dtype), preferred_element_type=jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets)


def case(vocab: int, dtype: str = "float32") -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    rng = np.random.default_rng(vocab)
    x, table = (jnp.asarray(rng.normal(size=(n, 8)), jnp.float32) for n in (13, vocab))
    targets = rng.integers(0, vocab, 13)
    targets[:2] = 0, vocab - 1  # both ends, and one twice
    targets[2] = targets[3]
    return x.astype(dtype), table, jnp.asarray(targets), jnp.asarray(rng.normal(size=13), jnp.float32)


@pytest.mark.parametrize(("vocab", "part"), [(1, 4), (50, 50), (50, 64), (51, 10), (97, 16), (64, 1)])
def test_losses_and_gradients_of_parts_are_those_of_the_whole(vocab: int, part: int) -> None:
    x, table, targets, weights = case(vocab)

    def objective(function: Any) -> Any:
        return jax.value_and_grad(lambda x, t: (function(x, t) * weights).sum(), argnums=(0, 1))(x, table)

    np.testing.assert_allclose(cross_entropy(x, table, targets, part), whole(x, table, targets), atol=1e-5)
    got = objective(lambda x, t: cross_entropy(x, t, targets, part))
    expected = objective(lambda x, t: whole(x, t, targets))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), got, expected)


def test_bfloat16_tokens_keep_float32_losses_and_table_gradients() -> None:
    x, table, targets, weights = case(97, "bfloat16")
    losses = cross_entropy(x, table, targets, 16)
    assert losses.dtype == jnp.float32
    np.testing.assert_allclose(losses, whole(x, table, targets), rtol=1e-3, atol=1e-3)
    dx, dtable = jax.grad(lambda x, t: (cross_entropy(x, t, targets, 16) * weights).sum(), argnums=(0, 1))(x, table)
    assert (dx.dtype, dtable.dtype) == (jnp.bfloat16, jnp.float32)
    exact = jax.grad(lambda t: (whole(x.astype(jnp.float32), t, targets) * weights).sum())(table)
    np.testing.assert_allclose(dtable, exact, atol=0.06)


def test_extreme_logits_stay_finite() -> None:
    x, table, targets, _ = case(50)
    losses, grads = jax.value_and_grad(lambda x: cross_entropy(x, table * 100, targets, 16).sum())(x * 100)
    assert np.isfinite(losses)
    assert np.isfinite(grads).all()
    np.testing.assert_allclose(losses, whole(x * 100, table * 100, targets).sum(), rtol=1e-5)


def test_no_array_of_tokens_times_vocabulary_is_ever_held() -> None:
    """By the compiler's own figures, for the gradient; the whole formulation is the yardstick."""
    T, D, V = 64, 8, 40_000
    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((T, D), (V, D))] + [jax.ShapeDtypeStruct((T,), jnp.int32)]

    def temporary(function: Any) -> int:
        objective = jax.grad(lambda x, t, ids: function(x, t, ids).sum(), argnums=(0, 1))
        memory: Any = jax.jit(objective).lower(*shapes).compile().memory_analysis()
        return memory.temp_size_in_bytes

    logits = 4 * T * V
    assert temporary(whole) > logits
    assert temporary(lambda x, t, ids: cross_entropy(x, t, ids, 2_000)) < 0.3 * logits
