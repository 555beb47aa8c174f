"""Partial loads, files, and everything that must be refused."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from safetensors.numpy import save_file

from openpi_like.models.arrays import LoraMerged, MemoryArrays, open_arrays
from openpi_like.models.pi0 import Pi0Config
from openpi_like.models.weights import (
    WeightsError,
    export_weights,
    flatten,
    load_weights,
    plan_load,
    read_weights,
    unflatten,
    weight_shapes,
    write_openpi,
    write_safetensors,
)
from tests.models.weight_arrays import Arrays, assert_same, exported, loaded, paligemma, with_heads

# When one array of a damaged Orbax directory cannot be read, the reads of all others are left behind, and reported at
# any later moment.
pytestmark = pytest.mark.filterwarnings(
    r"ignore:Exception ignored in. (None|<coroutine object _read_array):pytest.PytestUnraisableExceptionWarning"
)


# ---- Partial loads ---------------------------------------------------------------------------------------------------


def test_a_new_action_size_is_loaded_when_asked_for_and_reported(tiny_policy: Pi0Config, openpi_arrays: Arrays) -> None:
    wider = dataclasses.replace(tiny_policy, action_dim=7, cameras=("base", "wrist_right", "wrist_left"))
    with pytest.raises(WeightsError) as e:
        loaded(wider, openpi_arrays)
    assert "action_in_proj/kernel: got shape (4, 16), expected (7, 16) (for action_in/kernel)" in str(e.value)
    assert "(3 problems)" in str(e.value)  # a camera more needs no weight more
    source = MemoryArrays(openpi_arrays)
    plan = plan_load(wider, source, reinitialize=("^action_in/kernel$", "^action_out/"))
    fresh = {row["weight"]: row["why"] for row in plan.report if row["from"] == "fresh"}
    assert fresh.keys() == {"action_in/kernel", "action_out/kernel", "action_out/bias"}
    assert "got shape (4, 16), expected (7, 16)" in fresh["action_in/kernel"]
    assert read_weights(source, plan).keys() == weight_shapes(wider).keys() - fresh.keys()


def test_paligemma_starts_a_policy(tiny_policy: Pi0Config, weights: Any) -> None:
    config = paligemma(tiny_policy)
    mine = weights(config)
    arrays = exported(config, mine, "big_vision")
    with pytest.raises(
        WeightsError, match=r"expert/layers/q: this format does not hold it(.|\n)*choose the other config"
    ):
        loaded(tiny_policy, arrays)
    rest = ("^expert/", "^action_", "^state_in/")
    assert_same(loaded(tiny_policy, arrays, reinitialize=rest), mine)


def test_a_policy_gives_its_paligemma(tiny_policy: Pi0Config, weights: Any) -> None:
    mine = weights(tiny_policy)
    arrays = exported(tiny_policy, mine, "openpi")
    source, config = MemoryArrays(arrays), paligemma(tiny_policy)
    plan = plan_load(config, source, drop=("llm/.*_1/", "^action_", "^state_"))
    assert "action_in_proj/bias: asked by '^action_'" in plan.dropped
    assert_same(read_weights(source, plan), {k: v for k, v in mine.items() if k in weight_shapes(config)})
    with pytest.raises(WeightsError, match="pattern '_2/' matches no array"):
        plan_load(config, source, drop=("llm/.*_1/", "^action_", "^state_", "_2/"))


def test_weights_are_placed_sharded_and_in_bfloat16(tiny_policy: Pi0Config, weights: Any) -> None:
    mine = weights(tiny_policy)
    source = MemoryArrays(exported(tiny_policy, mine, "lerobot"))
    mesh = jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec
    shardings = {
        name: jax.sharding.NamedSharding(mesh, spec(*[None] * (v.ndim - 1), "x" if v.shape[-1] % 4 == 0 else None))
        for name, v in mine.items()
    }
    got = read_weights(source, plan_load(tiny_policy, source), dtype="bfloat16", shardings=shardings)
    table = got["vlm/embedding"]
    assert {shard.data.shape for shard in table.addressable_shards} == {(300, 4)}
    for name, value in mine.items():
        assert got[name].dtype == jnp.bfloat16
        np.testing.assert_array_equal(np.asarray(got[name]), value.astype(ml_dtypes.bfloat16), err_msg=name)


# ---- Files -----------------------------------------------------------------------------------------------------------


def test_openpi_orbax_with_and_without_the_value_level(
    tmp_path: Path, tiny_policy: Pi0Config, weights: Any, openpi_arrays: Arrays
) -> None:
    mine = weights(tiny_policy)
    write_openpi(export_weights(tiny_policy, mine, "openpi"), tmp_path / "with")
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "without" / "params", {"params": unflatten(openpi_arrays)})
    for path in (tmp_path / "with", tmp_path / "with" / "params", tmp_path / "without"):
        assert_same(flatten(load_weights(tiny_policy, path)), mine)


@pytest.mark.parametrize("parts", [1, 3])
def test_safetensors_in_one_or_several_files(tmp_path: Path, tiny_policy: Pi0Config, weights: Any, parts: int) -> None:
    mine = weights(tiny_policy)
    total = sum(v.nbytes for v in exported(tiny_policy, mine, "lerobot").values())
    arrays = export_weights(tiny_policy, mine, "lerobot")
    files = write_safetensors(arrays, tmp_path, max_bytes=total if parts == 1 else total // 2)
    assert (len(files) == 1) == (parts == 1)
    assert_same(flatten(load_weights(tiny_policy, tmp_path)), mine)
    one = tmp_path / ("model.safetensors" if parts == 1 else "model.safetensors.index.json")
    assert_same(flatten(load_weights(tiny_policy, one)), mine)


def test_npz_with_prefix_and_bfloat16(tmp_path: Path, tiny_policy: Pi0Config, weights: Any) -> None:
    config = paligemma(tiny_policy)
    mine = weights(config)
    half = {f"params/{k}": v.astype(ml_dtypes.bfloat16) for k, v in exported(config, mine, "big_vision").items()}
    np.savez(tmp_path / "pt.npz", **half)  # type: ignore[arg-type]
    got = flatten(load_weights(config, tmp_path / "pt.npz"))
    for name, value in mine.items():
        np.testing.assert_array_equal(got[name], value.astype(ml_dtypes.bfloat16).astype(np.float32), err_msg=name)


# ---- Bad input -------------------------------------------------------------------------------------------------------


def test_every_mismatch_is_in_one_error(tiny_policy: Pi0Config, openpi_arrays: Arrays) -> None:
    arrays = openpi_arrays
    arrays["action_in_projj/kernel"] = arrays.pop("action_in_proj/kernel")
    arrays["PaliGemma/img/Transformer/encoderblock_0/bias"] = np.zeros(3, np.float32)
    head = "PaliGemma/llm/layers/mlp_1/linear"
    arrays[head] = arrays[head].swapaxes(1, 2)
    arrays["state_proj/bias"] = arrays["state_proj/bias"][:-1]
    with pytest.raises(WeightsError) as caught:
        loaded(tiny_policy, arrays)
    message = str(caught.value)
    assert "action_in_proj/kernel: missing (for action_in/kernel); did you mean 'action_in_projj/kernel'" in message
    assert "action_in_projj/kernel: not used; did you mean 'action_in_proj/kernel'" in message
    assert "encoderblock_0/bias: not used" in message
    assert f"{head}: got shape (2, 16, 32), expected (2, 32, 16) (for expert/layers/down); the same sizes in" in message
    assert "state_proj/bias: got shape (15,), expected (16,)" in message
    assert len(message.splitlines()) == 6  # the headline and five mismatches


def test_numbers_that_are_no_weights(tiny_policy: Pi0Config, openpi_arrays: Arrays) -> None:
    openpi_arrays["action_out_proj/bias"] = openpi_arrays["action_out_proj/bias"].astype(np.int32)
    openpi_arrays["state_proj/bias"][1] = np.nan
    openpi_arrays["PaliGemma/img/head/bias"][0] = np.inf
    with pytest.raises(WeightsError) as caught:
        loaded(tiny_policy, openpi_arrays)
    message = str(caught.value)
    assert "action_out_proj/bias: got int32, expected a floating-point array" in message
    assert "state_proj/bias: holds values that are not finite" in message
    assert "PaliGemma/img/head/bias: holds values that are not finite" in message


def test_the_wrong_family_is_named(tiny_policy: Pi0Config, openpi_arrays: Arrays) -> None:
    pi05 = dataclasses.replace(tiny_policy, pi05=True)
    with pytest.raises(WeightsError, match=r"these arrays look like pi0, this config is pi0\.5: choose the other"):
        loaded(pi05, openpi_arrays)
    with pytest.raises(WeightsError, match="look like pi0, this config is PaliGemma"):
        loaded(paligemma(tiny_policy), openpi_arrays)
    with pytest.raises(WeightsError, match="names of no format that holds this model"):
        loaded(tiny_policy, {"encoder.weight": np.zeros(3, np.float32)})
    with pytest.raises(WeightsError, match="no weight format 'openpie'; did you mean 'openpi'"):
        loaded(tiny_policy, openpi_arrays, fmt="openpie")


def test_lora_leaves_are_not_taken_for_weights(tiny_policy: Pi0Config, openpi_arrays: Arrays) -> None:
    name = "PaliGemma/llm/layers/attn/q_einsum/lora_a"
    openpi_arrays[name] = np.zeros((2, 2, 16, 4), np.float32)
    with pytest.raises(WeightsError, match=rf"{name}: not used(.|\n)*look like a model with LoRA weights"):
        loaded(tiny_policy, openpi_arrays)


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_lora_is_merged_when_asked_for(
    tmp_path: Path, tiny_policy: Pi0Config, weights: Any, openpi_arrays: Arrays, scale: float
) -> None:
    """A rank-2 change of every kind of weight, in bfloat16, where adding it in bfloat16 would lose it."""
    mine, rng = weights(tiny_policy), np.random.default_rng(0)
    half = {k: v.astype(ml_dtypes.bfloat16) for k, v in openpi_arrays.items()}
    stems = {
        "PaliGemma/llm/layers/attn/q_einsum/": "vlm/layers/q",
        "PaliGemma/llm/layers/attn/kv_einsum_1/": "expert/layers/kv",
        "PaliGemma/llm/layers/attn/attn_vec_einsum/": "vlm/layers/out",
        "PaliGemma/llm/layers/mlp/gating_einsum_": "vlm/layers/gate_up",
    }
    expected = {k: v.astype(ml_dtypes.bfloat16).astype(np.float32) for k, v in mine.items()}
    for stem, ours in stems.items():
        w = mine[ours]
        a = rng.normal(size=(*w.shape[:-1], 2)).astype(np.float32) * 0.03
        b = rng.normal(size=(*w.shape[:-2], 2, w.shape[-1])).astype(np.float32) * 0.03
        half |= {f"{stem}lora_a": a, f"{stem}lora_b": b}
        summed = b.sum(1, keepdims=True) if "attn_vec" in stem else b
        expected[ours] = expected[ours] + (1.0 if "gating" in stem else scale) * np.matmul(a, summed)
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "params", {"params": unflatten(half)})
    source = open_arrays(tmp_path, lora_scale=scale)
    got = read_weights(source, plan_load(tiny_policy, source))
    for name, value in expected.items():
        np.testing.assert_allclose(got[name], value, atol=1e-6, err_msg=name)


def test_lora_weights_that_belong_to_nothing(openpi_arrays: Arrays) -> None:
    q, out = (f"PaliGemma/llm/layers/attn/{name}_einsum/" for name in ("q", "attn_vec"))
    foreign = "PaliGemma/llm/layers/attn/qq_einsum/"
    arrays = MemoryArrays(
        openpi_arrays
        | {
            f"{q}lora_b": np.zeros((2, 2, 2, 8)),
            f"{foreign}lora_a": np.zeros((1, 2)),
            f"{foreign}lora_b": np.zeros((2, 1)),
        }
        | {f"{out}lora_a": np.zeros((2, 1, 8, 2)), f"{out}lora_b": np.zeros((2, 2, 2, 16))}
    )
    with pytest.raises(WeightsError) as e:
        LoraMerged(arrays, 1.0)
    assert f"{q}w: expected {q}w, {q}lora_a and {q}lora_b, got ['{q}w', '{q}lora_b']" in str(e.value)
    assert f"{foreign}w: expected" in str(e.value)
    assert f"{out}w (2, 2, 8, 16): lora_a (2, 1, 8, 2)" in str(e.value)
    with pytest.raises(WeightsError, match="there are no LoRA weights; leave it out"):
        LoraMerged(MemoryArrays(openpi_arrays), 1.0)


def test_our_own_checkpoints_are_read_as_strictly(tiny_policy: Pi0Config, weights: Any) -> None:
    mine = weights(tiny_policy)
    with pytest.raises(WeightsError, match="foo/bar: not used"):
        loaded(tiny_policy, {**mine, "foo/bar": np.zeros(3, np.float32)})
    with pytest.raises(WeightsError, match=r"expert/layers/q: not used(.|\n)*look like pi0, this config is PaliGemma"):
        loaded(paligemma(tiny_policy), mine)


def test_what_is_used_is_not_dropped(tiny_policy: Pi0Config, openpi_arrays: Arrays) -> None:
    with pytest.raises(WeightsError, match=r"action_in_proj/bias: to be dropped by '\^action_in', but it is used"):
        loaded(tiny_policy, openpi_arrays, drop=("^action_in",))
    rest = ("^action_in/",)
    assert "action_in/bias" not in loaded(tiny_policy, openpi_arrays, drop=("^action_in",), reinitialize=rest)


def test_patterns_that_match_nothing(tiny_policy: Pi0Config, openpi_arrays: Arrays) -> None:
    with pytest.raises(WeightsError, match=r"pattern '\^action_inn/' matches no weight; did you mean 'action_in/"):
        loaded(tiny_policy, openpi_arrays, reinitialize=("^action_inn/",))


def test_unfused_arrays_do_not_pass_for_fused_ones(tiny_policy: Pi0Config, openpi_arrays: Arrays) -> None:
    with pytest.raises(WeightsError, match=r"qkv_einsum/w: missing(.|\n)*q_einsum/w: not used"):
        loaded(with_heads(tiny_policy, tiny_policy.backbone.language.num_heads, pi05=False), openpi_arrays)


def test_damaged_files(tmp_path: Path, tiny_policy: Pi0Config, weights: Any) -> None:
    mine = weights(tiny_policy)
    write_safetensors(export_weights(tiny_policy, mine, "lerobot"), tmp_path / "st")
    file = tmp_path / "st" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(WeightsError, match="damaged or incomplete"):
        open_arrays(tmp_path / "st")

    np.savez(tmp_path / "a.npz", **exported(paligemma(tiny_policy), weights(paligemma(tiny_policy)), "big_vision"))  # type: ignore[arg-type]
    whole = (tmp_path / "a.npz").read_bytes()
    (tmp_path / "a.npz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(WeightsError, match="damaged or incomplete"):
        open_arrays(tmp_path / "a.npz")

    write_openpi(export_weights(tiny_policy, mine, "openpi"), tmp_path / "orbax")
    for chunk in (tmp_path / "orbax").rglob("d/*"):  # all: some are left over from writing in parallel
        chunk.write_bytes(chunk.read_bytes()[: chunk.stat().st_size // 2])
    with pytest.raises(WeightsError, match="damaged or incomplete"):
        load_weights(tiny_policy, tmp_path / "orbax")

    with pytest.raises(WeightsError, match="no such file or directory"):
        open_arrays(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(WeightsError, match=r"expected an \.npz file, safetensors, or an Orbax directory"):
        open_arrays(tmp_path / "empty")


def test_an_index_that_names_lost_arrays(tmp_path: Path) -> None:
    save_file({"a": np.zeros(3, np.float32)}, tmp_path / "m.safetensors")
    index = {"weight_map": {"a": "m.safetensors", "b": "m.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(WeightsError, match=r"name different arrays: \['b in m\.safetensors'\]"):
        open_arrays(tmp_path)
    save_file({"a": np.zeros(3, np.float32), "c": np.zeros(3, np.float32)}, tmp_path / "m.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "m.safetensors"}}))
    with pytest.raises(WeightsError, match=r"name different arrays: \['c in m\.safetensors'\]"):
        open_arrays(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(WeightsError, match="is no index of safetensors"):
        open_arrays(tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    assert open_arrays(tmp_path).shapes == {"a": (3,), "c": (3,)}  # whatever the one file is called
    save_file({"a": np.zeros(3, np.float32)}, tmp_path / "n.safetensors")
    with pytest.raises(WeightsError, match=r"holds \['m.safetensors', 'n.safetensors'\], expected one file"):
        open_arrays(tmp_path)


def test_flatten_has_an_inverse() -> None:
    tree = {"a": {"b": 1, "c": {"d": 2}}, "e": 3}
    assert flatten(tree) == {"a/b": 1, "a/c/d": 2, "e": 3}
    assert unflatten(flatten(tree)) == tree
