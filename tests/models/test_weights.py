"""The name table in both directions, fused projections, and what happens to arrays that do not fit."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from openpi_like.models.pi0 import Pi0Config
from openpi_like.models.weights import WeightsError, flat_weights, from_openpi, load, openpi_names, to_openpi

KEY = jax.random.key(0)
FUSED, FUSED_EXPERT = (f"PaliGemma/llm/layers/attn/qkv_einsum{suffix}/w" for suffix in ("", "_1"))


def with_heads(config: Pi0Config, num_kv_heads: int, pi05: bool) -> Pi0Config:
    experts = {n: dataclasses.replace(getattr(config, n), num_kv_heads=num_kv_heads) for n in ("vlm", "expert")}
    return dataclasses.replace(config, pi05=pi05, **experts)


@pytest.mark.parametrize("pi05", [False, True])
@pytest.mark.parametrize("num_kv_heads", [1, 2])
def test_export_then_import_returns_every_weight(
    tiny_policy: Pi0Config, filled: Any, num_kv_heads: int, pi05: bool
) -> None:
    config = with_heads(tiny_policy, num_kv_heads, pi05)
    model = filled(lambda: config.create(KEY))
    arrays = to_openpi(model)
    assert (FUSED in arrays) == (FUSED_EXPERT in arrays) == (num_kv_heads == config.vlm.num_heads)
    ours, again = flat_weights(model), flat_weights(load(config, from_openpi(config, arrays)))
    assert ours.keys() == again.keys()
    for name, value in ours.items():
        np.testing.assert_array_equal(again[name], value, err_msg=name)


def test_fused_projection_is_query_then_key_then_value(tiny_policy: Pi0Config, filled: Any) -> None:
    config = with_heads(tiny_policy, tiny_policy.vlm.num_heads, pi05=False)
    arrays = to_openpi(filled(lambda: config.create(KEY)))
    L, D, N, H = config.vlm.depth, config.vlm.width, config.vlm.num_heads, config.vlm.head_dim
    assert arrays[FUSED].shape == (L, 3, N, D, H)
    arrays[FUSED] = np.broadcast_to(np.arange(3.0)[None, :, None, None, None], (L, 3, N, D, H)).copy()
    layers = from_openpi(config, arrays)["vlm"]["layers"]
    np.testing.assert_array_equal(layers["q"], 0.0)
    np.testing.assert_array_equal(layers["kv"][:, 0], 1.0)
    np.testing.assert_array_equal(layers["kv"][:, 1], 2.0)


def test_table_covers_every_weight_once(tiny_policy: Pi0Config) -> None:
    for pi05 in (False, True):
        config = dataclasses.replace(tiny_policy, pi05=pi05)
        covered = [name for ours in openpi_names(config).values() for name in ours]
        assert sorted(covered) == sorted(flat_weights(nnx.eval_shape(lambda c=config: c.create(KEY))))


def test_every_mismatch_is_in_one_error(tiny_policy: Pi0Config, filled: Any) -> None:
    arrays = to_openpi(filled(lambda: tiny_policy.create(KEY)))
    arrays["action_in_projj/kernel"] = arrays.pop("action_in_proj/kernel")
    arrays["PaliGemma/img/Transformer/encoderblock_0/bias"] = np.zeros(3, np.float32)
    head = "PaliGemma/llm/layers/mlp_1/linear"
    arrays[head] = arrays[head].swapaxes(1, 2)
    arrays["state_proj/bias"] = arrays["state_proj/bias"][:-1]
    arrays["action_out_proj/bias"] = arrays["action_out_proj/bias"].astype(np.int32)
    with pytest.raises(WeightsError) as caught:
        from_openpi(tiny_policy, arrays)
    message = str(caught.value)
    assert "action_in_proj/kernel: missing; did you mean 'action_in_projj/kernel'" in message
    assert "action_in_projj/kernel: not used; did you mean 'action_in_proj/kernel'" in message
    assert "encoderblock_0/bias: not used" in message
    assert f"{head}: got shape (2, 16, 32), expected (2, 32, 16) (the same sizes in another order" in message
    assert "state_proj/bias: got shape (15,), expected (16,)" in message
    assert "action_out_proj/bias: got int32, expected a floating-point array" in message
    assert len(message.splitlines()) == 7  # the headline and six mismatches


def test_unfused_arrays_do_not_pass_for_fused_ones(tiny_policy: Pi0Config, filled: Any) -> None:
    arrays = to_openpi(filled(lambda: tiny_policy.create(KEY)))
    with pytest.raises(WeightsError, match=r"qkv_einsum/w: missing(.|\n)*q_einsum/w: not used"):
        from_openpi(with_heads(tiny_policy, tiny_policy.vlm.num_heads, pi05=False), arrays)


def test_bfloat16_arrays_become_float32(tiny_policy: Pi0Config, filled: Any) -> None:
    arrays = {
        k: np.asarray(jnp.asarray(v, "bfloat16")) for k, v in to_openpi(filled(lambda: tiny_policy.create(KEY))).items()
    }
    weights = from_openpi(tiny_policy, arrays)
    assert {leaf.dtype for leaf in jax.tree.leaves(weights)} == {np.dtype(np.float32)}
