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

from openpi_like.batch import EntityTokens
from openpi_like.models.dima import LEFT_BEHIND, DimaConfig, DimaStudent, DimaStudentConfig
from openpi_like.models.scene_decoder import SceneDecoderConfig
from openpi_like.models.scene_perception import Perceived, PerceptionConfig, ScenePerception, matching, set_errors
from openpi_like.models.weights import flatten, named_weights, weight_shapes
from openpi_like.partition import ShardingRules
from openpi_like.robots.ego_vehicle import EGO_VEHICLE, EGO_VEHICLE_SCENE
from openpi_like.train.optimizer import OptimizerConfig
from openpi_like.train.sharding import MeshConfig, put_batch
from openpi_like.train.state import ModelDef, Trainer

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
    seen, there = Perceived({"agents": logits}, {"agents": values}).entities()
    np.testing.assert_array_equal(there["agents"], [[True, False, False]])
    np.testing.assert_array_equal(seen["agents"][0, :, 0], [1, 0, 0])


# ---- In a policy -----------------------------------------------------------------------------------------------------


def config_of(tiny_policy: Any, cls: Any = DimaStudentConfig, **perception: Any) -> Any:
    names = {f.name for f in dataclasses.fields(cls)} & {f.name for f in dataclasses.fields(tiny_policy)}
    own = {"student": SIZES, "perception": PerceptionConfig(decoder=SIZES, **perception), "entities": THINGS}
    return cls(**{**{name: getattr(tiny_policy, name) for name in names}, **own})


@pytest.fixture(scope="module")
def annotated(tiny_batch: Any) -> Any:
    """`tiny_batch` with things around the robot; row 0 has none."""
    rng, B = np.random.default_rng(5), 8
    there = {e.name: (rng.random((B, e.count)) < 0.7) & (np.arange(B) > 0)[:, None] for e in THINGS}
    values = {e.name: rng.normal(size=(B, e.count, e.size)).astype(np.float32) for e in THINGS}
    entities = {name: np.where(there[name][..., None], x, 0) for name, x in values.items()}
    return jax.tree.map(jnp.asarray, tiny_batch | {"entities": entities, "entity_mask": there})


def seeing(filled: Any, config: Any) -> Any:
    """Returns a policy with drawn weights that takes all of its agents to be there."""
    model = filled(lambda: config.create(KEY))
    bias = model.perception.agents.presence.bias
    bias[...] = bias[...] + 50.0
    return model


def test_acting_needs_no_entities_and_reads_none(tiny_policy: Any, filled: Any, annotated: Any) -> None:
    config = config_of(tiny_policy)
    model = seeing(filled, config)
    given = config.observation(annotated)
    bare = {k: v for k, v in given.items() if not k.startswith("entit")}
    act = nnx.jit(lambda m, o: m.sample_actions(KEY, o))
    np.testing.assert_array_equal(act(model, given), act(model, bare))
    # What it reads is what it sees: the same things, given to the same policy without a perception.
    values, there = model.perception(model.backbone.see(bare)).entities()
    assert there["agents"].all()
    read = model.student(model.backbone, bare | {"entities": values, "entity_mask": there}, model.backbone.see(bare))
    np.testing.assert_allclose(act(model, bare), read.plan, atol=1e-5)
    nothing = bare | {"entities": values, "entity_mask": jax.tree.map(jnp.zeros_like, there)}
    other = model.student(model.backbone, nothing, model.backbone.see(bare)).plan
    assert (np.abs(np.asarray(other - read.plan)).max((1, 2)) > 1e-5).all()
    with pytest.raises(ValueError, match=r"entities: missing"):
        model.loss(KEY, {k: v for k, v in annotated.items() if not k.startswith("entit")})


@pytest.mark.parametrize(
    ("reads", "detached", "reached"),
    [("annotations", False, False), ("predictions", True, False), ("predictions", False, True)],
)
def test_the_plan_reaches_the_perception_where_it_may(
    tiny_policy: Any, filled: Any, annotated: Any, reads: str, detached: bool, reached: bool
) -> None:
    model = seeing(filled, config_of(tiny_policy, reads=reads, detached=detached))

    def plan_loss(model: Any, batch: Any) -> jax.Array:
        return model.loss(KEY, batch)[1]["student_loss"].sum()

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
    loss, metrics = model.loss(KEY, annotated)
    mean = lambda name: np.asarray(metrics[name], np.float64)  # noqa: E731
    of_slots = [mean(f"{e.name}_presence_loss") + 3 * mean(f"{e.name}_values_loss") for e in THINGS]
    np.testing.assert_allclose(metrics["perception_loss"], sum(of_slots), rtol=1e-5)
    np.testing.assert_allclose(metrics["loss"], mean("student_loss") + 0.5 * sum(of_slots), rtol=1e-5)
    assert float(loss) == pytest.approx(np.asarray(metrics["loss"]).mean(), rel=1e-5)
    np.testing.assert_array_equal(metrics["agents_values_loss_valid"], annotated["entity_mask"]["agents"].any(1))
    perceived = model.perception(model.backbone.see(annotated))
    errors, _ = model.perception.errors(perceived, annotated["entities"], annotated["entity_mask"])
    np.testing.assert_allclose(errors, metrics["perception_loss"], rtol=1e-4)


def test_the_student_is_handed_over_with_its_perception(tiny_policy: Any) -> None:
    both, alone = (weight_shapes(config_of(tiny_policy, cls)) for cls in (DimaConfig, DimaStudentConfig))
    assert alone.keys() == {k for k in both if not k.startswith(tuple(p.strip("^") for p in LEFT_BEHIND))}
    assert "perception/map/query" in alone


def test_it_learns_to_see_a_batch(tiny_policy: Any, annotated: Any) -> None:
    """With what is around each of the images by heart."""
    config = config_of(tiny_policy, weight=1.0)
    trainer = Trainer(
        ModelDef(config),
        OptimizerConfig(peak_lr=1e-2, end_lr=1e-4, warmup_steps=10, decay_steps=STEPS, weight_decay=0.0).create(),
        ema_decay=None,
        seed=0,
        mesh=MeshConfig().create(jax.devices()[:1]),
        rules=ShardingRules(),
        dataset_names=("one", "two"),
    )
    state, placed, found = trainer.init(), put_batch(jax.tree.map(np.asarray, annotated), trainer.mesh), []
    for _ in range(STEPS):
        state, metrics = trainer.train_step(state, placed)
        found.append({k: float(v) for k, v in metrics.items()})
    for name in ("perception_loss", "agents_values_loss", "map_values_loss", "agents_presence_loss", "student_loss"):
        assert found[-1][f"loss/{name}"] < 0.2 * found[0][f"loss/{name}"] + 0.02, name
    model = trainer.model.bind(jax.tree.map(jnp.asarray, jax.device_get(state.params)))
    assert isinstance(model, DimaStudent)
    _, there = model.perception(model.backbone.see(annotated)).entities()
    for name, mask in there.items():
        np.testing.assert_array_equal(mask.sum(1), annotated["entity_mask"][name].sum(1))


# ---- Configs ---------------------------------------------------------------------------------------------------------


def test_configs_that_do_not_fit(tiny_policy: Any) -> None:
    with pytest.raises(ValueError, match=r"weight=0\.0, .*value_weight=-1.*reads='both', expected one of"):
        PerceptionConfig(decoder=SIZES, weight=0.0, value_weight=-1.0, reads="both")
    config = config_of(tiny_policy)
    with pytest.raises(ValueError, match=r"perception without entities"):
        dataclasses.replace(config, entities=())


def test_a_perception_learns_from_robots_that_have_what_it_sees(tiny_policy: Any) -> None:
    config = config_of(tiny_policy)
    assert config.robot_problems(EGO_VEHICLE_SCENE, None) == []
    (problem,) = config.robot_problems(EGO_VEHICLE, None)
    assert problem == "entities without agents, map, expected all that the perception learns"
    assert dataclasses.replace(config, perception=None).robot_problems(EGO_VEHICLE, None) == []


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
