"""The released sizes: parameter counts leaf by leaf against the published layouts, without allocating any array.

The shapes are facts about public checkpoints: openpi's by `jax.eval_shape` of its models at commit 15a9616a, LeRobot's
(commit 7427f31) and Hugging Face's (transformers 5.5) by their state dicts on torch's meta device.
"""

import math

import pytest

from openpi_like.models.pi0 import Pi0Config
from openpi_like.models.text_model import TextModelConfig
from openpi_like.models.weights import layout, weight_shapes

OPENPI_BOTH: dict[str, tuple[int, ...]] = {
    "PaliGemma/img/Transformer/encoder_norm/bias": (1152,),
    "PaliGemma/img/Transformer/encoder_norm/scale": (1152,),
    "PaliGemma/img/Transformer/encoderblock/LayerNorm_0/bias": (27, 1152),
    "PaliGemma/img/Transformer/encoderblock/LayerNorm_0/scale": (27, 1152),
    "PaliGemma/img/Transformer/encoderblock/LayerNorm_1/bias": (27, 1152),
    "PaliGemma/img/Transformer/encoderblock/LayerNorm_1/scale": (27, 1152),
    "PaliGemma/img/Transformer/encoderblock/MlpBlock_0/Dense_0/bias": (27, 4304),
    "PaliGemma/img/Transformer/encoderblock/MlpBlock_0/Dense_0/kernel": (27, 1152, 4304),
    "PaliGemma/img/Transformer/encoderblock/MlpBlock_0/Dense_1/bias": (27, 1152),
    "PaliGemma/img/Transformer/encoderblock/MlpBlock_0/Dense_1/kernel": (27, 4304, 1152),
    "PaliGemma/img/Transformer/encoderblock/MultiHeadDotProductAttention_0/key/bias": (27, 16, 72),
    "PaliGemma/img/Transformer/encoderblock/MultiHeadDotProductAttention_0/key/kernel": (27, 1152, 16, 72),
    "PaliGemma/img/Transformer/encoderblock/MultiHeadDotProductAttention_0/out/bias": (27, 1152),
    "PaliGemma/img/Transformer/encoderblock/MultiHeadDotProductAttention_0/out/kernel": (27, 16, 72, 1152),
    "PaliGemma/img/Transformer/encoderblock/MultiHeadDotProductAttention_0/query/bias": (27, 16, 72),
    "PaliGemma/img/Transformer/encoderblock/MultiHeadDotProductAttention_0/query/kernel": (27, 1152, 16, 72),
    "PaliGemma/img/Transformer/encoderblock/MultiHeadDotProductAttention_0/value/bias": (27, 16, 72),
    "PaliGemma/img/Transformer/encoderblock/MultiHeadDotProductAttention_0/value/kernel": (27, 1152, 16, 72),
    "PaliGemma/img/embedding/bias": (1152,),
    "PaliGemma/img/embedding/kernel": (14, 14, 3, 1152),
    "PaliGemma/img/head/bias": (2048,),
    "PaliGemma/img/head/kernel": (1152, 2048),
    "PaliGemma/img/pos_embedding": (1, 256, 1152),
    "PaliGemma/llm/embedder/input_embedding": (257152, 2048),
    "PaliGemma/llm/final_norm/scale": (2048,),
    "PaliGemma/llm/layers/attn/attn_vec_einsum/w": (18, 8, 256, 2048),
    "PaliGemma/llm/layers/attn/attn_vec_einsum_1/w": (18, 8, 256, 1024),
    "PaliGemma/llm/layers/attn/kv_einsum/w": (18, 2, 1, 2048, 256),
    "PaliGemma/llm/layers/attn/kv_einsum_1/w": (18, 2, 1, 1024, 256),
    "PaliGemma/llm/layers/attn/q_einsum/w": (18, 8, 2048, 256),
    "PaliGemma/llm/layers/attn/q_einsum_1/w": (18, 8, 1024, 256),
    "PaliGemma/llm/layers/mlp/gating_einsum": (18, 2, 2048, 16384),
    "PaliGemma/llm/layers/mlp/linear": (18, 16384, 2048),
    "PaliGemma/llm/layers/mlp_1/gating_einsum": (18, 2, 1024, 4096),
    "PaliGemma/llm/layers/mlp_1/linear": (18, 4096, 1024),
    "PaliGemma/llm/layers/pre_attention_norm/scale": (18, 2048),
    "PaliGemma/llm/layers/pre_ffw_norm/scale": (18, 2048),
    "action_in_proj/bias": (1024,),
    "action_in_proj/kernel": (32, 1024),
    "action_out_proj/bias": (32,),
    "action_out_proj/kernel": (1024, 32),
}
OPENPI_PI0: dict[str, tuple[int, ...]] = {
    "PaliGemma/llm/final_norm_1/scale": (1024,),
    "PaliGemma/llm/layers/pre_attention_norm_1/scale": (18, 1024),
    "PaliGemma/llm/layers/pre_ffw_norm_1/scale": (18, 1024),
    "action_time_mlp_in/bias": (1024,),
    "action_time_mlp_in/kernel": (2048, 1024),
    "action_time_mlp_out/bias": (1024,),
    "action_time_mlp_out/kernel": (1024, 1024),
    "state_proj/bias": (1024,),
    "state_proj/kernel": (32, 1024),
}
OPENPI_PI05: dict[str, tuple[int, ...]] = {
    "PaliGemma/llm/final_norm_1/Dense_0/bias": (3072,),
    "PaliGemma/llm/final_norm_1/Dense_0/kernel": (1024, 3072),
    "PaliGemma/llm/layers/pre_attention_norm_1/Dense_0/bias": (18, 3072),
    "PaliGemma/llm/layers/pre_attention_norm_1/Dense_0/kernel": (18, 1024, 3072),
    "PaliGemma/llm/layers/pre_ffw_norm_1/Dense_0/bias": (18, 3072),
    "PaliGemma/llm/layers/pre_ffw_norm_1/Dense_0/kernel": (18, 1024, 3072),
    "time_mlp_in/bias": (1024,),
    "time_mlp_in/kernel": (1024, 1024),
    "time_mlp_out/bias": (1024,),
    "time_mlp_out/kernel": (1024, 1024),
}


def numbers(shapes: dict[str, tuple[int, ...]]) -> int:
    return sum(math.prod(shape) for shape in shapes.values())


@pytest.mark.parametrize(
    ("pi05", "own", "count"), [(False, OPENPI_PI0, 3_238_048_528), (True, OPENPI_PI05, 3_353_433_872)]
)
def test_released_policies_leaf_by_leaf(pi05: bool, own: dict[str, tuple[int, ...]], count: int) -> None:
    config = Pi0Config.released(pi05=pi05)
    assert layout(config, "openpi") == OPENPI_BOTH | own
    shapes = {name: tuple(leaf.shape) for name, leaf in weight_shapes(config).items()}
    assert numbers(shapes) == numbers(OPENPI_BOTH | own) == count
    assert {str(leaf.dtype) for leaf in weight_shapes(config).values()} == {"float32"}


@pytest.mark.parametrize(("pi05", "tensors", "own"), [
    (False, 777, {"state_proj.weight": (1024, 32), "action_time_mlp_in.weight": (1024, 2048)}),
    (True, 812, {"time_mlp_in.weight": (1024, 1024), "time_mlp_out.bias": (1024,)}),
])  # fmt: skip
def test_lerobot_tensors(pi05: bool, tensors: int, own: dict[str, tuple[int, ...]]) -> None:
    config = Pi0Config.released(pi05=pi05)
    shapes = layout(config, "lerobot")
    assert len(shapes) == tensors
    idle = 257_152 * 1024  # the expert's output layer, which nothing uses
    assert numbers(shapes) == numbers(OPENPI_BOTH | (OPENPI_PI05 if pi05 else OPENPI_PI0)) + idle
    expert, vlm = (f"model.paligemma_with_expert.{e}" for e in ("gemma_expert", "paligemma"))
    expected = {f"model.{name}": shape for name, shape in own.items()} | {
        "model.action_out_proj.bias": (32,),
        f"{expert}.lm_head.weight": (257_152, 1024),
        f"{expert}.model.layers.17.self_attn.q_proj.weight": (2048, 1024),
        f"{expert}.model.layers.0.self_attn.o_proj.weight": (1024, 2048),
        f"{expert}.model.layers.0.mlp.down_proj.weight": (1024, 4096),
        f"{vlm}.lm_head.weight": (257_152, 2048),
        f"{vlm}.model.language_model.layers.0.self_attn.k_proj.weight": (256, 2048),
        f"{vlm}.model.language_model.layers.17.mlp.gate_proj.weight": (16_384, 2048),
        f"{vlm}.model.vision_tower.vision_model.embeddings.patch_embedding.weight": (1152, 3, 14, 14),
        f"{vlm}.model.vision_tower.vision_model.encoder.layers.26.mlp.fc1.weight": (4304, 1152),
        f"{vlm}.model.multi_modal_projector.linear.weight": (2048, 1152),
    }
    assert {name: shapes.get(name) for name in expected} == expected


def test_huggingface_tensors() -> None:
    shapes = layout(TextModelConfig.paligemma(), "huggingface")
    assert len(shapes) == 603
    assert shapes["language_model.model.embed_tokens.weight"] == (257_216, 2048)
    assert shapes["vision_tower.vision_model.embeddings.position_embedding.weight"] == (256, 1152)
    prefix = {
        k: v for k, v in OPENPI_BOTH.items() if k.startswith("PaliGemma/img/") or ("/llm/" in k and "_1" not in k)
    }
    assert numbers(shapes) == numbers(prefix) + 64 * 2048
    assert layout(TextModelConfig.paligemma(), "big_vision") == {
        k.removeprefix("PaliGemma/"): v for k, v in prefix.items()
    }


@pytest.mark.parametrize(("size", "patches"), [(224, 256), (448, 1024), (896, 4096)])
def test_paligemma_of_other_resolutions(size: int, patches: int) -> None:
    shapes = weight_shapes(TextModelConfig.paligemma(image_size=size))
    assert shapes["vision/position"].shape == (1, patches, 1152)
