"""Import and export of weights under the names and layouts of openpi's checkpoints.

One table, `openpi_names`, says which of our weights a published array holds; import and export both read it.
Weights are flat here: {"vlm/layers/q": array} for ours, {"PaliGemma/llm/layers/attn/q_einsum/w": array} for theirs.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from openpi_like.config import near_names
from openpi_like.models.gemma import GemmaConfig
from openpi_like.models.pi0 import Pi0, Pi0Config


class WeightsError(ValueError):
    """Arrays do not fit the model; the message lists every one that does not."""


def _linear(theirs: str, ours: str) -> dict[str, tuple[str, ...]]:
    return {f"{theirs}/{name}": (f"{ours}/{name}",) for name in ("kernel", "bias")}


def _layer_norm(theirs: str, ours: str) -> dict[str, tuple[str, ...]]:
    return {f"{theirs}/{name}": (f"{ours}/{name}",) for name in ("scale", "bias")}


def _rms_norm(theirs: str, ours: str, adaptive: bool) -> dict[str, tuple[str, ...]]:
    if adaptive:
        return _linear(f"{theirs}/Dense_0", f"{ours}/modulation")
    return {f"{theirs}/scale": (f"{ours}/scale",)}


def _gemma(config: GemmaConfig, ours: str, suffix: str, *, adaptive: bool) -> dict[str, tuple[str, ...]]:
    """suffix: "" for openpi's first expert, "_1" for its second."""
    layers, attn = "PaliGemma/llm/layers", "PaliGemma/llm/layers/attn"
    names: dict[str, tuple[str, ...]] = {}
    if config.num_heads == config.num_kv_heads:
        names[f"{attn}/qkv_einsum{suffix}/w"] = (f"{ours}/layers/q", f"{ours}/layers/kv")
    else:
        names[f"{attn}/q_einsum{suffix}/w"] = (f"{ours}/layers/q",)
        names[f"{attn}/kv_einsum{suffix}/w"] = (f"{ours}/layers/kv",)
    return {
        **names,
        f"{attn}/attn_vec_einsum{suffix}/w": (f"{ours}/layers/out",),
        f"{layers}/mlp{suffix}/gating_einsum": (f"{ours}/layers/gate_up",),
        f"{layers}/mlp{suffix}/linear": (f"{ours}/layers/down",),
        **_rms_norm(f"{layers}/pre_attention_norm{suffix}", f"{ours}/layers/attn_norm", adaptive),
        **_rms_norm(f"{layers}/pre_ffw_norm{suffix}", f"{ours}/layers/mlp_norm", adaptive),
        **_rms_norm(f"PaliGemma/llm/final_norm{suffix}", f"{ours}/final_norm", adaptive),
    }


def openpi_names(config: Pi0Config) -> dict[str, tuple[str, ...]]:
    """Returns {name in openpi's checkpoint: our weights it holds}.

    One weight has the same shape there and here. Two are q (L, N, D, H) and kv (L, 2, N, D, H), which openpi fuses to
    one array (L, 3, N, D, H) when every query head has its own kv head.
    """
    block = "PaliGemma/img/Transformer/encoderblock"
    attention = f"{block}/MultiHeadDotProductAttention_0"
    names = {
        **_linear("PaliGemma/img/embedding", "vision/patch"),
        "PaliGemma/img/pos_embedding": ("vision/position",),
        **_layer_norm(f"{block}/LayerNorm_0", "vision/layers/attn_norm"),
        **_linear(f"{attention}/query", "vision/layers/query"),
        **_linear(f"{attention}/key", "vision/layers/key"),
        **_linear(f"{attention}/value", "vision/layers/value"),
        **_linear(f"{attention}/out", "vision/layers/out"),
        **_layer_norm(f"{block}/LayerNorm_1", "vision/layers/mlp_norm"),
        **_linear(f"{block}/MlpBlock_0/Dense_0", "vision/layers/mlp_up"),
        **_linear(f"{block}/MlpBlock_0/Dense_1", "vision/layers/mlp_down"),
        **_layer_norm("PaliGemma/img/Transformer/encoder_norm", "vision/final_norm"),
        **_linear("PaliGemma/img/head", "vision/head"),
        "PaliGemma/llm/embedder/input_embedding": ("vlm/embedding",),
        **_gemma(config.vlm, "vlm", "", adaptive=False),
        **_gemma(config.expert, "expert", "_1", adaptive=config.pi05),
        **_linear("action_in_proj", "action_in"),
        **_linear("action_out_proj", "action_out"),
    }
    if config.pi05:
        names |= _linear("time_mlp_in", "time_in") | _linear("time_mlp_out", "time_out")
    else:
        names |= _linear("state_proj", "state_in")
        names |= _linear("action_time_mlp_in", "action_time_in") | _linear("action_time_mlp_out", "action_time_out")
    return names


def _abstract(config: Pi0Config) -> Pi0:
    """Returns a policy whose weights are shapes only."""
    return nnx.eval_shape(lambda: config.create(jax.random.key(0)))


def flat_weights(model: Pi0) -> dict[str, Any]:
    """Returns {"a/b/c": array} of a policy's weights."""
    return {"/".join(map(str, path)): v.get_value() for path, v in nnx.to_flat_state(nnx.state(model, nnx.Param))}


def from_openpi(config: Pi0Config, arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Returns our weights, float32 and nested by name, from openpi's flat names (without "params/" and "/value").

    Raises:
        WeightsError: an array is missing, unused, of the wrong shape or not of floats; lists all of them.
    """
    names = openpi_names(config)
    shapes = {name: value.shape for name, value in flat_weights(_abstract(config)).items()}
    problems = [f"{k}: missing; {near_names(k, list(arrays))}" for k in sorted(names.keys() - arrays.keys())]
    problems += [f"{k}: not used; {near_names(k, list(names))}" for k in sorted(arrays.keys() - names.keys())]
    flat: dict[str, np.ndarray] = {}
    for theirs, ours in names.items():
        if theirs not in arrays:
            continue
        array = np.asarray(arrays[theirs])
        expected = _fused_shape(shapes[ours[0]]) if len(ours) == 2 else shapes[ours[0]]
        if array.shape != expected:
            hint = " (the same sizes in another order: transposed?)" if sorted(array.shape) == sorted(expected) else ""
            problems.append(f"{theirs}: got shape {array.shape}, expected {expected}{hint}")
        elif not jnp.issubdtype(array.dtype, jnp.floating):
            problems.append(f"{theirs}: got {array.dtype}, expected a floating-point array")
        else:
            parts = (array[:, 0], array[:, 1:]) if len(ours) == 2 else (array,)
            flat.update({name: part.astype(np.float32) for name, part in zip(ours, parts, strict=True)})
    if problems:
        raise WeightsError("arrays do not fit the model:\n  " + "\n  ".join(problems))
    nested: dict[str, Any] = {}
    for name, value in flat.items():
        *parents, leaf = name.split("/")
        node = nested
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return nested


def to_openpi(model: Pi0) -> dict[str, np.ndarray]:
    """Returns a policy's weights under openpi's flat names: the inverse of `from_openpi`."""
    flat = {name: np.asarray(value) for name, value in flat_weights(model).items()}
    arrays = {}
    for theirs, ours in openpi_names(model.config).items():
        q, *kv = (flat[name] for name in ours)
        arrays[theirs] = np.concatenate([q[:, None], *kv], axis=1) if kv else q
    return arrays


def load(config: Pi0Config, weights: dict[str, Any]) -> Pi0:
    """Returns a policy with the given nested weights (as from `from_openpi`); draws nothing."""
    graph, state = nnx.split(_abstract(config), nnx.Param)
    nnx.replace_by_pure_dict(state, jax.tree.map(jnp.asarray, weights))
    return nnx.merge(graph, state)


def _fused_shape(q_shape: tuple[int, ...]) -> tuple[int, ...]:
    return (q_shape[0], 3, *q_shape[1:])
