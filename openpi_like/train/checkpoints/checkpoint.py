"""Checkpoints of a run: weights, optimiser and data position, and the contract; which of them are kept.

Layout of a run (Orbax):
    checkpoints/<step>/params/     float32 weights that are trained, and memory, which is written
    checkpoints/<step>/ema/        moving average of those that are trained, when kept
    checkpoints/<step>/opt_state/  optax state                          contract/  one JSON object, see `Contract`
    checkpoints/<step>/metrics/    what it is ranked by, see `Keep`
    base/                          weights that are not trained, if any; see `openpi_like.train.checkpoints.base`
"""

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import orbax.checkpoint as ocp

from openpi_like.config import from_json, near_names, to_json
from openpi_like.train.checkpoints.base import BASE, base_record, check_digest, read_base, run_of, save_base
from openpi_like.train.checkpoints.contract import (
    FORMAT,
    CheckpointError,
    Contract,
    contract_problems,
    contract_record,
    differences,
    read_record,
)
from openpi_like.train.state import Params, Trainable, TrainState

TEMPORARY = ocp.utils.TMP_DIR_SUFFIX  # in the name of a directory that Orbax has not finished
# Which step of a run: its number, "best" by its score (see `Keep`), or None, the newest.
Step = int | Literal["best"] | None
_SCORE = Path("metrics") / "metrics"  # of a step, as Orbax writes it: {metric: score or null}


@dataclasses.dataclass(frozen=True)
class Keep:
    """Which checkpoints stay on disk: those that any of these rules keeps.

    newest: so many of the newest. best: so many of those with the lowest `metric` in validation, the mean of all its
    values that begin so ("loss", "action_mae", "action_error"), averaged over datasets. every: those whose step is a
    multiple of it; None keeps none for that.
    """

    newest: int = 2
    best: int = 0
    metric: str = "loss"
    every: int | None = None

    def __post_init__(self) -> None:
        problems = []
        if self.newest < 1:
            problems.append(f"newest={self.newest}, expected at least 1: a run goes on from the newest")
        if self.best < 0:
            problems.append(f"best={self.best}, expected at least 0")
        if self.every is not None and self.every < 1:
            problems.append(f"every={self.every}, expected at least 1, or None")
        if problems:
            raise ValueError("Keep: " + "; ".join(problems))

    def score(self, line: dict[str, float]) -> float | None:
        """Returns what checkpoints are ranked by, of a line of validation; None where it has no such metric.

        Raises:
            ValueError: checkpoints are to be ranked, and the line has no such metric.
        """
        values = [v for name, v in line.items() if name.split("/")[0] == self.metric]
        if values:
            return float(np.mean(values))
        if self.best:
            raise ValueError(f"keep.metric={self.metric!r} is not measured in validation; got {sorted(line)}")
        return None

    def kept_by(self, scores: Mapping[int, float | None]) -> dict[int, tuple[str, ...]]:
        """Returns which rules keep each step, by the names they have here; of those that go, none.

        scores: of each step, see `score`; one that was not measured, or is not finite, is never among the best.
        """
        steps = sorted(scores)
        measured = [(score, -step) for step, score in scores.items() if score is not None and math.isfinite(score)]
        keeps = {
            "newest": steps[-self.newest :],
            "best": [-negative for _, negative in sorted(measured)[: self.best]],
            "every": [step for step in steps if self.every is not None and step % self.every == 0],
        }
        return {step: tuple(rule for rule, kept in keeps.items() if step in kept) for step in steps}

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """Returns which steps stay, of those that Orbax knows of: its protocol for such rules."""
        kept = self.kept_by({known.step: (known.metrics or {}).get(self.metric) for known in checkpoints})
        return [bool(kept[known.step]) for known in checkpoints]


class Checkpointer:
    """Saves asynchronously and restores; one per run directory."""

    def __init__(self, directory: str | Path, *, keep: Keep = Keep(), trainable: Trainable = Trainable()) -> None:
        """trainable: of the run.

        Raises:
            CheckpointError: a step that is not complete is newer than all that are; none could be saved before it.
        """
        self.directory = Path(directory).resolve()
        self._keep, self._trainable = keep, trainable
        self.last_saved: int | None = None  # by this object; it may still be being written
        self._base: dict[str, Any] | None = None
        newest, broken = self.latest_step(), incomplete_steps(self.directory)
        if broken and (newest is None or max(broken) > newest):
            raise CheckpointError(
                f"{broken[max(broken)]} is not complete: it has no contract, as it was copied or deleted in part; copy "
                f"it again or remove it; the newest complete step is {newest}"
            )
        # Only complete steps count: Orbax renames a step into place when all of it is written, and what a kill left
        # behind is removed here. It writes scores, which outlive this process, only where it is told what is best.
        options = ocp.CheckpointManagerOptions(
            preservation_policy=keep,
            best_fn=lambda metrics: metrics[keep.metric],
            best_mode="min",
            cleanup_tmp_directories=True,
        )
        self._manager = ocp.CheckpointManager(self.directory, options=options)

    def latest_step(self) -> int | None:
        """Returns the newest complete step, or None."""
        return max(complete_steps(self.directory), default=None)

    def begin(self, state: TrainState, *, source: Any = None) -> None:
        """Before the first step of a run that does not train all weights: keeps the others, or notes where they are.

        source: the `WarmStart` that they can be read from again; None writes them beside the checkpoints.
        """
        if source is None and state.frozen:
            save_base(run_of(self.directory / "0"), state.frozen)
        elif source is not None and Path(source.checkpoint).exists():
            source = dataclasses.replace(source, checkpoint=str(Path(source.checkpoint).resolve()))
        self._base = base_record(state.frozen, source)

    def save(
        self,
        state: TrainState,
        *,
        position: int,
        order: dict[str, Any],
        contract: Contract,
        config: Any,
        score: float | None = None,
    ) -> None:
        """Starts saving; returns once the arrays are copied, before they are written.

        position: global sample index of the next batch. order: what positions stand for, `Loader.order`. config: the
        run's, for the record. score: see `Keep.score`, of these very weights.

        Raises:
            CheckpointError: this step, or the one saved before it, could not be written, or a later one is there.
                Steps written before are intact.
        """
        step = int(state.step)
        record = {
            "format": FORMAT,
            "step": step,
            "position": position,
            "order": order,
            "config": to_json(config),
            "trainable": to_json(self._trainable),
            "base": self._base,
            **contract_record(contract),
        }
        items: dict[str, Any] = {
            "params": ocp.args.StandardSave(state.params),
            "opt_state": ocp.args.StandardSave(state.opt_state),
            "contract": ocp.args.JsonSave(record),
        }
        if state.ema is not None:
            items["ema"] = ocp.args.StandardSave(state.ema)
        metrics = {self._keep.metric: score}
        begun = self._written(lambda: self._manager.save(step, args=ocp.args.Composite(**items), metrics=metrics), step)
        if not begun:
            raise CheckpointError(
                f"step {step} is not saved: {self.directory} holds {sorted(complete_steps(self.directory))}, expected "
                "none from this step on"
            )
        self.last_saved = step

    def _written(self, write: Callable[[], Any], step: int | None) -> Any:
        """Orbax writes in the background, and reports what failed when it is called next."""
        try:
            return write()
        except Exception as e:  # of many kinds: OSError, ValueError of TensorStore ...
            first = str(e.__cause__ or e).strip().split("\n")[0]
            newest = self.latest_step()
            raise CheckpointError(
                f"step {step if step is not None else 'before the end'} or the one before it could not be written to "
                f"{self.directory}: {first}; the newest complete checkpoint is {newest}; make room, or repair the "
                "disk, and give the same command again: it goes on from there"
            ) from e

    def restore(
        self,
        abstract: TrainState,
        shardings: TrainState,
        *,
        contract: Contract,
        frozen_from: Callable[[Any], Params] | None = None,
    ) -> tuple[TrainState, int, dict[str, Any] | None]:
        """Returns the newest state, placed as `shardings` say, and the data position and order that belong to it.

        The order is None where nothing was trained, as in the weights that `save_policy` writes, and where it was not
        recorded yet. frozen_from: returns the weights that are not trained for the `WarmStart` they came from, where
        the run did not keep them.

        Raises:
            CheckpointError: no step, or its contract is not `contract` (other robots, statistics, model ...), or other
                weights are trained.
        """
        step = self.latest_step()
        if step is None:
            raise CheckpointError(f"no complete checkpoint in {self.directory}")
        record = read_record(self.directory / str(step))
        # Read back first: what this version added to robots and configs has its default in an older record.
        stored = from_json(record["contract"])
        found = [] if stored.hash() == contract.hash() else [differences(stored, contract)]
        if stored_trainable(record) != from_json(to_json(self._trainable)):  # both as today's: a config may be older
            found.append("trainable")
        if found:
            raise CheckpointError(
                f"cannot resume from {self.directory}/{step}: this run differs in {', '.join(found)}; "
                "train into another directory, or use warm_start to begin from these weights"
            )

        def target(tree: Any, placed: Any) -> Any:
            return ocp.args.StandardRestore(
                jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), tree, placed)
            )

        items = {name: target(getattr(abstract, name), getattr(shardings, name)) for name in ("params", "opt_state")}
        if abstract.ema is not None:
            items["ema"] = target(abstract.ema, shardings.ema)
        try:
            restored = self._manager.restore(step, args=ocp.args.Composite(**items))
            for name in items:  # what Orbax finds no value for, it leaves out
                have, want = (jax.tree.leaves_with_path(tree) for tree in (restored[name], getattr(abstract, name)))
                if [path for path, _ in have] != [path for path, _ in want]:
                    raise ValueError(f"{name} has not the parts that this run has")
        except Exception as e:  # Orbax raises many kinds, among them bare Exception, for damage and for other shapes
            first = str(e.__cause__ or e).strip().split("\n")[0]
            raise CheckpointError(
                f"cannot resume from {self.directory}/{step}: {first}; if its optimiser or its average is of another "
                "kind, train into another directory with warm_start; if it is damaged, remove it, to go on from the "
                "one before"
            ) from e
        state = TrainState(
            step=jax.device_put(np.int32(step), shardings.step),
            params=restored["params"],
            frozen=self._restore_base(record, abstract, shardings, frozen_from),
            ema=restored["ema"] if abstract.ema is not None else None,
            opt_state=restored["opt_state"],
        )
        return state, int(record["position"]), record.get("order")

    def _restore_base(
        self,
        record: dict[str, Any],
        abstract: TrainState,
        shardings: TrainState,
        frozen_from: Callable[[Any], Params] | None,
    ) -> Params:
        self._base = record.get("base")
        if self._base is None:
            return {}
        source = None if self._base["source"] is None else from_json(self._base["source"])
        if source is None:
            run_dir = run_of(self.directory / "0")
            frozen, where = read_base(run_dir, abstract.frozen, shardings.frozen), str(run_dir / BASE)
        else:
            assert frozen_from is not None  # of every run that does not keep its base
            frozen, where = frozen_from(source), source.checkpoint
        check_digest(self._base, frozen, where)
        return frozen

    def wait(self) -> None:
        """Waits until everything is on disk.

        Raises:
            CheckpointError: as `save`.
        """
        self._written(self._manager.wait_until_finished, None)

    def close(self) -> None:
        """Waits until everything is on disk, and ends.

        Raises:
            CheckpointError: as `save`.
        """
        self.wait()
        self._manager.close()


def stored_trainable(record: dict[str, Any]) -> Trainable:
    """Returns what was trained in the run of a record; all of it, where that was not recorded yet."""
    return from_json(record["trainable"]) if record.get("trainable") else Trainable()


def stored_keep(record: dict[str, Any]) -> Keep | None:
    """Returns the rules of the run of a record; None where its config has none."""
    keep = record["config"].get("keep")
    return None if keep is None else from_json(keep)


def stored_scores(step_dir: Path) -> dict[str, float]:
    """Returns what a step is ranked by, {metric: score}; empty where nothing was measured."""
    try:
        scores = json.loads((step_dir / _SCORE).read_text())
    except FileNotFoundError:
        return {}
    return {metric: score for metric, score in scores.items() if score is not None}


def save_policy(directory: str | Path, params: Params, *, contract: Contract, origin: str) -> Path:
    """Writes weights that were not trained here as step 0 of a run, to be served or to start from; returns the step.

    origin: where they come from, for the record.

    Raises:
        CheckpointError: the directory holds checkpoints already, or robots, statistics or tokenizer do not fit the
            policy; lists everything that does not.
    """
    problems = contract_problems(contract)
    if problems:
        raise CheckpointError("a policy that cannot be served:\n  " + "\n  ".join(problems))
    directory = Path(directory).resolve() / "checkpoints"
    manager = ocp.CheckpointManager(directory)
    if manager.all_steps():
        raise CheckpointError(
            f"{directory} holds steps {sorted(manager.all_steps())} already; choose another directory"
        )
    record = {"format": FORMAT, "step": 0, "position": 0, "config": {"origin": origin}, **contract_record(contract)}
    items = {"params": ocp.args.StandardSave(params), "contract": ocp.args.JsonSave(record)}
    manager.save(0, args=ocp.args.Composite(**items))
    manager.wait_until_finished()
    manager.close()
    return directory / "0"


# ---- Directories -----------------------------------------------------------------------------------------------------


def complete_steps(directory: Path) -> dict[int, Path]:
    """Returns the complete steps in a directory of checkpoints. Orbax renames a step when all of it is written."""
    return {step: path for step, path in _steps(directory) if (path / "contract").is_dir()}


def incomplete_steps(directory: Path) -> dict[int, Path]:
    """Returns what is called like a step and is none."""
    return {step: path for step, path in _steps(directory) if not (path / "contract").is_dir()}


def _steps(directory: Path) -> list[tuple[int, Path]]:
    return [(int(p.name), p) for p in directory.iterdir() if p.name.isdigit()] if directory.is_dir() else []


def temporary_directories(directory: Path) -> list[Path]:
    """Returns what is being written for a run, or was when it was killed: of its steps, and of its base."""
    places = {directory, run_of(directory / "0")}
    return sorted(p for place in places for p in place.iterdir() if TEMPORARY in p.name and p.is_dir())


def steps_directory(directory: str | Path) -> Path:
    """Returns where a run has its steps: `directory` itself, or its `checkpoints`.

    Raises:
        CheckpointError: that is no run; says what is there instead.
    """
    directory = Path(directory).resolve()
    if not directory.is_dir():
        beside = sorted(p.name for p in directory.parent.iterdir() if p.is_dir()) if directory.parent.is_dir() else []
        hint = near_names(directory.name, beside) if beside else "nothing"
        raise CheckpointError(f"no checkpoint directory {directory}; in {directory.parent}: {hint}")
    if (directory / "checkpoints").is_dir():
        return directory / "checkpoints"
    if directory.name == "checkpoints" or any(directory.glob("[0-9]*/contract")):
        return directory
    runs = sorted(p.name for p in directory.iterdir() if p.is_dir() and is_run(p))
    raise CheckpointError(_no_steps(directory) + (f"; runs in it: {', '.join(runs)}" if runs else ""))


def find_step(directory: str | Path, step: Step = None) -> Path:
    """Returns the directory of one step: `directory` itself, or the newest (or given) step in it or its `checkpoints`.

    step: a number, or "best": the one with the lowest score of those that are there, see `Keep`.

    Raises:
        CheckpointError: there is none; says what is there instead.
    """
    directory = Path(directory).resolve()
    if step is None and (directory / "contract").is_dir():
        return directory
    root = steps_directory(directory)
    steps = complete_steps(root)
    if not steps:
        raise CheckpointError(_no_steps(root))
    if step == "best":
        return steps[_best_step(root, steps)]
    if step is not None and step not in steps:
        raise CheckpointError(f"{directory} has no step {step}; steps there: {sorted(steps)}")
    return steps[max(steps) if step is None else step]


def _best_step(root: Path, steps: Mapping[int, Path]) -> int:
    """Returns the step with the lowest score.

    Raises:
        CheckpointError: the run ranks its steps by nothing that any of them has.
    """
    keep = stored_keep(read_record(steps[max(steps)])) or Keep()
    scores = {step: stored_scores(path).get(keep.metric) for step, path in steps.items()}
    ranked = dataclasses.replace(keep, best=1).kept_by(scores)
    best = [step for step, rules in ranked.items() if "best" in rules]
    if not best:
        raise CheckpointError(
            f"{root}: none of its steps {sorted(steps)} has a score ({keep.metric}), so none is the best; give a step, "
            "or train with validation where it saves, keep=Keep(best=1)"
        )
    return best[0]


def _no_steps(directory: Path) -> str:
    return (
        f"{directory} holds no complete checkpoint; expected a directory per step with params/ and contract/, "
        f"got {sorted(p.name for p in directory.iterdir()) or 'an empty directory'}"
    )


def is_run(path: str | Path) -> bool:
    """Says whether a directory is one of our checkpoints or runs, rather than published weights."""
    path = Path(path)
    return any((path / name).is_dir() for name in ("checkpoints", "contract")) or any(path.glob("[0-9]*/contract"))
