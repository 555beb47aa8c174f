"""Says whether a run fits a machine and how fast it could be there, before there is one:

    python train/plan.py configs/pretrain_pi0.py --topology v5e:16x16
    python train/plan.py configs/pretrain_pi0.py mesh.fsdp=8 batch_size=64 --topology h100:8 --search 6
    python train/plan.py configs/finetune_pi0_widowx.py                       # this machine

The real training step and the sampler are compiled ahead of time, which takes one to four minutes each at released
sizes; nothing is allocated, and no data are needed. For TPUs this needs the extra `plan` (pip install -e '.[plan]').
Memory is the compiler's own account. Times are bounds: work divided by published peaks, as if all overlapped perfectly;
a real step takes longer. GPUs are planned with a program for TPUs in their place, and say so.

Exit code: 0 where the training step fits, 1 where it does not, 2 where there is no such run or machine, 3 where
something else went wrong.
"""

import dataclasses
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.table import Table


@dataclasses.dataclass(frozen=True)
class Args:
    """See the file's head.

    config: of a run. overrides: key=value. topology: a TPU slice or a number of GPUs; without it, this machine.
    slices: of TPUs, each of that topology; as `mesh.slices=` in the run.
    samples: to say how long they take; None takes those of the run, steps x batch_size.
    search: compile up to so many meshes, remat policies and microbatches, and list them.
    sampler: batch sizes to plan sampling for, on one chip; `--sampler` alone leaves it out. json: file for all results.
    """

    config: Annotated[Path, tyro.conf.Positional]
    overrides: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    topology: str | None = None
    slices: int = 1
    samples: int | None = None
    search: int = 0
    sampler: tuple[int, ...] = (1, 8)
    json: Path | None = None


def prepare_environment() -> None:
    """Lets libtpu compile on a machine without TPUs, and keeps it quiet; before jax is imported."""
    os.environ |= {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",  # several plans may be made at once
        # Without these, it complains that this is no host of a TPU.
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_WORKER_ID": "0",
        "TPU_LOG_DIR": "disabled",
        "TPU_MIN_LOG_LEVEL": "3",
        "TPU_STDERR_LOG_LEVEL": "3",
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }


def size(nbytes: float | None) -> str:
    """Returns bytes with the unit that suits them."""
    if nbytes is None:
        return "-"
    unit, name = next(((u, n) for u, n in ((2**30, "GiB"), (2**20, "MiB")) if nbytes >= u), (2**10, "KiB"))
    return f"{nbytes / unit:.2f} {name}"


def milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms"


def rows(title: str) -> Table:
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column(min_width=34)
    table.add_column(justify="right", min_width=10)
    table.add_column()
    return table


def print_step(plan: Any, console: Console) -> None:
    """Prints a training step, all numbers of one chip."""
    mesh = " x ".join(f"{name} {n}" for name, n in plan.mesh.items())
    console.print(
        f"mesh {mesh}, batch {plan.batch} in {plan.accumulate} part(s), remat {plan.remat}, attention by "
        f"{plan.attention}; {plan.parameters:,} parameters; compiled in {plan.compile_seconds:.0f} s"
    )
    if plan.memory is not None:
        notes = {
            "weights": "those that are trained",
            "arguments": "all of these, as the compiler lays them out",
            "temporaries": "activations, gathered weights, gradients",
            "peak": f"of {size(plan.memory.limit)}",
        }
        table = rows("memory of a chip")
        for name in ("weights", "frozen", "optimizer", "ema", "batch", "arguments", "temporaries", "peak"):
            table.add_row(name, size(getattr(plan.memory, name)), notes.get(name, ""))
        console.print(table)
    for r in plan.replicated:
        console.print(f"replicated: {r.name} {r.shape}, {size(r.nbytes)} alike on {r.copies} chips")
    if not plan.replicated:
        console.print("replicated over fsdp or tensor: no weight above 1 MiB")
    if plan.flops is not None:
        table = rows("work of a chip")
        table.add_row("model FLOPs", f"{plan.model_flops / 1e12:.3g} T", "forward and backward, nothing twice")
        table.add_row("executed FLOPs", f"{plan.flops / 1e12:.3g} T", "what is computed again included")
        table.add_row("traffic of its memory", f"{plan.traffic / 1e9:.3g} GB", "at least")
        if plan.host:
            table.add_row("traffic with the host's memory", f"{plan.host / 1e9:.3g} GB", "")
        for t in plan.collectives:
            took = "" if t.seconds is None else f", {milliseconds(t.seconds)}"
            name = f"{t.kind} over {'+'.join(t.axes)}"
            table.add_row(name, f"{t.nbytes / 1e9:.3g} GB", f"{t.times:,.0f} of them{took}")
        console.print(table)
    for line in plan.largest:
        console.print(f"  {line}")
    if plan.unknown:
        console.print(f"not counted, as they do not say what they do: {', '.join(plan.unknown)}")
    if plan.endless:
        print_endless(plan, console)
    if plan.roofline is not None:
        r = plan.roofline
        parts = ", ".join(f"{n} {milliseconds(getattr(r, n))}" for n in ("compute", "memory", "interconnect"))
        console.print(f"at the published peaks of {plan.chip}: {parts}")
        console.print(f"a step takes at least {milliseconds(r.bound)}, by {r.bound_by}; MFU at most {plan.mfu:.0%}")
    console.print("it fits" if plan.fits else f"it does not fit: {plan.problem}")


def print_endless(plan: Any, console: Console) -> None:
    console.print(f"loops that end on what they compute are taken as {plan.rounds} rounds: {', '.join(plan.endless)}")


def print_samplers(plans: list[Any], console: Console) -> None:
    table = Table(
        "batch", "compiled in", "weights", "temporaries", "peak", "at least", "by",
        title="sampling on one chip, weights in bfloat16", title_justify="left",
    )  # fmt: skip
    for p in plans:
        memory = [size(getattr(p.memory, name)) for name in ("frozen", "temporaries", "peak")]
        bound = ("-", "-") if p.roofline is None else (milliseconds(p.roofline.bound), p.roofline.bound_by)
        fits = () if p.fits else (f"does not fit: {p.problem}",)
        table.add_row(str(p.batch), f"{p.compile_seconds:.0f} s", *memory, *(fits or bound))
    console.print(table)
    if plans[0].endless:
        print_endless(plans[0], console)


def print_tried(plan: Any, console: Console) -> None:
    mesh = " x ".join(f"{name} {n}" for name, n in plan.mesh.items())
    result = plan.problem or ("fits" if plan.roofline is None else f"fits, {milliseconds(plan.roofline.bound)}")
    took = f"compiled in {plan.compile_seconds:.0f} s"
    console.print(f"{mesh}, remat {plan.remat}, {plan.accumulate} part(s): {result}; {took}")


def print_search(plans: list[Any], console: Console) -> None:
    columns = ("data x fsdp x tensor", "remat", "parts", "peak", "at least", "by", "MFU at most")
    table = Table(*columns, title="tried, the fastest that fits first", title_justify="left")
    for p in plans:
        r, peak = p.roofline, "-" if p.memory is None else size(p.memory.peak)
        bound = ("-", "-", "-") if r is None else (milliseconds(r.bound), r.bound_by, f"{p.mfu:.0%}")
        mesh = " x ".join(map(str, p.mesh.values()))
        table.add_row(mesh, str(p.remat), str(p.accumulate), peak if p.fits else f"{peak}: does not fit", *bound)
    console.print(table)


def main(args: Args, console: Console) -> int:
    # Imported here, as what is in the environment decides what jax sees.
    from openpi_like.config import load_run, override
    from openpi_like.train.planning.plan import plan_sampler, plan_step
    from openpi_like.train.planning.search import search, suggestions
    from openpi_like.train.planning.topology import find_target

    config = override(load_run(args.config), args.overrides)
    target = find_target(args.topology, slices=args.slices)
    if args.slices > 1:
        config = dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, slices=args.slices))
    if args.search and target.chip is None:
        raise ValueError(f"--search needs published peaks, and {target.name} has none; give a --topology")
    console.print(f"{args.config}: {type(config.model).__name__} on {target.name}, {target.count} chips")
    if target.compiled_for is not None:
        console.print(
            f"compiled for {target.compiled_for} as a stand-in: memory and collectives are theirs, with the peaks and "
            f"{size(target.limit)} of {target.name.partition(':')[0]}"
        )
    plans = []
    if args.search:
        found = search(config, target, compiles=args.search, done=lambda p: print_tried(p, console))
        if not found:
            raise ValueError(
                f"no mesh of {target.count} chips divides batch_size={config.batch_size} and holds the weights"
            )
        plans = [plan for _, plan in found]
        print_search(plans, console)
        config, step = found[0]
    else:
        step = plan_step(config, target)
        plans = [step]
    print_step(step, console)
    for line in suggestions(config, step, target):
        console.print(f"  try {line}")
    if step.samples_per_second is not None and step.fits:
        samples = args.samples or config.steps * config.batch_size
        days = samples / step.samples_per_second / 86_400
        console.print(
            f"at most {step.samples_per_second:,.0f} samples/s; {samples:,} samples take at least {days:.2f} days"
        )
    if args.sampler:
        samplers = [plan_sampler(config.model, target, batch=batch) for batch in args.sampler]
        print_samplers(samplers, console)
        plans += samplers
    if args.json is not None:
        args.json.write_text(json.dumps([p.to_json() for p in plans], indent=1))
    return 0 if step.fits else 1


if __name__ == "__main__":
    given = tyro.cli(Args, description=__doc__)
    if given.topology is not None:
        prepare_environment()
    try:
        sys.exit(main(given, Console(width=120, highlight=False, markup=False)))
    except (ValueError, FileNotFoundError) as e:
        print(e, file=sys.stderr)
        sys.exit(2)
    except Exception:  # not 1, which says that it does not fit
        traceback.print_exc()
        sys.exit(3)
