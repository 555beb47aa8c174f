"""Looks at the checkpoints of runs, checks them, compares them, and removes those that are not wanted:

    python train/checkpoints.py ls runs/*
    python train/checkpoints.py verify runs/my_robot --step 20000
    python train/checkpoints.py diff runs/my_robot/checkpoints/10000 runs/my_robot
    python train/checkpoints.py prune runs/my_robot --newest 1 --every 10000 --dry-run

RUN is what `run_dir` is in a config; where one step is enough, its directory will do, and a run means its newest. It
computes on the CPU, and needs no accelerator. Exit status: 1 where `verify` finds a problem or `diff` a difference of
contracts or weights, and where something else is wrong.
"""

import dataclasses
import datetime
import json
import logging
import sys
from pathlib import Path
from typing import Annotated, Any

import jax
import tyro
from rich.console import Console
from rich.table import Table

from openpi_like.models.weights import WeightsError
from openpi_like.train.checkpoints.base import run_of
from openpi_like.train.checkpoints.checkpoint import Step, find_step, steps_directory
from openpi_like.train.checkpoints.compare import Change, by_module, compare_records, compare_weights
from openpi_like.train.checkpoints.contract import CheckpointError, read_record
from openpi_like.train.checkpoints.inspection import RunInfo, StepInfo, in_use, inspect_run, plan_pruning, prune
from openpi_like.train.checkpoints.verify import verify_run
from openpi_like.train.checkpoints.warm_start import open_weights
from openpi_like.train.hosts.agreement import short
from openpi_like.train.hosts.lock import RunLockedError

SHOWN = 20  # fields that differ, of one kind
SHOWN_WEIGHTS = 3  # of one module

# ---- ls --------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Ls:
    """Lists steps: size, samples seen, scores, which rule keeps them, what is trained; and what is not a whole step.

    json: for programs.
    """

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    json: bool = False

    def __call__(self, console: Console) -> int:
        infos, problems = [], []
        for run in self.runs:
            try:
                infos.append(inspect_run(run))
            except CheckpointError as e:
                problems.append(str(e))
        if self.json:
            say(console, json.dumps([dataclasses.asdict(info) for info in infos], indent=1))
        else:
            for info in infos:
                show_run(info, console)
        if problems:
            raise CheckpointError("\n".join(problems))
        return 0


def show_run(info: RunInfo, console: Console) -> None:
    table = Table("step", "written", "size", "samples", "score", "kept by", "trained", "base")
    for step in info.steps:
        table.add_row(*cells(step))
    console.print(info.run, markup=False, soft_wrap=True, style="bold")
    console.print(table if info.steps else "no complete step", markup=False)
    for step in info.steps:
        if step.problem is not None:
            say(console, f"step {step.step}: {step.problem}")
    for path, size in info.incomplete.items():
        say(console, f"{path}: not a complete step, {human(size)}; it has no contract")
    for path, size in info.temporary.items():
        state = "being written, or left behind by a run that was killed" if info.in_use else "left behind, stale"
        say(console, f"{path}: temporary, {human(size)}; {state}")
    if info.in_use:
        say(console, f"in use by {info.in_use}")
    base = f", {human(info.base_bytes)} of weights that are not trained" if info.base_bytes else ""
    say(console, f"{human(sum(s.bytes for s in info.steps))} in steps{base}; {human(info.free_bytes)} free")


def cells(step: StepInfo) -> list[str]:
    written = f"{datetime.datetime.fromtimestamp(step.written):%Y-%m-%d %H:%M}"
    scores = ", ".join(f"{metric} {score:.4g}" for metric, score in step.scores.items())
    kept = "not known" if step.kept_by is None else ", ".join(step.kept_by) or "none"
    if step.problem is not None:
        return [str(step.step), written, human(step.bytes), "unreadable", scores, kept, "", ""]
    samples = f"{step.position:,}"
    return [str(step.step), written, human(step.bytes), samples, scores, kept, step.trained or "", step.base or ""]


# ---- verify ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Verify:
    """Reads every array to its end, and names all that a resume or a server would miss.

    Shapes and dtypes are those of the model and the optimiser in the record; values must be finite; the contract and
    the weights that were not trained must be those of the run. A changed bit of a trained weight is found where it
    cannot be decompressed or makes a value that is not finite; their sums are not kept. step: default all; or "best".
    """

    run: Annotated[Path, tyro.conf.Positional]
    step: Step = None

    def __call__(self, console: Console) -> int:
        found = False
        with console.status("") as status:
            for report in verify_run(self.run, self.step, progress=lambda what: status.update(f"reading {what}")):
                for problem in report.problems:
                    say(console, str(problem))
                for note in report.notes:
                    say(console, f"step {report.step}: {note}")
                found = found or bool(report.problems)
                result = f"problems: {len(report.problems)}" if report.problems else "sound"
                read = f"{report.arrays:,} arrays read, {human(report.bytes)}"
                say(console, f"step {report.step}: {result}; {read}")
        return int(found)


# ---- diff ------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Diff:
    """Compares two checkpoints: contracts, configs, versions, and the (averaged) weights as they are served.

    all: every field and weight. raw: weights without their average. weights: compare them, too.
    """

    a: Annotated[Path, tyro.conf.Positional]
    b: Annotated[Path, tyro.conf.Positional]
    all: bool = False
    raw: bool = False
    weights: bool = True

    def __call__(self, console: Console) -> int:
        a, b = find_step(self.a), find_step(self.b)
        records = read_record(a), read_record(b)
        for name, path, record in zip("ab", (a, b), records, strict=True):
            average = "averaged" if (path / "ema").is_dir() and not self.raw else "raw"
            say(console, f"{name}: {path}: step {record['step']}, {record['position']:,} samples, {average} weights")
        found = compare_records(*records)
        for section, fields in found.items():
            say(console, f"{section}: {f'fields that differ: {len(fields)}' if fields else 'equal'}")
            shown = fields if self.all else fields[:SHOWN]
            for field, mine, theirs in shown:
                say(console, f"  {field or section}: {short(mine)} -> {short(theirs)}")
            if len(shown) < len(fields):
                say(console, f"  and {len(fields) - len(shown)} more, see --all")
        same = not self.weights or self._same_weights(a, b, console)
        return int(not same or bool(found["contract"]))

    def _same_weights(self, a: Path, b: Path, console: Console) -> bool:
        with console.status("") as status:
            changes = compare_weights(
                open_weights(a, average=not self.raw),
                open_weights(b, average=not self.raw),
                progress=lambda name: status.update(f"reading {name}"),
            )
        count, same = len(changes.changes), sum(c.equal for c in changes.changes)
        say(console, f"weights: {same} of {count} equal")
        for which, names in (("a", changes.only_a), ("b", changes.only_b)):
            for name in names:
                say(console, f"  only in {which}: {name}")
        for name, mine, theirs in changes.reshaped:
            say(console, f"  {name}: {mine} -> {theirs}")
        if same < count or self.all:
            table = Table("weight", "|a - b| / |a|", "max |a - b|", "equal")
            for module, weights in by_module(changes.changes):
                if module.equal < module.arrays or self.all:
                    table.add_row(*change_cells(module, module.name or "."), style="bold")
                    differ = [w for w in weights if not w.equal]
                    for weight in weights if self.all else differ[:SHOWN_WEIGHTS]:
                        table.add_row(*change_cells(weight, "  " + weight.name.rpartition("/")[2]))
                    if len(differ) > SHOWN_WEIGHTS and not self.all:
                        table.add_row(f"  and {len(differ) - SHOWN_WEIGHTS} more")
            console.print(table)
        return changes.equal


def change_cells(change: Change, name: str) -> list[str]:
    return [name, f"{change.relative:.3g}", f"{change.largest:.3g}", f"{change.equal} of {change.arrays}"]


# ---- prune -----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Prune:
    """Removes steps that no rule keeps, and what runs that were killed have left behind.

    newest, best, every: as `keep` in a config; those left out are as the run has them, 0 is none. The newest step
    always stays, and so does what is called like a step and is not complete. Weights are not read: `verify` first.
    dry_run: only say what would go. yes: do it.
    """

    run: Annotated[Path, tyro.conf.Positional]
    newest: int | None = None
    best: int | None = None
    every: int | None = None
    dry_run: bool = False
    yes: bool = False

    def __call__(self, console: Console) -> int:
        if self.dry_run == self.yes:
            raise ValueError("give --dry-run to see what would go, or --yes to remove it")
        changes = {k: v for k in ("newest", "best", "every") if (v := getattr(self, k)) is not None}
        if self.dry_run:
            plan = plan_pruning(self.run, changes)
            owner = in_use(run_of(steps_directory(self.run) / "0"))
            if owner is not None:
                say(console, f"in use by {owner}: --yes will be refused")
        else:
            plan = prune(self.run, changes, say=lambda line: say(console, line))
        for step, rules in plan.kept.items():
            say(console, f"step {step}: kept by {', '.join(rules)}")
        for path, size in plan.removed.items():
            say(console, f"{path}: {'would be removed' if self.dry_run else 'removed'}, {human(size)}")
        say(console, f"{human(sum(plan.removed.values()))} {'would be freed' if self.dry_run else 'freed'}")
        return 0


# ---- Shared ----------------------------------------------------------------------------------------------------------


def human(size: float) -> str:
    """Returns a number of bytes with a unit."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:,.3g} TB"


def say(console: Console, line: str) -> None:
    console.print(line, markup=False, highlight=False, soft_wrap=True)


COMMANDS: dict[str, Any] = {"ls": Ls, "verify": Verify, "diff": Diff, "prune": Prune}


def main(arguments: list[str] | None = None, console: Console | None = None) -> int:
    """Returns the exit status. arguments: default those of the process."""
    command = tyro.extras.subcommand_cli_from_dict(COMMANDS, args=arguments, description=__doc__)
    return command(console or Console(highlight=False))


if __name__ == "__main__":
    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax reports every array it reads
    jax.config.update("jax_platforms", "cpu")  # a run may be using what else there is
    try:
        sys.exit(main())
    except (CheckpointError, WeightsError, RunLockedError, ValueError) as e:
        sys.exit(str(e))
