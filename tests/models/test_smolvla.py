"""SmolVLA itself: what sees what, loss, sampling, what is trained, fewer bits, overlays, and what it refuses.

What is asked of every policy is in test_policies.py, and LeRobot's numbers are in test_golden_smolvla.py.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from openpi_like.batch import ActionTokens
from openpi_like.draws import sample_keys
from openpi_like.models.flow import draw_noise, draw_time
from openpi_like.models.llama import LlamaConfig
from openpi_like.models.lora import Lora, add_lora
from openpi_like.models.sampling import for_sampling
from openpi_like.models.siglip import SiglipConfig
from openpi_like.models.smolvla import SmolVla, SmolVlaConfig
from openpi_like.models.smolvla_expert import ExpertConfig
from openpi_like.models.smolvlm import SmolVlmConfig
from openpi_like.models.weights import flatten, named_weights, weight_shapes
from openpi_like.train.presets import expert_only
from openpi_like.train.state import trained_names
from tests.models.other_parts import PARTS, with_other

KEY = jax.random.key(7)


@pytest.fixture(scope="module")
def config(tiny_policy: Any) -> SmolVlaConfig:
    """The smallest that has every part: two blocks, and half of the VLM's layers."""
    vlm = LlamaConfig.tiny(width=16, depth=8, mlp_dim=32, num_kv_heads=2, head_dim=8, tied=True)
    siglip = SiglipConfig(width=16, depth=1, mlp_dim=32, num_heads=2, patch_size=4)
    fields = ("cameras", "image_size", "state_dim", "action_dim", "action_horizon", "prompt_len", "vocab_size")
    return SmolVlaConfig(
        backbone=SmolVlmConfig(siglip, vlm, layers=4, shuffle=2),
        expert=ExpertConfig(width=12, mlp_dim=24),
        **{name: getattr(tiny_policy, name) for name in fields},
    )


@pytest.fixture(scope="module")
def model(config: SmolVlaConfig, filled: Any) -> SmolVla:
    return filled(lambda: config.create(KEY))


@pytest.fixture(scope="module")
def draws(batch: Any) -> tuple[jax.Array, jax.Array]:
    """Noise and flow times of the samples."""
    keys = sample_keys(KEY, batch["position"])
    return draw_noise(keys, batch["actions"].shape[1:]), draw_time(keys)


flow_loss = nnx.jit(SmolVla.flow_loss)
velocity = nnx.jit(lambda model, batch, x, time: model.velocity(model.prefix(batch), batch, x, time))


def observation_of(batch: Any) -> Any:
    return {k: v for k, v in batch.items() if k not in ("actions", "action_mask", "dataset_id", "position")}


# ---- What sees what --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", PARTS)
def test_every_part_of_an_observation_is_seen(model: SmolVla, tiny_batch: Any, draws: Any, part: str) -> None:
    changed = flow_loss(model, with_other(tiny_batch, part), *draws)
    difference = np.abs(changed - flow_loss(model, tiny_batch, *draws))
    assert (difference.max((1, 2)) > 1e-4).all()


def test_the_state_sees_images_and_text_and_they_do_not_see_it(model: SmolVla, batch: Any) -> None:
    def values(state: jax.Array) -> jax.Array:
        """Values of the last layer, which hold what each token has seen in those before it."""
        observation = batch | {"state": state}
        sequence = model.embed_prefix(observation)
        S = sequence.valid.shape[1]
        mask, positions = model.masks(sequence.valid)
        cache = model.backbone.run(sequence, mask[:, :S, :S], model.backbone.vlm.rope(positions[:, :S]))[1]
        return cache.v[-1]

    first, second = (np.asarray(jax.jit(values)(batch["state"] + shift)) for shift in (0, 1))
    there = np.asarray(model.embed_prefix(batch).valid)[:, :-1]  # what is not there sees anything, and nobody sees it
    np.testing.assert_array_equal(first[:, :-1][there], second[:, :-1][there])
    assert (np.abs(first[:, -1] - second[:, -1]).max((1, 2)) > 1e-4).all()


def test_an_action_sees_those_before_it(model: SmolVla, batch: Any, draws: Any) -> None:
    noise, time = draws
    expected = np.asarray(velocity(model, batch, noise, time))
    for i in range(noise.shape[1]):
        moved = np.abs(velocity(model, batch, noise.at[:, i].add(1.0), time) - expected).max((0, 2))
        assert (moved[:i] == 0).all()
        assert (moved[i:] > 1e-5).all()


# ---- Loss and sampling -----------------------------------------------------------------------------------------------


def test_loss_is_flow_loss_at_its_own_draws(model: SmolVla, tiny_batch: Any, draws: Any) -> None:
    error, mask = np.asarray(flow_loss(model, tiny_batch, *draws)), tiny_batch["action_mask"]
    scalar, metrics = nnx.jit(SmolVla.loss)(model, KEY, tiny_batch)
    expected = [error[i][mask[i]].mean() for i in range(8)]
    np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-5)
    np.testing.assert_allclose(scalar, np.mean(expected), rtol=1e-5)


@pytest.mark.parametrize("steps", [1, 3, 10])
def test_euler_on_the_exact_linear_field_returns_the_data(
    monkeypatch: pytest.MonkeyPatch, model: SmolVla, batch: Any, draws: Any, steps: int
) -> None:
    noise, data = draws[0], batch["actions"]
    monkeypatch.setattr(SmolVla, "velocity", lambda self, prefix, observation, x, time: noise - data)
    out = model.sample_actions(KEY, observation_of(batch), num_steps=steps, noise=noise)
    np.testing.assert_allclose(out, data, atol=1e-5)


@pytest.mark.parametrize("how", ["int8", "bfloat16"])
def test_sampling_in_fewer_bits_stays_close(
    config: SmolVlaConfig, model: SmolVla, filled: Any, batch: Any, how: str
) -> None:
    sample = nnx.jit(SmolVla.sample_actions)
    expected = sample(model, KEY, observation_of(batch))
    if how == "int8":
        other = for_sampling(model, quantize="int8")
    else:
        other = filled(lambda: dataclasses.replace(config, dtype="bfloat16").create(KEY)).packed()
    got = sample(other, KEY, observation_of(batch))
    assert got.dtype == jnp.float32
    assert 0 < np.abs(got - expected).max() < 0.2


# ---- Training --------------------------------------------------------------------------------------------------------


def test_every_weight_learns_from_the_first_step(config: SmolVlaConfig, filled: Any, batch: Any, draws: Any) -> None:
    """Except those behind the last keys and values of the language model; and the same with layers recomputed."""

    def gradients(changes: Any) -> dict[str, jax.Array]:
        model = filled(lambda: dataclasses.replace(config, **changes).create(KEY))
        found = nnx.jit(nnx.grad(lambda model, *inputs: model.flow_loss(*inputs).mean()))(model, batch, *draws)
        return flatten(named_weights(found))

    plain, recomputed = (gradients(changes) for changes in ({}, {"remat": "nothing_saveable", "unroll": True}))
    assert [name for name, g in plain.items() if not jnp.abs(g).max() > 0] == ["vlm/final_norm/scale"]
    scale = max(float(jnp.abs(g).max()) for g in plain.values())
    for name, g in plain.items():
        np.testing.assert_allclose(recomputed[name], g, rtol=1e-3, atol=1e-5 * scale, err_msg=name)


def test_what_lerobot_trains_is_the_expert_and_the_projections(config: SmolVlaConfig) -> None:
    names = list(weight_shapes(config))
    trained = trained_names(names, expert_only(config))
    parts = {name.split("/")[0] for name in trained}
    assert parts == {"expert", "state_in", "action_in", "action_out", "action_time_in", "action_time_out"}
    assert trained == {name for name in names if name.split("/")[0] in parts}


def test_the_usual_overlay_is_on_both_stacks_and_starts_at_the_base(model: SmolVla, batch: Any, draws: Any) -> None:
    changed: Any = add_lora(nnx.merge(*nnx.split(model)), Lora(), KEY)
    names = flatten(named_weights(nnx.state(changed, nnx.Param)))
    for stack in ("vlm/layers", "expert/layers/joint", "expert/layers/cross_1"):
        assert {f"{stack}/{name}_lora/a" for name in ("q", "kv", "out", "gate_up", "down")} <= names.keys()
    np.testing.assert_allclose(flow_loss(changed, batch, *draws), flow_loss(model, batch, *draws), rtol=1e-6)
    assert changed.packed() is changed
    block = changed.expert.layers
    block.cross_1.kv_lora.b[...] = block.cross_1.kv_lora.b[...] + 1.0
    assert np.abs(flow_loss(changed, batch, *draws) - flow_loss(model, batch, *draws)).max() > 1e-4


# ---- Sizes -----------------------------------------------------------------------------------------------------------


def test_tiny_is_of_about_a_million_weights() -> None:
    sizes: dict[str, Any] = {"state_dim": 4, "action_dim": 4, "action_horizon": 8, "prompt_len": 16, "vocab_size": 512}
    config = SmolVlaConfig.tiny(cameras=("base",), **sizes)
    assert 0.8e6 < sum(np.prod(leaf.shape) for leaf in weight_shapes(config).values()) < 1.5e6
    assert config.backbone.image_tokens(config.image_size) == 16


def test_sizes_beside_a_language_model() -> None:
    assert ExpertConfig.beside(LlamaConfig.smollm2_360m()) == ExpertConfig(width=720, mlp_dim=2048)
    assert ExpertConfig.beside(LlamaConfig.smollm2_135m(), factor=0.5).width == 288


def test_what_does_not_fit_is_refused(config: SmolVlaConfig) -> None:
    with pytest.raises(ValueError, match="SmolVlaConfig") as caught:
        dataclasses.replace(
            config,
            expert=dataclasses.replace(config.expert, self_every=3),
            image_size=(16, 20),
            action_tokens=ActionTokens(max_len=4, count=8),
        )
    for part in (
        "4 layers are used, expected a multiple of expert.self_every=3",
        "image_size=(16, 20)",
        "action_tokens=",
    ):
        assert part in str(caught.value)
    with pytest.raises(ValueError, match=r"width=11.*mlp_dim=0.*self_every=1"):
        ExpertConfig(width=11, mlp_dim=0, self_every=1)
    with pytest.raises(ValueError, match=r"layers=9, expected 1 to vlm.depth=8"):
        dataclasses.replace(config.backbone, layers=9)
