"""Policies with a memory, parts for each robot, a teacher, or a perception, through a checkpoint to a served policy."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from openpi_like.models.ddim import Ddim
from openpi_like.models.dexvla import DexVlaConfig
from openpi_like.models.dima import LEFT_BEHIND, DimaConfig, DimaStudentConfig
from openpi_like.models.m2vla import FROZEN, M2VlaConfig
from openpi_like.models.scale_dp import ScaleDpConfig
from openpi_like.models.scene_perception import PerceptionConfig
from openpi_like.models.weights import WeightsError, flatten, unflatten
from openpi_like.partition import ShardingRules
from openpi_like.robots.entities import Entities
from openpi_like.robots.sawyer import SAWYER
from openpi_like.serve.observation import ObservationError
from openpi_like.serve.policy import Policy
from openpi_like.train.checkpoints.checkpoint import Checkpointer, save_policy
from openpi_like.train.checkpoints.contract import CheckpointError, contract_problems
from openpi_like.train.checkpoints.load import load_policy_parts
from openpi_like.train.checkpoints.verify import verify_run
from openpi_like.train.checkpoints.warm_start import WarmStart, warm_start
from openpi_like.train.optimizer import OptimizerConfig
from openpi_like.train.sharding import MeshConfig, put_batch
from openpi_like.train.state import ModelDef, Trainable, Trainer, TrainState
from tests.models.test_policies import PRISMATIC, SKILLS, STUDENT, THINGS
from tests.train.run_files import ORDER, run_config

ADAMW = OptimizerConfig(peak_lr=1e-2, warmup_steps=1, decay_steps=100)


def common(config: type, policy: Any) -> dict[str, Any]:
    names = {f.name for f in dataclasses.fields(config)} & {f.name for f in dataclasses.fields(policy)}
    return {name: getattr(policy, name) for name in names if name not in ("backbone", "expert")}


def observation(policy: Policy) -> dict[str, Any]:
    images = {c.name: np.full((c.height or 64, c.width or 64, 3), 90, np.uint8) for c in SAWYER.cameras}
    return {"images": images, "state": np.zeros(SAWYER.robot_state_size), "prompt": "press", "seed": 3}


@pytest.fixture(scope="module")
def remembering(policy: Any) -> Trainer:
    """Of an M2-VLA whose backbone is frozen, on four devices; half of the batches are written."""
    config = M2VlaConfig(
        **common(M2VlaConfig, policy), backbone=PRISMATIC, queries=4, head_heads=2,
        skills=dataclasses.replace(SKILLS, size=300),
    )  # fmt: skip
    model = ModelDef(config, Trainable(frozen=FROZEN))
    return Trainer(
        model, ADAMW.create(model.maps), ema_decay=0.9, seed=0, mesh=MeshConfig(fsdp=4).create(),
        rules=ShardingRules(), dataset_names=("sawyer",),
    )  # fmt: skip


def drawn(config: Any, step: int) -> dict[str, Any]:
    """A batch of eight samples, the next ones at every step."""
    rng = np.random.default_rng(step)

    def draw(x: jax.ShapeDtypeStruct) -> np.ndarray:
        if x.dtype == bool:
            return np.ones(x.shape, bool)
        if np.issubdtype(x.dtype, np.floating):
            return rng.standard_normal(x.shape, np.float32)
        return rng.integers(4, 200, x.shape).astype(x.dtype)

    position = np.stack([np.zeros(8), 8 * step + np.arange(8)], axis=1).astype(np.uint32)
    shapes = jax.tree.map(draw, config.batch_shapes(8))
    return {**shapes, "dataset_id": np.zeros(8, np.int32), "position": position}


def test_a_run_with_a_memory_goes_on_exactly(remembering: Trainer, contract_of: Any, tmp_path: Path) -> None:
    """Three steps, a checkpoint and three more are six, bit for bit; validation and sampling write nothing."""
    trainer, config = remembering, remembering.model.config

    def trained(state: TrainState, steps: range) -> tuple[TrainState, list[float]]:
        counts = []
        for step in steps:
            state, _ = trainer.train_step(state, put_batch(drawn(config, step), trainer.mesh))
            counts.append(float(state.params["skills"]["count"]))
        return state, counts

    contract = contract_of(config)
    checkpointer = Checkpointer(tmp_path / "checkpoints", trainable=trainer.model.trainable)
    state = trainer.init()
    checkpointer.begin(state)
    state, counts = trained(state, range(3))
    checkpointer.save(state, position=24, order=ORDER, contract=contract, config=ADAMW)
    checkpointer.close()
    whole, more = trained(state, range(3, 6))
    assert (counts, more) == ([0, 8, 16], [16, 24, 24])  # of both parts, some batches were written and some were not

    checkpointer = Checkpointer(tmp_path / "checkpoints", trainable=trainer.model.trainable)
    restored, position, _ = checkpointer.restore(trainer.abstract, trainer.shardings, contract=contract)
    checkpointer.close()
    assert position == 24
    resumed, again = trained(restored, range(3, 6))
    assert again == more
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(resumed), jax.device_get(whole))

    # A quarter of the rows on each device.
    rows = {"keys": (75, 32), "values": (75, config.action_horizon * config.action_dim)}
    for name, shape in rows.items():
        x = resumed.params["skills"][name]
        assert [shard.data.shape for shard in x.addressable_shards] == [shape] * 4
        assert sorted(shard.index[0].start for shard in x.addressable_shards) == [0, 75, 150, 225]

    model, kept = trainer.model.bind(resumed.weights()), jax.device_get(resumed.params["skills"])
    batch = put_batch(drawn(config, 6), trainer.mesh)
    with trainer.tracing():  # nnx.jit hands back what a call has changed of its module
        loss = nnx.jit(lambda model, batch: model.validation_losses(jax.random.key(0), batch)["loss"])(model, batch)
        observation = config.observation(batch)
        actions = nnx.jit(lambda model, o: model.sample_actions(jax.random.key(0), o))(model, observation)
    assert np.isfinite(loss)
    assert np.isfinite(np.asarray(actions)).all()
    for name, x in kept.items():
        np.testing.assert_array_equal(getattr(model.skills, name)[...], x)


def test_a_memory_is_saved_and_served(remembering: Trainer, contract_of: Any, tmp_path: Path) -> None:
    """Its rows, and how many there are, exactly, in a server that holds bfloat16 too. The average has none."""
    trainer, model, config = remembering, remembering.model, remembering.model.config
    contract = contract_of(config)
    assert contract_problems(contract) == []
    state = trainer.init()
    rng, kept = np.random.default_rng(0), {"count": np.float32(287)}  # which bfloat16 does not hold
    for name in ("keys", "values"):
        kept[name] = rng.standard_normal(state.params["skills"][name].shape).astype(np.float32)
    placed = jax.tree.map(lambda x, old: jax.device_put(x, old.sharding), kept, state.params["skills"])
    state = dataclasses.replace(state, params={**state.params, "skills": placed})
    assert "skills/keys" in flatten(state.params)
    for part in (state.ema, state.opt_state):
        assert not [path for path, _ in jax.tree.leaves_with_path(part) if "skills" in jax.tree_util.keystr(path)]
    checkpointer = Checkpointer(tmp_path / "checkpoints", trainable=model.trainable)
    checkpointer.begin(state, source=None)
    run = run_config(tmp_path, config, trainable=model.trainable, optimizer=ADAMW)
    saved = {"position": 8, "order": ORDER, "contract": contract, "config": run}
    checkpointer.save(dataclasses.replace(state, step=jnp.int32(1)), **saved)
    checkpointer.close()

    (report,) = verify_run(tmp_path)
    assert (report.problems, report.notes) == ([], [])
    checkpointer = Checkpointer(tmp_path / "checkpoints", trainable=model.trainable)
    again = checkpointer.restore(trainer.abstract, trainer.shardings, contract=contract)[0]
    for name, x in kept.items():
        np.testing.assert_array_equal(again.params["skills"][name], x)
        assert again.params["skills"][name].sharding == placed[name].sharding
    for dtype in (None, "bfloat16"):
        parts = load_policy_parts(tmp_path, dtype=dtype)
        count = parts.model.skills.count[...]
        assert (count.shape, count.dtype, int(count)) == ((), jnp.float32, 287)
        served = Policy(parts)
        actions = served.infer(observation(served))["actions"]
        assert np.isfinite(actions).all()
        np.testing.assert_array_equal(served.infer(observation(served))["actions"], actions)  # it only reads

    # As runs were saved while the optimiser and the average had it: no run goes on from there, but one may begin.
    before = dataclasses.replace(
        state,
        step=jnp.int32(2),
        ema={**(state.ema or {}), "skills": placed},
        opt_state=trainer.optimizer.init(state.params),
    )
    checkpointer.save(before, **saved)
    checkpointer.wait()
    with pytest.raises(CheckpointError, match="its optimiser or its average is of another kind, train into another"):
        checkpointer.restore(trainer.abstract, trainer.shardings, contract=contract)
    checkpointer.close()
    weights = flatten(warm_start(WarmStart(str(tmp_path)), trainer)[0])
    for name, x in kept.items():
        np.testing.assert_array_equal(weights[f"skills/{name}"], x)


def test_a_robot_acts_by_its_own_maps_after_a_thought(policy: Any, contract_of: Any, tmp_path: Path) -> None:
    own: dict[str, Any] = {"backbone": PRISMATIC, "expert": ScaleDpConfig(width=16, depth=2, heads=2, combined=16)}
    own |= {"robots": ("other", "sawyer"), "thought_len": 4, "diffusion": Ddim(20, 4)}
    config = DexVlaConfig(**{**common(DexVlaConfig, policy), **own})
    contract = contract_of(config)
    assert contract_problems(contract) == []
    assert "no parts for it" in contract_problems(contract_of(dataclasses.replace(config, robots=("other",))))[0]
    rng = np.random.default_rng(0)
    shapes = flatten(ModelDef(config).shapes)
    weights = {name: 0.2 * rng.standard_normal(x.shape).astype(np.float32) for name, x in shapes.items()}
    actions, thoughts = [], []
    for i, changed in enumerate(("none", "other", "sawyer")):
        mine = {name: x.copy() for name, x in weights.items()}
        if changed != "none":
            mine["expert/action_out"][config.robots.index(changed)] += 1
        save_policy(tmp_path / str(i), unflatten(mine), contract=contract, origin="a test")
        served = Policy(load_policy_parts(tmp_path / str(i)))
        (reply,) = served.sample([served.prepare(observation(served))])
        assert not isinstance(reply, Exception)
        actions.append(reply.actions)
        thoughts.append(reply.thought.text if reply.thought else None)
    np.testing.assert_array_equal(actions[1], actions[0])
    assert np.abs(actions[2] - actions[0]).max() > 1e-3
    assert thoughts[0] is not None
    assert thoughts == [thoughts[0]] * 3
    with pytest.raises(ValueError, match=r"temperature=0.5, expected .* for others; this is a DexVla"):
        Policy(load_policy_parts(tmp_path / "0"), dataclasses.replace(served.options, temperature=0.5))
    kept = Policy(load_policy_parts(tmp_path / "0"), dataclasses.replace(served.options, think_every=3))
    assert kept.metadata()["think_every"] == 3


def test_a_student_is_served_without_its_teacher(policy: Any, contract_of: Any, tmp_path: Path) -> None:
    own: dict[str, Any] = {"backbone": PRISMATIC, "student": STUDENT}
    both = DimaConfig(**common(DimaConfig, policy), **own, teacher_width=16)
    alone = DimaStudentConfig(**common(DimaStudentConfig, policy), **own)
    rng = np.random.default_rng(0)
    shapes = flatten(ModelDef(both).shapes)
    weights = {name: 0.2 * rng.standard_normal(x.shape).astype(np.float32) for name, x in shapes.items()}
    save_policy(tmp_path / "both", unflatten(weights), contract=contract_of(both), origin="a test")

    def started(config: Any, drop: tuple[str, ...], name: str) -> Path:
        """As a run of no steps does."""
        trainer = Trainer(
            ModelDef(config), OptimizerConfig().create(), ema_decay=None, seed=0, mesh=MeshConfig(fsdp=2).create(),
            rules=ShardingRules(), dataset_names=("sawyer",),
        )  # fmt: skip
        params, plan = warm_start(WarmStart(str(tmp_path / "both"), drop=drop), trainer)
        assert all(row["from"] == "checkpoint" for row in plan.report)
        save_policy(tmp_path / name, jax.device_get(params), contract=contract_of(config), origin="a test")
        return tmp_path / name

    student = started(alone, LEFT_BEHIND, "student")
    teacher = started(dataclasses.replace(both, acts_as="teacher"), (), "teacher")
    served = [Policy(load_policy_parts(run)) for run in (tmp_path / "both", student, teacher)]
    actions = [policy.infer(observation(policy))["actions"] for policy in served]
    np.testing.assert_allclose(actions[1], actions[0], atol=1e-6)
    assert np.abs(actions[2] - actions[0]).max() > 1e-3
    with pytest.raises(WeightsError, match=r"(?s)vlm/embedding: not used.*warm_start\.drop"):
        started(alone, ("^teacher/",), "none")


def test_who_sees_for_itself_is_not_told(policy: Any, contract_of: Any, tmp_path: Path) -> None:
    things = tuple(Entities(e.name, f"observation/{e.name}", e.count, e.size) for e in THINGS)
    own: dict[str, Any] = {"backbone": PRISMATIC, "student": STUDENT, "entities": THINGS}
    told = DimaStudentConfig(**common(DimaStudentConfig, policy) | own)
    given = {"agents": np.ones((2, 4), np.float32), "map": np.zeros((0, 5), np.float32)}
    for config in (told, dataclasses.replace(told, perception=PerceptionConfig(decoder=STUDENT))):
        contract = dataclasses.replace(contract_of(config), robots=(dataclasses.replace(SAWYER, entities=things),))
        assert contract_problems(contract) == []
        rng, shapes = np.random.default_rng(0), flatten(ModelDef(config).shapes)
        weights = {name: 0.2 * rng.standard_normal(x.shape).astype(np.float32) for name, x in shapes.items()}
        run = tmp_path / str(config.perception is None)
        save_policy(run, unflatten(weights), contract=contract, origin="a test")
        served = Policy(load_policy_parts(run))
        asks, plain = served.metadata()["robots"]["sawyer"]["entities"], observation(served)
        needed, refused = (
            (plain | {"entities": given}, plain) if config is told else (plain, plain | {"entities": given})
        )
        assert asks == ({"agents": [3, 4], "map": [2, 5]} if config is told else {})
        assert np.isfinite(served.infer(needed)["actions"]).all()
        with pytest.raises(ObservationError, match=r"entities"):
            served.infer(refused)
