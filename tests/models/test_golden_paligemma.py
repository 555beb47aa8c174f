"""PaliGemma as a language model against vectors computed by big_vision on tiny random weights."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from openpi_like.batch import Observation, TextBatch
from openpi_like.models.arrays import MemoryArrays
from openpi_like.models.gemma import GemmaConfig, attention_mask
from openpi_like.models.paligemma import PaliGemma, PaliGemmaConfig
from openpi_like.models.siglip import SiglipConfig
from openpi_like.models.text_model import TextModelConfig
from openpi_like.models.weights import bind, export_weights, flat_weights, plan_load, read_weights, unflatten
from tests.models.golden_set import assert_tokens, config_json, open_golden, patch_size


@pytest.fixture(scope="module")
def arrays(golden: Path) -> dict[str, Any]:
    return open_golden(golden / "item4_bigvision_paligemma.npz")


@pytest.fixture(scope="module")
def params(arrays: dict[str, Any]) -> dict[str, np.ndarray]:
    return {k.removeprefix("params/"): np.asarray(v) for k, v in arrays.items() if k.startswith("params/")}


@pytest.fixture(scope="module")
def config(arrays: dict[str, Any]) -> TextModelConfig:
    c = config_json(arrays)
    image = c["img_config"]
    vision = {k: image[k] for k in ("width", "depth", "mlp_dim", "num_heads", "patch_size")}
    return TextModelConfig(
        backbone=PaliGemmaConfig(SiglipConfig(**patch_size(vision)), GemmaConfig(**c["llm_config"])),
        cameras=("image",),
        image_size=tuple(arrays["image"].shape[1:3]),
        prompt_len=arrays["text"].shape[1],
        vocab_size=arrays["params/llm/embedder/input_embedding"].shape[0],
    )


@pytest.fixture(scope="module")
def model(config: TextModelConfig, params: dict[str, np.ndarray]) -> PaliGemma:
    source = MemoryArrays(params)
    backbone = bind(config, unflatten(read_weights(source, plan_load(config, source)))).backbone
    assert isinstance(backbone, PaliGemma)
    return backbone


@pytest.fixture(scope="module")
def text_batch(arrays: dict[str, Any]) -> TextBatch:
    B = arrays["text"].shape[0]
    return {
        "images": {"image": arrays["image"]},
        "image_mask": {"image": jnp.ones(B, bool)},
        "prompt": arrays["text"],
        "prompt_mask": jnp.ones(arrays["text"].shape, bool),
        "prompt_causal": arrays["mask_ar"].astype(bool),
        "prompt_loss": arrays["mask_ar"].astype(bool),
        "dataset_id": jnp.zeros(B, jnp.int32),
    }


@pytest.fixture(scope="module")
def observation(arrays: dict[str, Any], text_batch: TextBatch) -> Observation:
    return {  # type: ignore[typeddict-item]  # a language model reads no state
        "images": text_batch["images"],
        "image_mask": text_batch["image_mask"],
        "prompt": arrays["decode/prompt_text"],
        "prompt_mask": arrays["decode/prompt_input_mask"],
    }


def test_golden_paligemma_images_and_tokens(
    arrays: dict[str, Any], model: PaliGemma, text_batch: TextBatch, config: TextModelConfig
) -> None:
    x = model.vision.stem(arrays["image"])
    x = x.reshape(x.shape[0], -1, x.shape[-1]) + model.vision.position[...]
    assert_tokens(x, arrays["siglip/with_posemb"])
    for i in range(model.vision.config.depth):
        layer = jax.tree.map(lambda w, i=i: w[i], model.vision.layers)
        x = layer.mlp(layer.attention(x))
        assert_tokens(x, arrays[f"siglip/block{i:02d}/+mlp"])
    tokens, valid, _ = model.embed_prefix(text_batch)
    P = arrays["zimg"].shape[1]
    assert_tokens(tokens[:, :P], arrays["zimg"])
    assert_tokens(tokens[:, P:], arrays["ztxt"])
    images = {"image": arrays["image_uint8"]}
    assert_tokens(model.embed_prefix({**text_batch, "images": images})[0], tokens)
    starts = jnp.pad(text_batch["prompt_causal"], ((0, 0), (P, 0)))
    np.testing.assert_array_equal(attention_mask(valid, starts), arrays["attn_mask"])


def test_golden_paligemma_stack(arrays: dict[str, Any], model: PaliGemma) -> None:
    """`encoded` is before the final norm, `pre_logits` after it."""
    x = jnp.concatenate([arrays["zimg"], arrays["ztxt"]], axis=1)
    positions = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
    out, _ = nnx.jit(lambda m, x: m.vlm(x, arrays["attn_mask"], m.vlm.rope(positions)))(model, x)
    assert_tokens(model.vlm.final_norm(arrays["encoded"], None)[0], arrays["pre_logits"])
    assert_tokens(out, arrays["pre_logits"])


def test_golden_paligemma_text_logits(arrays: dict[str, Any], model: PaliGemma, text_batch: TextBatch) -> None:
    logits = nnx.jit(PaliGemma.text_logits)(model, text_batch)
    assert_tokens(logits, arrays["text_logits"])
    np.testing.assert_array_equal(jnp.argmax(logits, axis=-1), arrays["text_tokens"])


def test_golden_paligemma_loss_is_that_of_its_logits(
    arrays: dict[str, Any], model: PaliGemma, text_batch: TextBatch
) -> None:
    loss, metrics = nnx.jit(PaliGemma.text_loss)(model, text_batch)
    logits = np.asarray(arrays["text_logits"], np.float64)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = []
    for b, row in enumerate(np.asarray(arrays["text"])):
        marked = [s for s in range(1, len(row)) if arrays["mask_ar"][b, s]]
        expected.append(-np.mean([log_p[b, s - 1, row[s]] for s in marked]))
    assert_tokens(metrics["loss"], expected)
    assert_tokens(loss, np.mean(expected))


def test_golden_paligemma_decoding(arrays: dict[str, Any], model: PaliGemma, observation: Observation) -> None:
    continuation, expected = arrays["decode/continuation"], arrays["decode/logits"]
    steps = continuation.shape[1]
    x, cache = nnx.jit(PaliGemma.prefill, static_argnames="max_new")(model, observation, max_new=steps)
    assert_tokens(model.next_logits(x), expected[:, 0])
    extend = nnx.jit(PaliGemma.extend)
    for s in range(steps):
        x, cache = extend(model, continuation[:, s], cache)
        assert_tokens(model.next_logits(x), expected[:, s + 1])


def test_golden_paligemma_generation_follows_the_likeliest_token(
    arrays: dict[str, Any], model: PaliGemma, observation: Observation, config: TextModelConfig
) -> None:
    """Token by token the same as running the whole sequence anew each time."""
    new = 4
    generate = nnx.jit(PaliGemma.generate, static_argnames="max_new")
    ids, mask = generate(model, jax.random.key(0), observation, max_new=new)
    length, logits = config.prompt_len + new, nnx.jit(PaliGemma.text_logits)
    longer = bind(dataclasses.replace(config, prompt_len=length), unflatten(flat_weights(model))).backbone
    for b in range(ids.shape[0]):
        n = int(observation["prompt_mask"][b].sum())
        text = list(np.asarray(observation["prompt"][b, :n]))
        for s in range(int(mask[b].sum())):
            at, padding = np.arange(length), [0] * (length - len(text))
            whole: TextBatch = {
                "images": {"image": arrays["image"][b : b + 1]},
                "image_mask": {"image": jnp.ones(1, bool)},
                "prompt": jnp.asarray([[*text, *padding]], jnp.int32),
                "prompt_mask": jnp.asarray(at < len(text))[None],
                "prompt_causal": jnp.asarray(at >= n)[None],
                "prompt_loss": jnp.zeros((1, length), bool),
                "dataset_id": jnp.zeros(1, jnp.int32),
            }
            token = int(jnp.argmax(logits(longer, whole)[0, len(text) - 1]))
            assert int(ids[b, s]) == token
            text.append(token)


def test_golden_alignment_of_prompts_changes_nothing(
    golden: Path, arrays: dict[str, Any], model: PaliGemma, observation: Observation
) -> None:
    """The reference rolls prompts to the right before decoding; here padding may stand on either side."""
    functions = open_golden(golden / "item5_functions.npz")

    def align(x: np.ndarray, valid: np.ndarray) -> np.ndarray:
        last = [int(np.flatnonzero(row)[-1]) for row in valid]
        return np.stack([np.roll(row, len(row) - 1 - at, axis=0) for row, at in zip(x, last, strict=True)])

    f = {k.split("/")[1]: np.asarray(v) for k, v in functions.items() if k.startswith("left_to_right_align/")}
    np.testing.assert_array_equal(align(f["x"], f["input_mask"]), f["result_x"])
    np.testing.assert_array_equal(align(f["input_mask"], f["input_mask"]), f["result_input_mask"])
    seen = align(f["attn_mask"], f["input_mask"]).swapaxes(1, 2)
    np.testing.assert_array_equal(align(seen, f["input_mask"]).swapaxes(1, 2), f["result_attn_mask"])

    mask = np.asarray(observation["prompt_mask"])
    moved: Any = {
        **observation,
        "prompt": jnp.asarray(align(np.asarray(observation["prompt"]), mask)),
        "prompt_mask": jnp.asarray(align(mask, mask)),
    }
    prefill = nnx.jit(PaliGemma.prefill, static_argnames="max_new")
    x, cache = prefill(model, moved, max_new=2)
    assert_tokens(model.next_logits(x), arrays["decode/logits"][:, 0])
    x, _ = nnx.jit(PaliGemma.extend)(model, arrays["decode/continuation"][:, 0], cache)
    assert_tokens(model.next_logits(x), arrays["decode/logits"][:, 1])


def test_golden_paligemma_weights_round_trip(
    model: PaliGemma, params: dict[str, np.ndarray], config: TextModelConfig
) -> None:
    exported = {name: make() for name, make in export_weights(config, flat_weights(model), "big_vision")}
    assert exported.keys() == params.keys()
    for name, array in params.items():
        np.testing.assert_array_equal(exported[name], array, err_msg=name)
