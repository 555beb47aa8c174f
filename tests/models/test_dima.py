"""DiMA: what reaches whom in training, what acting reads, and the hand-over of the student."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from flax import nnx

from openpi_like.config import load_run
from openpi_like.models.arrays import MemoryArrays
from openpi_like.models.dima import LEFT_BEHIND, Dima, DimaConfig, DimaStudent, DimaStudentConfig, divergence
from openpi_like.models.gemma import GemmaConfig
from openpi_like.models.paligemma import PaliGemmaConfig
from openpi_like.models.prismatic import PrismaticConfig
from openpi_like.models.scene_decoder import SceneDecoder, SceneDecoderConfig
from openpi_like.models.weights import (
    WeightsError,
    flat_weights,
    flatten,
    named_weights,
    plan_load,
    read_weights,
    unflatten,
    weight_shapes,
)
from openpi_like.partition import ShardingRules
from openpi_like.train.optimizer import OptimizerConfig
from openpi_like.train.sharding import MeshConfig, put_batch
from openpi_like.train.state import ModelDef, Trainer
from tests.models.other_parts import PARTS, with_other

KEY = jax.random.key(0)
SIZES = SceneDecoderConfig(width=16, depth=2, num_heads=2, mlp_dim=32)
STEPS = 200


def config_of(tiny_policy: Any, cls: Any = DimaConfig, **options: Any) -> Any:
    names = {f.name for f in dataclasses.fields(cls)} & {f.name for f in dataclasses.fields(tiny_policy)}
    own = {"student": SIZES, **({"teacher_width": 16} if cls is DimaConfig else {})}
    return cls(**{**{name: getattr(tiny_policy, name) for name in names}, **own, **options})


@pytest.fixture(scope="module")
def config(tiny_policy: Any) -> DimaConfig:
    return config_of(tiny_policy, feature_weight=0.7, imitation_weight=0.4)


@pytest.fixture(scope="module")
def model(config: DimaConfig, filled: Any) -> Dima:
    return filled(lambda: config.create(KEY))


# ---- Training --------------------------------------------------------------------------------------------------------


def test_the_loss_by_hand(config: DimaConfig, model: Dima, batch: Any) -> None:
    student, teacher = (jax.tree.map(np.asarray, x) for x in model.both(config.observation(batch)))
    mask, actions = (np.asarray(batch[name]) for name in ("action_mask", "actions"))
    by_sample = lambda x, y: np.array([np.abs(a - b)[m].mean() for a, b, m in zip(x, y, mask, strict=True)])  # noqa: E731
    w = {k: np.asarray(v, np.float64) for k, v in flat_weights(model).items()}
    matched = student.feature @ w["teacher/match/kernel"] + w["teacher/match/bias"]
    p, q = (scipy.special.softmax(x, axis=-1) for x in (teacher.feature.astype(np.float64), matched))
    expected = {
        "student_loss": by_sample(student.plan, actions),
        "teacher_loss": by_sample(teacher.plan, actions),
        "feature_loss": scipy.special.rel_entr(p, q).sum(-1),
        "imitation_loss": by_sample(student.plan, teacher.plan),
    }
    loss, metrics = model.loss(KEY, batch)
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=2e-4, err_msg=name)
    shares = {"student_loss": 1.0, "teacher_loss": 1.0, "feature_loss": 0.7, "imitation_loss": 0.4}
    total = sum(share * expected[name] for name, share in shares.items())
    np.testing.assert_allclose(metrics["loss"], total, rtol=2e-4)
    assert float(loss) == pytest.approx(total.mean(), rel=2e-4)


def test_a_sample_without_a_plan_teaches_nothing(model: Dima, batch: Any) -> None:
    mask = batch["action_mask"].at[2].set(False)
    _, metrics = model.loss(KEY, batch | {"action_mask": mask})
    assert all(float(x[2]) == 0 for x in metrics.values())
    first = jax.tree.map(lambda x: x[2:3], batch | {"action_mask": mask})
    assert float(model.loss(KEY, first)[0]) == 0
    assert np.isnan(float(model.validation_losses(KEY, first)["feature_loss"]))


def test_a_divergence_is_none_from_itself_and_of_what_all_channels_have_more() -> None:
    x, y = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 5)), jnp.float32)
    np.testing.assert_allclose(divergence(x, x + 3.0), 0, atol=1e-6)
    assert (np.asarray(divergence(x, y)) > 0).all()


def gradients(of: Any, model: Dima) -> dict[str, np.ndarray]:
    return {k: np.asarray(x) for k, x in flatten(named_weights(nnx.jit(nnx.grad(of))(model))).items()}


def test_distillation_moves_the_student_alone(tiny_policy: Any, filled: Any, batch: Any) -> None:
    """Gradients of the two parts that distil: in all weights of the student and of the towers, and in none of the
    teacher and the language model but `match`."""
    model = filled(lambda: config_of(tiny_policy).create(KEY))

    def distilled(model: Dima) -> jax.Array:
        metrics = model.loss(KEY, batch)[1]
        return (metrics["feature_loss"] + metrics["imitation_loss"]).sum()

    grads = {k: float(np.abs(x).max()) for k, x in gradients(distilled, model).items()}
    still = {name for name, size in grads.items() if size == 0}
    of_teacher = {name for name in grads if name.startswith(("vlm/", "teacher/"))}
    assert still == of_teacher - {"teacher/match/kernel", "teacher/match/bias"}


def test_the_teacher_is_taught_by_the_plan_alone(tiny_policy: Any, filled: Any, batch: Any) -> None:
    """Its gradient does not depend on what the student is drawn by; without a student's weight, neither does it."""
    apart, drawn = (config_of(tiny_policy, feature_weight=f, imitation_weight=i) for f, i in ((0.0, 0.0), (3.0, 0.9)))
    one, two = (gradients(lambda m: m.loss(KEY, batch)[0], filled(lambda c=c: c.create(KEY))) for c in (apart, drawn))
    for name in one:
        if name.startswith(("vlm/", "teacher/")) and "match" not in name:
            np.testing.assert_allclose(one[name], two[name], atol=1e-6, err_msg=name)
    differ = {name for name in one if not np.allclose(one[name], two[name], atol=1e-6)}
    assert {"teacher/match/kernel", "student/plan_out/kernel", "vision/patch/kernel"} <= differ


# ---- Acting ----------------------------------------------------------------------------------------------------------


def act(model: Any, observation: Any) -> np.ndarray:
    return np.asarray(nnx.jit(lambda m, o: m.sample_actions(KEY, o))(model, observation))


@pytest.mark.parametrize("acts_as", ["student", "teacher"])
def test_the_student_reads_no_weight_of_the_teacher(tiny_policy: Any, filled: Any, batch: Any, acts_as: str) -> None:
    config = config_of(tiny_policy, acts_as=acts_as)
    model = filled(lambda: config.create(KEY))
    observation = config.observation(batch)
    student, teacher = model.both(observation)
    plan = act(model, observation)
    np.testing.assert_allclose(plan, (student if acts_as == "student" else teacher).plan, atol=1e-5)
    prefixes = ("vlm/", "teacher/") if acts_as == "student" else ("student/",)
    broken = jax.tree_util.tree_map_with_path(
        lambda path, x: jnp.full_like(x, jnp.nan) if named(path).startswith(prefixes) else x, nnx.state(model)
    )
    np.testing.assert_array_equal(act(nnx.merge(nnx.graphdef(model), broken), observation), plan)


def named(path: Any) -> str:
    return "/".join(str(getattr(part, "key", part)) for part in path if str(getattr(part, "key", part)) != "backbone")


def test_the_student_is_a_fraction_of_the_teacher(tiny_policy: Any) -> None:
    """Of the compiled programs, on a language model that is large beside the towers; and beside the student that has
    none."""
    language = GemmaConfig(width=128, depth=4, mlp_dim=512, num_heads=4, num_kv_heads=1, head_dim=32)
    backbone = PaliGemmaConfig(tiny_policy.backbone.vision, language)

    def flops(config: Any) -> float:
        model = nnx.eval_shape(lambda: config.create(KEY))
        observation = config.input_shapes(2, actions=False)
        graph, state = nnx.split(model)
        program = jax.jit(lambda s, o: nnx.merge(graph, s).sample_actions(KEY, o)).lower(state, observation).compile()
        return float((program.cost_analysis() or {})["flops"])

    student, teacher = (flops(config_of(tiny_policy, backbone=backbone, acts_as=x)) for x in ("student", "teacher"))
    alone = flops(config_of(tiny_policy, DimaStudentConfig, backbone=backbone))
    assert student < teacher / 8
    assert student == pytest.approx(alone, rel=1e-3)


@pytest.mark.parametrize("part", PARTS)
def test_the_student_sees_everything(model: Dima, config: DimaConfig, tiny_batch: Any, part: str) -> None:
    one, two = (act(model, config.observation(b)) for b in (tiny_batch, with_other(tiny_batch, part)))
    assert (np.abs(one - two).max((1, 2)) > 1e-5).all()


def test_cameras_are_told_apart(model: Dima, config: DimaConfig, tiny_batch: Any) -> None:
    """Two images in each other's place are another scene; and without any camera there is still a plan."""
    images, mask = tiny_batch["images"], {name: np.ones(8, bool) for name in config.cameras}
    plain = tiny_batch | {"image_mask": mask}
    swapped = plain | {"images": dict(zip(images, reversed(images.values()), strict=True))}
    one, two = (act(model, config.observation(b)) for b in (plain, swapped))
    assert (np.abs(one - two).max((1, 2)) > 1e-5).all()
    blind = [b | {"image_mask": {name: np.zeros(8, bool) for name in mask}} for b in (plain, swapped)]
    one, two = (act(model, config.observation(b)) for b in blind)
    assert np.isfinite(one).all()
    np.testing.assert_array_equal(one, two)


def test_a_decoder_by_hand(filled: Any) -> None:
    """One head, one layer, two queries and three tokens, one of which is not there."""
    sizes = SceneDecoderConfig(width=4, depth=1, num_heads=1, mlp_dim=6)
    decoder = filled(lambda: SceneDecoder(KEY, sizes, unroll=True, remat=None))
    w = {k: np.asarray(v, np.float64) for k, v in flat_weights(decoder).items()}
    rng = np.random.default_rng(1)
    x, tokens, there = rng.normal(size=(2, 4)), rng.normal(size=(3, 4)), np.array([True, False, True])
    expected = x

    def norm(x: np.ndarray, name: str, at: Any = 0) -> np.ndarray:
        y = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
        return y * w[f"{name}/scale"][at] + w[f"{name}/bias"][at]

    def attended(part: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        of = lambda z, n: z @ w[f"layers/{part}_{n}/kernel"][0, :, 0] + w[f"layers/{part}_{n}/bias"][0, 0]  # noqa: E731
        weights = scipy.special.softmax(of(x, "query") @ of(y, "key").T / 2, axis=-1)
        return weights @ of(y, "value") @ w[f"layers/{part}_out/kernel"][0, 0] + w[f"layers/{part}_out/bias"][0]

    own = norm(expected, "layers/own_norm")
    expected = expected + attended("own", own, own)
    expected = expected + attended("seen", norm(expected, "layers/seen_norm"), tokens[there])
    up = norm(expected, "layers/mlp_norm") @ w["layers/mlp_up/kernel"][0] + w["layers/mlp_up/bias"][0]
    up = up * (1 + scipy.special.erf(up / np.sqrt(2))) / 2
    expected = expected + up @ w["layers/mlp_down/kernel"][0] + w["layers/mlp_down/bias"][0]
    got = decoder(*(jnp.asarray(v[None], jnp.float32) for v in (x, tokens)), jnp.asarray(there[None]))
    np.testing.assert_allclose(got[0], norm(expected, "final_norm", slice(None)), atol=1e-4)


# ---- Hand-over -------------------------------------------------------------------------------------------------------


def test_the_student_is_handed_over_by_name(tiny_policy: Any, config: DimaConfig, model: Dima, batch: Any) -> None:
    alone = config_of(tiny_policy, DimaStudentConfig)
    arrays = MemoryArrays({name: np.asarray(x) for name, x in flat_weights(model).items()})
    plan = plan_load(alone, arrays, drop=LEFT_BEHIND)
    assert all(row["from"] == "checkpoint" for row in plan.report)
    taken = read_weights(arrays, plan)
    assert taken.keys() == weight_shapes(alone).keys()
    assert not [name for name in taken if name.startswith(("vlm/", "teacher/"))]
    student = ModelDef(alone).bind(unflatten({k: jnp.asarray(v) for k, v in taken.items()}))
    assert isinstance(student, DimaStudent)
    observation = config.observation(batch)
    np.testing.assert_allclose(act(student, observation), act(model, observation), atol=1e-6)
    with pytest.raises(WeightsError, match=r"(?s)vlm/embedding: not used.*teacher/query: not used"):
        plan_load(alone, arrays)


def test_configs_of_driving_fit_each_other() -> None:
    runs = {
        name: load_run(Path("configs/driving") / f"{name}.py")
        for name in ("flow", "dima", "dima_student", "dima_teacher", "planner")
    }
    both, alone = (weight_shapes(runs[name].model) for name in ("dima", "dima_student"))
    assert {k: v.shape for k, v in both.items() if not k.startswith(("vlm/", "teacher/"))} == {
        k: v.shape for k, v in alone.items()
    }
    assert runs["dima_student"].model == runs["planner"].model
    same = ("data", "batch_size", "steps", "optimizer", "seed", "stats", "tokenizer")
    for name in ("dima", "planner"):
        assert [getattr(runs[name], field) for field in same] == [getattr(runs["flow"], field) for field in same]
    assert [runs[name].steps for name in ("dima_student", "dima_teacher")] == [0, 0]
    assert runs["dima_teacher"].model.acts_as == "teacher"


def test_configs_that_do_not_fit(tiny_policy: Any) -> None:
    with pytest.raises(ValueError, match=r"acts_as='both', .*feature_weight=-1.*imitation_weight=1.*teacher_width=0"):
        config_of(tiny_policy, acts_as="both", feature_weight=-1.0, imitation_weight=1.0, teacher_width=0)
    with pytest.raises(ValueError, match=r"backbone\.film=True, expected False"):
        config_of(tiny_policy, DimaStudentConfig, backbone=PrismaticConfig.tiny(patch_size=8, film=True))
    with pytest.raises(ValueError, match=r"depth=0, expected at least 1"):
        SceneDecoderConfig(depth=0)
    with pytest.raises(ValueError, match=r"width=10, expected a multiple of num_heads=4"):
        SceneDecoderConfig(width=10, num_heads=4)


def test_it_learns_a_batch_by_heart(tiny_policy: Any, tiny_batch: Any) -> None:
    """On a mesh of four devices."""
    trainer = Trainer(
        ModelDef(config_of(tiny_policy)),
        OptimizerConfig(peak_lr=1e-2, end_lr=1e-4, warmup_steps=10, decay_steps=STEPS, weight_decay=0.0).create(),
        ema_decay=None,
        seed=0,
        mesh=MeshConfig(fsdp=2, tensor=2).create(),
        rules=ShardingRules(),
        dataset_names=("one", "two"),
    )
    state, placed, found = trainer.init(), put_batch(tiny_batch, trainer.mesh), []
    for _ in range(STEPS):
        state, metrics = trainer.train_step(state, placed)
        found.append({k: float(v) for k, v in metrics.items()})
    for part in ("student_loss", "teacher_loss", "imitation_loss"):
        assert found[-1][f"loss/{part}"] < 0.1 * found[0][f"loss/{part}"] + 0.02, part
    assert found[-1]["loss/feature_loss"] < 0.1 * found[0]["loss/feature_loss"]
