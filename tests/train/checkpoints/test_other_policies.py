"""Policies with a memory, parts for each robot, a teacher, or a perception, through a checkpoint to a served policy."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

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
from openpi_like.train.checkpoints.contract import contract_problems
from openpi_like.train.checkpoints.load import load_policy_parts
from openpi_like.train.checkpoints.warm_start import WarmStart, warm_start
from openpi_like.train.optimizer import OptimizerConfig
from openpi_like.train.sharding import MeshConfig
from openpi_like.train.state import ModelDef, Trainable, Trainer
from tests.models.test_policies import PRISMATIC, SKILLS, STUDENT, THINGS
from tests.train.run_files import ORDER, run_config


def common(config: type, policy: Any) -> dict[str, Any]:
    names = {f.name for f in dataclasses.fields(config)} & {f.name for f in dataclasses.fields(policy)}
    return {name: getattr(policy, name) for name in names if name not in ("backbone", "expert")}


def observation(policy: Policy) -> dict[str, Any]:
    images = {c.name: np.full((c.height or 64, c.width or 64, 3), 90, np.uint8) for c in SAWYER.cameras}
    return {"images": images, "state": np.zeros(SAWYER.robot_state_size), "prompt": "press", "seed": 3}


def test_a_memory_is_saved_and_served(policy: Any, contract_of: Any, tmp_path: Path) -> None:
    """Its rows, and how many there are, exactly, in a server that holds bfloat16 too."""
    config = M2VlaConfig(
        **common(M2VlaConfig, policy), backbone=PRISMATIC, queries=4, head_heads=2,
        skills=dataclasses.replace(SKILLS, size=300),
    )  # fmt: skip
    model, contract = ModelDef(config, Trainable(frozen=FROZEN)), contract_of(config)
    assert contract_problems(contract) == []
    mesh, rules = MeshConfig(fsdp=4).create(), ShardingRules()
    optimizer = OptimizerConfig().create(model.maps)
    trainer = Trainer(model, optimizer, ema_decay=0.9, seed=0, mesh=mesh, rules=rules, dataset_names=("sawyer",))
    state = trainer.init()
    rng, kept = np.random.default_rng(0), {"count": np.float32(287)}  # which bfloat16 does not hold
    for name in ("keys", "values"):
        kept[name] = rng.standard_normal(state.params["skills"][name].shape).astype(np.float32)
    placed = jax.tree.map(lambda x, old: jax.device_put(x, old.sharding), kept, state.params["skills"])
    state = dataclasses.replace(
        state, params={**state.params, "skills": placed}, ema={**(state.ema or {}), "skills": placed}
    )
    checkpointer = Checkpointer(tmp_path / "checkpoints", trainable=model.trainable)
    checkpointer.begin(state, source=None)
    saved = {"position": 8, "order": ORDER, "contract": contract, "config": run_config(tmp_path, config)}
    checkpointer.save(dataclasses.replace(state, step=jnp.int32(1)), **saved)
    checkpointer.close()

    abstract = Checkpointer(tmp_path / "checkpoints", trainable=model.trainable)
    again = abstract.restore(trainer.abstract, trainer.shardings, contract=contract)[0]
    abstract.close()
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
