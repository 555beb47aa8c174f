"""What the directory of a run holds, and what of it may go."""

import dataclasses
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from openpi_like.train.checkpoints.base import BASE, run_of
from openpi_like.train.checkpoints.checkpoint import (
    TEMPORARY,
    Keep,
    complete_steps,
    find_step,
    incomplete_steps,
    steps_directory,
    stored_keep,
    stored_scores,
    stored_trainable,
    temporary_directories,
)
from openpi_like.train.checkpoints.contract import CheckpointError, read_record
from openpi_like.train.hosts.lock import STALE_S, RunLock, RunLockedError, read_owner
from openpi_like.train.state import Trainable

METADATA = "_CHECKPOINT_METADATA"

# ---- What is there ---------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class StepInfo:
    """A complete step. written: seconds since 1970. position: samples seen. scores: see `Keep`, by metric.

    kept_by: rules that keep it; None where they are not known. trained, base: in words; base None: all is trained.
    problem: why its record cannot be read; then all that it says is None.
    """

    step: int
    written: float
    bytes: int
    scores: dict[str, float]
    kept_by: tuple[str, ...] | None
    position: int | None = None
    trained: str | None = None
    base: str | None = None
    problem: str | None = None


@dataclasses.dataclass(frozen=True)
class RunInfo:
    """A run. incomplete, temporary: bytes by directory: of what is called like a step and is none, and of what is being
    written, or was when the run was killed. in_use: by whom. base_bytes: of the weights that it keeps untrained.
    """

    run: str
    steps: tuple[StepInfo, ...]
    incomplete: dict[str, int]
    temporary: dict[str, int]
    in_use: str | None
    base_bytes: int
    free_bytes: int


def inspect_run(directory: str | Path) -> RunInfo:
    """Returns what a run holds; reads no weights.

    Raises:
        CheckpointError: that is no run.
    """
    root = steps_directory(directory)
    run = run_of(root / "0")
    steps = complete_steps(root)
    scores = {step: stored_scores(path) for step, path in sorted(steps.items())}
    details: dict[int, dict[str, Any]] = {}
    keep = None
    for step in scores:
        try:
            record = read_record(steps[step])
            keep = stored_keep(record)  # of the newest
            trained, base = describe_trainable(stored_trainable(record)), _describe_base(record)
            details[step] = {"position": int(record["position"]), "trained": trained, "base": base}
        except ValueError as e:
            details[step] = {"problem": str(e)}
    kept = {} if keep is None else keep.kept_by({step: of.get(keep.metric) for step, of in scores.items()})
    found = [
        StepInfo(step, _written(path), size_on_disk(path), scores[step], kept.get(step), **details[step])
        for step, path in sorted(steps.items())
        if path.is_dir()  # the run may have removed it meanwhile
    ]
    sizes = lambda paths: {str(p.relative_to(run)): size_on_disk(p) for p in paths}  # noqa: E731
    return RunInfo(
        run=str(run),
        steps=tuple(found),
        incomplete=sizes(incomplete_steps(root).values()),
        temporary=sizes(temporary_directories(root)),
        in_use=in_use(run),
        base_bytes=size_on_disk(run / BASE),
        free_bytes=shutil.disk_usage(run).free,
    )


def in_use(run: Path) -> str | None:
    """Returns who trains in a directory, as far as can be seen without taking its lock; None for nobody."""
    owner = read_owner(run)
    return None if owner is None or time.time() - owner.seen > STALE_S else str(owner)


def describe_trainable(trainable: Trainable) -> str:
    """Returns what is trained, in a few words."""
    frozen = f" but {', '.join(trainable.frozen)}" if trainable.frozen else ""
    if trainable.lora is None:
        return f"all{frozen}"
    return f"LoRA {', '.join(map(str, sorted({rule.rank for rule in trainable.lora.rules})))}{frozen}"


def _describe_base(record: Mapping[str, Any]) -> str | None:
    if record.get("base") is None:
        return None
    source = record["base"]["source"]
    return f"{record['trainable']['frozen_dtype']}, {'kept' if source is None else source['checkpoint']}"


def step_metadata(step_dir: Path) -> dict[str, Any]:
    """Returns what Orbax notes of a step, such as its items and when it was written; empty where that is lost."""
    try:
        return json.loads((step_dir / METADATA).read_text())
    except (OSError, ValueError):
        return {}


def _written(step_dir: Path) -> float:
    stamp = step_metadata(step_dir).get("commit_timestamp_nsecs")
    return stamp / 1e9 if stamp else (step_dir / "contract").stat().st_mtime


def size_on_disk(directory: Path) -> int:
    """Returns the bytes of all files in a directory; of those that a run removes meanwhile, none."""
    total = 0
    for parent, _, names in os.walk(directory):
        for name in names:
            with suppress(FileNotFoundError):
                total += os.stat(os.path.join(parent, name)).st_size
    return total


# ---- What may go -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Pruning:
    """kept: which rules keep the steps that stay. removed: bytes of the directories that go, by path."""

    keep: Keep
    kept: dict[int, tuple[str, ...]]
    removed: dict[Path, int]


def plan_pruning(directory: str | Path, changes: Mapping[str, int]) -> Pruning:
    """Returns what no rule keeps, and what runs that were killed have left behind.

    changes: of the rules that the run has itself, fields of `Keep`; 0: no such rule.

    Raises:
        CheckpointError: no such run, or its newest record cannot be read, or there are no rules, or no scores for them.
        ValueError: `newest` is below 1, so that the newest would go.
    """
    root = steps_directory(directory)
    steps = complete_steps(root)
    newest = find_step(root)
    stored = stored_keep(read_record(newest))
    if stored is None and "newest" not in changes:
        raise CheckpointError(f"the record of {newest} says nothing of which steps are kept; give at least --newest")
    given: dict[str, Any] = {**changes, **({"every": None} if changes.get("every") == 0 else {})}
    keep = dataclasses.replace(stored or Keep(), **given)
    scores = {step: stored_scores(path) for step, path in steps.items()}
    if keep.best and not any(keep.metric in of for of in scores.values()):
        measured = sorted({metric for of in scores.values() for metric in of}) or "nothing"
        raise CheckpointError(
            f"best={keep.best} ranks steps by {keep.metric!r}, which none of {root} has (measured: {measured}); "
            "give --best 0 to keep none for that"
        )
    kept = keep.kept_by({step: of.get(keep.metric) for step, of in scores.items()})
    go = [*temporary_directories(root), *(path for step, path in sorted(steps.items()) if not kept[step])]
    return Pruning(keep, {s: rules for s, rules in kept.items() if rules}, {path: size_on_disk(path) for path in go})


def prune(directory: str | Path, changes: Mapping[str, int], *, say: Callable[[str], None]) -> Pruning:
    """Removes what `plan_pruning` returns, and returns it; holds the lock of the directory meanwhile.

    say: prints a line.

    Raises:
        RunLockedError: a run trains there. CheckpointError, ValueError: as `plan_pruning`; or lists what could not be
            removed.
    """
    taken: list[str] = []
    failures = []
    with RunLock(run_of(steps_directory(directory) / "0"), lost=taken.append, say=say):
        plan = plan_pruning(directory, changes)
        for path in plan.removed:
            if taken:
                raise RunLockedError(taken[0])
            try:
                _remove(path)
            except OSError as e:
                failures.append(f"{path}: {e.strerror}")
    if failures:
        raise CheckpointError("could not be removed:\n  " + "\n  ".join(failures))
    return plan


def _remove(path: Path) -> None:
    """Whoever kills this leaves a temporary directory, not half a step."""
    if TEMPORARY not in path.name:
        path = path.rename(path.with_name(path.name + TEMPORARY))
    shutil.rmtree(path)
