"""What every language model must be fit for: overlays, fewer bits, packing, remat, bfloat16; and impossible configs."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from openpi_like.models.gemma import Gemma, GemmaConfig, attention_mask
from openpi_like.models.gemma2 import Gemma2, Gemma2Config
from openpi_like.models.language import LanguageModel
from openpi_like.models.llama import Llama, LlamaConfig
from openpi_like.models.lora import Lora, LoraRule, add_lora, linear_maps
from openpi_like.models.quantize import quantized_model
from openpi_like.partition import ShardingRules, placed
from openpi_like.train.sharding import MeshConfig

KEY = jax.random.key(0)
SIZES: dict[str, Any] = {"width": 16, "depth": 2, "mlp_dim": 32, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8}
SMALL = LlamaConfig(**SIZES, rope_base=1e4, norm_eps=1e-5, qkv_bias=True, qk_norm=True)
MODELS: dict[str, tuple[Any, Any]] = {
    "gemma": (Gemma, GemmaConfig(**SIZES)),
    "gemma2": (Gemma2, Gemma2Config(**SIZES, attention_cap=2.0, final_cap=1.5, window=3)),
    "llama": (Llama, SMALL),
}
MASK = attention_mask(jnp.ones((2, 6), bool), jnp.ones(6, bool))
POSITIONS = jnp.tile(jnp.arange(6), (2, 1))
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 48, (2, 6)))


def created(name: str, **changes: Any) -> LanguageModel:
    create, config = MODELS[name]
    options = {"dtype": "float32", "unroll": False, "remat": None, "vocab_size": 48, **changes}
    return create(config, KEY, **options)


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest, filled: Any) -> Any:
    return filled(lambda: created(request.param))


@nnx.jit
def losses(model: Any) -> jax.Array:
    x, _ = model(model.embed(TOKENS), MASK, model.rope(POSITIONS))
    return model.token_losses(x, TOKENS)


def test_hidden_states_begin_with_the_inputs_and_end_with_the_output(model: Any) -> None:
    x, turns = model.embed(TOKENS), model.rope(POSITIONS)
    states = nnx.jit(lambda m: m.hidden_states(x, MASK, turns))(model)
    assert states.shape == (3, *x.shape)
    np.testing.assert_array_equal(states[0], x)
    np.testing.assert_allclose(states[-1], nnx.jit(lambda m: m(x, MASK, turns)[0])(model), atol=1e-5)


def test_all_maps_can_have_overlays_and_fewer_bits(model: Any) -> None:
    assert [name for name, *_ in linear_maps(model)] == [f"layers/{n}" for n in ("down", "gate_up", "kv", "out", "q")]
    expected = losses(model)
    overlaid: Any = add_lora(nnx.merge(*nnx.split(model)), Lora(rules=(LoraRule("^layers/", rank=2),)), KEY)
    np.testing.assert_allclose(losses(overlaid), expected, atol=1e-5)
    few = quantized_model(model, "int8")
    for changed in (overlaid, few):
        assert changed.packed() is changed
    np.testing.assert_allclose(losses(few), expected, atol=0.15 * float(expected.max()))
    assert (losses(few) != expected).any()


def test_gradients_do_not_depend_on_how_layers_are_run(model: Any) -> None:
    gradient = nnx.jit(nnx.grad(lambda m: losses(m).mean()))
    other = nnx.merge(*nnx.split(model))
    other.unroll, other.remat = True, "save:attention,mlp"
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), gradient(other), gradient(model))


def test_a_mesh_computes_the_same(model: Any) -> None:
    """And all maps and tables are split over it."""
    mesh, rules = MeshConfig(data=1, fsdp=2, tensor=2).create(), ShardingRules()
    for _, _, _, w in linear_maps(model):
        assert any(rules.spec(w.get_metadata()["axes"], w.shape, mesh))

    def run(model: Any) -> jax.Array:
        with placed(mesh, rules):
            return model.token_losses(model(model.embed(TOKENS), MASK, model.rope(POSITIONS))[0], TOKENS)

    np.testing.assert_allclose(nnx.jit(run)(model), losses(model), atol=1e-5)


def test_bfloat16_is_near(model: Any) -> None:
    other = nnx.merge(*nnx.split(model))
    other.dtype = "bfloat16"
    x = other(other.embed(TOKENS), MASK, other.rope(POSITIONS))[0]
    assert x.dtype == jnp.bfloat16
    expected = losses(model)
    assert float(jnp.abs(other.token_losses(x, TOKENS) - expected).mean()) < 0.05 * float(expected.max())


def test_what_is_masked_takes_no_room(model: Any) -> None:
    """Neither padding nor free slots of a cache are among the keys of Gemma 2's window."""
    run = nnx.jit(lambda m, x, mask, turns, past=None: m(x, mask, turns, past=past))
    whole, cache = run(model, model.embed(TOKENS), MASK, model.rope(POSITIONS))
    valid = jnp.tile(jnp.asarray([True, True, False, False, True, True, False, True, True]), (2, 1))
    at = jnp.cumsum(valid, axis=1) - 1
    starts = jnp.ones(9, bool)
    padded, _ = run(model, model.embed(TOKENS[:, at[0]]), attention_mask(valid, starts), model.rope(at))
    np.testing.assert_allclose(padded[:, valid[0]], whole, atol=1e-5)
    room = jax.tree.map(lambda x: jnp.pad(x[:, :, :5], [(0, 0), (0, 0), (0, 7), (0, 0), (0, 0)]), cache)
    seen = jnp.broadcast_to((np.arange(13) < 5) | (np.arange(13) == 12), (2, 1, 13))
    last, _ = run(model, model.embed(TOKENS[:, 5:]), seen, model.rope(POSITIONS[:, 5:]), room)
    np.testing.assert_allclose(last[:, 0], whole[:, 5], atol=1e-5)


# ---- Rotations and configs -------------------------------------------------------------------------------------------


def test_pairs_turn_with_time_height_or_width() -> None:
    """Of the published models: in blocks, and taking turns as long as height and width have some."""
    blocks, turns = LlamaConfig.qwen2_5_vl_3b().rope_axes(), LlamaConfig.qwen3_vl_2b().rope_axes()
    np.testing.assert_array_equal(blocks, [0] * 16 + [1] * 24 + [2] * 24)
    np.testing.assert_array_equal(turns, [0, 1, 2] * 20 + [0] * 4)


def test_text_has_the_same_rotation_in_one_axis_and_in_three(filled: Any) -> None:
    config = dataclasses.replace(SMALL, rope_sections=(2, 1, 1))
    create = lambda c: filled(lambda: Llama(c, KEY, dtype="float32", unroll=True, remat=None, vocab_size=8))  # noqa: E731
    three = create(config)
    np.testing.assert_array_equal(three.rope(jnp.stack([POSITIONS] * 3)), three.rope(POSITIONS))
    with pytest.raises(ValueError, match=r"positions \(3, 2, 6\): this model has no rope_sections, expected \(B, S\)"):
        create(SMALL).rope(jnp.stack([POSITIONS] * 3))


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        (SMALL, {"num_heads": 5}, "num_heads=5, expected a multiple of num_kv_heads=2"),
        (SMALL, {"head_dim": 7}, "head_dim=7, expected an even number"),
        (SMALL, {"rope_base": 0.0}, "rope_base=0.0, expected a number above 1"),
        (SMALL, {"norm_eps": 0.0}, "norm_eps=0.0, expected a number above 0"),
        (SMALL, {"rope_interleaved": True}, "rope_interleaved=True, expected rope_sections to interleave"),
        (SMALL, {"rope_sections": (2, 2)}, r"rope_sections=\(2, 2\), expected three numbers that sum to .* = 4"),
        (SMALL, {"rope_sections": (1, 1, 1)}, "expected three numbers that sum to"),
        (
            SMALL,
            {"rope_sections": (0, 2, 2), "rope_interleaved": True},
            "expected height and width to have a third of 4 at most",
        ),
        (MODELS["gemma2"][1], {"num_heads": 5}, "num_heads=5, expected a multiple of num_kv_heads=2"),
        (
            MODELS["gemma2"][1],
            {"window": 0, "final_cap": -1.0},
            "final_cap=-1.0, .*; window=0, expected a number above",
        ),
    ],
)
def test_impossible_configs_are_refused(config: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(config, **changes)


def test_gemma_2_takes_no_condition() -> None:
    model = nnx.eval_shape(lambda: created("gemma2"))
    with pytest.raises(ValueError, match="Gemma 2 has no adaptive norms, expected no condition"):
        model.step(MASK, jnp.zeros((2, 2, 6, 4)), cond_BSD=jnp.zeros((2, 1, 16)))


def test_tiny_sizes_are_small() -> None:
    assert LlamaConfig.tiny(qk_norm=True).qk_norm
    assert Gemma2Config.tiny().window < 32
