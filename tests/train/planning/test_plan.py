"""Plans: what a step needs, what does not fit, what is refused; and what the compiled step moves between chips."""

import dataclasses
import json
import os
import subprocess
import sys
from typing import Any

import jax
import pytest
from jax.sharding import AbstractMesh, NamedSharding

from openpi_like.batch import ActionTokens
from openpi_like.data.prompts import FastPrompt
from openpi_like.models.pi0 import Pi0Config
from openpi_like.models.pi0_fast import Pi0FastConfig
from openpi_like.partition import ShardingRules
from openpi_like.train.config import TrainConfig
from openpi_like.train.planning.plan import Plan, out_of_memory, plan_sampler, plan_step, replicated_weights
from openpi_like.train.planning.topology import Target, this_machine
from openpi_like.train.sharding import MeshConfig
from openpi_like.train.state import ModelDef
from tests.compile_flags import IN_A_HURRY
from tests.conftest import REPOSITORY
from tests.train.planning.batch_moves import policies

# Programs are compiled once, see `compile_once`.
pytestmark = pytest.mark.usefixtures("compile_once")


# ---- The training step -----------------------------------------------------------------------------------------------


def test_memory_is_that_of_the_parts(config: TrainConfig, step: Plan) -> None:
    shapes = jax.tree.leaves(ModelDef(config.model).shapes)
    assert step.parameters == sum(x.size for x in shapes)
    m = step.memory
    assert m is not None
    # float32, in two parts but for weights that have no even axis; AdamW has two moments and a count or two.
    assert 0.5 * 4 * step.parameters <= m.weights < 0.55 * 4 * step.parameters
    assert m.ema == m.weights
    assert 0 <= m.optimizer - 2 * m.weights <= 16
    image, text = 2 * (16 * 16 * 3 + 1), 8 * 4 + 8
    sample = image + text + 4 * 4 + 4 + 4 * 4 * 4 + 4 * 4 + 8 + 4
    assert m.batch == 8 // 4 * sample
    assert m.arguments == pytest.approx(m.weights + m.optimizer + m.ema + m.batch, abs=64)
    assert m.arguments + m.temporaries <= m.peak < m.arguments + m.temporaries + 2**16  # the state is donated
    assert step.fits


def test_work_and_bounds(step: Plan) -> None:
    assert step.model_flops is not None
    assert step.flops is not None
    assert step.traffic is not None
    # Nothing twice, and nothing on two chips; but for keys and values, the last layer of the prefix is read by nobody,
    # and XLA leaves it out. 2 rows a chip, 16 tokens, width 16, 2 heads of 8, mlp 32.
    unread = 2 * (2 * 2 * 16 * 16 * 16 + 2 * 2 * 16 * 16 * 16 + 3 * 2 * 16 * 16 * 32)
    assert step.flops == pytest.approx(step.model_flops - unread, rel=1e-3)
    r = step.roofline
    assert r is not None
    assert r.compute == step.flops / 1e9
    assert r.memory == step.traffic / 1e9
    assert r.interconnect == pytest.approx(sum(t.nbytes for t in step.collectives) / 1e8)
    assert r.bound == max(r.compute, r.memory, r.interconnect) == getattr(r, r.bound_by)
    assert step.mfu == pytest.approx(step.model_flops / (r.bound * 1e9))
    assert step.samples_per_second == 8 / r.bound
    assert {t.axes for t in step.collectives} <= {("data",), ("fsdp",), ("data", "fsdp")}
    assert any(t.kind == "all-gather" and t.axes == ("fsdp",) for t in step.collectives)


def test_recomputation_is_work_but_not_of_the_model(config: TrainConfig, machine: Target, step: Plan) -> None:
    model = dataclasses.replace(config.model, remat="nothing_saveable")
    again = plan_step(dataclasses.replace(config, model=model), machine)
    assert again.model_flops == step.model_flops
    assert again.flops is not None
    assert step.flops is not None
    assert 1.15 < again.flops / step.flops <= 4 / 3


def test_what_does_not_fit_is_a_result(config: TrainConfig, machine: Target, step: Plan) -> None:
    assert step.memory is not None
    small = plan_step(config, dataclasses.replace(machine, limit=step.memory.peak - 1))
    assert not small.fits
    assert small.problem is not None
    assert small.to_json()["fits"] is False
    json.dumps(small.to_json())


def test_domains_are_joined_by_a_slower_network(config: TrainConfig, machine: Target, step: Plan) -> None:
    """Two hosts of two: `fsdp` stays inside of one, `data` goes over the network."""
    assert machine.chip is not None
    slow = dataclasses.replace(machine.chip, domain=2, network_gbps=0.001)
    apart = plan_step(config, dataclasses.replace(machine, chip=slow))
    seconds = lambda p: {(t.kind, t.axes): t.seconds for t in p.collectives}  # noqa: E731
    before, after = seconds(step), seconds(apart)
    assert before.keys() == after.keys()
    for (kind, axes), value in after.items():
        # Of both axes, two chips of a host share its network.
        factor = {("fsdp",): 1, ("data",): 100, ("data", "fsdp"): 50}[axes]
        assert value == pytest.approx(factor * before[kind, axes])


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (
            "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 87.50G of 15.75G hbm. Exceeded hbm",
            (int(87.5 * 2**30), int(15.75 * 2**30), True),
        ),
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (40.25G) "
            "exceeds available HBM (15.75G).",
            (int(40.25 * 2**30), int(15.75 * 2**30), False),
        ),
        ("INVALID_ARGUMENT: Used 3 of 4 things", None),
        ("INTERNAL: no", None),
    ],
)
def test_the_compiler_says_what_is_needed(message: str, expected: Any) -> None:
    assert out_of_memory(message) == expected


class Refusing:
    """A lowered program that cannot be compiled."""

    def __init__(self, message: str) -> None:
        self.message = message

    def compile(self) -> None:
        raise jax.errors.JaxRuntimeError(self.message)


def test_a_compiler_out_of_memory_is_a_result_and_other_errors_are_errors(
    config: TrainConfig, machine: Target, step: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    message = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 3.00G of 1.00G hbm."
    monkeypatch.setattr(jax.stages.Lowered, "compile", lambda self: Refusing(message).compile())
    refused = plan_step(config, dataclasses.replace(machine, limit=None))
    assert refused.problem == "needs 3.0 GiB a chip, of 1.0"
    assert refused.memory is not None
    assert step.memory is not None
    assert (refused.memory.peak, refused.memory.limit) == (3 * 2**30, 2**30)
    assert refused.memory.weights == step.memory.weights
    # Another machine has more memory than what stands in for it in the compiler.
    assert plan_step(config, dataclasses.replace(machine, limit=4 * 2**30)).fits
    monkeypatch.setattr(jax.stages.Lowered, "compile", lambda self: Refusing("INTERNAL: broken").compile())
    with pytest.raises(jax.errors.JaxRuntimeError, match="broken"):
        plan_step(config, machine)


# ---- Bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mesh", "batch", "said"),
    [
        (MeshConfig(data=3), 8, "data=3, fsdp=1, tensor=1 for 4 devices; expected sizes whose product"),
        (MeshConfig(fsdp=8), 8, "fsdp=8, tensor=1 for 4 devices"),
        (MeshConfig(fsdp=2), 6, "batch_size=6 on a mesh of data=2 x fsdp=2 .*multiple of 4, such as 4 or 8"),
    ],
)
def test_meshes_that_do_not_divide_are_refused(config: TrainConfig, mesh: MeshConfig, batch: int, said: str) -> None:
    changed = dataclasses.replace(config, mesh=mesh, batch_size=batch)
    with pytest.raises(ValueError, match=said):
        plan_step(changed, this_machine())


# ---- Replicated weights ----------------------------------------------------------------------------------------------

RELEASED = {
    "pi0": Pi0Config.released(),
    "insulated": dataclasses.replace(
        Pi0Config.released(pi05=True), prompt_format=FastPrompt(), action_tokens=ActionTokens(max_len=100)
    ),
    "fast": Pi0FastConfig.released(),
}


def placed(policy: Any, data: int, fsdp: int, tensor: int) -> Any:
    """Returns the shapes of a policy's weights on a mesh of chips that are not there."""
    model, mesh = ModelDef(policy), AbstractMesh((data, fsdp, tensor), ("data", "fsdp", "tensor"))
    rules = ShardingRules()

    def place(x: Any, axes: Any) -> Any:
        sharding = NamedSharding(mesh, rules.spec(axes, x.shape, mesh))
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return jax.tree.map(place, model.shapes, model.axes, is_leaf=lambda x: hasattr(x, "shape"))


@pytest.mark.parametrize("name", RELEASED)
def test_no_large_weight_is_replicated_under_fsdp(name: str) -> None:
    for fsdp in (8, 16, 32, 64, 128):
        assert replicated_weights(placed(RELEASED[name], 2, fsdp, 1)) == ()
    # Widths of the image tower, 1,152 and 4,304, are no multiples of 256: a plan names it, and 2 x 128 splits it.
    assert {r.name.split("/")[0] for r in replicated_weights(placed(RELEASED[name], 1, 256, 1))} == {"vision"}


def test_what_is_replicated_is_named() -> None:
    found = replicated_weights(placed(RELEASED["pi0"], 1, 3, 5))
    by_name = {r.name: r for r in found}
    table = by_name["vlm/embedding"]  # 257,152 x 2,048: neither is a multiple of 3 or 5
    assert (table.copies, table.nbytes) == (15, 257_152 * 2048 * 4)
    assert found[0].nbytes == max(r.nbytes for r in found)
    assert all(r.copies in (3, 5, 15) for r in found)
    assert replicated_weights(placed(RELEASED["pi0"], 15, 1, 1)) == ()  # `data` is meant to replicate


# ---- Sampling --------------------------------------------------------------------------------------------------------


def test_the_sampler_is_the_server_s(tiny_policy: Pi0Config, machine: Target) -> None:
    plan = plan_sampler(tiny_policy, machine, batch=3)
    assert plan.memory is not None
    assert plan.memory.frozen == 2 * sum(x.size for x in jax.tree.leaves(ModelDef(tiny_policy).shapes))
    assert plan.flops is not None
    one = plan_sampler(dataclasses.replace(tiny_policy, sample_steps=1), machine, batch=3)
    assert one.flops is not None
    assert plan.flops - one.flops > 0  # nine Euler steps more
    assert (plan.collectives, plan.endless) == ((), ())


def test_a_sampler_that_writes_is_taken_to_write_all_it_may(machine: Target) -> None:
    policy = dataclasses.replace(policies()["fast"], remat=None)
    plan = plan_sampler(policy, machine, batch=1)
    assert (plan.rounds, len(plan.endless)) == (5, 1)
    c: Any = policy.backbone.language
    # A token: each matrix of both layers, two products with 31 + 4 + 3 + 5 keys, and its scores among 64 tokens.
    matrices = c.depth * (2 * c.width * c.num_heads * c.head_dim + 2 * c.width * c.head_dim + 3 * c.width * c.mlp_dim)
    keys = 3 * 9 + 4 + 3 + 5 + 1
    token = 2 * matrices + c.depth * 2 * 2 * keys * c.num_heads * c.head_dim + 2 * c.width * 64
    shorter = dataclasses.replace(policy, action_tokens=ActionTokens(max_len=4, count=64, skip=0))
    fewer = plan_sampler(shorter, machine, batch=1)
    assert plan.flops is not None
    assert fewer.flops is not None
    # Keys of a shorter cache are fewer too, by one in each round.
    assert plan.flops - fewer.flops == pytest.approx(token + 4 * c.depth * 2 * 2 * c.num_heads * c.head_dim, rel=0.05)


# ---- The compiled step -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_no_collective_moves_rows_of_the_batch() -> None:
    """Nothing of the global batch leaves its chip, in training or validation, but for what `batch_moves.moves` lets
    through: token ids, rows that were looked up for others, and over `tensor` sums of a chip's own rows."""
    meshes = ["2x4x1", "2x2x2"]
    flags = f"--xla_force_host_platform_device_count=8 {IN_A_HURRY}"
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    command = [sys.executable, "tests/train/planning/batch_moves.py", *meshes]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line for line in lines if "moves rows" in line] == []
    read = {line.partition(":")[0]: int(line.split()[-2]) for line in lines}
    programs = [(mesh, "step") for mesh in meshes] + [(meshes[0], "losses"), (meshes[0], "chunks")]
    assert set(read) == {f"{policy}, {mesh}, {what}" for policy in policies() for mesh, what in programs}
    assert min(n for name, n in read.items() if name.endswith("step")) > 20  # it has read them
