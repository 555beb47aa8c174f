"""Waypoints as text: characters against Python's own formatting, the grammar against a pattern, and a policy that
learns to write."""

import dataclasses
import re
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from openpi_like.config import from_json, to_json
from openpi_like.data.normalize import FieldStats, Normalization
from openpi_like.data.sentencepiece_model import SentencePieceTokenizer, fit_text_tokenizer
from openpi_like.data.text import TextTokenizer
from openpi_like.driving.waypoint_text import CHARACTERS, format_waypoints, parse_waypoints
from openpi_like.models.plan_text import Characters, Written, hundredths, longest, plan_characters
from openpi_like.models.policy import PolicyConfig
from openpi_like.models.text_waypoints import TextWaypoints, TextWaypointsConfig
from openpi_like.partition import ShardingRules
from openpi_like.robots.ego_vehicle import EGO_CONTROLS, EGO_VEHICLE, EGO_VEHICLE_METRES
from openpi_like.robots.limits import Limits
from openpi_like.serve.policy import Policy
from openpi_like.train.checkpoints.checkpoint import Checkpointer
from openpi_like.train.checkpoints.contract import Contract, contract_problems
from openpi_like.train.checkpoints.load import load_policy_parts
from openpi_like.train.optimizer import OptimizerConfig
from openpi_like.train.sharding import MeshConfig, put_batch
from openpi_like.train.state import ModelDef, Trainer
from openpi_like.train.validation import held_out_losses
from tests.train.run_files import ORDER

KEY = jax.random.key(0)
ALL = f"{CHARACTERS}$"  # "$" is the end
TOKENIZER = fit_text_tokenizer(["keep going", "turn left-ish at 12.5 m (then stop)"], 330, symbols=CHARACTERS)
HORIZON, STEPS = 3, 300
ROBOT = dataclasses.replace(
    EGO_VEHICLE_METRES,
    cameras=tuple(dataclasses.replace(c, height=None, width=None) for c in EGO_VEHICLE.cameras[:1]),
    state=EGO_VEHICLE.state[:2],
    action_horizon=HORIZON,
)

# Ties, which only odd eighths are; what is nearest to a tie without being one; and the ends of the range.
_TIES = st.integers(-7999, 7999).map(lambda k: (2 * k + 1) / 8 if abs(k) < 3999 else 0.125)
_NEAR = st.tuples(st.integers(-99_999, 99_998), st.integers(-2, 2)).map(
    lambda of: np.float32((of[0] + 0.5) / 100) + of[1] * np.spacing(np.float32((of[0] + 0.5) / 100))
)
_ENDS = st.sampled_from([0.0, -0.0, 0.005, -0.005, -0.004, 0.00390625, 1e-30, -1e-45, 999.99, -999.99, 0.995, 99.995])
_ANY = st.floats(-999.875, 999.875, width=32)
metres = st.one_of(_TIES, _NEAR, _ENDS, _ANY).map(np.float32)


def written(characters: Any, there: Any) -> list[str]:
    return [
        "".join(ALL[c] for c in row[mask]) for row, mask in zip(np.asarray(characters), np.asarray(there), strict=True)
    ]


# ---- What is written -------------------------------------------------------------------------------------------------


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(metres, metres), min_size=4, max_size=4))
def test_a_plan_is_written_as_python_formats_it(points: list[tuple[float, float]]) -> None:
    plan = np.array(points, np.float32)
    characters, there = jax.jit(plan_characters)(plan[None], np.ones((1, 4, 2), bool))
    assert characters.shape == (1, longest(4, 2))
    assert written(characters, there) == [format_waypoints(plan) + "$"]


def test_hundredths_of_many_numbers_are_those_that_python_rounds_to() -> None:
    rng = np.random.default_rng(0)
    spread = rng.uniform(-999.98, 999.98, 40_000), 10 ** rng.uniform(-4, 2.9, 40_000)
    near = np.float32((rng.integers(-99_999, 99_999, 40_000) + 0.5) / 100)
    ties = (2 * np.arange(-3990, 3990) + 1) / 8
    x = np.concatenate([*spread, near, np.nextafter(near, np.float32(0)), ties]).astype(np.float32)
    expected = [round(float(f"{v:.2f}") * 100) for v in x.tolist()]
    np.testing.assert_array_equal(jax.jit(hundredths)(x), expected)
    np.testing.assert_array_equal(hundredths(jnp.array([999.995, -5e6, jnp.inf])), [99_999, -99_999, 99_999])


def test_what_is_not_known_is_not_written() -> None:
    plan = np.arange(12, dtype=np.float32).reshape(1, 3, 4) - 4
    mask = np.ones((4, 3, 4), bool)
    mask[1, 2:] = mask[2, :, 1:] = mask[3] = False
    assert written(*plan_characters(jnp.repeat(plan, 4, axis=0), jnp.asarray(mask))) == [
        "[(-4.00,-3.00,-2.00,-1.00),(0.00,1.00,2.00,3.00),(4.00,5.00,6.00,7.00)]$",
        "[(-4.00,-3.00,-2.00,-1.00),(0.00,1.00,2.00,3.00)",
        "[(-4.00),(0.00),(4.00)]$",
        "",
    ]


# ---- The grammar -----------------------------------------------------------------------------------------------------

NUMBER = r"(?!-0\.00)-?(0|[1-9][0-9]{0,2})\.[0-9]{2}"


@jax.jit
def allowed_in(plan: Written) -> jax.Array:
    return plan.allowed()


@jax.jit
def after(plan: Written, character: jax.Array) -> Written:
    return plan.after(character)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 3), st.integers(1, 3), st.randoms(use_true_random=False))
def test_any_choice_of_what_is_allowed_ends_as_a_plan(points: int, numbers: int, random: Any) -> None:
    mask = (np.arange(3)[:, None] < points) & (np.arange(3) < numbers)
    plan, text = Written.nothing(jnp.asarray(mask[None])), ""
    while not plan.is_whole.all():
        allowed = np.flatnonzero(np.asarray(allowed_in(plan))[0])
        assert len(text) < longest(points, numbers)
        # Rare choices as often as others: a sign, a zero, the point.
        some = [c for c in allowed if c in (0, 10, 11)] if random.random() < 0.4 else []
        character = random.choice(some or list(allowed))
        text, plan = text + ALL[character], after(plan, np.array([character]))
    point = rf"\({NUMBER}(,{NUMBER}){{{numbers - 1}}}\)"
    assert re.fullmatch(rf"\[{point}(,{point}){{{points - 1}}}\]\$", text)
    found = np.array(re.findall(r"-?\d+\.\d+", text), np.float32).reshape(points, numbers)
    np.testing.assert_allclose(plan.metres()[0][:points, :numbers], found, rtol=1e-6)
    assert not np.asarray(plan.metres()[0])[~mask].any()
    assert not np.asarray(plan.allowed()).any()


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(metres, metres), min_size=2, max_size=2))
def test_everything_that_is_trained_may_be_written(points: list[tuple[float, float]]) -> None:
    plan = np.array(points, np.float32)
    reading = Written.nothing(jnp.ones((1, 2, 2), bool))
    for character in format_waypoints(plan) + "$":
        assert bool(allowed_in(reading)[0, ALL.index(character)]), character
        reading = after(reading, np.array([ALL.index(character)]))
    assert bool(reading.is_whole[0])
    np.testing.assert_allclose(reading.metres()[0], plan, atol=0.00505)


@pytest.mark.parametrize(
    "text", ["(", "[[", "[(.", "[(00", "[(-0.00", "[(--", "[(1234", "[(1.5,", "[(1.50)", "[(1.50,1.00]"]
)
def test_what_is_no_plan_is_not_allowed(text: str) -> None:
    reading = Written.nothing(jnp.ones((1, 1, 2), bool))
    for character in text[:-1]:
        assert bool(allowed_in(reading)[0, ALL.index(character)])
        reading = after(reading, np.array([ALL.index(character)]))
    assert not bool(reading.allowed()[0, ALL.index(text[-1])])


# ---- Ids -------------------------------------------------------------------------------------------------------------


def test_ids_of_a_fitted_tokenizer_are_known_before_it_is() -> None:
    assert Characters.of(TOKENIZER) == Characters.fitted()
    text = format_waypoints(np.array([[0.5, -12.25]]))
    ids = [Characters.fitted().ids[CHARACTERS.index(c)] for c in text]
    assert TOKENIZER.encode(text) == ids  # the tokenizer, too, has one token for each
    assert TOKENIZER.decode(ids) == text
    assert TOKENIZER.encode("left-ish")[TOKENIZER.encode("left-ish").index(15)] == CHARACTERS.index("-") + 5
    again = fit_text_tokenizer(["something else"], 330, symbols=CHARACTERS)
    assert Characters.of(again) == Characters.fitted() != Characters.of(fit_text_tokenizer(["keep going"], 330))
    with pytest.raises(ValueError, match=r"vocab_size=280, expected at least 282: bytes"):
        fit_text_tokenizer(["abc"], 280, symbols=CHARACTERS)


class Doubled(SentencePieceTokenizer):
    """Has two tokens for some digits, as one that puts a space before every text."""

    def encode(self, text: str) -> list[int]:
        return [3, *super().encode(text)] if text in ("0", "7") else super().encode(text)


def test_tokenizers_that_do_not_fit(small: TextWaypointsConfig) -> None:
    text = lambda tokenizer: SimpleNamespace(tokenizer=tokenizer)  # noqa: E731
    assert small.tokenizer_problems(text(TOKENIZER)) == []
    (problem,) = small.tokenizer_problems(text(fit_text_tokenizer(["keep going"], 330)))
    assert re.match(r"characters: 0 5, 1 6, .*\] 21, the tokenizer has 0 \d+, 1 \d+, .*; take Characters\.of", problem)
    swapped = Characters((*Characters.fitted().ids[:15], 21, 20), 2)
    assert swapped.tokenizer_problems(TOKENIZER) == [
        "characters: [ 21, ] 20, EOS 2, the tokenizer has [ 20, ] 21, EOS 1; take Characters.of(tokenizer), or fit one "
        "with data/fit_text.py --waypoints for Characters.fitted()"
    ]
    (problem,) = small.tokenizer_problems(text(Doubled(TOKENIZER.model)))
    assert "0 [3, 5], 7 [3, 12], expected one each; choose another tokenizer" in problem


def test_configs_that_do_not_fit(small: TextWaypointsConfig) -> None:
    with pytest.raises(ValueError, match=r"thought_len=-1.*ids has 2 ids, expected one for each of '0123456789-\.,\("):
        dataclasses.replace(small, thought_len=-1, characters=Characters((5, 6), 1))
    wrong = Characters((400, -1, *range(7, 22)), 7)
    with pytest.raises(ValueError, match=r"\[7\] more than once, .*; characters has \[-1, 400\], expected ids below"):
        dataclasses.replace(small, characters=wrong)
    assert from_json(to_json(small)) == small


def test_robots_that_cannot_be_written_for(small: TextWaypointsConfig) -> None:
    assert small.robot_problems(ROBOT, None) == []
    scaled, controls = (small.robot_problems(robot, None) for robot in (EGO_VEHICLE, EGO_CONTROLS))
    assert [p.split(",")[0] for p in scaled] == ["plan=Plan(known='plan_known'", "action_horizon 6"]
    assert controls[0].startswith("plan=None, expected Plan(scale='none')")
    assert controls[1] == "actions acceleration [m/s^2], steering [rad], expected metres"
    (waypoint,) = ROBOT.action
    far = dataclasses.replace(waypoint, unit="mm", limits=Limits(lower=(-5e6, None), upper=(2e6, 10.0)))
    assert small.robot_problems(dataclasses.replace(ROBOT, action=(far,)), None) == [
        "action 'waypoint' goes to 5000 m, expected at most 999.99 m"
    ]


# ---- The policy ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(tiny_policy: Any) -> TextWaypointsConfig:
    common = {f.name: getattr(tiny_policy, f.name) for f in dataclasses.fields(PolicyConfig)}
    own = {"cameras": ("front",), "action_dim": 2, "action_horizon": HORIZON, "vocab_size": 340, "state_dim": 3}
    fields = {**common, **own, "characters": Characters.fitted()}
    return TextWaypointsConfig(**fields)


def samples(config: TextWaypointsConfig, size: int = 8) -> dict[str, Any]:
    """Random plans, the third known in part; with thoughts of different lengths, where the policy has these."""
    rng = np.random.default_rng(1)
    text = TextTokenizer(TOKENIZER, config.prompt_len, answer_len=config.answer_len)
    asked = [("go on"[: 1 + i % 4], "go.a"[i % 4 :]) for i in range(size)]
    if config.answer_len:
        rows = [text.encode_thought(prompt, None, said) for prompt, said in asked]
        names = ("prompt", "prompt_mask", "prompt_causal", "prompt_loss")
        words = {name: np.stack([getattr(row, name) for row in rows]) for name in names}
    else:
        words = dict(
            zip(("prompt", "prompt_mask"), text.batch([a for a, _ in asked], [np.zeros(0)] * size), strict=True)
        )
    mask = np.ones((size, HORIZON, 2), bool)
    mask[2, 1:] = False
    return {
        "images": {"front": rng.integers(0, 256, (size, 16, 16, 3), dtype=np.uint8)},
        "image_mask": {"front": np.ones(size, bool)},
        "state": rng.standard_normal((size, 3), np.float32),
        "state_mask": np.ones((size, 3), bool),
        **words,
        "actions": np.where(mask, rng.normal(size=mask.shape) * [3, 30], 0).astype(np.float32),
        "action_mask": mask,
        "dataset_id": np.zeros(size, np.int32),
        "position": np.zeros((size, 2), np.uint32),
    }


@pytest.fixture(scope="module", params=[0, 24], ids=["plain", "thinking"])
def config(request: Any, small: TextWaypointsConfig) -> TextWaypointsConfig:
    return dataclasses.replace(small, thought_len=request.param)


@pytest.fixture(scope="module")
def model(config: TextWaypointsConfig, filled: Any) -> TextWaypoints:
    return filled(lambda: config.create(KEY))


@pytest.fixture(scope="module")
def batch(config: TextWaypointsConfig) -> dict[str, Any]:
    return jax.tree.map(jnp.asarray, samples(config))


def as_text(config: TextWaypointsConfig, batch: dict[str, Any], plans: list[list[int]]) -> dict[str, Any]:
    """Words, thought and the ids of a plan in one row without gaps, as a backbone is trained to answer questions."""
    S = config.prompt_len + config.answer_len + longest(HORIZON, 2)
    ids, causal, mask = np.zeros((8, S), np.int32), np.zeros((8, S), bool), np.zeros((8, S), bool)
    words = {k: np.asarray(batch[k]) for k in ("prompt", "prompt_mask")}
    thought = np.asarray(batch.get("prompt_causal", np.zeros_like(words["prompt_mask"])))
    for i, plan in enumerate(plans):
        there = words["prompt_mask"][i]
        row = [*words["prompt"][i][there], *plan]
        ids[i, : len(row)], mask[i, : len(row)] = row, True
        causal[i, (there & ~thought[i]).sum() : len(row)] = True
    text = {"prompt": ids, "prompt_mask": mask, "prompt_causal": causal, "prompt_loss": causal}
    return batch | jax.tree.map(jnp.asarray, text)


@pytest.fixture(scope="module")
def reader(config: TextWaypointsConfig, filled: Any) -> Any:
    """The backbone with room for all that text."""
    S = config.prompt_len + config.answer_len + longest(HORIZON, 2)
    return filled(lambda: dataclasses.replace(config, prompt_len=S, thought_len=0).create(KEY)).backbone


def test_the_loss_is_that_of_the_same_text_as_an_answer(
    config: TextWaypointsConfig, model: TextWaypoints, batch: dict[str, Any], reader: Any
) -> None:
    said = [format_waypoints(plan) + "$" for plan in np.asarray(batch["actions"])]
    said[2] = format_waypoints(np.asarray(batch["actions"])[2, :1])[:-1]
    text = as_text(config, batch, [[config.characters.every[ALL.index(c)] for c in of] for of in said])
    expected, per_sample = nnx.jit(lambda m, b: m.text_loss(b))(reader, text)
    loss, metrics = nnx.jit(lambda m, b: m.loss(KEY, b))(model, batch)
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)
    np.testing.assert_allclose(metrics["loss"], per_sample["loss"], rtol=1e-5)


def test_losses_of_validation(config: TextWaypointsConfig, model: TextWaypoints, batch: Any) -> None:
    losses = nnx.jit(lambda m, b: m.validation_losses(KEY, b))(model, batch)
    if not config.thought_len:
        assert losses.keys() == {"loss"}
        return
    assert losses.keys() == {"loss", "plan_loss", "thought_loss"}
    # A sample with text alone counts, and one with neither does not.
    batch = batch | {"action_mask": batch["action_mask"].at[:2].set(False)}
    batch = batch | {"prompt_loss": batch["prompt_loss"].at[0].set(False)}
    assert float(model.loss_counts(batch)["tokens"]) == 7
    loss, metrics = nnx.jit(lambda m, b: m.loss(KEY, b))(model, batch)
    np.testing.assert_array_equal(metrics["valid"], [0, *[1] * 7])
    assert float(loss) == pytest.approx(float(metrics["loss"].sum()) / 7, rel=1e-5)
    nothing = batch | {"action_mask": jnp.zeros_like(batch["action_mask"])}
    assert np.isnan(nnx.jit(lambda m, b: m.validation_losses(KEY, b))(model, nothing)["plan_loss"])


@pytest.fixture(scope="module")
def sampled(config: TextWaypointsConfig, model: TextWaypoints, batch: Any) -> Any:
    """Actions, ids, which there are, where the grammar ruled, and the observation with its thought."""
    observation: dict[str, Any] = dict(config.observation(batch))
    if config.thought_len:
        ids, there = nnx.jit(lambda m, o: m.think(o))(model, observation)
        observation |= {"thought": ids, "thought_mask": there}
    return (
        *nnx.jit(lambda m, o, k: m.sample_text(o, action_mask=k))(model, observation, batch["action_mask"]),
        observation,
    )


def test_what_is_sampled_is_what_the_text_says(batch: dict[str, Any], sampled: Any) -> None:
    actions, ids, real, ruled_out = map(np.asarray, sampled[:4])
    assert np.isfinite(actions).all()
    for i, count in enumerate(np.asarray(batch["action_mask"]).any(2).sum(1)):
        assert ids[i, real[i]][-1] == 1
        text = TOKENIZER.decode(ids[i, real[i]].tolist())
        parsed = parse_waypoints(text, int(count))
        assert parsed.whole, (text, parsed.problems)
        np.testing.assert_allclose(parsed.points, actions[i, :count], atol=1e-4)
        assert text == format_waypoints(parsed.points)
        assert not actions[i, count:].any()
    assert not ids[~real].any()
    assert not ruled_out[~real].any()
    assert 0 < ruled_out.sum() < real.sum()  # of random weights


def test_each_character_is_the_likeliest_that_is_allowed(
    config: TextWaypointsConfig, batch: dict[str, Any], reader: Any, sampled: Any
) -> None:
    """The text that was written, read again in one pass without a cache."""
    _, ids, real, ruled_out, observation = jax.tree.map(np.asarray, sampled)
    words = dict(observation)
    if config.thought_len:
        there = observation["thought_mask"]
        words["prompt"] = np.concatenate([observation["prompt"], observation["thought"]], axis=1)
        words["prompt_mask"] = np.concatenate([observation["prompt_mask"], there], axis=1)
        words["prompt_causal"] = np.concatenate([np.zeros_like(observation["prompt_mask"]), there], axis=1)
    text = as_text(config, {**batch, **words}, [row[of].tolist() for row, of in zip(ids, real, strict=True)])
    every = config.characters.every
    logits = np.asarray(nnx.jit(lambda m, b: m.text_logits(b))(reader, text))[..., every]
    first = np.asarray(text["prompt_mask"]).sum(1) - real.sum(1) - 1
    plan = Written.nothing(batch["action_mask"])
    for step in range(int(real.sum(1).max())):
        at = logits[np.arange(8), np.minimum(first + step, logits.shape[1] - 1)]
        best = np.where(np.asarray(plan.allowed()), at, -np.inf).argmax(1)
        np.testing.assert_array_equal(every[best][real[:, step]], ids[real[:, step], step])
        np.testing.assert_array_equal((at.argmax(1) != best)[real[:, step]], ruled_out[real[:, step], step])
        plan = plan.after(jnp.asarray(best))
    assert bool(plan.is_whole.all())
    np.testing.assert_array_equal(plan.metres(), sampled[0])


def test_a_thought_is_written_before_the_plan(
    config: TextWaypointsConfig, model: TextWaypoints, batch: Any, sampled: Any
) -> None:
    act = nnx.jit(lambda m, o, k: m.sample_actions(KEY, o, action_mask=k))
    asked = config.observation(batch)
    np.testing.assert_array_equal(act(model, asked, batch["action_mask"]), sampled[0])
    if config.thought_len:  # and another one leads to another plan
        other = sampled[-1] | {"thought": (sampled[-1]["thought"] + 7) % 300}
        assert (np.asarray(act(model, other, batch["action_mask"])) != np.asarray(sampled[0])).any()


def test_a_row_of_broken_logits_is_no_plan(small: TextWaypointsConfig, filled: Any) -> None:
    """An id whose embedding is not finite breaks the rows that have it in their prompt, and no others."""
    model, batch = filled(lambda: small.create(KEY)), jax.tree.map(jnp.asarray, samples(small))
    table = model.backbone.vlm.embedding
    table[...] = table[...].at[339].set(jnp.nan)
    batch["prompt"] = batch["prompt"].at[1, 0].set(339)
    with pytest.raises(ValueError, match=r"state: got float32 \(8, 2\), expected float32 \(8, 3\)"):
        model.sample_actions(KEY, {**small.observation(batch), "state": batch["state"][:, :2]})
    mask = batch["action_mask"].at[4].set(False)
    actions = np.asarray(
        nnx.jit(lambda m, o: m.sample_actions(KEY, o, action_mask=mask))(model, small.observation(batch))
    )
    np.testing.assert_array_equal(np.isnan(actions).all((1, 2)), np.arange(8) == 1)
    np.testing.assert_array_equal(np.isnan(actions).any((1, 2)), np.arange(8) == 1)
    assert not actions[4].any()


# ---- Training, checkpoints, serving ----------------------------------------------------------------------------------


def test_it_learns_a_batch_by_heart_and_is_saved_and_served(small: TextWaypointsConfig, tmp_path: Any) -> None:
    trainer = Trainer(
        ModelDef(small),
        OptimizerConfig(peak_lr=1e-2, end_lr=1e-4, warmup_steps=10, decay_steps=STEPS, weight_decay=0.0).create(),
        ema_decay=None,
        seed=0,
        mesh=MeshConfig(fsdp=2, tensor=2).create(),
        rules=ShardingRules(),
        dataset_names=("one",),
    )
    batch = samples(small)
    state, placed = trainer.init(), put_batch(batch, trainer.mesh)
    losses = []
    for _ in range(STEPS):
        state, metrics = trainer.train_step(state, placed)
        losses.append(float(metrics["loss"]))
    held_out = jax.jit(held_out_losses, static_argnums=0)(trainer, state.params, placed, jax.random.key(0))
    assert float(held_out["loss"]) == pytest.approx(losses[-1], rel=0.5)

    contract = contract_of(small)
    assert contract_problems(contract) == []
    checkpointer = Checkpointer(tmp_path / "checkpoints")
    checkpointer.save(state, position=8, order=ORDER, contract=contract, config=OptimizerConfig())
    checkpointer.close()
    again = Checkpointer(tmp_path / "checkpoints")
    restored, _, _ = again.restore(trainer.abstract, trainer.shardings, contract=contract)
    again.close()
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(restored.params), jax.device_get(state.params))
    _, metrics = trainer.train_step(restored, placed)
    assert float(metrics["loss"]) < 1.5 * losses[-1] + 1e-3

    # What it has learned is what it writes, to the half centimetre that two decimals leave; also when it is served.
    parts = load_policy_parts(tmp_path)
    act = nnx.jit(lambda m, o, k: m.sample_text(o, action_mask=k))
    whole = jax.tree.map(jnp.asarray, batch)
    actions, _, real, ruled_out = act(parts.model, small.observation(whole), whole["action_mask"])
    np.testing.assert_allclose(actions, batch["actions"], atol=0.00501)
    assert int(ruled_out.sum()) <= 1 < int(real.sum())  # where the plan that is known in part was cut
    served = Policy(parts).infer(
        {"images": {"front": batch["images"]["front"][0]}, "state": np.zeros(3), "prompt": "g", "robot": ROBOT.name}
    )
    np.testing.assert_allclose(served["actions"], batch["actions"][0], atol=0.00501)


def contract_of(config: TextWaypointsConfig) -> Contract:
    def stats(names: tuple[str, ...]) -> FieldStats:
        n = len(names)
        return FieldStats(names, (0.5,) * n, (2.0,) * n, (-1.0,) * n, (1.0,) * n, (-3.0,) * n, (3.0,) * n, 10)

    normalization = Normalization(
        ROBOT.name, "zscore", stats(ROBOT.state_names), stats(ROBOT.statistics_names), plan=ROBOT.plan
    )
    return Contract(
        policy=config,
        robots=(ROBOT,),
        normalizations={ROBOT.name: normalization},
        tokenizer=TOKENIZER,
        renderers={ROBOT.name: "none"},
    )


def test_a_contract_with_what_does_not_fit_says_all_of_it(small: TextWaypointsConfig) -> None:
    contract = contract_of(dataclasses.replace(small, action_horizon=4, characters=Characters(tuple(range(6, 23)), 1)))
    tokens, horizon = contract_problems(contract)
    assert tokens.startswith("characters: 0 6, 1 7, ")
    assert horizon.startswith("robot 'ego_vehicle': action_horizon 3, expected 4: shorter plans")
