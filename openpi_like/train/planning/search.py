"""What to change where a run does not fit its machine, and a search for what is fastest there."""

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any

import jax

from openpi_like.train.planning.flops import model_flops
from openpi_like.train.planning.plan import Plan, abstract_state, plan_step, state_bytes
from openpi_like.train.planning.topology import GIB, Target
from openpi_like.train.sharding import MeshConfig
from openpi_like.train.state import ModelDef

ACCUMULATE = (1, 2, 4, 8)
# What a step computes with a remat policy, as a multiple of what it computes with none.
REMAT: dict[str | None, float] = {
    None: 1.0,
    "dots_saveable": 1.05,
    "save:queries,keys_values,attention,mlp": 1.1,
    "save:attention,mlp": 1.15,
    "save:attention": 1.25,
    "nothing_saveable": 4 / 3,
}


# ---- Advice ----------------------------------------------------------------------------------------------------------


def suggestions(config: Any, plan: Plan, target: Target) -> list[str]:
    """Returns overrides that would help, each with why: to fit, or to be faster in the memory that is left."""
    memory = plan.memory
    if memory is None or memory.limit is None:
        return []
    state = memory.weights + memory.frozen + memory.optimizer + memory.ema
    data, fsdp = plan.mesh["data"], plan.mesh["fsdp"]
    rows = config.batch_size // (data * fsdp * plan.accumulate)
    if plan.fits:
        roomy = plan.remat == "nothing_saveable" and memory.arguments + 3 * memory.temporaries < memory.limit
        left = (memory.limit - memory.peak) / GIB
        return [f"model.remat=dots_saveable: {left:.1f} GiB are left, so less can be computed twice"] if roomy else []
    found = []
    if data > 1 and state > 0.3 * memory.limit:
        whole = state * fsdp / (data * fsdp) / GIB
        found.append(
            f"mesh.data=1 mesh.fsdp={data * fsdp}: weights, average and moments take {whole:.1f} GiB a chip instead of "
            f"{state / GIB:.1f}"
        )
    if plan.remat != "nothing_saveable":
        found.append("model.remat=nothing_saveable: keeps only what goes into each layer, and computes the rest again")
    if rows > 1:
        found.append(f"accumulate={2 * plan.accumulate}: {rows // 2} samples of a chip at a time instead of {rows}")
    if memory.ema:
        found.append(f"ema_decay=None: without the average, {memory.ema / GIB:.1f} GiB a chip less")
    more = math.ceil(memory.peak / memory.limit)
    found.append(f"about {more * target.count} chips of this kind: it needs {memory.peak / memory.limit:.1f} of each")
    return found


# ---- Search ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Candidate:
    """state: bytes on a chip. estimate: seconds of a step, roughly; it only orders what is compiled."""

    config: Any
    state: int
    estimate: float


def candidates(config: Any, target: Target) -> list[Candidate]:
    """Returns meshes, remat policies and microbatches whose state fits, those that may be fastest first."""
    chip = target.chip
    assert chip is not None
    limit = target.limit or chip.memory_gib * GIB
    whole = ModelDef(config.model, config.trainable)
    weights = sum(math.prod(x.shape) for x in jax.tree.leaves(whole.shapes))
    compute = model_flops(whole, config.batch_shapes(1)) * config.batch_size / target.count / (chip.tflops * 1e12)
    slices = config.mesh.slices
    found = []
    for tensor in (t for t in (1, 2, 4, 8) if target.count % t == 0):
        ways = target.count // tensor
        parts = [n for n in ACCUMULATE if config.batch_size % (ways * n) == 0]
        for fsdp in (f for f in range(1, ways + 1) if ways % f == 0 and ways // f % slices == 0 and parts):
            mesh = MeshConfig(data=ways // fsdp, fsdp=fsdp, tensor=tensor, slices=slices)
            trainer = config.trainer(mesh.create(target.devices))
            state = sum(state_bytes(abstract_state(trainer)).values())
            if state > 0.95 * limit:
                continue
            for (remat, again), n in itertools.product(REMAT.items(), parts):
                # Weights are gathered going forward and backward, and reduced once; `tensor` sends activations.
                moved = 2 * weights / tensor * (1 - 1 / fsdp) * (2 * n + 1)
                moved += 8 * weights / (tensor * fsdp) * (1 - fsdp * tensor / target.count)
                busy = compute * again * (1 + 0.1 * (tensor - 1))
                model = dataclasses.replace(config.model, remat=remat)
                changed = dataclasses.replace(config, mesh=mesh, model=model, accumulate=n)
                found.append(Candidate(changed, state, busy + 0.3 * moved / (chip.link_gbps * 1e9)))
    return sorted(found, key=lambda c: c.estimate)


def search(config: Any, target: Target, *, compiles: int, done: Callable[[Plan], None]) -> list[tuple[Any, Plan]]:
    """Compiles up to so many candidates; returns their configs and plans: those that fit first, by bound step time.

    done: called with each plan as it is made.
    """
    limit = target.limit or (0 if target.chip is None else target.chip.memory_gib * GIB)
    left, made = candidates(config, target), list[tuple[Any, Plan]]()
    while left and len(made) < compiles:
        tried = left.pop(0)
        plan = plan_step(tried.config, target)
        made.append((tried.config, plan))
        done(plan)
        if plan.memory is not None and not plan.fits:
            # A batch in more parts has as many times less of them, whatever the mesh.
            temporaries = plan.memory.temporaries * tried.config.accumulate
            left = [
                c
                for c in left
                if c.config.model.remat != tried.config.model.remat
                or temporaries / c.config.accumulate < limit - c.state
            ]
        elif plan.fits:
            # Slower in all likelihood: the same mesh, computing or gathering more.
            same = tried.config.mesh
            left = [c for c in left if c.config.mesh != same]
    return sorted(made, key=lambda m: (not m[1].fits, m[1].roofline.bound if m[1].roofline else math.inf))
