"""pi0 and pi0.5 against vectors computed by openpi and big_vision on tiny random weights.

Set OPENPI_LIKE_GOLDEN to the directory of another set; configs come from the files, tolerances from the set's README.
"""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from openpi_like.batch import Batch
from openpi_like.models.arrays import MemoryArrays
from openpi_like.models.attention import VARIANTS, Variant, computed_by, splash
from openpi_like.models.flow import Prefix
from openpi_like.models.gemma import Gemma, GemmaConfig, attention_mask
from openpi_like.models.paligemma import PaliGemma, PaliGemmaConfig
from openpi_like.models.pi0 import Pi0, Pi0Config
from openpi_like.models.siglip import SiglipConfig
from openpi_like.models.weights import bind, export_weights, flat_weights, plan_load, read_weights, unflatten
from tests.models.golden_set import assert_bfloat16, assert_flow, assert_tokens, config_json, open_golden, patch_size


def config_of(arrays: dict[str, Any]) -> Pi0Config:
    c = config_json(arrays)
    # The order of the prefix is the order of the config's list; not every set has these names or this number.
    return Pi0Config(
        backbone=PaliGemmaConfig(SiglipConfig(**patch_size(c["siglip"])), GemmaConfig(**c["vlm"])),
        expert=GemmaConfig(**c["expert"]),
        cameras=tuple(c["cameras"]),
        image_size=tuple(c["image_hw"]),
        state_dim=arrays["state"].shape[1],
        action_dim=c["action_dim"],
        action_horizon=c["action_horizon"],
        prompt_len=arrays["tokenized_prompt"].shape[1],
        vocab_size=c["vocab"],
        pi05=c["pi05"],
        dtype=c["dtype"],
        train_on_padding=True,
    )


class Golden:
    """One file: its arrays, the policy with its weights, its batch, and what is computed from them once."""

    def __init__(self, path: Path) -> None:
        self.arrays = open_golden(path)
        self.config = config_of(self.arrays)
        self.params = {
            k.removeprefix("params/"): np.asarray(v) for k, v in self.arrays.items() if k.startswith("params/")
        }
        self.model = self.with_dtype(self.config.dtype)
        a = self.arrays
        self.batch: Batch = {
            "images": {c: a[f"images/{c}"] for c in self.config.cameras},
            "image_mask": {c: a[f"image_masks/{c}"] for c in self.config.cameras},
            "state": a["state"],
            "state_mask": jnp.ones(a["state"].shape, bool),
            "prompt": a["tokenized_prompt"],
            "prompt_mask": a["tokenized_prompt_mask"],
            "actions": a["actions"],
            "action_mask": jnp.ones(a["actions"].shape, bool),
            "dataset_id": jnp.zeros(a["actions"].shape[0], jnp.int32),
            "position": jnp.zeros((a["actions"].shape[0], 2), jnp.uint32),
        }

    def with_dtype(self, dtype: str) -> Pi0:
        config = dataclasses.replace(self.config, dtype=dtype)
        arrays = MemoryArrays(self.params)
        return bind(config, unflatten(read_weights(arrays, plan_load(config, arrays))))

    def in_their_names(self, model: Pi0) -> dict[str, np.ndarray]:
        return {name: make() for name, make in export_weights(self.config, flat_weights(model), "openpi")}

    @functools.cached_property
    def prefix(self) -> Prefix:
        return nnx.jit(Pi0.prefix)(self.model, self.batch)

    @functools.cached_property
    def gradients(self) -> dict[str, np.ndarray]:
        loss = nnx.grad(lambda model, *inputs: model.flow_loss(*inputs).mean())
        state = nnx.jit(loss)(self.model, self.batch, self.arrays["noise"], self.arrays["time"])
        graph, _ = nnx.split(self.model, nnx.Param)
        return self.in_their_names(nnx.merge(graph, state))

    def sample(self, model: Pi0, steps: int) -> np.ndarray:
        call = nnx.jit(Pi0.sample_actions, static_argnames="num_steps")
        return np.asarray(
            call(model, jax.random.key(0), self.batch, num_steps=steps, noise=self.arrays["sample_noise"])
        )


@pytest.fixture(scope="module", params=["item1_pi0.npz", "item2_pi05.npz"])
def case(request: pytest.FixtureRequest, golden: Path) -> Golden:
    return Golden(golden / request.param)


# ---- Vision and prefix -----------------------------------------------------------------------------------------------


def test_golden_siglip_stages(case: Golden) -> None:
    a, tower = case.arrays, case.model.backbone
    assert isinstance(tower, PaliGemma)
    vision = tower.vision
    x = vision.stem(case.batch["images"][case.config.cameras[0]])
    assert_tokens(x, a["siglip/stem"])
    x = x.reshape(x.shape[0], -1, x.shape[-1]) + vision.position[...]
    assert_tokens(x, a["siglip/with_posemb"])
    assert_tokens(vision.encode(x), a["siglip/encoded"])
    for i in range(vision.config.depth):
        layer = jax.tree.map(lambda w, i=i: w[i], vision.layers)
        x = layer.attention(x)
        assert_tokens(x, a[f"siglip/block{i:02d}/+sa"])
        x = layer.mlp(x)
        assert_tokens(x, a[f"siglip/block{i:02d}/+mlp"])
    assert_tokens(vision.head(vision.final_norm(x)), a["siglip/image_tokens"])


def test_golden_prefix_tokens(case: Golden) -> None:
    tokens, valid, _ = case.model.backbone.embed_prefix(case.batch)
    np.testing.assert_array_equal(valid, case.arrays["prefix_mask"])
    assert_tokens(tokens, case.arrays["prefix_tokens"])


def test_golden_uint8_images_are_converted_on_the_device(case: Golden) -> None:
    images = {c: case.arrays[f"images_uint8/{c}"] for c in case.config.cameras}
    batch: Batch = {**case.batch, "images": images}
    tokens, _, _ = case.model.backbone.embed_prefix(batch)
    assert_tokens(tokens, case.arrays["prefix_tokens"])


def test_golden_masks_and_positions(case: Golden) -> None:
    mask, positions = case.model.masks(case.arrays["prefix_mask"])
    np.testing.assert_array_equal(mask, case.arrays["attn_mask"])
    np.testing.assert_array_equal(positions, case.arrays["positions"])
    S = case.arrays["prefix_mask"].shape[1]
    np.testing.assert_array_equal(positions[:, S:], case.arrays["sample_suffix_positions"])
    parts = [jnp.concatenate([case.arrays[f"{p}_{m}"] for p in ("prefix", "suffix")], -1) for m in ("mask", "ar_mask")]
    np.testing.assert_array_equal(attention_mask(*parts), case.arrays["attn_mask"])


def test_golden_prefix_outputs_and_cache(case: Golden) -> None:
    a, valid = case.arrays, case.arrays["prefix_mask"]
    S = valid.shape[1]
    run = nnx.jit(
        lambda model: model.backbone.vlm(
            a["prefix_tokens"], a["attn_mask"][:, :S, :S], model.backbone.vlm.rope(a["positions"][:, :S])
        )
    )
    # Only valid rows: what a fully masked query returns has no meaning and is seen by nobody.
    assert_tokens(np.asarray(run(case.model)[0])[valid], a["prefix_out"][valid])
    sampling = nnx.jit(Pi0.prefix, static_argnames="differentiable")(case.model, case.batch, differentiable=False)
    for cache in (case.prefix.cache, sampling.cache):
        for name in ("k", "v"):
            ours, theirs = np.asarray(getattr(cache, name)), a[f"prefix_kv_cache/{name}"]
            assert ours.shape == theirs.shape
            assert_tokens(ours[:, valid], theirs[:, valid])


# ---- Suffix, loss, gradients -----------------------------------------------------------------------------------------


def test_golden_suffix_tokens_and_condition(case: Golden) -> None:
    a = case.arrays
    tokens, cond = case.model.embed_suffix(case.batch, a["x_t"], a["time"])
    assert_flow(tokens, a["suffix_tokens"])
    assert (cond is not None) == case.config.pi05
    if cond is not None:
        assert_flow(cond[:, 0], a["adarms_cond"])


def test_golden_suffix_output_and_velocity_from_stored_tokens(case: Golden) -> None:
    a = case.arrays
    cond = a["adarms_cond"][:, None] if case.config.pi05 else None
    out = nnx.jit(Pi0.suffix)(case.model, case.prefix, a["suffix_tokens"], cond)
    assert_tokens(out, a["suffix_out"])
    velocity = case.model.action_out(out[:, -case.config.action_horizon :])
    assert_tokens(velocity, a["v_t"])


def test_golden_velocity_and_loss(case: Golden) -> None:
    a = case.arrays
    velocity = nnx.jit(Pi0.velocity)(case.model, case.prefix, case.batch, a["x_t"], a["time"])
    assert_flow(velocity, a["v_t"])
    np.testing.assert_allclose(a["u_t"], a["noise"] - a["actions"], atol=1e-6)
    error = nnx.jit(Pi0.flow_loss)(case.model, case.batch, a["noise"], a["time"])
    assert_flow(error, jnp.square(a["v_t"] - a["u_t"]), rtol=1e-3)
    assert_flow(error.mean(-1), a["loss"])
    assert_flow(error.mean(), a["loss_mean"])


@pytest.mark.parametrize("variant", ["xla", "splash"])
def test_golden_loss_and_velocity_by_other_variants_of_attention(case: Golden, variant: str, monkeypatch: Any) -> None:
    """What is measured to be fastest elsewhere gives the same numbers; the TPU's kernel is interpreted here."""
    monkeypatch.setitem(VARIANTS, "splash", Variant(functools.partial(splash, interpret=True), alone=True))
    if not all(g.num_kv_heads in (1, g.num_heads) for g in (case.config.backbone.language, case.config.expert)):
        variant = "xla"  # splash has no place for such heads

    @nnx.jit
    def compute(model: Pi0, batch: Batch, noise: jax.Array, time: jax.Array) -> tuple[jax.Array, jax.Array]:
        with computed_by(variant):
            velocity = model.velocity(model.prefix(batch), batch, case.arrays["x_t"], time)
            return model.flow_loss(batch, noise, time), velocity

    a = case.arrays
    error, velocity = compute(case.model, case.batch, a["noise"], a["time"])
    assert_flow(velocity, a["v_t"])
    assert_flow(error.mean(-1), a["loss"])


def test_golden_gradient_norms_of_all_weights(case: Golden) -> None:
    expected = {k.removeprefix("grad_norm/"): v for k, v in case.arrays.items() if k.startswith("grad_norm/")}
    assert expected.keys() == case.gradients.keys()
    for name, norm in expected.items():
        np.testing.assert_allclose(np.linalg.norm(case.gradients[name]), norm, rtol=1e-3, atol=1e-6, err_msg=name)


def test_golden_gradients(case: Golden) -> None:
    stored = [k.removeprefix("grad/") for k in case.arrays if k.startswith("grad/")]
    assert stored
    for name in stored:
        expected = case.arrays[f"grad/{name}"]
        error = np.linalg.norm(case.gradients[name] - expected) / np.linalg.norm(expected)
        assert error < 1e-3, f"{name}: relative error {error:.1e}"


# ---- Sampling --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 5, 10])
def test_golden_samples(case: Golden, steps: int) -> None:
    sampled = case.sample(case.model, steps)
    assert_flow(sampled, case.arrays[f"sample_actions_num_steps_{steps}"])


def test_golden_sampling_velocities(case: Golden) -> None:
    a = case.arrays
    call = nnx.jit(Pi0.velocity)
    for x, v, t in zip(a["sample_trajectory_x"], a["sample_trajectory_v"], a["sample_trajectory_time"], strict=False):
        velocity = call(case.model, case.prefix, case.batch, x, jnp.full(x.shape[0], t))
        assert_flow(velocity, v)


def test_golden_bfloat16_activations(case: Golden) -> None:
    model = case.with_dtype("bfloat16")
    error = nnx.jit(Pi0.flow_loss)(model, case.batch, case.arrays["noise"], case.arrays["time"])
    assert_bfloat16(error.mean(-1), case.arrays["bf16_activations/loss"])
    expected = case.arrays["bf16_activations/sample_actions_num_steps_10"]
    assert_bfloat16(case.sample(model, 10), expected)


# ---- Weights ---------------------------------------------------------------------------------------------------------


def test_golden_weights_round_trip(case: Golden) -> None:
    exported = case.in_their_names(case.model)
    assert exported.keys() == case.params.keys()
    for name, array in case.params.items():
        np.testing.assert_array_equal(exported[name], array, err_msg=name)


def test_golden_embedding_is_scaled_and_expert_has_none(case: Golden) -> None:
    table = case.params["PaliGemma/llm/embedder/input_embedding"]
    tokens = np.asarray([[0, 3, table.shape[0] - 1]], np.int32)
    expected = table[tokens] * np.float32(np.sqrt(case.config.backbone.language.width))
    np.testing.assert_allclose(case.model.backbone.vlm.embed(jnp.asarray(tokens)), expected, rtol=1e-6)
    assert isinstance(case.model.expert, Gemma)
    assert not hasattr(case.model.expert, "embedding")
