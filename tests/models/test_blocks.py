"""The blocks against drawn masks, other implementations and their own invariants."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from openpi_like.draws import named_key
from openpi_like.models.attention import attention
from openpi_like.models.gemma import Gemma, GemmaConfig, attention_mask, rope, rotate, token_positions
from openpi_like.models.param import Linear, fan_in, normal, weight
from openpi_like.models.siglip import Siglip, SiglipConfig

KEY = jax.random.key(0)
SMALL = GemmaConfig(width=12, depth=2, mlp_dim=16, num_heads=4, num_kv_heads=2, head_dim=6)


def drawn(picture: str) -> np.ndarray:
    return np.array([[c == "x" for c in line.split()] for line in picture.strip().splitlines()])


# ---- Masks and positions ---------------------------------------------------------------------------------------------


def test_blocks_see_themselves_and_what_came_before() -> None:
    """Two prefix tokens, the state, two actions; everything valid."""
    expected = drawn("""
        x x . . .
        x x . . .
        x x x . .
        x x x x x
        x x x x x
    """)
    starts = jnp.array([0, 0, 1, 1, 0], bool)
    np.testing.assert_array_equal(attention_mask(jnp.ones((1, 5), bool), starts)[0], expected)


def test_invalid_tokens_neither_see_nor_are_seen() -> None:
    expected = drawn("""
        x . x . .
        . . . . .
        x . x . .
        x . x x .
        . . . . .
    """)
    valid = jnp.array([[1, 0, 1, 1, 0]], bool)
    np.testing.assert_array_equal(attention_mask(valid, jnp.array([0, 0, 0, 1, 0], bool))[0], expected)
    np.testing.assert_array_equal(token_positions(valid), [[0, 0, 1, 2, 2]])
    np.testing.assert_array_equal(token_positions(~valid), [[-1, 0, 0, 0, 1]])


def test_every_token_its_own_block_is_causal() -> None:
    mask = attention_mask(jnp.ones((1, 6), bool), jnp.ones(6, bool))[0]
    np.testing.assert_array_equal(mask, np.tril(np.ones((6, 6), bool)))


# ---- Rotation and attention ------------------------------------------------------------------------------------------


def test_rotation_is_a_complex_product_and_depends_on_distance_only() -> None:
    x = jax.random.normal(KEY, (1, 3, 2, 8))
    positions = jnp.array([[0, 5, 11]])
    turned = np.asarray(rotate(x, rope(positions, 8)[:, :, :, None]))
    pairs = np.asarray(x[..., :4]) + 1j * np.asarray(x[..., 4:])
    angle = np.asarray(positions)[..., None, None] * 10_000.0 ** (-2 * np.arange(4) / 8)
    expected = pairs * np.exp(1j * angle)
    np.testing.assert_allclose(turned, np.concatenate([expected.real, expected.imag], -1), atol=1e-5)
    moved = rotate(x, rope(positions + 100, 8)[:, :, :, None])
    dots = lambda y: np.einsum("bsnh,btnh->bnst", y, y)  # noqa: E731
    np.testing.assert_allclose(dots(np.asarray(moved)), dots(turned), atol=1e-4)


def numpy_layer(layers: dict[str, np.ndarray], i: int, x: np.ndarray, mask: np.ndarray, pos: np.ndarray) -> np.ndarray:
    """One Gemma layer in float64, head by head, for one example."""
    norm = lambda y, scale: y / np.sqrt((y**2).mean(-1, keepdims=True) + 1e-6) * (1 + scale)  # noqa: E731
    gelu = lambda y: 0.5 * y * (1 + np.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3)))  # noqa: E731

    def turn(y: np.ndarray) -> np.ndarray:
        half = y.shape[-1] // 2
        z = (y[:, :half] + 1j * y[:, half:]) * np.exp(1j * pos[:, None] * 10_000.0 ** (-np.arange(half) / half))
        return np.concatenate([z.real, z.imag], -1)

    y, out = norm(x, layers["attn_norm"][i]), 0.0
    N, K = layers["q"].shape[1], layers["kv"].shape[2]
    for n in range(N):
        q, k = turn(y @ layers["q"][i, n]), turn(y @ layers["kv"][i, 0, n // (N // K)])
        logits = np.where(mask, q @ k.T / math.sqrt(q.shape[-1]), -1e30)
        probs = np.exp(logits - logits.max(-1, keepdims=True))
        seen = probs / probs.sum(-1, keepdims=True) @ (y @ layers["kv"][i, 1, n // (N // K)])
        out = out + seen @ layers["out"][i, n]
    x = x + out
    y = norm(x, layers["mlp_norm"][i])
    return x + (gelu(y @ layers["gate_up"][i, 0]) * (y @ layers["gate_up"][i, 1])) @ layers["down"][i]


def test_stack_matches_a_float64_restatement_with_grouped_heads(filled: Any) -> None:
    model = filled(lambda: Gemma(SMALL, KEY, dtype="float32", unroll=False, remat=None))
    layers = model.layers
    x = np.asarray(jax.random.normal(KEY, (1, 5, SMALL.width)))
    valid = jnp.array([[1, 1, 0, 1, 1]], bool)
    mask = attention_mask(valid, jnp.array([0, 0, 0, 1, 1], bool))
    positions = token_positions(valid)
    names = ("q", "kv", "out", "gate_up", "down")
    weights = {n: np.asarray(getattr(layers, n)[...], np.float64) for n in names}
    weights |= {n: np.asarray(getattr(layers, n).scale[...], np.float64) for n in ("attn_norm", "mlp_norm")}
    expected = x[0].astype(np.float64)
    for i in range(SMALL.depth):
        expected = numpy_layer(weights, i, expected, np.asarray(mask[0]), np.asarray(positions[0]))
    rms = np.sqrt((expected**2).mean(-1, keepdims=True) + 1e-6)
    expected = expected / rms * (1 + np.asarray(model.final_norm.scale[...], np.float64))
    got, _ = nnx.jit(Gemma.__call__)(model, jnp.asarray(x), mask, model.rope(positions))
    seen = np.asarray(valid[0])
    np.testing.assert_allclose(np.asarray(got[0])[seen], expected[seen], atol=3e-5)


def test_second_part_on_a_cache_equals_all_at_once(filled: Any) -> None:
    model = filled(lambda: Gemma(SMALL, KEY, dtype="float32", unroll=False, remat=None))
    x = jax.random.normal(KEY, (2, 7, SMALL.width))
    valid = jnp.ones((2, 7), bool).at[1, 2].set(False)
    mask, turns = attention_mask(valid, jnp.array([0, 0, 0, 0, 1, 0, 0], bool)), model.rope(token_positions(valid))
    whole, _ = model(x, mask, turns)
    _, cache = model(x[:, :4], mask[:, :4, :4], turns[:, :, :4])
    rest, _ = model(x[:, 4:], mask[:, 4:], turns[:, :, 4:], past=cache)
    np.testing.assert_allclose(rest, whole[:, 4:], atol=1e-5)


def test_fresh_adaptive_stack_is_the_identity(filled: Any) -> None:
    create = lambda: Gemma(SMALL, KEY, dtype="float32", unroll=True, remat=None, adaptive=True)  # noqa: E731
    model = filled(create)
    fresh = nnx.jit(lambda: [n.modulation for n in (create().layers.attn_norm, create().final_norm)])()
    assert all((w.get_value() == 0).all() for m in fresh for w in (m.kernel, m.bias))
    for norm in (model.layers.attn_norm, model.layers.mlp_norm, model.final_norm):
        for w in (norm.modulation.kernel, norm.modulation.bias):
            w[...] = jnp.zeros_like(w[...])
    x, cond = jax.random.normal(KEY, (2, 3, SMALL.width)), jax.random.normal(KEY, (2, 1, SMALL.width))
    mask, turns = jnp.ones((2, 3, 3), bool), model.rope(jnp.zeros((2, 3), jnp.int32))
    out, _ = model(x, mask, turns, cond_BSD=cond)
    np.testing.assert_allclose(out, x / jnp.sqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-6), atol=1e-6)


# ---- Vision ----------------------------------------------------------------------------------------------------------


def test_stem_is_a_strided_convolution_and_tokens_are_row_major(filled: Any) -> None:
    config = SiglipConfig(width=8, depth=1, mlp_dim=8, num_heads=2, patch_size=4)
    vision = filled(
        lambda: Siglip(config, KEY, image_size=(8, 12), out_width=10, dtype="float32", unroll=True, remat=None)
    )
    vision.patch.bias[...] = jnp.zeros_like(vision.patch.bias[...])
    images = jax.random.normal(KEY, (2, 8, 12, 3))
    kernel = vision.patch.kernel[...]
    convolved = jax.lax.conv_general_dilated(
        images, kernel, (4, 4), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    np.testing.assert_allclose(vision.stem(images), convolved, atol=1e-5)
    tokens = vision(images)
    assert tokens.shape == (2, 6, 10)
    # Attention moves everything, so make the transformer see one changed patch and switch its mixing off.
    vision.layers.out.kernel[...] = jnp.zeros_like(vision.layers.out.kernel[...])
    changed = vision(images.at[:, 4:8, 0:4].add(1.0)) != vision(images)
    np.testing.assert_array_equal(changed.any((0, 2)), [False, False, False, True, False, False])


# ---- Declarations ----------------------------------------------------------------------------------------------------


def test_draws_depend_on_names_and_not_on_order() -> None:
    a = weight(KEY, "a", (64, 64), ("embed", "mlp"), normal(1.0))
    b = weight(KEY, "b", (64, 64), ("embed", "mlp"), normal(1.0))
    again = weight(KEY, "a", (64, 64), ("embed", "mlp"), normal(1.0))
    np.testing.assert_array_equal(a[...], again[...])
    assert abs(np.corrcoef(np.ravel(a[...]), np.ravel(b[...]))[0, 1]) < 0.05
    assert a.get_metadata()["axes"] == ("embed", "mlp")


def test_axes_must_name_every_dimension() -> None:
    with pytest.raises(ValueError, match=r"weight 'w' of shape \(2, 3\): got logical axes \('embed',\), expected 2"):
        weight(KEY, "w", (2, 3), ("embed",), normal(1.0))


def test_linear_keeps_the_variance_of_its_inputs() -> None:
    linear = Linear(KEY, "BPNH,NHD->BPD", (8, 16, 256), ("heads", "head_dim", "embed"), layers=3)
    assert linear.kernel.shape == (3, 8, 16, 256)
    assert linear.bias.shape == (3, 256)
    assert float(linear.kernel[...].std()) == pytest.approx(1 / math.sqrt(8 * 16), rel=0.02)
    draw = fan_in(1)(named_key(KEY, "x"), (2, 400, 50))
    assert float(draw.std()) == pytest.approx(1 / 20, rel=0.02)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 5}, "num_heads=5, expected a multiple of num_kv_heads=2"),
        ({"head_dim": 7}, "head_dim=7, expected an even number"),
    ],
)
def test_impossible_sizes_are_refused(changes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **changes)


def test_vision_width_must_split_into_heads() -> None:
    with pytest.raises(ValueError, match="vision width 10: expected a multiple of num_heads=4"):
        SiglipConfig(width=10, depth=1, mlp_dim=8, num_heads=4, patch_size=4)


def test_published_sizes_have_the_published_number_of_weights() -> None:
    """Gemma 2B has 2,506,172,416 weights with 256,000 token rows; PaliGemma adds 1,152 rows."""
    shape = nnx.eval_shape(
        lambda: Gemma(GemmaConfig.gemma_2b(), KEY, dtype="bfloat16", unroll=False, remat=None, vocab_size=257_152)
    )
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(shape)))
    assert count == 2_506_172_416 + 1_152 * 2048


# ---- Speed that changes no number ------------------------------------------------------------------------------------


@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    kv_heads=st.sampled_from([1, 2, 6]),
    tokens=st.sampled_from([1, 5]),
    keys=st.sampled_from([1, 3, 7]),
)
def test_attention_is_that_of_jax(seed: int, kv_heads: int, tokens: int, keys: int) -> None:
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape) * 3, jnp.float32)  # noqa: E731
    q, k, v = draw(2, tokens, 6, 8), draw(2, keys, kv_heads, 8), draw(2, keys, kv_heads, 8)
    mask = jnp.asarray(rng.random((2, tokens, keys)) < 0.6)
    for seen in (mask, None):
        expected = jax.nn.dot_product_attention(q, k, v, mask=None if seen is None else seen[:, None])
        got = attention(q.swapaxes(1, 2), k, v, seen).swapaxes(1, 2)
        rows = np.ones((2, tokens), bool) if seen is None else np.asarray(seen.any(-1))
        np.testing.assert_allclose(got[rows], expected[rows], rtol=1e-5, atol=1e-5)
        mean = jnp.repeat(v.mean(1), 6 // kv_heads, axis=1)  # what a query that sees nothing gets
        for b, t in zip(*np.nonzero(~rows), strict=True):
            np.testing.assert_allclose(got[b, t], mean[b], atol=1e-5)


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_packed_layers_compute_the_same(filled: Any, adaptive: bool, kv_heads: int) -> None:
    config = GemmaConfig(width=12, depth=3, mlp_dim=20, num_heads=4, num_kv_heads=kv_heads, head_dim=6)
    model = filled(lambda: Gemma(config, KEY, dtype="float32", unroll=False, remat=None, adaptive=adaptive))
    rng = np.random.default_rng(0)
    x, past_x = (jnp.asarray(rng.normal(size=(2, n, 12)), jnp.float32) for n in (3, 5))
    cond = jnp.asarray(rng.normal(size=(2, 1, 12)), jnp.float32) if adaptive else None
    turns = model.rope(jnp.arange(8)[None].repeat(2, 0))
    _, past = model(past_x, jnp.ones((2, 5, 5), bool), turns[:, :, :5], cond_BSD=cond)
    mask = jnp.asarray(rng.random((2, 3, 8)) < 0.7).at[:, :, -1].set(True)
    run = nnx.jit(lambda m: m(x, mask, turns[:, :, 5:], past=past, cond_BSD=cond))
    packed = model.packed()
    assert packed.packed() is packed
    expected, got = run(model), run(packed)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), got, expected)
