"""Constrained decoding of action tokens, and a policy that writes them."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jaxtyping import TypeCheckError

from openpi_like.batch import ActionTokens
from openpi_like.data.fast import FastTokenizer, dct_coefficients, fit_fast
from openpi_like.models.backbone import Backbone
from openpi_like.models.pi0 import Pi0Config
from openpi_like.models.pi0_fast import ActionDecoding, Pi0Fast, Pi0FastConfig
from tests.data.test_fast import released_kind

KEY = jax.random.key(3)
SHARED = [f.name for f in dataclasses.fields(Pi0FastConfig)]


def smooth(rng: np.random.Generator, count: int, horizon: int, dims: int) -> np.ndarray:
    """Chunks that bend once or twice, in [-1, 1]."""
    t = np.linspace(0, 1, horizon)[:, None]
    phase, rate = rng.uniform(0, 6, (2, count, 1, dims))
    return (0.9 * np.sin(phase + rate * t)).astype(np.float32)


@pytest.fixture(scope="module")
def fast() -> FastTokenizer:
    rng = np.random.default_rng(0)
    coefficients = [dct_coefficients(smooth(rng, 200, *shape), 6.0) for shape in ((4, 4), (4, 3), (3, 2))]
    return fit_fast(coefficients, scale=6.0, vocab_size=120)


@pytest.fixture(scope="module")
def config(tiny_policy: Pi0Config, fast: FastTokenizer) -> Pi0FastConfig:
    shared = {n: getattr(tiny_policy, n) for n in SHARED if hasattr(tiny_policy, n) and n != "prompt_format"}
    tokens = ActionTokens(max_len=24, count=fast.vocab_size, skip=4)
    return Pi0FastConfig(**{**shared, "action_tokens": tokens})


@pytest.fixture(scope="module")
def decoding(fast: FastTokenizer, config: Pi0FastConfig) -> ActionDecoding:
    return decoding_of(fast, config)


def decoding_of(fast: FastTokenizer, config: Pi0FastConfig) -> ActionDecoding:
    tables = fast.tables(config.action_horizon * config.action_dim, count=config.tokens.count)
    begin = jnp.array([7, 9], jnp.int32)
    return jax.tree.map(jnp.asarray, ActionDecoding(**dataclasses.asdict(tables), begin=begin))


@pytest.fixture(scope="module")
def model(config: Pi0FastConfig) -> Pi0Fast:
    return config.create(jax.random.key(0))


@pytest.fixture(scope="module")
def masks(config: Pi0FastConfig) -> jax.Array:
    """Eight rows of robots with three kinds of chunk."""
    shapes = [(4, 4), (4, 3), (3, 2), (4, 4)] * 2
    steps, dims = (np.array(s)[:, None, None] for s in zip(*shapes, strict=True))
    k, j = np.arange(config.action_horizon)[:, None], np.arange(config.action_dim)
    return jnp.asarray((k < steps) & (j < dims))


@pytest.fixture(scope="module")
def batch(tiny_batch: Any, config: Pi0FastConfig, fast: FastTokenizer, masks: jax.Array) -> Any:
    """`tiny_batch` with actions that can be written, and the text that writes them."""
    rng, S, T = np.random.default_rng(1), config.prompt_len, config.answer_len
    actions = np.zeros(masks.shape, np.float32)
    prompt, kind = np.zeros((8, S + T), np.int32), np.zeros((8, S + T), np.int8)  # kinds: 1 prompt, 2 answer
    for row, mask in enumerate(np.asarray(masks)):
        horizon, dims = int(mask.any(1).sum()), int(mask.any(0).sum())
        chunk = smooth(rng, 1, horizon, dims)
        actions[row, :horizon, :dims] = chunk[0]
        asked = tiny_batch["prompt"][row][tiny_batch["prompt_mask"][row]]
        written = [7, 9, *(config.tokens.first(config.vocab_size) - fast.encode(chunk).ids[0]), 1]
        ids = [*asked, *written]
        prompt[row, : len(ids)], kind[row, : len(asked)], kind[row, len(asked) : len(ids)] = ids, 1, 2
    rows = {
        **tiny_batch,
        "actions": actions,
        "action_mask": np.asarray(masks),
        "prompt": prompt,
        "prompt_mask": kind > 0,
        "prompt_causal": kind == 2,
        "prompt_loss": kind == 2,
        "prompt_action": kind == 2,
    }
    return jax.tree.map(jnp.asarray, rows)


sample = nnx.jit(Pi0Fast.sample_tokens, static_argnames="temperature")


class Dice(Pi0Fast):
    """A policy whose logits are thrown by a rule; everything else is the policy's own."""

    backbone: Any = property(lambda self: self)

    def __init__(self, config: Pi0FastConfig, rows: int, throw: Any) -> None:
        self.config, self.rows, self.throw = config, rows, throw

    def packed(self) -> "Dice":
        return self

    def prefill(self, observation: Any, **options: Any) -> Any:
        return jnp.zeros((self.rows, 1)), jnp.int32(0)

    def action_logits(self, x_BD: Any) -> Any:
        return self.throw(x_BD[0, 0].astype(jnp.int32), self.rows)

    def extend(self, tokens_B: Any, cache: Any) -> Any:
        return jnp.full((self.rows, 1), cache + 1.0), cache + 1


def throws(decoding: ActionDecoding, seed: int) -> dict[str, Any]:
    """Rules for logits: random ones, and some that want what is hardest to complete."""
    count, pending = decoding.count[0], decoding.following[0] > 0
    drawn = lambda step, rows: jax.random.normal(  # noqa: E731
        jax.random.fold_in(jax.random.key(seed), step), (rows, count.shape[0])
    )
    return {
        "random": drawn,
        "peaked": lambda step, rows: 100 * drawn(step, rows),
        "shortest": lambda step, rows: -10.0 * count + drawn(step, rows),
        "longest": lambda step, rows: 10.0 * count + drawn(step, rows),
        "unfinished": lambda step, rows: 50.0 * pending + drawn(step, rows),
    }


def trials(
    fast: FastTokenizer, config: Pi0FastConfig, decoding: ActionDecoding, rule: str, rows: int, seed: int
) -> tuple[int, int]:
    """Returns how many of `rows` chunks were not decoded when constrained, and when any token may be written."""
    rng = np.random.default_rng(seed)
    steps, dims = rng.integers(1, config.action_horizon + 1, rows), rng.integers(1, config.action_dim + 1, rows)
    k, j = np.arange(config.action_horizon)[None, :, None], np.arange(config.action_dim)
    mask = jnp.asarray((k < steps[:, None, None]) & (j < dims[:, None, None]))
    observation: Any = {
        "images": {c: jnp.zeros((rows, *config.image_size, 3), jnp.uint8) for c in config.cameras},
        "image_mask": {c: jnp.ones(rows, bool) for c in config.cameras},
        "state": jnp.zeros((rows, config.state_dim)),
        "state_mask": jnp.ones((rows, config.state_dim), bool),
        "prompt": jnp.zeros((rows, config.prompt_len), jnp.int32),
        "prompt_mask": jnp.ones((rows, config.prompt_len), bool),
    }
    throw = throws(decoding, seed)[rule]

    def run(mask: Any) -> Any:
        return Dice(config, rows, throw).sample_tokens(KEY, observation, decoding=decoding, action_mask=mask)

    actions, ids, real = (np.asarray(x) for x in jax.jit(run)(mask))
    failed = 0
    for i in range(rows):
        again = fast.decode([ids[i][real[i]]], horizon=int(steps[i]), dims=int(dims[i]))
        same = np.allclose(actions[i, : steps[i], : dims[i]], again.actions[0], atol=1e-4)
        failed += again.errors[0] is not None or not same
    free = np.stack([np.argmax(np.asarray(throw(jnp.int32(s), rows)), axis=1) for s in range(config.answer_len)], 1)
    wrong = 0
    for i in range(rows):
        lengths = np.cumsum([len(fast._bpe.decode([t])) for t in free[i].tolist()])
        stop = int(np.searchsorted(lengths, steps[i] * dims[i])) + 1  # where it has enough, as if it had known to stop
        wrong += fast.decode([free[i][:stop]], horizon=int(steps[i]), dims=int(dims[i])).errors[0] is not None
    return failed, wrong


@pytest.mark.parametrize("rule", ["random", "peaked", "shortest", "longest", "unfinished"])
def test_constrained_decoding_always_makes_a_chunk(fast: FastTokenizer, config: Pi0FastConfig, rule: str) -> None:
    """2,000 chunks of random sizes per rule; the library's own decoding of the same tokens is the judge.

    Once with tokens of our own fit, once with those of a released kind, which may end in the middle of a character.
    """
    for tokenizer in (fast, released_kind(-200)):
        tokens = dataclasses.replace(config.tokens, count=tokenizer.vocab_size if tokenizer is not fast else 120)
        wide = dataclasses.replace(config, vocab_size=1000, action_tokens=dataclasses.replace(tokens, max_len=40))
        failed, unconstrained = trials(tokenizer, wide, decoding_of(tokenizer, wide), rule, 1_000, seed=5)
        assert failed == 0
        if rule == "random":
            assert unconstrained > 100  # the trial can fail: without the constraint it does


def test_too_few_tokens_make_nan_and_never_zeros(
    fast: FastTokenizer, config: Pi0FastConfig, decoding: ActionDecoding, model: Pi0Fast, batch: Any, masks: jax.Array
) -> None:
    least = int(decoding.least[16, 0])
    shorter = dataclasses.replace(config, action_tokens=dataclasses.replace(config.tokens, max_len=least - 1))
    policy = shorter.create(jax.random.key(0))
    actions, _, _ = sample(policy, KEY, config.observation(batch), decoding=decoding, action_mask=masks)
    impossible = np.asarray(decoding.least[masks.sum((1, 2)), 0]) > least - 1
    assert impossible.any()
    assert np.isnan(np.asarray(actions)[impossible]).all()
    assert np.isfinite(np.asarray(actions)[~impossible]).all()


def test_broken_logits_make_nan_and_never_a_motion(
    config: Pi0FastConfig, decoding: ActionDecoding, batch: Any, masks: jax.Array
) -> None:
    """Row 3 has one logit that is not finite, at its second token."""

    def throw(step: Any, rows: int) -> Any:
        broken = (jnp.arange(rows)[:, None] == 3) & (step == 1) & (jnp.arange(config.tokens.count) == 5)
        return jnp.where(broken, jnp.inf, 0.0)

    def run(observation: Any) -> Any:
        return Dice(config, 8, throw).sample_actions(KEY, observation, decoding=decoding, action_mask=masks)

    actions = np.asarray(jax.jit(run)(config.observation(batch)))
    np.testing.assert_array_equal(np.isnan(actions).all((1, 2)), np.arange(8) == 3)
    assert np.isfinite(actions[np.arange(8) != 3]).all()


def test_a_vocabulary_smaller_than_the_policy_allows_for_is_enough(
    fast: FastTokenizer, config: Pi0FastConfig, batch: Any, masks: jax.Array
) -> None:
    """A fit may find fewer tokens than it was allowed to."""
    wider = dataclasses.replace(config, action_tokens=dataclasses.replace(config.tokens, count=config.tokens.count + 9))
    tables = dataclasses.asdict(fast.tables(16, count=wider.tokens.count))
    decoding = jax.tree.map(jnp.asarray, ActionDecoding(**tables, begin=np.array([7, 9])))
    policy = wider.create(jax.random.key(0))
    actions, ids, real = sample(policy, KEY, wider.observation(batch), decoding=decoding, action_mask=masks)
    assert np.isfinite(actions).all()
    assert np.asarray(ids)[np.asarray(real)].max() < fast.vocab_size


# ---- The policy ------------------------------------------------------------------------------------------------------


def test_sampled_chunks_are_the_tokens_decoded(
    fast: FastTokenizer, config: Pi0FastConfig, model: Pi0Fast, decoding: ActionDecoding, batch: Any, masks: jax.Array
) -> None:
    observation = config.observation(batch)
    actions, ids, real = sample(model, KEY, observation, decoding=decoding, action_mask=masks)
    for row, mask in enumerate(np.asarray(masks)):
        horizon, dims = int(mask.any(1).sum()), int(mask.any(0).sum())
        decoded = fast.decode([np.asarray(ids[row])[np.asarray(real[row])]], horizon=horizon, dims=dims)
        assert decoded.errors == [None]
        np.testing.assert_allclose(actions[row, :horizon, :dims], decoded.actions[0], atol=1e-5)
        assert not np.asarray(actions)[row][~mask].any()
    packed = sample(model.packed(), KEY, observation, decoding=decoding, action_mask=masks)
    np.testing.assert_allclose(packed[0], actions, atol=1e-5)
    alone = sample(model, KEY, jax.tree.map(lambda x: x[2:3], observation), decoding=decoding, action_mask=masks[2:3])
    np.testing.assert_allclose(alone[0][0], actions[2], atol=1e-5)
    hot = [
        sample(model, k, observation, decoding=decoding, action_mask=masks, temperature=1.0)[1]
        for k in jax.random.split(KEY)
    ]
    assert (np.asarray(hot[0]) != np.asarray(hot[1])).any()


def test_only_action_tokens_are_scored(config: Pi0FastConfig, model: Pi0Fast) -> None:
    x = jax.random.normal(KEY, (3, config.backbone.language.width))
    ids = config.tokens.first(config.vocab_size) - np.arange(config.tokens.count)
    np.testing.assert_allclose(model.action_logits(x), model.backbone.next_logits(x)[:, ids], atol=1e-6)


def test_answers_longer_than_the_policy_looks_at_are_nan(config: Pi0FastConfig, model: Pi0Fast, batch: Any) -> None:
    every: Any = {
        **batch,
        "prompt_mask": np.ones_like(batch["prompt_mask"]),
        "prompt_loss": np.ones_like(batch["prompt_loss"]),
    }
    scalar, metrics = nnx.jit(Pi0Fast.loss)(model, KEY, every)
    assert np.isnan(scalar)
    assert np.isnan(metrics["loss"]).all()


def test_loss_is_that_of_all_logits(config: Pi0FastConfig, model: Pi0Fast, batch: Any) -> None:
    logits = nnx.jit(Backbone.text_logits)(model.backbone, batch)[:, :-1]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["prompt"][:, 1:])
    mask = batch["prompt_loss"][:, 1:]
    expected = np.where(mask, losses, 0).sum(1) / mask.sum(1)
    scalar, metrics = nnx.jit(Pi0Fast.loss)(model, KEY, batch)
    np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-4)
    np.testing.assert_allclose(scalar, expected.mean(), rtol=1e-4)


def test_a_policy_learns_to_write_actions(
    fast: FastTokenizer, config: Pi0FastConfig, decoding: ActionDecoding, model: Pi0Fast, batch: Any, masks: jax.Array
) -> None:
    """Trained on eight samples, it writes the very chunks, to the tokenizer's resolution."""
    graph, weights = nnx.split(model)
    optimizer = optax.adam(3e-3)

    @jax.jit
    def step(weights: Any, state: Any) -> Any:
        objective = lambda w: nnx.merge(graph, w).loss(KEY, batch)[0]  # noqa: E731
        loss, grads = jax.value_and_grad(objective)(weights)
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(weights, updates), state, loss

    state, loss = optimizer.init(weights), jnp.inf
    for _ in range(300):
        weights, state, loss = step(weights, state)
    assert float(loss) < 0.05
    actions, _, _ = sample(
        nnx.merge(graph, weights), KEY, config.observation(batch), decoding=decoding, action_mask=masks
    )
    resolution = 0.5 / fast.scale * np.sqrt(config.action_horizon)
    assert np.abs(np.asarray(actions) - batch["actions"]).max() < resolution


# ---- What is refused -------------------------------------------------------------------------------------------------


def test_configs_without_meaning_are_refused(config: Pi0FastConfig) -> None:
    with pytest.raises(ValueError, match=r"action_tokens=None, expected ActionTokens.*"):
        dataclasses.replace(config, action_tokens=None)
    with pytest.raises(ValueError, match=r"vocab_size=300, expected at least 428 for the ids of action tokens"):
        dataclasses.replace(config, action_tokens=ActionTokens(max_len=4, count=300))
    named = dataclasses.replace(config)
    object.__setattr__(named, "prompt_format", "fast")  # as if it were given; tests check types before that
    assert named._problems() == ["prompt_format='fast', expected a PromptFormat such as Pi0Prompt()"]
    with pytest.raises(ValueError, match=r"ActionTokens: max_len=0, expected at least 1; skip=-1, expected at least 0"):
        ActionTokens(max_len=0, skip=-1)


def test_batches_without_answers_are_refused(
    config: Pi0FastConfig, model: Pi0Fast, batch: Any, tiny_batch: Any
) -> None:
    with pytest.raises((ValueError, TypeCheckError)) as e:
        model.loss(KEY, tiny_batch)
    text = str(e.value)
    for part in ("prompt_causal: missing", "prompt_loss: missing", "prompt_action: missing", "expected int32 (8, 32)"):
        assert part in text
    asked: Any = {k: batch[k] for k in config.observation(batch)}
    with pytest.raises(ValueError, match=r"prompt: got int32 \(8, 32\), expected int32 \(8, 8\)"):
        config.check_inputs(asked, actions=False)


def test_it_acts_after_a_thought(config: Pi0FastConfig, filled: Any, batch: Any, decoding: ActionDecoding) -> None:
    """Tokens are those of greedy decoding of the whole text, thought and all; and acting thinks on its own."""
    thinking = filled(lambda: dataclasses.replace(config, thought_len=2).create(jax.random.key(3)))
    observation, ends = thinking.config.observation(batch), jnp.array([400, 401])
    act = nnx.jit(lambda model, o: model.sample_actions(jax.random.key(0), o, decoding=decoding, ends=ends))
    ids, mask = nnx.jit(lambda model, o: model.think(o, ends=ends))(thinking, observation)
    given: Any = {**observation, "thought": ids, "thought_mask": mask}
    np.testing.assert_allclose(act(thinking, observation), act(thinking, given), atol=1e-5)
    tokens, real = sample(thinking, jax.random.key(0), given, decoding=decoding)[1:]
    row = int(np.argmax(np.asarray(mask.sum(1))))
    assert mask[row].any()
    text = [*observation["prompt"][row][observation["prompt_mask"][row]].tolist(), *ids[row][mask[row]].tolist()]
    asked = int(observation["prompt_mask"][row].sum())
    text += np.asarray(decoding.begin).tolist()
    S = config.prompt_len + config.answer_len
    one = jax.tree.map(lambda x: x[row : row + 1], {**batch})
    at = jnp.arange(S)[None]
    one |= {
        "prompt": jnp.zeros((1, S), jnp.int32).at[0, : len(text)].set(jnp.array(text)),
        "prompt_mask": at < len(text),
        "prompt_causal": (at >= asked) & (at < len(text)),
    }
    logits = thinking.backbone.text_logits(one)[0, len(text) - 1]
    first = config.tokens.first(config.vocab_size)
    scored = logits[first - jnp.arange(config.tokens.count)]
    allowed = decoding.allowed(jnp.zeros(1, jnp.int32), jnp.array([16]), jnp.int32(config.tokens.max_len))[0]
    assert int(jnp.where(allowed, scored, -jnp.inf).argmax()) == int(tokens[row, 0])
    assert real[row, 0]
