"""Whether a resume and a server would find all they need in the checkpoints of a run."""

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from openpi_like.config import from_json
from openpi_like.models.arrays import leaf_name, open_arrays
from openpi_like.models.weights import WeightsError, flatten, unflatten
from openpi_like.train.checkpoints.base import BASE, plain, run_of
from openpi_like.train.checkpoints.checkpoint import (
    Step,
    complete_steps,
    find_step,
    incomplete_steps,
    stored_trainable,
)
from openpi_like.train.checkpoints.contract import CheckpointError, contract_problems, read_record
from openpi_like.train.checkpoints.inspection import METADATA, size_on_disk, step_metadata
from openpi_like.train.checkpoints.load import misfits
from openpi_like.train.checkpoints.warm_start import BaseArrays, open_base
from openpi_like.train.state import ModelDef

Progress = Callable[[str], None]  # is told what is being read


@dataclasses.dataclass(frozen=True)
class Problem:
    """What is wrong with a step: in which item, and with which array of it, where it is about one.

    step: the name of its directory, as in `StepReport`.
    """

    step: str
    item: str
    array: str | None
    what: str

    def __str__(self) -> str:
        return ", ".join([f"step {self.step}", self.item, *([self.array] if self.array else [])]) + f": {self.what}"


@dataclasses.dataclass
class StepReport:
    """Of one step. arrays: that were read. notes: what could not be checked, and why."""

    step: str
    bytes: int
    arrays: int = 0
    problems: list[Problem] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)

    def add(self, item: str, array: str | None, what: str) -> None:
        """Adds a problem."""
        self.problems.append(Problem(self.step, item, array, what))


def verify_run(
    directory: str | Path, step: Step = None, *, progress: Progress = lambda _: None
) -> Iterator[StepReport]:
    """Yields, for every step (or one), all that a resume or a server would miss in it.

    Every array is read to its end, one at a time, and so is the base that the steps of a run share, once.

    Raises:
        CheckpointError: no such run or step.
    """
    newest = find_step(directory, step)
    paths, broken = [newest], {}
    if step is None and newest != Path(directory).resolve():
        broken = incomplete_steps(newest.parent)
        paths = [path for _, path in sorted((complete_steps(newest.parent) | broken).items())]
    read: set[str] = set()
    for path in paths:
        report = StepReport(path.name, size_on_disk(path))
        if path in broken.values():
            report.add("contract", None, "missing: this was copied or deleted in part; copy it again or remove it")
        else:
            _verify_step(report, path, read, progress)
        yield report


def _verify_step(report: StepReport, step_dir: Path, read: set[str], progress: Progress) -> None:
    """read: bases that need not be read again, as JSON; adds this one's."""
    items = set(step_metadata(step_dir).get("item_handlers", ()))
    if not items:
        report.add(METADATA, None, "missing or unreadable: it says which items there are, so one may be missing unseen")
    items |= {"params"} | {p.name for p in step_dir.iterdir() if p.name in ("ema", "opt_state")}
    expected: dict[str, dict[str, jax.ShapeDtypeStruct] | None] = {}
    try:
        record = read_record(step_dir)
        contract = from_json(record["contract"])
        model = ModelDef(contract.policy, stored_trainable(record))
    except (CheckpointError, ValueError) as e:
        report.add("contract", None, str(e))
    else:
        if report.step.isdigit() and record["step"] != int(report.step):
            report.add("contract", None, f"it is of step {record['step']}; the directory was renamed")
        dropped = tuple(record["config"].get("data", {}).get("drop_cameras", ()))
        for problem in contract_problems(contract, drop_cameras=dropped):
            report.add("contract", None, problem)
        shapes = flatten(model.shapes)
        expected["params"], expected["ema"] = ({k: shapes[k] for k in of} for of in (model.trained, model.learned))
        if "opt_state" in items:
            expected["opt_state"] = _optimizer_arrays(record, model)
            if expected["opt_state"] is None:
                report.notes.append("opt_state was read, but the config in the record does not say what belongs in it")
        key = json.dumps([record.get("base"), record.get("trainable"), record["contract"]["policy"]])
        if record.get("base") is not None and key not in read:
            read.add(key)
            _verify_base(report, step_dir, record, model, progress)
    trained = "opt_state" in items  # imported weights may be of any dtype
    for item in sorted(items & {"params", "ema", "opt_state"}):
        _verify_item(report, step_dir / item, expected.get(item), exact=trained, progress=progress)


def _optimizer_arrays(record: Mapping[str, Any], model: ModelDef) -> dict[str, jax.ShapeDtypeStruct] | None:
    """Returns the arrays of an optimiser's state by their names on disk; None where the record has no optimiser."""
    try:
        optimizer = from_json(record["config"]["optimizer"]).create(model.maps)
    except (KeyError, ValueError):
        return None
    params = unflatten({name: v for name, v in flatten(model.shapes).items() if name in model.learned})
    leaves, _ = jax.tree_util.tree_flatten_with_path(jax.eval_shape(optimizer.init, params))
    return {leaf_name(path): leaf for path, leaf in leaves}


def _verify_item(
    report: StepReport,
    directory: Path,
    expected: Mapping[str, jax.ShapeDtypeStruct] | None,
    *,
    exact: bool,
    progress: Progress,
) -> None:
    """expected: None where it is not known. exact: dtypes, too."""
    try:
        arrays = open_arrays(directory)
    except WeightsError as e:
        report.add(directory.name, None, str(e))
        return
    if expected is not None:
        for name, problem in misfits(arrays.shapes, {k: tuple(v.shape) for k, v in expected.items()}).items():
            report.add(directory.name, name, problem)
    for name in arrays.shapes:
        dtype = expected[name].dtype if expected is not None and exact and name in expected else None
        _verify_array(report, directory.name, name, arrays.read, dtype, progress)


def _verify_base(
    report: StepReport, step_dir: Path, record: dict[str, Any], model: ModelDef, progress: Progress
) -> None:
    try:
        if record["base"]["source"] is None:
            shapes = flatten(model.shapes)
            frozen = {
                k: jax.eval_shape(lambda x, k=k: model.hold(k, x), shapes[k]) for k in shapes.keys() - model.trained
            }
            held = {k: tuple(v.shape) for k, v in flatten(plain(unflatten(frozen))).items()}
            for name, problem in misfits(open_base(run_of(step_dir)).shapes, held).items():
                report.add(BASE, name, problem)
        arrays = BaseArrays(step_dir, record, model)
    except (CheckpointError, WeightsError) as e:
        report.add(BASE, None, str(e))
        return
    for name in arrays.shapes:
        _verify_array(report, BASE, name, arrays.read, None, progress)


def _verify_array(
    report: StepReport, item: str, name: str, read: Callable[[str], np.ndarray], dtype: Any, progress: Progress
) -> None:
    progress(f"step {report.step}, {item}, {name}")
    try:
        array = read(name)
    except Exception as e:  # Orbax raises bare Exception for a damaged array
        first = str(e.__cause__ or e).strip().split("\n")[0]
        report.add(item, name, f"cannot be read: {first}")
        return
    report.arrays += 1
    if dtype is not None and array.dtype != dtype:
        report.add(item, name, f"got {array.dtype}, expected {dtype}")
    if jnp.issubdtype(array.dtype, jnp.floating):
        bad = array.size - int(np.isfinite(array).sum())
        if bad:
            report.add(item, name, f"{bad:,} of {array.size:,} values are not finite")
