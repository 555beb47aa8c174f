"""DexVLA: a thought before acting, maps of robots, and what is refused. The released code's numbers are in
test_golden_dexvla.py."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from openpi_like.models.ddim import Ddim
from openpi_like.models.dexvla import DexVla, DexVlaConfig
from openpi_like.models.formats import WeightsError
from openpi_like.models.llama import LlamaConfig
from openpi_like.models.qwen_vision import Qwen2VisionConfig
from openpi_like.models.qwen_vl import QwenVlConfig
from openpi_like.models.scale_dp import ScaleDpConfig
from openpi_like.models.weights import (
    export_weights,
    flatten,
    layout,
    named_weights,
    plan_load,
    read_weights,
    weight_shapes,
)
from tests.models.test_policies import PRISMATIC
from tests.models.weight_arrays import MemoryArrays

KEY = jax.random.key(3)
EOS = jnp.int32(1)
T = 5


@pytest.fixture(scope="module")
def config(tiny_policy: Any) -> DexVlaConfig:
    common = {f.name for f in dataclasses.fields(DexVlaConfig)} & {f.name for f in dataclasses.fields(tiny_policy)}
    own: dict[str, Any] = {"backbone": PRISMATIC, "image_slots": (1, 1), "thought_len": T, "diffusion": Ddim(20, 4)}
    own |= {"expert": ScaleDpConfig(width=16, depth=2, heads=2, combined=16), "robots": ("one", "two", "three")}
    return DexVlaConfig(**{**{name: getattr(tiny_policy, name) for name in common - own.keys()}, **own})


@pytest.fixture(scope="module")
def model(config: DexVlaConfig, filled: Any) -> DexVla:
    return filled(lambda: config.create(KEY))


@pytest.fixture(scope="module")
def samples(config: DexVlaConfig, tiny_batch: Any) -> Any:
    """`tiny_batch` with thoughts of 1 to T tokens right behind the prompts, and the robots one and three."""
    S, B = config.prompt_len, len(tiny_batch["prompt"])
    rng = np.random.default_rng(0)
    asked = tiny_batch["prompt_mask"].sum(1)
    length = 1 + np.arange(B) % T
    at = np.arange(S + T)
    prompt = np.zeros((B, S + T), np.int32)
    prompt[:, :S] = tiny_batch["prompt"]
    said = (at >= asked[:, None]) & (at < (asked + length)[:, None])
    prompt = np.where(said, rng.integers(5, 200, said.shape), np.where(at < asked[:, None], prompt, 0))
    text = {"prompt": prompt.astype(np.int32), "prompt_mask": (at < asked[:, None]) | said}
    text |= {"prompt_causal": said, "prompt_loss": said, "robot": np.int32(2 * (np.arange(B) % 2))}
    return jax.tree.map(jnp.asarray, tiny_batch | text)


def test_the_loss_of_parts_is_that_of_the_whole(model: DexVla, samples: Any) -> None:
    loss = jax.jit(lambda batch, counts: model.loss(KEY, batch, counts=counts))
    some = samples | {"action_mask": samples["action_mask"].at[0].set(False)}  # text alone
    whole, metrics = loss(some, None)
    halves = [jax.tree.map(lambda x, h=h: x[h], some) for h in (slice(0, 4), slice(4, 8))]
    counts = model.loss_counts(some)
    assert (int(counts["actions"]), int(counts["text"])) == (7, 8)
    np.testing.assert_allclose(sum(loss(half, counts)[0] for half in halves), whole, rtol=2e-5)
    assert (metrics["noise_loss_valid"][0], metrics["text_loss_valid"][0]) == (0, 1)
    np.testing.assert_allclose(metrics["loss"], metrics["noise_loss"] + metrics["text_loss"], rtol=1e-6)


def test_a_fresh_expert_says_zeros(config: DexVlaConfig, samples: Any) -> None:
    """So the error is that of unit noise, whatever was read."""
    _, metrics = config.create(KEY).loss(KEY, samples)
    keys = metrics["noise_loss"][metrics["noise_loss_valid"] > 0]
    assert 0.5 < float(keys.mean()) < 1.6


def test_gradients_go_to_robots_that_are_there(model: DexVla, samples: Any) -> None:
    gradients = nnx.jit(nnx.grad(lambda model, batch: model.loss(KEY, batch)[0]))(model, samples)
    flat = {name: np.asarray(x) for name, x in flatten(named_weights(gradients)).items()}
    for name in ("action_in", "action_in_bias", "action_out", "action_out_bias"):
        moved = [bool(flat[f"expert/{name}"][i].any()) for i in range(3)]
        assert moved == [True, False, True], name
    assert all(np.abs(x).max() > 0 for name, x in flat.items() if not name.startswith("expert/action_"))


def test_a_thought_that_is_given_is_that_of_training(model: DexVla, config: DexVlaConfig, samples: Any) -> None:
    """What is done with a thought behind a padded prompt is what training makes of it right behind the prompt."""
    observation = config.observation(samples)
    asked = samples["prompt_mask"].sum(1) - samples["prompt_causal"].sum(1)
    at = asked[:, None] + jnp.arange(T)
    take = lambda name: jnp.take_along_axis(samples[name], at, axis=1)  # noqa: E731
    mask = take("prompt_causal")
    observation |= {"thought": jnp.where(mask, take("prompt"), 0), "thought_mask": mask}
    mine = jax.jit(lambda o: model.sample_actions(KEY, o, eos=EOS))(observation)
    np.testing.assert_allclose(mine, jax.jit(lambda b: model.outputs(KEY, b))(samples), atol=2e-5)
    other = observation | {"thought": observation["thought"] + mask}
    changed = jax.jit(lambda o: model.sample_actions(KEY, o, eos=EOS))(other)
    assert np.abs(changed - mine).max(axis=(1, 2)).min() > 1e-4


def test_it_thinks_before_it_acts(model: DexVla, config: DexVlaConfig, samples: Any) -> None:
    """The likeliest tokens, each by a look at everything before it; and acting does that on its own."""
    observation = config.observation(samples)
    ids, mask = jax.jit(lambda o: model.think(o, eos=EOS))(observation)
    row, said = 2, list[int]()
    one = jax.tree.map(lambda x: x[row : row + 1], observation)
    length = int(one["prompt_mask"].sum())
    for _ in range(T):
        text = (
            jnp.zeros((1, config.prompt_len + T), jnp.int32)
            .at[0, : length + len(said)]
            .set(jnp.array([*one["prompt"][0, :length].tolist(), *said]))
        )
        there = jnp.arange(config.prompt_len + T)[None] < length + len(said)
        batch: Any = one | {"prompt": text, "prompt_mask": there}
        batch |= {"prompt_causal": there & (jnp.arange(there.shape[1]) >= length), "prompt_loss": there}
        logits = model.backbone.text_logits(batch)
        said.append(int(logits[0, length + len(said) - 1].argmax()))
        if said[-1] == 1:
            break
    assert ids[row, : len(said)].tolist() == said
    assert int(mask[row].sum()) == len(said)
    act = jax.jit(lambda o: model.sample_actions(KEY, o, eos=EOS))
    np.testing.assert_allclose(act(observation), act(observation | {"thought": ids, "thought_mask": mask}), atol=2e-5)


def test_a_fresh_fusion_does_not_depend_on_the_thought(config: DexVlaConfig, filled: Any, samples: Any) -> None:
    model = filled(lambda: config.create(KEY))
    for name in ("scale", "shift"):
        getattr(model.fusion, name).kernel[...] *= 0
        getattr(model.fusion, name).bias[...] *= 0
    observation = config.observation(samples)
    thought = {"thought": jnp.full((8, T), 7), "thought_mask": jnp.ones((8, T), bool)}
    act = jax.jit(lambda o: model.sample_actions(KEY, o, eos=EOS))
    first = act(observation | thought)
    np.testing.assert_allclose(act(observation | thought | {"thought": jnp.full((8, T), 9)}), first, atol=1e-5)


def test_what_does_not_fit_is_named(config: DexVlaConfig, tiny_policy: Any, samples: Any, model: DexVla) -> None:
    with pytest.raises(ValueError, match="thought_len=0, expected at least 1, for the end; text_weight=-1"):
        dataclasses.replace(config, thought_len=0, text_weight=-1.0)
    with pytest.raises(ValueError, match="each named once"):
        dataclasses.replace(config, robots=("one", "one"))
    with pytest.raises(ValueError, match=r"robots=\('one',\), expected \(\): all robots share all of it"):
        dataclasses.replace(tiny_policy, robots=("one",))
    without: Any = {k: v for k, v in samples.items() if k != "robot"}
    with pytest.raises(ValueError, match="robot: missing"):
        model.loss(KEY, without)


def test_the_released_layout_is_read_and_written(config: DexVlaConfig) -> None:
    """Behind a Qwen2-VL, for one robot; the maps of several are in no file, and are asked for by name."""
    vision = Qwen2VisionConfig(width=16, hidden=16, depth=1, mlp_dim=16, num_heads=2, patch_size=4)
    vlm = LlamaConfig.tiny(
        width=16, depth=1, mlp_dim=16, num_kv_heads=2, head_dim=8, qkv_bias=True, tied=True, rope_sections=(1, 1, 2)
    )
    one = dataclasses.replace(config, backbone=QwenVlConfig(vision, vlm), robots=())
    rng = np.random.default_rng(0)
    weights = {name: rng.standard_normal(x.shape).astype(np.float32) for name, x in weight_shapes(one).items()}
    written = {name: make() for name, make in export_weights(one, weights, "huggingface")}
    assert {name: x.shape for name, x in written.items()} == layout(one, "huggingface")
    assert written["policy_head.blocks.1.attn.qkv.weight"].shape == (3 * 16, 16)
    assert written["policy_head.pos_embed"].shape == (1, config.action_horizon, 16)
    assert written["reasoning_film.scale_fc.weight"].shape == (16, 16)
    assert written["visual.blocks.0.mlp.fc1.weight"].shape == (16, 16)
    source = MemoryArrays(written)
    back = read_weights(source, plan_load(one, source))
    assert back.keys() == weights.keys()
    for name, x in weights.items():
        np.testing.assert_array_equal(back[name], x, err_msg=name)
    several = dataclasses.replace(one, robots=("one", "two"))
    with pytest.raises(WeightsError, match=r"expert/action_in: this format does not hold it"):
        plan_load(several, source)
