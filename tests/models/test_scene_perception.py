"""The perception: its matching against scipy's, its loss by hand, and a policy that reads what it sees."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
import scipy.special
from flax import nnx

from openpi_like.batch import ActionTokens, EntityTokens
from openpi_like.data.prompts import FastPrompt
from openpi_like.models.dima import LEFT_BEHIND, DimaConfig, DimaStudent, DimaStudentConfig
from openpi_like.models.perceiving import held_out_losses, training_counts, training_loss
from openpi_like.models.pi0 import Pi0Config
from openpi_like.models.plan_text import Characters
from openpi_like.models.scene_decoder import SceneDecoderConfig
from openpi_like.models.scene_perception import Perceived, PerceptionConfig, ScenePerception, matching, set_errors
from openpi_like.models.text_waypoints import TextWaypointsConfig
from openpi_like.models.vlm4vla import Vlm4VlaConfig
from openpi_like.models.weights import flatten, named_weights, weight_shapes
from openpi_like.partition import ShardingRules
from openpi_like.robots.ego_vehicle import EGO_VEHICLE, VIEWS
from openpi_like.robots.entities import Entities
from openpi_like.robots.policy_fit import policy_problems
from openpi_like.train import presets
from openpi_like.train.optimizer import OptimizerConfig
from openpi_like.train.sharding import MeshConfig, put_batch
from openpi_like.train.state import ModelDef, Trainer
from tests.models.test_policies import PRISMATIC

KEY = jax.random.key(0)
SIZES = SceneDecoderConfig(width=16, depth=1, num_heads=2, mlp_dim=32)
THINGS = (EntityTokens("agents", 3, 4), EntityTokens("map", 2, 5))
STEPS = 200


def drawn(seed: int, B: int = 6, N: int = 7, F: int = 3, there: float = 0.6) -> Any:
    rng = np.random.default_rng(seed)
    arrays = rng.normal(size=(B, N)), rng.normal(size=(B, N, F)), rng.normal(size=(B, N, F))
    return (*(jnp.asarray(x, jnp.float32) for x in arrays), jnp.asarray(rng.random((B, N)) < there))


def costs(logits: Any, values: Any, truth: Any, weight: float) -> np.ndarray:
    apart = np.abs(np.asarray(values, np.float64)[:, :, None] - np.asarray(truth)[:, None]).mean(-1)
    return weight * apart - scipy.special.expit(np.asarray(logits, np.float64))[..., None]


# ---- Matching and loss -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("N", "there"), [(1, 1.0), (7, 0.6), (7, 0.0), (16, 1.0), (32, 0.7)])
def test_no_matching_costs_less(N: int, there: float) -> None:
    """Of the rows that there are, against scipy's, which is given those alone."""
    logits, values, truth, real = drawn(N, N=N, there=there)
    rows = np.asarray(jax.jit(matching, static_argnums=4)(logits, values, truth, real, 2.0))
    assert (np.sort(rows, axis=1) == np.arange(N)).all()
    for cost, row, mask in zip(costs(logits, values, truth, 2.0), rows, np.asarray(real), strict=True):
        queries, best = scipy.optimize.linear_sum_assignment(cost[:, mask])
        taken = np.flatnonzero(mask[row])
        assert len(taken) == mask.sum()
        assert cost[taken, row[taken]].sum() == pytest.approx(cost[:, mask][queries, best].sum(), abs=1e-4)


def test_errors_by_hand() -> None:
    logits, values, truth, real = drawn(3)
    presence, apart, matched = map(np.asarray, set_errors(logits, values, truth, real, 5.0))
    cost = costs(logits, values, truth, 5.0)
    for b, mask in enumerate(np.asarray(real)):
        queries, columns = scipy.optimize.linear_sum_assignment(cost[b][:, mask])
        expected = np.zeros(7)
        expected[queries] = np.abs(values[b, queries] - truth[b, np.flatnonzero(mask)[columns]]).mean(-1)
        np.testing.assert_allclose(apart[b], expected, atol=1e-5)
        np.testing.assert_array_equal(matched[b], np.isin(np.arange(7), queries))
    said = np.where(matched, logits, -np.asarray(logits))
    np.testing.assert_allclose(presence, np.log1p(np.exp(-said)), rtol=1e-5)


def test_the_order_of_rows_does_not_matter_nor_what_is_not_there() -> None:
    logits, values, truth, real = drawn(4)
    expected = set_errors(logits, values, truth, real, 5.0)
    order = np.random.default_rng(0).permutation(7)
    other = set_errors(logits, values, jnp.where(real[..., None], truth, 9.0)[:, order], real[:, order], 5.0)
    for x, y in zip(expected, other, strict=True):
        np.testing.assert_allclose(x, y, atol=1e-6)


def test_what_is_not_finite_ends_and_shows() -> None:
    logits, values, truth, real = drawn(5, there=1.0)
    errors = set_errors(logits.at[0, 0].set(jnp.nan), values.at[1, 2].set(jnp.inf), truth, real, 5.0)
    assert np.isnan(errors[0]).sum() == 1
    assert np.isinf(errors[1]).sum() == 1


def test_what_is_seen_is_what_is_likelier_than_not() -> None:
    logits, values = jnp.array([[0.1, -0.1, jnp.nan]]), jnp.ones((1, 3, 2))
    seen = Perceived({"agents": logits}, {"agents": values}).entities()
    np.testing.assert_array_equal(seen["entity_mask"]["agents"], [[True, False, False]])
    np.testing.assert_array_equal(seen["entities"]["agents"][0, :, 0], [1, 0, 0])


# ---- In a policy -----------------------------------------------------------------------------------------------------


def config_of(tiny_policy: Any, cls: Any = DimaStudentConfig, *, own: Any = None, **perception: Any) -> Any:
    """own: of the policy, {"student": SIZES} by default. perception: of `PerceptionConfig`."""
    names = {f.name for f in dataclasses.fields(cls)} & {f.name for f in dataclasses.fields(tiny_policy)}
    sees = {"perception": PerceptionConfig(decoder=SIZES, **perception), "entities": THINGS}
    own = {"student": SIZES} if own is None else own
    return cls(**{**{name: getattr(tiny_policy, name) for name in names}, **sees, **own})


@pytest.fixture(scope="module")
def annotated(tiny_batch: Any) -> Any:
    """`tiny_batch` with things around the robot; row 0 has none."""
    rng, B = np.random.default_rng(5), 8
    there = {e.name: (rng.random((B, e.count)) < 0.7) & (np.arange(B) > 0)[:, None] for e in THINGS}
    values = {e.name: rng.normal(size=(B, e.count, e.size)).astype(np.float32) for e in THINGS}
    entities = {name: np.where(there[name][..., None], x, 0) for name, x in values.items()}
    return jax.tree.map(jnp.asarray, tiny_batch | {"entities": entities, "entity_mask": there})


def bare(inputs: Any) -> Any:
    return {k: v for k, v in inputs.items() if not k.startswith("entit")}


def seeing(filled: Any, config: Any) -> Any:
    """Returns a policy with drawn weights that takes all of its agents to be there."""
    model = filled(lambda: config.create(KEY))
    bias = model.backbone.perception.agents.presence.bias
    bias[...] = bias[...] + 50.0
    return model


def told(model: Any) -> Any:
    """Returns the same weights as a policy without a perception."""
    config = dataclasses.replace(model.config, perception=None)
    state = nnx.state(model)
    del state["backbone"]["perception"]
    return nnx.merge(nnx.graphdef(nnx.eval_shape(lambda: config.create(KEY))), state)


def answered(batch: Any, config: Any) -> Any:
    """Returns a batch whose prompts go on with answers, where the policy has such."""
    if not (T := config.answer_len):
        return batch
    rng, (B, S) = np.random.default_rng(6), batch["prompt"].shape
    ids = jnp.asarray(rng.integers(4, config.vocab_size, (B, T)), jnp.int32)
    later = jnp.broadcast_to(jnp.arange(S + T) >= S, (B, S + T))
    mask = jnp.pad(batch["prompt_mask"], ((0, 0), (0, T)), constant_values=True)
    causal = later & mask
    answers = {"prompt_mask": mask, "prompt_causal": causal, "prompt_loss": causal, "prompt_action": causal}
    wanted = config.batch_shapes(B).keys() | batch.keys()
    return (
        batch
        | {"prompt": jnp.concatenate([batch["prompt"], ids], axis=1)}
        | {k: v for k, v in answers.items() if k in wanted}
    )


FILM = dataclasses.replace(PRISMATIC, film=True)
TOKENS = ActionTokens(max_len=6, count=40, skip=4)
POLICIES: dict[str, tuple[Any, dict[str, Any], dict[str, Any]]] = {  # and the options of sampling
    "dima_student": (DimaStudentConfig, {"student": SIZES}, {}),
    "insulated": (
        Pi0Config,
        {"pi05": True, "prompt_format": FastPrompt(), "action_tokens": TOKENS, "thought_len": 3},
        {"num_steps": 1},
    ),
    "text_waypoints": (TextWaypointsConfig, {"characters": Characters.fitted(), "thought_len": 3}, {}),
    "vlm4vla": (Vlm4VlaConfig, {"binary_dims": (), "head_width": 16, "backbone": FILM, "image_slots": (1, 1)}, {}),
}


@pytest.mark.parametrize("name", POLICIES)
def test_what_is_read_is_what_is_seen(tiny_policy: Any, filled: Any, annotated: Any, name: str) -> None:
    """Acting, thinking and training are those of a policy of the same weights that is told the very rows."""
    cls, own, options = POLICIES[name]
    config = config_of(tiny_policy, cls, own=own)
    model, batch = seeing(filled, config), answered(annotated, config)
    given, without = config.observation(batch), told(model)
    assert not {"entities", "entity_mask"} & config.input_shapes(1, actions=False).keys()

    @nnx.jit
    def act(model: Any, observation: Any) -> Any:
        if config.thought_len:  # once, as a server does
            ids, there = model.think(observation)
            observation = {**observation, "thought": ids, "thought_mask": there}
        return model.sample_actions(KEY, observation, **options), observation.get("thought", 0)

    seen = model.backbone.perception(model.backbone.see(given)).entities()
    assert seen["entity_mask"]["agents"].all()
    mine = act(model, bare(given))
    for x, y in zip(mine, act(without, bare(given) | seen), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5)
    # What it is told all the same, it does not read; what it sees, it does.
    if name == "dima_student":
        np.testing.assert_array_equal(act(model, given)[0], mine[0])
        nothing = {**seen, "entity_mask": jax.tree.map(jnp.zeros_like, seen["entity_mask"])}
        other = act(without, bare(given) | nothing)[0]
        assert (np.abs(np.asarray(other - mine[0])).max((1, 2)) > 1e-5).all()

    metrics = nnx.jit(lambda m, b: training_loss(m, KEY, b)[1])(model, batch)
    expected = nnx.jit(lambda m, b: m.loss(KEY, b)[1])(without, batch | seen)
    np.testing.assert_allclose(metrics["policy_loss"], expected["loss"], rtol=1e-5)
    assert expected.keys() - {"loss", "valid"} <= metrics.keys()
    with pytest.raises(ValueError, match=r"entities: missing"):
        training_loss(model, KEY, bare(batch))


@pytest.mark.parametrize(
    ("reads", "detached", "reached"),
    [("annotations", False, False), ("predictions", True, False), ("predictions", False, True)],
)
def test_the_plan_reaches_the_perception_where_it_may(
    tiny_policy: Any, filled: Any, annotated: Any, reads: str, detached: bool, reached: bool
) -> None:
    model = seeing(filled, config_of(tiny_policy, reads=reads, detached=detached))

    def plan_loss(model: Any, batch: Any) -> jax.Array:
        return training_loss(model, KEY, batch)[1]["student_loss"].sum()

    both = nnx.jit(nnx.value_and_grad(plan_loss))
    value, grads = both(model, annotated)
    sizes = {k: float(jnp.abs(x).max()) for k, x in flatten(named_weights(grads)).items()}
    assert (sizes["perception/agents/values/kernel"] > 0) == reached
    assert all(size == 0 for name, size in sizes.items() if "presence" in name)
    # Annotations are read where that is asked for, and only there.
    moved = annotated | {"entities": jax.tree.map(lambda x: x + 1.0, annotated["entities"])}
    assert (float(both(model, moved)[0]) != float(value)) == (reads == "annotations")


def test_the_loss_is_the_sum_of_its_parts(tiny_policy: Any, filled: Any, annotated: Any) -> None:
    config = config_of(tiny_policy, weight=0.5, value_weight=3.0)
    model = filled(lambda: config.create(KEY))
    loss, metrics = training_loss(model, KEY, annotated)
    mean = lambda name: np.asarray(metrics[name], np.float64)  # noqa: E731
    of_slots = [mean(f"{e.name}_presence_loss") + 3 * mean(f"{e.name}_values_loss") for e in THINGS]
    np.testing.assert_allclose(metrics["perception_loss"], sum(of_slots), rtol=1e-5)
    np.testing.assert_allclose(metrics["loss"], mean("student_loss") + 0.5 * sum(of_slots), rtol=1e-5)
    np.testing.assert_array_equal(metrics["policy_loss"], metrics["student_loss"])
    assert float(loss) == pytest.approx(np.asarray(metrics["loss"]).mean(), rel=1e-5)
    np.testing.assert_array_equal(metrics["agents_values_loss_valid"], annotated["entity_mask"]["agents"].any(1))
    perceived = model.backbone.perception(model.backbone.see(annotated))
    errors, _ = model.backbone.perception.errors(perceived, annotated["entities"], annotated["entity_mask"])
    np.testing.assert_allclose(errors, metrics["perception_loss"], rtol=1e-4)
    # Nothing is drawn, so held-out losses are the same; what no sample has is NaN.
    held_out = held_out_losses(model, KEY, annotated)
    assert held_out.keys() == {name for name in metrics if f"{name}_valid" in metrics} | {"loss"}
    for name, value in held_out.items():
        there = mean(f"{name}_valid") if name != "loss" else np.ones(8)
        assert float(value) == pytest.approx(mean(name).sum() / there.sum(), rel=1e-5)
    nothing = {"entity_mask": jax.tree.map(jnp.zeros_like, annotated["entity_mask"])}
    assert np.isnan(float(held_out_losses(model, KEY, annotated | nothing)["map_values_loss"]))


def test_a_perception_alone(tiny_policy: Any, filled: Any, annotated: Any) -> None:
    """Of samples without a plan, too; and nothing else of the policy has a gradient, or is computed."""
    own = {"characters": Characters.fitted()}
    config = config_of(tiny_policy, TextWaypointsConfig, own=own, alone=True, weight=2.0)
    model = filled(lambda: config.create(KEY))
    batch = annotated | {"action_mask": jnp.zeros_like(annotated["action_mask"])}
    (loss, metrics), grads = nnx.jit(
        nnx.value_and_grad(lambda m, b: training_loss(m, KEY, b, counts=training_counts(m, b)), has_aux=True)
    )(model, batch)
    assert float(loss) == pytest.approx(2 * float(metrics["perception_loss"].mean()), rel=1e-5)
    assert not {"policy_loss", "plan_loss"} & metrics.keys()
    np.testing.assert_array_equal(metrics["valid"], 1)
    still = {k for k, x in flatten(named_weights(grads)).items() if not np.asarray(x).any()}
    assert still == {k for k in weight_shapes(config) if k.startswith(("vlm/", "entities/"))}
    held_out = held_out_losses(model, KEY, batch)
    assert float(held_out["loss"]) == pytest.approx(float(loss), rel=1e-5)
    assert "policy_loss" not in held_out


def test_the_student_is_handed_over_with_its_perception(tiny_policy: Any) -> None:
    both, alone = (weight_shapes(config_of(tiny_policy, cls)) for cls in (DimaConfig, DimaStudentConfig))
    assert alone.keys() == {k for k in both if not k.startswith(tuple(p.strip("^") for p in LEFT_BEHIND))}
    assert "perception/map/query" in alone


def test_a_perception_is_the_robots(tiny_policy: Any) -> None:
    """For presets: no part of the backbone."""
    of = presets.parts(config_of(tiny_policy, Pi0Config, own={}))
    assert {"entities", "perception"} <= set(of.added)
    assert not {"entities", "perception"} & set(of.backbone)


def trainer_of(config: Any, mesh: MeshConfig = MeshConfig(data=1), accumulate: int = 1) -> Trainer:
    return Trainer(
        ModelDef(config),
        OptimizerConfig(peak_lr=1e-2, end_lr=1e-4, warmup_steps=10, decay_steps=STEPS, weight_decay=0.0).create(),
        ema_decay=None,
        seed=0,
        mesh=mesh.create(jax.devices()[: mesh.data * mesh.fsdp * mesh.tensor]),
        rules=ShardingRules(),
        dataset_names=("one", "two"),
        accumulate=accumulate,
    )


def test_on_a_mesh_and_in_parts_it_learns_the_same(tiny_policy: Any, annotated: Any) -> None:
    config, found = config_of(tiny_policy, Pi0Config, own={}), []
    fresh = jax.device_get(trainer_of(config).init())
    for mesh, parts in ((MeshConfig(data=1), 1), (MeshConfig(data=1, fsdp=2, tensor=2), 2)):
        trainer = trainer_of(config, mesh, parts)
        state, batch = jax.device_put(fresh, trainer.shardings), put_batch(jax.device_get(annotated), trainer.mesh)
        for _ in range(2):
            state, metrics = trainer.train_step(state, batch)
            found.append({k: float(v) for k, v in metrics.items()})
    for alone, together in zip(found[:2], found[2:], strict=True):
        assert together == pytest.approx(alone, rel=1e-4, abs=1e-6)
    assert {"loss/policy_loss", "loss/perception_loss", "loss/map_values_loss"} <= found[0].keys()
    assert found[1]["loss"] != found[0]["loss"]


def test_it_learns_to_see_a_batch(tiny_policy: Any, annotated: Any) -> None:
    """With what is around each of the images by heart."""
    config = config_of(tiny_policy, weight=1.0)
    trainer = trainer_of(config)
    state, placed, found = trainer.init(), put_batch(jax.tree.map(np.asarray, annotated), trainer.mesh), []
    for _ in range(STEPS):
        state, metrics = trainer.train_step(state, placed)
        found.append({k: float(v) for k, v in metrics.items()})
    for name in ("perception_loss", "agents_values_loss", "map_values_loss", "agents_presence_loss", "student_loss"):
        assert found[-1][f"loss/{name}"] < 0.2 * found[0][f"loss/{name}"] + 0.02, name
    model = trainer.model.bind(jax.tree.map(jnp.asarray, jax.device_get(state.params)))
    assert isinstance(model, DimaStudent)
    assert model.backbone.perception is not None
    there = model.backbone.perception(model.backbone.see(annotated)).entities()["entity_mask"]
    for name, mask in there.items():
        np.testing.assert_array_equal(mask.sum(1), annotated["entity_mask"][name].sum(1))


# ---- Configs ---------------------------------------------------------------------------------------------------------


def test_configs_that_do_not_fit(tiny_policy: Any) -> None:
    with pytest.raises(ValueError, match=r"weight=0\.0, .*value_weight=-1.*reads='both', expected one of"):
        PerceptionConfig(decoder=SIZES, weight=0.0, value_weight=-1.0, reads="both")
    for cls, own in ((DimaStudentConfig, None), (Pi0Config, {})):
        config = config_of(tiny_policy, cls, own=own)
        with pytest.raises(ValueError, match=r"perception without entities"):
            dataclasses.replace(config, entities=())


def test_a_perception_learns_from_robots_that_have_what_it_sees(tiny_policy: Any) -> None:
    config = config_of(tiny_policy, Pi0Config, own={"cameras": VIEWS, "action_horizon": 6, "state_dim": 17})
    things = tuple(Entities(slot.name, slot.name, slot.count, slot.size) for slot in THINGS)
    assert policy_problems(dataclasses.replace(EGO_VEHICLE, entities=things), config) == []
    (problem,) = policy_problems(EGO_VEHICLE, config)
    assert problem.startswith("no entities agents, map, which the policy's perception learns from all robots")
    assert policy_problems(EGO_VEHICLE, dataclasses.replace(config, perception=None)) == []


def test_numbers_that_come_out_are_no_inner_maps(tiny_policy: Any) -> None:
    """For Muon."""
    maps = {name for name in ModelDef(config_of(tiny_policy)).maps if name.startswith("perception/")}
    assert "perception/images_in/map/kernel" in maps
    assert not {name for name in maps if "presence" in name or "values/" in name}


def test_a_perception_has_a_query_for_each_row(tiny_policy: Any) -> None:
    sizes = PerceptionConfig(decoder=SIZES)
    made = nnx.eval_shape(
        lambda: ScenePerception(KEY, sizes, THINGS, cameras=6, token_width=12, unroll=False, remat=None)
    )
    assert [getattr(made, e.name).query.shape for e in THINGS] == [(3, 16), (2, 16)]
    assert made.images_in.camera.shape == (6, 16)
