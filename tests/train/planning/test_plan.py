"""Plans: what a step needs, what does not fit, what is refused; and what the compiled step moves between chips."""

import dataclasses
import importlib.util
import io
import json
import os
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import pytest
from jax.sharding import AbstractMesh, NamedSharding
from rich.console import Console

from openpi_like.batch import ActionTokens
from openpi_like.config import load_run
from openpi_like.data.prompts import FastPrompt
from openpi_like.models.pi0 import Pi0Config
from openpi_like.models.pi0_fast import Pi0FastConfig
from openpi_like.partition import ShardingRules
from openpi_like.train.config import TrainConfig
from openpi_like.train.planning.chips import Chip
from openpi_like.train.planning.plan import (
    Memory,
    Plan,
    Roofline,
    out_of_memory,
    plan_sampler,
    plan_step,
    replicated_weights,
)
from openpi_like.train.planning.search import candidates, search, suggestions
from openpi_like.train.planning.topology import Target, TopologyError, find_target, this_machine
from openpi_like.train.sharding import MeshConfig
from openpi_like.train.state import ModelDef
from tests.train.planning.batch_moves import policies

ROOT = Path(__file__).resolve().parents[3]
CHIP = Chip("toy", ("Toy",), tflops=0.001, memory_gib=1.0, memory_gbps=1.0, link_gbps=0.1)
needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: pip install -e '.[plan]'"
)


@pytest.fixture(scope="module")
def config(tiny_policy: Pi0Config) -> TrainConfig:
    """A run of the smallest pi0 on four chips; its data are not there."""
    run = load_run(ROOT / "configs" / "demo_compare_flow.py")
    # Not as a loop, which computes what the last layer's tokens would need, though nobody reads them.
    model = dataclasses.replace(tiny_policy, unroll=True)
    return dataclasses.replace(run, model=model, batch_size=8, mesh=MeshConfig(data=2, fsdp=2))


@pytest.fixture(scope="module")
def machine() -> Target:
    """The four devices of the tests, as chips with peaks."""
    return dataclasses.replace(this_machine(), chip=CHIP, limit=2**30)


@pytest.fixture(scope="module", autouse=True)
def compile_once() -> Iterator[None]:
    """Programs are compiled once, for whatever machine they are planned; nobody runs them."""
    compile, made = jax.stages.Lowered.compile, dict[str, Any]()

    def cached(lowered: Any) -> Any:
        text = lowered.as_text()
        if text not in made:
            try:  # three times faster
                made[text] = compile(lowered, compiler_options={"xla_cpu_use_fusion_emitters": False})
            except jax.errors.JaxRuntimeError:  # a version without this choice
                made[text] = compile(lowered)
        return made[text]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax.stages.Lowered, "compile", cached)
        yield


@pytest.fixture(scope="module")
def step(config: TrainConfig, machine: Target, compile_once: None) -> Plan:
    return plan_step(config, machine)


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
    slow = dataclasses.replace(CHIP, domain=2, network_gbps=0.001)
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


@pytest.mark.parametrize(
    ("topology", "said"),
    [
        ("v5f:4x4", "no chip 'v5f'; did you mean 'v5p', 'v5e'"),
        ("v5e:4x5", "there is no such slice; did you mean"),
        ("v5e:32x32", "there is no such slice"),
        ("v5e", "expected v5e:4x4 or the like"),
        ("v5p:4x4", "expected 3 axes and at most 6,144 chips, such as v5p:2x2x4"),
        ("v5p:64x64x64", "at most 6,144 chips"),
        ("h100:6", "expected 1, 2 or a multiple of 4 GPUs"),
        ("h100:4x4", "expected the number of GPUs, h100:8"),
        ("rtx4090:16", "expected at most 8"),
        ("cpu:8", "no chip 'cpu'"),
    ],
)
def test_machines_that_do_not_exist_are_refused(topology: str, said: str) -> None:
    with pytest.raises(TopologyError, match=said):
        find_target(topology)


def test_without_libtpu_nothing_is_planned_for_tpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(TopologyError, match=r"needs libtpu to compile for; pip install -e '\.\[plan\]'"):
        find_target("v5e:4x4")


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
    c = policy.vlm
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


# ---- Advice and search -----------------------------------------------------------------------------------------------


def plan_of(memory: Memory, *, problem: str | None, remat: str | None, mesh: tuple[int, int, int]) -> Plan:
    sizes = dict(zip(("data", "fsdp", "tensor"), mesh, strict=True))
    return Plan("training step", "toy", "toy", sizes, 8, remat=remat, memory=memory, problem=problem)


def test_advice_is_for_what_takes_the_memory(config: TrainConfig, machine: Target) -> None:
    full = Memory(
        weights=200, frozen=0, optimizer=400, ema=200, batch=1, arguments=801, temporaries=400, peak=1201, limit=1000
    )
    plan = plan_of(full, problem="too large", remat=None, mesh=(4, 1, 1))
    advice = "\n".join(suggestions(config, plan, machine))
    for said in (
        "mesh.data=1 mesh.fsdp=4",
        "model.remat=nothing_saveable",
        "accumulate=2",
        "ema_decay=None",
        "8 chips",
    ):
        assert said in advice
    least = plan_of(full, problem="too large", remat="nothing_saveable", mesh=(1, 4, 1))
    advice = "\n".join(suggestions(config, least, machine))
    assert "mesh." not in advice
    assert "remat" not in advice
    roomy = Memory(
        weights=20, frozen=0, optimizer=40, ema=20, batch=1, arguments=81, temporaries=100, peak=181, limit=1000
    )
    (only,) = suggestions(config, plan_of(roomy, problem=None, remat="nothing_saveable", mesh=(1, 4, 1)), machine)
    assert only.startswith("model.remat=dots_saveable")


def test_candidates_divide_and_hold_the_state(config: TrainConfig, machine: Target, step: Plan) -> None:
    every = candidates(config, machine)
    meshes = {(c.config.mesh.data, c.config.mesh.fsdp, c.config.mesh.tensor) for c in every}
    assert meshes == {(4, 1, 1), (2, 2, 1), (1, 4, 1), (2, 1, 2), (1, 2, 2), (1, 1, 4)}
    assert step.memory is not None
    tight = dataclasses.replace(machine, limit=int(4 * step.memory.weights / 0.94))  # the state in two parts
    assert {c.config.mesh.data for c in candidates(config, tight)} <= {1, 2}
    assert len(candidates(config, tight)) < len(every)


def test_search_compiles_few_and_puts_the_fastest_that_fits_first(
    config: TrainConfig, machine: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a compiler of our own: whatever has no remat does not fit, and tensor parallel steps are slowest."""

    def compiled(changed: TrainConfig, target: Target) -> Plan:
        memory = Memory(1, 0, 2, 1, 1, 5, 2**40 if changed.model.remat is None else 10, 20, 2**30)
        made = plan_of(
            memory,
            problem="needs more" if changed.model.remat is None else None,
            remat=changed.model.remat,
            mesh=(changed.mesh.data, changed.mesh.fsdp, changed.mesh.tensor),
        )
        return dataclasses.replace(made, roofline=Roofline(float(changed.mesh.tensor), 0.5, 1 / changed.mesh.data))

    monkeypatch.setattr("openpi_like.train.planning.search.plan_step", compiled)
    seen: list[Plan] = []
    found = search(config, machine, compiles=4, done=seen.append)
    assert len(seen) == len(found) == 4
    plans = [plan for _, plan in found]
    assert plans[0].fits
    assert plans[0].roofline is not None
    assert plans[0].roofline.bound == min(p.roofline.bound for p in plans if p.fits and p.roofline)
    assert [p.fits for p in plans] == sorted((p.fits for p in plans), reverse=True)
    # Once that did not fit without remat, no other mesh is tried so: temporaries alone are too many.
    assert [p.fits for p in seen] == [False, True, True, True]
    chosen, best = found[0]
    assert chosen.model.remat == best.remat


# ---- The program -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def program() -> SimpleNamespace:
    return SimpleNamespace(**runpy.run_path(str(ROOT / "train" / "plan.py")))


def run(program: SimpleNamespace, *arguments: Any, **options: Any) -> tuple[int, str]:
    console = Console(record=True, width=120, file=io.StringIO())
    args = program.Args(ROOT / "configs" / "demo_compare_flow.py", tuple(arguments), **options)
    code = program.main(args, console)
    return code, console.export_text()


def test_the_program_says_whether_it_fits(
    program: SimpleNamespace, config: TrainConfig, step: Plan, machine: Target, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr("openpi_like.config.load_run", lambda path: config)
    monkeypatch.setattr("openpi_like.train.planning.topology.find_target", lambda topology, slices: machine)
    code, text = run(program, sampler=(1,), json=tmp_path / "plan.json", samples=1000)
    assert code == 0
    assert "mesh data 2 x fsdp 2 x tensor 1, batch 8" in text
    assert f"{step.parameters:,} parameters" in text
    assert "all-gather over fsdp" in text
    assert "MFU at most" in text
    assert "1,000 samples take at least" in text
    train, sample = json.loads((tmp_path / "plan.json").read_text())
    assert (train["what"], train["flops"], sample["what"]) == ("training step", step.flops, "sampler")
    assert step.memory is not None
    small = dataclasses.replace(machine, limit=step.memory.peak - 1)
    monkeypatch.setattr("openpi_like.train.planning.topology.find_target", lambda topology, slices: small)
    code, text = run(program, sampler=())
    assert code == 1
    assert "it does not fit: needs" in text
    assert "try " in text


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere.py"], "no config file nowhere.py"),
        (["configs/demo_compare_flow.py", "batchsize=8"], "'batchsize': TrainConfig has no field 'batchsize'; did you"),
        (["configs/demo_compare_flow.py", "--topology", "v5e:7x7"], "there is no such slice"),
        (["configs/demo_compare_flow.py", "--search", "3"], "needs published peaks"),
    ],
)
def test_bad_input_is_one_line_and_code_2(arguments: list[str], said: str) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}
    done = subprocess.run(
        [sys.executable, "train/plan.py", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr


@needs_libtpu
def test_meshes_lie_on_tori_and_slices() -> None:
    """`fsdp` over 64 of 4 x 4 x 8 chips takes a part of an axis of the torus; `data` goes over slices."""
    program = (
        "import runpy; runpy.run_path('train/plan.py')['prepare_environment']()\n"
        "from openpi_like.train.planning.topology import find_target\n"
        "from openpi_like.train.sharding import MeshConfig\n"
        "print(dict(MeshConfig(fsdp=64).create(find_target('v5p:4x4x8').devices).shape))\n"
        "two = find_target('v5e:2x2', slices=2).devices\n"
        "mesh = MeshConfig(fsdp=2, tensor=2, slices=2).create(two)\n"
        "print([{d.slice_index for d in row.ravel()} for row in mesh.devices])\n"
        "try: MeshConfig(data=1, fsdp=8).create(two)\n"
        "except ValueError as e: print(e)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "{'data': 2, 'fsdp': 64, 'tensor': 1}",
        "[{0}, {1}]",
        "mesh: slices=1, expected 2: so many slices these devices are of",
    ]


@needs_libtpu
@pytest.mark.slow
def test_a_tpu_that_is_not_there(tmp_path: Path) -> None:
    """The whole program, with the TPU compiler: a policy of two layers on two slices of four chips."""
    (tmp_path / "run.py").write_text(
        "import dataclasses\n"
        "from openpi_like.config import load_run\n"
        "from openpi_like.train.sharding import MeshConfig\n"
        "from tests.train.planning.batch_moves import policies\n"
        f"base = load_run({str(ROOT / 'configs' / 'demo_compare_flow.py')!r})\n"
        "config = dataclasses.replace(base, model=policies()['pi0'], mesh=MeshConfig(fsdp=4))\n"
    )
    command = [sys.executable, "train/plan.py", str(tmp_path / "run.py"), "--topology", "v5e:2x2", "--slices", "2"]
    command += ["--sampler", "--json", str(tmp_path / "plan.json")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    (plan,) = json.loads((tmp_path / "plan.json").read_text())
    assert (plan["target"], plan["mesh"]) == ("2 x v5e:2x2", {"data": 2, "fsdp": 4, "tensor": 1})
    assert 1 < plan["flops"] / plan["model_flops"] < 1.6  # what is computed again, and so small matrices are padded
    assert 0 < plan["mfu"] < 1
    seconds = {tuple(t["axes"]): t["nbytes"] / t["seconds"] for t in plan["collectives"]}
    assert seconds["fsdp",] == pytest.approx(100e9)  # the links of a slice
    assert all(
        rate == pytest.approx(3.125e9 * (4 if "fsdp" in axes else 1))
        for axes, rate in seconds.items()
        if "data" in axes
    )


# ---- The compiled step -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_no_collective_moves_rows_of_the_batch() -> None:
    """Nothing of the global batch leaves its chip, in training or validation, but for what `batch_moves.moves` lets
    through: token ids, rows that were looked up for others, and over `tensor` sums of a chip's own rows."""
    meshes = ["1x8x1", "2x4x1", "2x2x2"]
    flags = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    command = [sys.executable, "tests/train/planning/batch_moves.py", *meshes]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line for line in lines if "moves rows" in line] == []
    read = {line.partition(":")[0]: int(line.split()[-2]) for line in lines}
    programs = [(mesh, "step") for mesh in meshes] + [(meshes[0], "losses"), (meshes[0], "chunks")]
    assert set(read) == {f"{policy}, {mesh}, {what}" for policy in policies() for mesh, what in programs}
    assert min(n for name, n in read.items() if name.endswith("step")) > 20  # it has read them
