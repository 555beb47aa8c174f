"""Every format of weights in both directions: names of all ages, layouts, tied and fused arrays."""

from typing import Any

import numpy as np
import pytest

from openpi_like.models.arrays import MemoryArrays
from openpi_like.models.formats import family, recognise
from openpi_like.models.pi0 import Pi0Config
from openpi_like.models.weights import WeightsError, known_formats, plan_load, read_weights, table_for, weight_shapes
from tests.models.weight_arrays import assert_same, exported, loaded, paligemma, with_heads

FUSED, FUSED_EXPERT = (f"PaliGemma/llm/layers/attn/qkv_einsum{suffix}/w" for suffix in ("", "_1"))


@pytest.mark.parametrize("pi05", [False, True])
@pytest.mark.parametrize("num_kv_heads", [1, 2])
@pytest.mark.parametrize("fmt", ["openpi", "lerobot", "ours"])
def test_policy_formats_round_trip(
    tiny_policy: Pi0Config, weights: Any, fmt: str, num_kv_heads: int, pi05: bool
) -> None:
    config = with_heads(tiny_policy, num_kv_heads, pi05)
    mine = weights(config)
    arrays = exported(config, mine, fmt)
    assert recognise(arrays, known_formats(config)) == fmt
    assert family(arrays) == ("pi0.5" if pi05 else "pi0")
    if fmt == "openpi":
        assert (FUSED in arrays) == (FUSED_EXPERT in arrays) == (num_kv_heads == config.backbone.language.num_heads)
    assert_same(loaded(config, arrays), mine)


@pytest.mark.parametrize("fmt", ["openpi", "big_vision", "huggingface", "ours"])
def test_paligemma_formats_round_trip(tiny_policy: Pi0Config, weights: Any, fmt: str) -> None:
    config = paligemma(tiny_policy)
    mine = weights(config)
    arrays = exported(config, mine, fmt)
    assert recognise(arrays, known_formats(config)) == fmt
    assert_same(loaded(config, arrays), mine)


@pytest.mark.parametrize("fmt", ["big_vision", "huggingface", "lerobot", "openpi", "ours", "siglip"])
@pytest.mark.parametrize("pi05", [False, True])
def test_no_weight_is_covered_twice_or_in_part(tiny_policy: Pi0Config, fmt: str, pi05: bool) -> None:
    config = with_heads(tiny_policy, 2, pi05)
    shapes = {name: leaf.shape for name, leaf in weight_shapes(config).items()}
    counts = {name: np.zeros(shape, int) for name, shape in shapes.items()}
    for row in table_for(config, list(shapes), fmt).rows:
        counts[row.ours][row.at] += 1
    covered = {name for name, count in counts.items() if count.any()}
    expected = {"openpi": "", "lerobot": "", "ours": "", "siglip": "vision/"}.get(fmt, "v")
    assert covered == {n for n in shapes if n.startswith(expected)} - (
        {"vision/head/kernel", "vision/head/bias"} if fmt == "siglip" else set()
    )
    assert all((counts[name] == 1).all() for name in covered)


def test_torch_layouts_by_hand(tiny_policy: Pi0Config, weights: Any) -> None:
    """What a torch module would compute with the exported arrays, against our einsums."""
    config = with_heads(tiny_policy, 2, pi05=True)
    mine = weights(config)
    theirs = exported(config, mine, "lerobot")
    root = "model.paligemma_with_expert."
    rng = np.random.default_rng(0)
    x = rng.normal(size=config.expert.width)
    layer = f"{root}gemma_expert.model.layers.1."
    kv = np.einsum("D,KDH->KH", x, mine["expert/layers/kv"][1, 1])
    np.testing.assert_allclose(theirs[f"{layer}self_attn.v_proj.weight"] @ x, kv.reshape(-1), rtol=1e-5)
    heads = rng.normal(size=(config.expert.num_heads, config.expert.head_dim))
    out = np.einsum("NH,NHD->D", heads, mine["expert/layers/out"][1])
    np.testing.assert_allclose(theirs[f"{layer}self_attn.o_proj.weight"] @ heads.reshape(-1), out, rtol=1e-5)
    up = x @ mine["expert/layers/gate_up"][1, 1]
    np.testing.assert_allclose(theirs[f"{layer}mlp.up_proj.weight"] @ x, up, rtol=1e-5)
    modulation = x @ mine["expert/layers/attn_norm/modulation/kernel"][1]
    np.testing.assert_allclose(theirs[f"{layer}input_layernorm.dense.weight"] @ x, modulation, rtol=1e-5)
    patch = rng.normal(size=(8, 8, 3))  # rows, columns, colours; torch has colours first
    vision = f"{root}paligemma.model.vision_tower.vision_model."
    conv = np.einsum("dchw,hwc->d", theirs[f"{vision}embeddings.patch_embedding.weight"], patch)
    np.testing.assert_allclose(conv, np.einsum("hwc,hwcd->d", patch, mine["vision/patch/kernel"]), rtol=1e-5)
    v = rng.normal(size=mine["vision/patch/bias"].shape[0])
    query = np.einsum("D,DNH->NH", v, mine["vision/layers/query/kernel"][0])
    projection = theirs[f"{vision}encoder.layers.0.self_attn.q_proj.weight"]
    np.testing.assert_allclose(projection @ v, query.reshape(-1), rtol=1e-5)


def test_fused_projection_is_query_then_key_then_value(tiny_policy: Pi0Config, weights: Any) -> None:
    config = with_heads(tiny_policy, tiny_policy.backbone.language.num_heads, pi05=False)
    arrays = exported(config, weights(config), "openpi")
    sizes = config.backbone.language
    L, D, N, H = sizes.depth, sizes.width, sizes.num_heads, sizes.head_dim
    assert arrays[FUSED].shape == (L, 3, N, D, H)
    arrays[FUSED] = np.broadcast_to(np.arange(3.0)[None, :, None, None, None], (L, 3, N, D, H)).copy()
    mine = loaded(config, arrays)
    np.testing.assert_array_equal(mine["vlm/layers/q"], 0.0)
    np.testing.assert_array_equal(mine["vlm/layers/kv"][:, 0], 1.0)
    np.testing.assert_array_equal(mine["vlm/layers/kv"][:, 1], 2.0)


@pytest.mark.parametrize("level", ["vision_model.", ""])
@pytest.mark.parametrize("language", ["language_model.model.", "model.language_model.", "model.language_model.model."])
def test_huggingface_names_of_all_ages_with_padded_and_tied_tables(
    tiny_policy: Pi0Config, weights: Any, language: str, level: str
) -> None:
    new = language.startswith("model.")
    config = paligemma(tiny_policy)
    mine = weights(config)
    arrays = exported(config, mine, "huggingface")
    table = "language_model.model.embed_tokens.weight"
    assert arrays[table].shape[0] == config.vocab_size + 64
    np.testing.assert_allclose(arrays[table][-1], mine["vlm/embedding"].mean(0), atol=1e-6)
    if new:
        arrays = {
            k.replace("language_model.model.", language)
            .replace("vision_tower.", "model.vision_tower.")
            .replace("multi_modal_projector.", "model.multi_modal_projector."): v
            for k, v in arrays.items()
        }
        table = f"{language}embed_tokens.weight"
    arrays = {k.replace("vision_model.", level): v for k, v in arrays.items()}
    head = "lm_head.weight" if new else "language_model.lm_head.weight"
    source = MemoryArrays({**arrays, head: arrays[table]})
    plan = plan_load(config, source)
    assert plan.dropped == [f"{table}: rows {config.vocab_size} and up: padding of the vocabulary"]
    assert_same(read_weights(source, plan), mine)
    with pytest.raises(WeightsError, match=f"{head}: differs from {table}, expected the same numbers"):
        loaded(config, {**arrays, head: arrays[table] + 1})


@pytest.mark.parametrize("loop", [False, True])
def test_siglip_alone_fills_the_image_tower(tiny_policy: Pi0Config, weights: Any, loop: bool) -> None:
    config = paligemma(tiny_policy)
    mine = weights(config)
    names = ["img/Transformer/encoderblock_0/x"] if loop else []
    table = table_for(config, names, "siglip")
    arrays = {r.theirs: mine[r.ours][r.at] for r in table.rows}
    assert any("encoderblock_0/" in name for name in arrays) == loop
    extra = ("img/MAPHead_0/probe", "img/head/kernel", "txt/Encoder_0/encoder_norm/bias", "t", "b")
    arrays |= {name: np.ones(3, np.float32) for name in extra}
    with pytest.raises(WeightsError, match="vlm/embedding: this format does not hold it"):
        plan_load(config, MemoryArrays(arrays))
    source = MemoryArrays(arrays)
    plan = plan_load(config, source, reinitialize=("^vlm/", "^vision/head/"))
    assert sorted(line.split(":")[0] for line in plan.dropped) == sorted(extra)
    got = read_weights(source, plan)
    assert_same(got, {k: v for k, v in mine.items() if k.startswith("vision/") and not k.startswith("vision/head")})


def test_lerobot_idle_head_and_tied_table(tiny_policy: Pi0Config, weights: Any) -> None:
    mine = weights(tiny_policy)
    for root in ("model.", ""):
        arrays = {k.replace("model.", root, 1): v for k, v in exported(tiny_policy, mine, "lerobot").items()}
        both = f"{root}paligemma_with_expert."
        table = f"{both}paligemma.model.language_model.embed_tokens.weight"
        head, idle = f"{both}paligemma.lm_head.weight", f"{both}gemma_expert.lm_head.weight"
        # LeRobot demands the idle layer, and takes the table from the output layer's name.
        assert arrays[idle].shape == (tiny_policy.vocab_size, tiny_policy.expert.width)
        assert head in arrays
        assert table not in arrays
        assert_same(loaded(tiny_policy, arrays), mine)
        arrays[table] = arrays[head]
        assert_same(loaded(tiny_policy, arrays), mine)
        del arrays[head], arrays[idle]
        assert_same(loaded(tiny_policy, arrays), mine)
        with pytest.raises(WeightsError, match="differs from"):
            loaded(tiny_policy, {**arrays, head: arrays[table] * 2})


def test_older_lerobot_files(tiny_policy: Pi0Config, weights: Any) -> None:
    mine, both = weights(tiny_policy), "model.paligemma_with_expert."
    arrays = {
        k.replace("paligemma.lm_head", "paligemma.language_model.lm_head")
        .replace("paligemma.model.language_model.", "paligemma.language_model.model.")
        .replace("paligemma.model.", "paligemma."): v
        for k, v in exported(tiny_policy, mine, "lerobot").items()
    }
    arrays["normalize_inputs.buffer_observation_state.mean"] = np.zeros(4, np.float32)
    source = MemoryArrays(arrays)
    plan = plan_load(tiny_policy, source)
    assert [line.split(": ")[1] for line in plan.dropped if "normalize" in line] == [
        "normalisation statistics, which are no weights"
    ]
    assert_same(read_weights(source, plan), mine)
    with pytest.raises(WeightsError, match="look like pi0, this config is PaliGemma"):
        loaded(paligemma(tiny_policy), arrays)
    assert f"{both}paligemma.language_model.lm_head.weight" in arrays


def test_a_format_that_cannot_hold_the_model(tiny_policy: Pi0Config, weights: Any) -> None:
    with pytest.raises(WeightsError, match=r"format 'big_vision' cannot hold action_in/bias, .*; choose another"):
        exported(tiny_policy, weights(tiny_policy), "big_vision")
