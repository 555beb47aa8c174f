"""Knowledge insulation: what reaches what, in values and in gradients."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from openpi_like.batch import ActionTokens
from openpi_like.data.prompts import FastPrompt, Pi05Prompt
from openpi_like.draws import row_keys
from openpi_like.models.flow import draw_noise, draw_time
from openpi_like.models.pi0 import Pi0, Pi0Config
from openpi_like.models.weights import bind, flat_weights, flatten, named_weights, unflatten

KEY = jax.random.key(7)


@pytest.fixture(scope="module")
def config(tiny_policy: Pi0Config) -> Pi0Config:
    """pi0.5 that writes action tokens too, with a subtask before them."""
    return dataclasses.replace(
        tiny_policy, pi05=True, prompt_format=FastPrompt(), action_tokens=ActionTokens(max_len=10, count=50, skip=4)
    )


@pytest.fixture(scope="module")
def model(config: Pi0Config, filled: Any) -> Pi0:
    """Random weights everywhere: fresh adaptive norms would hide the expert's input."""
    return filled(lambda: config.create(KEY))


@pytest.fixture(scope="module")
def batch(tiny_batch: Any, config: Pi0Config) -> Any:
    """`tiny_batch` with answers: two tokens of a subtask (in even rows), then up to seven action tokens."""
    rng, S, T = np.random.default_rng(1), config.prompt_len, config.answer_len
    prompt, kind = (
        np.zeros((8, S + T), np.int32),
        np.zeros((8, S + T), np.int8),
    )  # kinds: 1 prompt, 2 subtask, 3 actions
    for row in range(8):
        asked = int(tiny_batch["prompt_mask"][row].sum())
        parts = (asked, 2 * (row % 2 == 0), int(rng.integers(3, 8)))
        ends = np.cumsum(parts)
        for i, (start, stop) in enumerate(zip((0, *ends), ends, strict=False)):
            kind[row, start:stop] = i + 1
        prompt[row, : ends[-1]] = rng.integers(4, config.vocab_size, ends[-1])
        prompt[row, :asked] = tiny_batch["prompt"][row, :asked]
    answer = kind > 1
    return jax.tree.map(
        jnp.asarray,
        {
            **tiny_batch,
            "prompt": prompt,
            "prompt_mask": kind > 0,
            "prompt_causal": answer,
            "prompt_loss": answer,
            "prompt_action": kind == 3,
        },
    )


@pytest.fixture(scope="module")
def draws(config: Pi0Config) -> Any:
    keys = row_keys(KEY, 8)
    return draw_noise(keys, (config.action_horizon, config.action_dim))[None], draw_time(keys)[None]


losses = nnx.jit(Pi0._losses)


def with_leaves(batch: Any, **leaves: Any) -> Any:
    return {**batch, **leaves}


def part(name: str) -> Any:
    """Returns a function of the gradients of one part of the loss, flat by weight."""

    def objective(m: Pi0, batch: Any, draws: Any) -> jax.Array:
        return m._losses(batch, *draws)[1][name].sum()

    return nnx.jit(nnx.grad(objective))


def gradients(model: Pi0, batch: Any, draws: Any, name: str) -> dict[str, float]:
    """Returns the norm of the gradient of every weight."""
    flat = flatten(named_weights(part(name)(model, batch, draws)))
    return {k: float(jnp.linalg.norm(v.astype(jnp.float32))) for k, v in flat.items()}


def of_backbone(norms: dict[str, float]) -> dict[str, float]:
    return {k: v for k, v in norms.items() if k.startswith(("vision/", "vlm/"))}


def test_the_flow_loss_does_not_reach_the_backbone(model: Pi0, batch: Any, draws: Any) -> None:
    norms = gradients(model, batch, draws, "flow_loss")
    backbone = of_backbone(norms)
    assert backbone
    assert set(backbone.values()) == {0.0}
    assert all(v > 0 for k, v in norms.items() if k not in backbone)


def test_the_text_loss_reaches_the_backbone_alone(model: Pi0, batch: Any, draws: Any) -> None:
    norms = gradients(model, batch, draws, "text_loss")
    backbone = of_backbone(norms)
    assert set(norms.values()) - set(backbone.values()) == {0.0}
    unused = {k for k, v in backbone.items() if v == 0}
    assert not unused


def test_without_insulation_it_reaches_all(config: Pi0Config, model: Pi0, batch: Any, draws: Any) -> None:
    joint = bind(dataclasses.replace(config, insulate=False), unflatten(flat_weights(model)))
    backbone = of_backbone(gradients(joint, batch, draws, "flow_loss"))
    assert backbone["vlm/layers/kv"] > 0
    assert backbone["vision/patch/kernel"] > 0
    np.testing.assert_allclose(
        losses(joint, batch, *draws)[1]["flow_loss"], losses(model, batch, *draws)[1]["flow_loss"], atol=1e-6
    )


def test_action_tokens_do_not_change_the_flow_loss(model: Pi0, batch: Any, draws: Any) -> None:
    """Neither which ones they are, nor how many, nor that there are any: the expert's positions stay where they are."""
    expected = losses(model, batch, *draws)[1]
    other = jnp.where(batch["prompt_action"], (batch["prompt"] + 31) % 300, batch["prompt"])
    changed = losses(model, with_leaves(batch, prompt=other), *draws)[1]
    np.testing.assert_allclose(changed["flow_loss"], expected["flow_loss"], atol=1e-5)
    assert (np.abs(changed["text_loss"] - expected["text_loss"]) > 1e-3).all()
    gone = {k: batch[k] & ~batch["prompt_action"] for k in ("prompt_mask", "prompt_causal", "prompt_loss")}
    gone["prompt_action"] = jnp.zeros_like(batch["prompt_action"])
    nothing = losses(model, with_leaves(batch, **gone), *draws)[1]
    np.testing.assert_allclose(nothing["flow_loss"], expected["flow_loss"], atol=1e-5)
    assert nothing["text_loss_valid"].sum() == 4  # those with a subtask


def test_the_expert_sees_the_subtask(model: Pi0, batch: Any, draws: Any) -> None:
    said = batch["prompt_causal"] & ~batch["prompt_action"]
    changed = with_leaves(batch, prompt=jnp.where(said, (batch["prompt"] + 31) % 300, batch["prompt"]))
    apart = np.abs(losses(model, changed, *draws)[1]["flow_loss"] - losses(model, batch, *draws)[1]["flow_loss"])
    np.testing.assert_array_equal(apart > 1e-5, said.any(1))


def test_noise_and_actions_do_not_change_the_text_loss(model: Pi0, batch: Any, draws: Any) -> None:
    noise, time = draws
    other = losses(model, with_leaves(batch, actions=batch["actions"] + 1), noise + 1, time * 0.5)[1]
    np.testing.assert_array_equal(other["text_loss"], losses(model, batch, *draws)[1]["text_loss"])


def test_training_sees_what_sampling_sees(config: Pi0Config, model: Pi0, batch: Any, draws: Any) -> None:
    """Without a subtask, the velocity in the loss is that of a plain pi0.5 asked with the prompt alone."""
    rows = np.flatnonzero(np.arange(8) % 2)
    some = jax.tree.map(lambda x: x[rows], batch)
    noise, time = (d[0][rows] for d in draws)
    plain = bind(dataclasses.replace(config, action_tokens=None), unflatten(flat_weights(model)))
    kept = {k: v for k, v in some.items() if k not in ("prompt_causal", "prompt_loss", "prompt_action")}
    asked = with_leaves(kept, **{k: v for k, v in config.observation(some).items() if k.startswith("prompt")})
    expected = nnx.jit(Pi0.flow_loss)(plain, asked, noise, time)
    np.testing.assert_allclose(nnx.jit(Pi0.flow_loss)(model, some, noise, time), expected, atol=1e-4)
    ask = config.observation(some)
    sample = nnx.jit(Pi0.sample_actions, static_argnames="num_steps")
    np.testing.assert_array_equal(
        sample(model, KEY, ask, num_steps=2, noise=noise), sample(plain, KEY, ask, num_steps=2, noise=noise)
    )


def test_losses_add_up_each_over_its_own_samples(config: Pi0Config, model: Pi0, batch: Any, draws: Any) -> None:
    """Row 0 has no actions (a question about an image), row 1 nothing to say, row 2 neither."""
    row = jnp.arange(8)
    mixed = with_leaves(
        batch,
        action_mask=batch["action_mask"] & ~((row == 0) | (row == 2))[:, None, None],
        prompt_loss=batch["prompt_loss"] & ~((row == 1) | (row == 2))[:, None],
    )
    heavy = bind(dataclasses.replace(config, flow_weight=3.0), unflatten(flat_weights(model)))
    total, m = losses(heavy, mixed, *draws)
    np.testing.assert_array_equal(m["flow_loss_valid"], [0, 1, 0, 1, 1, 1, 1, 1])
    np.testing.assert_array_equal(m["text_loss_valid"], [1, 0, 0, 1, 1, 1, 1, 1])
    np.testing.assert_array_equal(m["valid"], [1, 1, 0, 1, 1, 1, 1, 1])
    np.testing.assert_allclose(m["loss"], m["text_loss"] + 3 * m["flow_loss"], rtol=1e-6)
    np.testing.assert_allclose(total, m["text_loss"].sum() / 6 + 3 * m["flow_loss"].sum() / 6, rtol=1e-6)
    assert m["loss"][2] == 0
    check = nnx.jit(Pi0.validation_losses)(model, KEY, batch)
    assert set(check) == {"loss", "flow_loss", "text_loss"}
    np.testing.assert_allclose(check["text_loss"], losses(model, batch, *draws)[1]["text_loss"].mean(), rtol=1e-5)


def test_draws_belong_to_the_sample(config: Pi0Config, model: Pi0, batch: Any) -> None:
    """Two draws of each, in reversed order, and the losses of validation too."""
    several = bind(dataclasses.replace(config, flow_draws=2), unflatten(flat_weights(model)))
    turned = jax.tree.map(lambda x: x[::-1], batch)
    for call in (nnx.jit(lambda *inputs: Pi0.loss(*inputs)[1]), nnx.jit(Pi0.validation_losses)):
        expected, got = call(several, KEY, batch), call(several, KEY, turned)
        for name, value in expected.items():
            np.testing.assert_allclose(got[name][::-1] if value.ndim else got[name], value, rtol=1e-4, err_msg=name)
    elsewhere = call(several, KEY, with_leaves(batch, position=batch["position"] + 8))
    assert abs(elsewhere["flow_loss"] - expected["flow_loss"]) > 1e-3


def test_options_without_meaning_are_refused(config: Pi0Config, tiny_policy: Pi0Config) -> None:
    with pytest.raises(ValueError, match=r"flow_weight=0.0, expected a number above 0"):
        dataclasses.replace(config, flow_weight=0.0)
    with pytest.raises(ValueError, match=r"prompt_format=Pi05Prompt\(\) with pi05=False, expected Pi0Prompt"):
        dataclasses.replace(tiny_policy, prompt_format=Pi05Prompt())


# ---- Thoughts --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def thinking(config: Pi0Config, model: Pi0) -> Pi0:
    return bind(dataclasses.replace(config, thought_len=3), unflatten(flat_weights(model)))


def test_the_expert_reads_a_thought_as_in_training(thinking: Pi0, batch: Any, draws: Any) -> None:
    """Behind a padded prompt in sampling, right behind the prompt and before action tokens in training."""
    asked = batch["prompt_mask"].sum(1) - batch["prompt_causal"].sum(1)
    said = batch["prompt_causal"] & ~batch["prompt_action"]
    at = asked[:, None] + jnp.arange(3)
    take = lambda x: jnp.take_along_axis(x, at, axis=1)  # noqa: E731
    mask = take(said)
    observation = thinking.config.observation(batch)
    thought = {"thought": jnp.where(mask, take(batch["prompt"]), 0), "thought_mask": mask}
    (noise,), (time,) = draws

    @nnx.jit
    def velocities(model: Pi0, batch: Any, observation: Any) -> tuple[jax.Array, jax.Array]:
        trained = model.velocity(model.training_prefix(batch)[0], batch, noise, time)
        return trained, model.velocity(model.prefix(observation), observation, noise, time)

    trained, sampled = velocities(thinking, batch, {**observation, **thought})
    np.testing.assert_allclose(sampled, trained, atol=2e-5)
    other = {**observation, **thought, "thought": thought["thought"] + mask}
    moved = np.abs(velocities(thinking, batch, other)[1] - trained).max(axis=(1, 2))
    assert (moved[::2] > 1e-4).all()  # rows with a subtask
    assert (moved[1::2] < 2e-5).all()


def test_it_thinks_to_where_actions_begin(thinking: Pi0, batch: Any) -> None:
    """Token by token the likeliest; what ends a thought is no part of it; and acting thinks on its own."""
    observation = thinking.config.observation(batch)
    think = nnx.jit(lambda model, o, ends: model.think(o, ends=ends))
    far = jnp.array([400, 401])
    ids, mask = think(thinking, observation, far)
    first = thinking.config.action_tokens.first(thinking.config.vocab_size)  # type: ignore[union-attr]
    count = 50
    assert not ((ids <= first) & (ids > first - count) & mask).any()
    whole = np.asarray(mask).all(1)
    assert whole.any()  # no end among three tokens
    row = int(np.flatnonzero(whole)[0])
    shorter, there = think(thinking, observation, jnp.array([int(ids[row, 1]), 401]))
    assert there[row].tolist() == [int(ids[row, 0]) != int(ids[row, 1]), False, False]
    assert shorter[row, 1:].tolist() == [0, 0]
    sample = nnx.jit(lambda model, o: model.sample_actions(KEY, o, ends=far, num_steps=2))
    given = {**observation, "thought": ids, "thought_mask": mask}
    np.testing.assert_allclose(sample(thinking, observation), sample(thinking, given), atol=2e-5)


def test_thoughts_need_room_and_a_teacher(config: Pi0Config, tiny_policy: Pi0Config) -> None:
    with pytest.raises(ValueError, match=r"thought_len=10, expected less than action_tokens.max_len=10"):
        dataclasses.replace(config, thought_len=10)
    with pytest.raises(ValueError, match=r"thought_len=2 without action_tokens, expected 0"):
        dataclasses.replace(tiny_policy, thought_len=2)
    with pytest.raises(ValueError, match=r"thought_len=-1, expected 0 or more"):
        dataclasses.replace(config, thought_len=-1)
