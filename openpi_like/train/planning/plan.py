"""What a run would need and how fast it could be, from its compiled program; no array is allocated and no data read."""

import dataclasses
import math
import re
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from openpi_like.models.sampling import for_sampling
from openpi_like.partition import replication
from openpi_like.train.planning.chips import Chip
from openpi_like.train.planning.flops import model_flops
from openpi_like.train.planning.hlo_cost import Collective, read_program
from openpi_like.train.planning.topology import GIB, Target
from openpi_like.train.sharding import MeshConfig, batch_sharding, check_batch, replicated
from openpi_like.train.state import Trainer

MIB = 2**20


# ---- Results ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one chip.

    weights: those that are trained. temporaries: activations, gathered weights, gradients. arguments: all that is
    given to the program, with what the compiler pads it by. limit: what a program may take, None where it is not known.
    """

    weights: int
    frozen: int
    optimizer: int
    ema: int
    batch: int
    arguments: int
    temporaries: int
    peak: int
    limit: int | None


@dataclasses.dataclass(frozen=True)
class Replicated:
    """A weight that lies whole, or in larger parts, on chips that are meant to split it.

    copies: chips with the same part. nbytes: of that part, the weight alone; its moments and average come on top.
    """

    name: str
    shape: tuple[int, ...]
    copies: int
    nbytes: int


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Collectives of one kind over the same mesh axes: bytes that one chip receives, executions, and seconds."""

    kind: str
    axes: tuple[str, ...]
    nbytes: float
    times: float
    seconds: float | None


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Seconds that one chip needs at its published peaks, by what would bound it, were all else free.

    The bound on the time of a step is the largest of the three: as if all overlapped.
    """

    compute: float
    memory: float
    interconnect: float

    @property
    def bound(self) -> float:
        return max(self.compute, self.memory, self.interconnect)

    @property
    def bound_by(self) -> str:
        return max(("compute", "memory", "interconnect"), key=lambda name: getattr(self, name))


@dataclasses.dataclass(frozen=True)
class Plan:
    """One compiled program on one machine.

    parameters: weights of the policy, all chips together. attention: what computes it.
    problem: why it does not fit, None where it does.
    model_flops, flops: of one chip, without and with what is computed again or on several chips alike.
    traffic, host: bytes between a chip and its memory, and that of the host. unknown: kernels that say nothing about
    their FLOPs and are not in them. endless: loops that end on what they compute, taken as if they ran `rounds` times.
    """

    what: str
    target: str
    chip: str | None
    mesh: dict[str, int]
    batch: int
    remat: str | None = None
    accumulate: int = 1
    attention: str = "einsum"
    parameters: int = 0
    compile_seconds: float = 0.0
    memory: Memory | None = None
    problem: str | None = None
    replicated: tuple[Replicated, ...] = ()
    model_flops: float | None = None
    flops: float | None = None
    traffic: float | None = None
    host: float = 0.0
    collectives: tuple[Traffic, ...] = ()
    largest: tuple[str, ...] = ()
    roofline: Roofline | None = None
    mfu: float | None = None
    unknown: tuple[str, ...] = ()
    endless: tuple[str, ...] = ()
    rounds: int = 1

    @property
    def fits(self) -> bool:
        return self.problem is None

    @property
    def samples_per_second(self) -> float | None:
        """Samples of all chips, at most."""
        return None if self.roofline is None else self.batch / self.roofline.bound

    def to_json(self) -> dict[str, Any]:
        """Returns the plan as JSON-ready data."""
        bound = {} if self.roofline is None else {"bound": self.roofline.bound, "bound_by": self.roofline.bound_by}
        samples = self.samples_per_second
        return dataclasses.asdict(self) | {"fits": self.fits, "samples_per_second": samples, **bound}


# ---- The training step -----------------------------------------------------------------------------------------------


def _placed(shapes: Any, shardings: Any) -> Any:
    """Returns shapes with where they lie. shardings: a tree, or one for all."""
    if isinstance(shardings, jax.sharding.Sharding):
        return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=shardings), shapes)
    return jax.tree.map(lambda s, at: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=at), shapes, shardings)


def bytes_per_chip(tree: Any) -> int:
    """Returns the bytes that one chip holds of arrays with shardings, without padding."""
    return sum(_nbytes(x, x.sharding.shard_shape(x.shape)) for x in jax.tree.leaves(tree))


def _nbytes(x: Any, shape: tuple[int, ...]) -> int:
    bits = jnp.iinfo(x.dtype).bits if jnp.issubdtype(x.dtype, jnp.integer) else 8 * x.dtype.itemsize  # int4 is 4
    return math.prod(shape) * bits // 8


def state_bytes(state: Any) -> dict[str, int]:
    """Returns the bytes of a training state on one chip, by part. state: shapes with shardings."""
    return {
        "weights": bytes_per_chip(state.params),
        "frozen": bytes_per_chip(state.frozen),
        "optimizer": bytes_per_chip(state.opt_state),
        "ema": 0 if state.ema is None else bytes_per_chip(state.ema),
    }


def abstract_state(trainer: Trainer) -> Any:
    """Returns the shapes of a trainer's state, with their shardings."""
    return _placed(trainer.abstract, trainer.shardings)


def replicated_weights(params: Any, least: int = MIB) -> tuple[Replicated, ...]:
    """Returns the weights of more than `least` bytes that are not split over all of `fsdp` and `tensor`.

    params: shapes with shardings.
    """
    found = []
    for path, x in jax.tree.flatten_with_path(params)[0]:
        name, copies = jax.tree_util.keystr(path, simple=True, separator="/"), replication(x.sharding)
        if copies > 1 and _nbytes(x, x.shape) > least:
            found.append(Replicated(name, tuple(x.shape), copies, _nbytes(x, x.sharding.shard_shape(x.shape))))
    return tuple(sorted(found, key=lambda r: -r.nbytes))


def plan_step(config: Any, target: Target) -> Plan:
    """Compiles the training step of a run, its attention as an einsum where that is to be measured.

    Raises:
        ValueError: the run cannot be split over these chips, see `MeshConfig.create` and `check_batch`.
    """
    mesh = config.mesh.create(target.devices)
    check_batch(config.batch_size, config.accumulate, mesh)
    check_batch(config.validation_batch_size, 1, mesh, name="validation_batch_size")
    trainer = config.trainer(mesh)
    state = abstract_state(trainer)
    batch = _placed(config.batch_shapes(config.batch_size), batch_sharding(mesh))
    parts = state_bytes(state) | {"batch": bytes_per_chip(batch)}
    plan = Plan(
        what="training step",
        target=target.name,
        chip=None if target.chip is None else target.chip.name,
        mesh=_sizes(mesh),
        batch=config.batch_size,
        remat=config.model.remat,
        accumulate=config.accumulate,
        attention=str(trainer.attention),
        parameters=sum(math.prod(x.shape) for x in jax.tree.leaves(trainer.model.shapes)),
        replicated=replicated_weights({"trained": state.params, "frozen": state.frozen}),
        model_flops=model_flops(trainer.model, config.batch_shapes(1)) * config.batch_size / target.count,
    )
    return _compiled(plan, trainer.train_step.lower(state, batch), mesh, target, parts)


# ---- The sampler -----------------------------------------------------------------------------------------------------


def plan_sampler(policy: Any, target: Target, *, batch: int) -> Plan:
    """Compiles `sample_actions` for one chip, with weights in bfloat16, as a server holds them.

    Action tokens are taken to be as many as the policy may write.
    """
    one = dataclasses.replace(target, devices=target.devices[:1])
    mesh = MeshConfig().create(one.devices)
    everywhere = replicated(mesh)
    graph, packed = nnx.split(nnx.eval_shape(lambda: for_sampling(policy.create(jax.random.key(0)))))
    weights = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, "bfloat16", sharding=everywhere), packed)
    chunk = jax.ShapeDtypeStruct((batch, policy.action_horizon, policy.action_dim), "bool")
    given = (policy.input_shapes(batch, actions=False), jax.eval_shape(lambda: jax.random.key(0)), chunk)
    observation, key, mask, options = (_placed(x, everywhere) for x in (*given, policy.sampling_shapes()))

    def sample(weights: Any, key: Any, observation: Any, mask: Any, options: dict[str, Any]) -> Any:
        return nnx.merge(graph, weights).sample_actions(key, observation, action_mask=mask, **options)

    parts = {"weights": 0, "frozen": bytes_per_chip(weights), "optimizer": 0, "ema": 0}
    parts["batch"] = bytes_per_chip(observation)
    lowered = jax.jit(sample).lower(weights, key, observation, mask, options)
    chip = None if target.chip is None else target.chip.name
    rounds = max(1, policy.answer_len)
    plan = Plan(what="sampler", target=target.name, chip=chip, mesh=_sizes(mesh), batch=batch, rounds=rounds)
    return _compiled(plan, lowered, mesh, one, parts)


# ---- Compiling -------------------------------------------------------------------------------------------------------

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_SIZE = r"([\d.]+)([KMGT]?)"
# As the TPU compiler says it, in two ways; the second says nothing about arguments.
_USED = re.compile(rf"Used {_SIZE} of {_SIZE}")
_NEEDED = re.compile(rf"temporaries \({_SIZE}\) exceeds available \w+ \({_SIZE}\)")


def out_of_memory(message: str) -> tuple[int, int, bool] | None:
    """Returns bytes that a program needs and may have, and whether arguments are in them; None for other errors."""
    for pattern, whole in ((_USED, True), (_NEEDED, False)):
        found = pattern.search(message)
        if found and "memory" in message:
            amount, unit, most, unit_of_most = found.groups()
            return int(float(amount) * _UNITS[unit]), int(float(most) * _UNITS[unit_of_most]), whole
    return None


def _compiled(plan: Plan, lowered: Any, mesh: Mesh, target: Target, parts: dict[str, int]) -> Plan:
    """Returns a plan with what compiling says. parts: bytes of the arguments."""
    started, chip = time.perf_counter(), target.chip
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as e:
        needed = out_of_memory(str(e))
        if needed is None:
            raise
        amount, most, whole = needed
        arguments = sum(parts.values())
        peak = amount if whole else amount + arguments
        limit = target.limit or most  # of a stand-in's memory, if it has less than what it stands for
        memory = Memory(**parts, arguments=arguments, temporaries=peak - arguments, peak=peak, limit=limit)
        problem = None if peak <= limit and limit > most else _exceeds(peak, limit)
        return dataclasses.replace(plan, compile_seconds=time.perf_counter() - started, memory=memory, problem=problem)
    seconds = time.perf_counter() - started
    analysis = compiled.memory_analysis()
    peak = analysis.argument_size_in_bytes + analysis.temp_size_in_bytes + analysis.output_size_in_bytes
    peak -= analysis.alias_size_in_bytes
    memory = Memory(
        **parts,
        arguments=analysis.argument_size_in_bytes,
        temporaries=analysis.temp_size_in_bytes,
        peak=peak,
        limit=int(chip.memory_gib * GIB) if target.limit is None and chip is not None else target.limit,
    )
    cost = read_program(compiled.as_text(), plan.mesh, rounds=plan.rounds)
    made = dataclasses.replace(
        plan,
        compile_seconds=seconds,
        memory=memory,
        # Without a limit of ours, the compiler has refused what does not fit.
        problem=_exceeds(peak, target.limit) if target.limit is not None and peak > target.limit else None,
        flops=cost.flops,
        traffic=cost.traffic,
        host=cost.host,
        collectives=_grouped(cost.collectives, mesh, target),
        largest=tuple(map(_described, sorted(cost.collectives, key=lambda c: -c.total)[:5])),
        unknown=tuple(sorted(cost.unknown)),
        endless=tuple(sorted(cost.endless)),
    )
    if chip is None:
        return made
    roofline = Roofline(
        compute=cost.flops / (chip.tflops * 1e12),
        memory=cost.traffic / (chip.memory_gbps * 1e9),
        interconnect=sum((t.seconds or 0.0 for t in made.collectives), 0.0),
    )
    mfu = None if plan.model_flops is None else plan.model_flops / (roofline.bound * chip.tflops * 1e12)
    return dataclasses.replace(made, roofline=roofline, mfu=mfu)


def _sizes(mesh: Mesh) -> dict[str, int]:
    return {name: int(n) for name, n in mesh.shape.items()}


def _exceeds(peak: int, limit: int) -> str:
    return f"needs {peak / GIB:.1f} GiB a chip, of {limit / GIB:.1f}"


def _seconds(collective: Collective, chip: Chip, mesh: Mesh, target: Target) -> float:
    """Returns how long a chip receives what a collective moves, in all its executions."""
    devices = mesh.devices.reshape(-1)
    domains = [target.domain(devices[i], i) for i in collective.members]
    together = max(domains.count(d) for d in set(domains))
    return collective.total / (chip.receive_gbps(together, len(set(domains))) * 1e9)


def _grouped(collectives: Sequence[Collective], mesh: Mesh, target: Target) -> tuple[Traffic, ...]:
    groups: dict[tuple[str, tuple[str, ...]], list[Collective]] = {}
    for c in collectives:
        groups.setdefault((c.kind, c.axes), []).append(c)
    made = []
    for (kind, axes), of in groups.items():
        seconds = None if target.chip is None else sum(_seconds(c, target.chip, mesh, target) for c in of)
        made.append(Traffic(kind, axes, sum(c.total for c in of), sum(c.times for c in of), seconds))
    return tuple(sorted(made, key=lambda t: -t.nbytes))


def _described(c: Collective) -> str:
    where, moved = "/".join(c.op_name.split("/")[-3:]), max(c.buffers, key=lambda b: b.nbytes)
    return f"{c.kind} over {'+'.join(c.axes)}, {c.times:g} x {c.nbytes / MIB:.1f} MiB: {moved} in {where}"
