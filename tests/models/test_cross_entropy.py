"""The loss in parts of the vocabulary against the whole formulation, its gradients, and what it keeps in memory."""

import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from openpi_like.models.cross_entropy import cross_entropy


def whole(x: jax.Array, table: jax.Array, targets: jax.Array, soft_cap: float | None = None) -> jax.Array:
    logits = jnp.einsum("TD,VD->TV", x, table.astype(x.dtype), preferred_element_type=jnp.float32)
    if soft_cap is not None:
        logits = soft_cap * jnp.tanh(logits / soft_cap)
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets)


def case(vocab: int, dtype: str = "float32") -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    rng = np.random.default_rng(vocab)
    x, table = (jnp.asarray(rng.normal(size=(n, 8)), jnp.float32) for n in (13, vocab))
    targets = rng.integers(0, vocab, 13)
    targets[:2] = 0, vocab - 1  # both ends, and one twice
    targets[2] = targets[3]
    return x.astype(dtype), table, jnp.asarray(targets), jnp.asarray(rng.normal(size=13), jnp.float32)


@pytest.mark.parametrize(
    ("vocab", "part"), [(1, 4), (50, 50), (50, 64), (51, 10), (97, 16), (64, 1), (384, 129), (640, 400), (257 * 4, 16)]
)
def test_losses_and_gradients_of_parts_are_those_of_the_whole(vocab: int, part: int) -> None:
    x, table, targets, weights = case(vocab)

    def objective(function: Any) -> Any:
        return jax.value_and_grad(lambda x, t: (function(x, t) * weights).sum(), argnums=(0, 1))(x, table)

    np.testing.assert_allclose(cross_entropy(x, table, targets, part), whole(x, table, targets), atol=1e-5)
    got = objective(lambda x, t: cross_entropy(x, t, targets, part))
    expected = objective(lambda x, t: whole(x, t, targets))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), got, expected)


@pytest.mark.parametrize(("vocab", "part"), [(50, 64), (51, 10), (257 * 4, 16)])
def test_capped_logits(vocab: int, part: int) -> None:
    x, table, targets, weights = case(vocab)

    def objective(function: Any) -> Any:
        return jax.value_and_grad(lambda x, t: (function(x, t) * weights).sum(), argnums=(0, 1))(x, table)

    got = objective(lambda x, t: cross_entropy(x, t, targets, part, 1.3))
    expected = objective(lambda x, t: whole(x, t, targets, 1.3))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), got, expected)


@pytest.mark.parametrize("certain", [0.0, 2.0, 6.0])
def test_bfloat16_gradients_are_as_good_where_targets_are_nearly_certain(certain: float) -> None:
    """Against float32 on the same rounded tokens and table; `certain` turns each token towards its target."""
    x, table, targets, weights = case(384, "bfloat16")
    table = table.astype(jnp.bfloat16).astype(jnp.float32)
    x = (x.astype(jnp.float32) + certain * table[targets]).astype(jnp.bfloat16)
    losses = cross_entropy(x, table, targets, 130)
    assert losses.dtype == jnp.float32
    exact = x.astype(jnp.float32)
    np.testing.assert_allclose(losses, whole(exact, table, targets), rtol=1e-3, atol=1e-3)

    def gradients(x: jax.Array, loss: Any) -> Any:
        return jax.grad(lambda x, t: (loss(x, t) * weights).sum(), argnums=(0, 1))(x, table)

    dx, dtable = gradients(x, lambda x, t: cross_entropy(x, t, targets, 130))
    assert (dx.dtype, dtable.dtype) == (jnp.bfloat16, jnp.float32)
    for got, expected in zip((dx, dtable), gradients(exact, lambda x, t: whole(x, t, targets)), strict=True):
        off = jnp.linalg.norm(got.astype(jnp.float32) - expected) / jnp.linalg.norm(expected)
        assert off < 0.01


def test_a_vocabulary_split_over_devices_is_never_gathered() -> None:
    mesh = jax.make_mesh((2, 2), ("fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("tensor", "fsdp"))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp"))
    V, D = 128 * 64, 16
    gradient = jax.grad(lambda x, t, ids: cross_entropy(x, t, ids, 1024).sum(), argnums=(0, 1))
    compiled = jax.jit(gradient, in_shardings=(rows, split, rows), out_shardings=(rows, split)).lower(
        jax.ShapeDtypeStruct((32, D), jnp.float32),
        jax.ShapeDtypeStruct((V, D), jnp.float32),
        jax.ShapeDtypeStruct((32,), jnp.int32),
    )
    text = compiled.compile().as_text()
    assert text is not None
    gathered = [
        math.prod(map(int, shape.split(","))) for shape in re.findall(r"= f32\[([\d,]+)\]\S* all-gather\(", text)
    ]
    assert gathered  # rows of one part, over the axis that splits the width
    assert max(gathered) <= 1024 * D
    x, table, targets, _ = case(384)
    placed = jax.device_put(table, split)
    np.testing.assert_allclose(cross_entropy(x, placed, targets, 100), whole(x, table, targets), atol=1e-5)


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
