"""Weights to start from: another run of ours, or published ones."""

import dataclasses
import re
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np
import qwix

from openpi_like.config import from_json
from openpi_like.models.arrays import Arrays, OrbaxArrays, open_arrays
from openpi_like.models.lora import SUFFIX, overlays
from openpi_like.models.weights import LoadPlan, WeightReader, WeightsError, flatten, plan_load, read_weights, unflatten
from openpi_like.train.checkpoints.base import BASE, digest, run_of
from openpi_like.train.checkpoints.checkpoint import find_step, is_run, stored_trainable
from openpi_like.train.checkpoints.contract import CheckpointError, Contract, read_contract, read_record
from openpi_like.train.state import ModelDef, Params

if TYPE_CHECKING:
    from openpi_like.train.state import Trainer


@dataclasses.dataclass(frozen=True)
class WarmStart:
    """Start from the weights of another run, or from published ones.

    checkpoint: directory of a run, or weights that `openpi_like.models.arrays.open_arrays` opens.
    reinitialize: regular expressions of weights that start fresh although the checkpoint has them, or that it may lack;
        whatever else differs is an error, so nothing is loaded partly without being asked for.
    drop: regular expressions of arrays of the checkpoint (in its own names) that this model has no place for.
    format: of published weights, a name in the model's `formats()`; None recognises it by its names.
    lora_scale: merges LoRA weights of openpi, see `openpi_like.models.arrays.LoraMerged`; where the run has LoRA of its
        own, None reads them into it.
    beside: another checkpoint, for the weights that this one leaves fresh: an expert trained alone, say, for a backbone
        that was published. What that one leaves fresh too starts fresh.
    """

    checkpoint: str
    reinitialize: tuple[str, ...] = ()
    drop: tuple[str, ...] = ()
    format: str | None = None
    lora_scale: float | None = None
    beside: "WarmStart | None" = None


def start_contract(start: WarmStart | None) -> Contract | None:
    """Returns the contract of the run that a run starts from; None where it starts from none of ours.

    Raises:
        CheckpointError: it cannot be read.
    """
    return read_contract(find_step(start.checkpoint)) if start is not None and is_run(start.checkpoint) else None


def open_weights(
    checkpoint: str | Path, *, lora_scale: float | None = None, average: bool = True, merge: bool = True
) -> Arrays:
    """Opens the (averaged, where kept and asked for) weights of one of our checkpoints, or published ones.

    Those of a run with frozen weights or LoRA come as one set, with the overlay merged into what it lies on; without
    `merge`, beside it.

    Raises:
        CheckpointError, WeightsError: there are none, or they cannot be read.
    """
    if not is_run(checkpoint):
        return open_arrays(checkpoint, lora_scale=lora_scale)
    if lora_scale is not None:
        raise WeightsError(f"lora_scale={lora_scale} is for published weights, {checkpoint} is a run; leave it out")
    step_dir = find_step(checkpoint)
    record = read_record(step_dir)
    trained = TrainedArrays(step_dir, record, average=average)
    return trained if record.get("base") is None else RunArrays(step_dir, record, trained, merge=merge)


class TrainedArrays:
    """The weights that a checkpoint holds, averaged where it has an average; of memory, there is none."""

    def __init__(self, step_dir: Path, record: dict[str, Any], *, average: bool) -> None:
        """
        Raises:
            WeightsError: they cannot be read.
        """
        averaged = average and (step_dir / "ema").is_dir()
        self._params = open_arrays(step_dir / "params")
        self._arrays = open_arrays(step_dir / "ema") if averaged else self._params
        beside = self._params.shapes.keys() - self._arrays.shapes.keys()
        if beside:
            beside &= ModelDef(from_json(record["contract"]).policy).memory
        self.shapes = {**self._arrays.shapes, **{name: self._params.shapes[name] for name in beside}}

    def read(self, name: str) -> np.ndarray:
        """Returns one weight."""
        return (self._arrays if name in self._arrays.shapes else self._params).read(name)


class RunArrays:
    """The weights of a run that trains only some of them: these from its checkpoint, the others from its base."""

    def __init__(self, step_dir: Path, record: dict[str, Any], trained: Arrays, *, merge: bool) -> None:
        """trained: what the checkpoint holds. merge: the overlay of LoRA into the others.

        Raises:
            CheckpointError, WeightsError: the base is not there.
        """
        self._model = ModelDef(from_json(record["contract"]).policy, stored_trainable(record))
        self._overlays = overlays(self._model.abstract) if merge else {}
        self._trained, self._frozen = trained, BaseArrays(step_dir, record, self._model)
        model = ModelDef(self._model.config) if merge else self._model
        self.shapes = {k: tuple(v.shape) for k, v in flatten(model.shapes).items()}

    def read(self, name: str) -> np.ndarray:
        """Returns one weight, in float32 where something is merged into it.

        Raises:
            CheckpointError: it is not the one that was trained on.
        """
        value = self._trained.read(name) if name in self._model.trained else self._frozen.read(name)
        overlay = self._overlays.get(name)
        if overlay is None:
            return np.asarray(value)
        a, b = (jnp.asarray(self._trained.read(f"{name}{SUFFIX}/{end}")) for end in "ab")
        return np.asarray(overlay.merge(jnp.asarray(value), a, b))


class BaseArrays:
    """The weights that a run does not train, from where it keeps or notes them, each checked."""

    def __init__(self, step_dir: Path, record: dict[str, Any], model: ModelDef) -> None:
        """
        Raises:
            CheckpointError, WeightsError: the base is not there.
        """
        self._model, self._digest = model, record["base"]["digest"]
        self.shapes = {k: tuple(v.shape) for k, v in flatten(model.shapes).items() if k not in model.trained}
        source = record["base"]["source"]
        self._where = ""
        self._readers: dict[str, tuple[str, WeightReader]] | None = None
        if source is None:
            self._where = str(run_of(step_dir) / BASE)
            self._base: Arrays = open_base(run_of(step_dir))
        else:
            start: WarmStart = from_json(source)
            self._readers = {}
            for where, arrays, plan in _sources(start, model, self.shapes):
                self._readers |= dict.fromkeys(plan.rows, (where, WeightReader(arrays, plan)))

    def read(self, name: str) -> np.ndarray:
        """Returns one weight, in the dtype it is held in; in float32 where that is of fewer bits than 16.

        Raises:
            CheckpointError: it is not the one that was trained on.
        """
        where = self._where if self._readers is None else self._readers[name][0]
        if self._readers is not None:
            held = self._model.hold(name, jnp.asarray(self._readers[name][1].weight(name, np.float32)))
        elif f"{name}/qvalue" in self._base.shapes:
            held = qwix.QArray(*(jnp.asarray(self._base.read(f"{name}/{part}")) for part in ("qvalue", "scale")))
        else:
            held = jnp.asarray(self._base.read(name))
        if digest({name: held}) != {name: self._digest.get(name)}:
            raise CheckpointError(f"{where}: {name} is not what was trained on; restore the base of this run")
        return np.asarray(qwix.dequantize(held) if isinstance(held, qwix.QArray) else held)


def open_base(run_dir: Path) -> Arrays:
    """Opens the frozen weights of a run.

    Raises:
        CheckpointError: they are not there.
    """
    directory = run_dir / BASE
    if not (directory / "_METADATA").exists():
        raise CheckpointError(
            f"{directory} is missing: the weights that this run does not train; copy it beside checkpoints/"
        )
    return OrbaxArrays(directory)


def base_plan(start: WarmStart, model: ModelDef, arrays: Arrays) -> LoadPlan:
    """Returns which arrays become which weights of the model that `start` is for.

    Raises:
        CheckpointError, WeightsError: as `warm_start`.
    """
    try:
        return plan_load(
            model.config,
            arrays,
            fmt=start.format,
            reinitialize=start.reinitialize,
            drop=start.drop,
            lora=model.lora,
        )
    except WeightsError as e:
        raise WeightsError(
            f"cannot start from {start.checkpoint}: {e}\nallow what may start fresh with warm_start.reinitialize, and "
            "what may be left out with warm_start.drop (tuples of regular expressions)"
        ) from e


def warm_start(start: WarmStart, trainer: "Trainer", *, again: bool = False) -> tuple[Params, LoadPlan]:
    """Returns weights taken from a checkpoint where they fit and fresh where asked for, and what was done.

    They are held as `Trainer.init_from` takes them.
    again: those that are not trained have to be read again from there, see `frozen_from`.

    Raises:
        CheckpointError, WeightsError: a weight differs and no pattern of `start.reinitialize` allows it; lists all of
            them, and patterns that match nothing. With `again`: some of those start fresh.
    """
    sources = _sources(start, trainer.model)
    plan = sources[0][2]
    for _, _, other in sources[1:]:
        found = {row["weight"]: row for row in other.report}
        report = [row if row["from"] == "checkpoint" else found[row["weight"]] for row in plan.report]
        plan = dataclasses.replace(plan, report=report, dropped=[*plan.dropped, *other.dropped])
    if again:
        _check_frozen(start, trainer, plan)
    weights: Params = {}
    for _, arrays, own in sources:
        weights |= read_weights(arrays, own, shardings=trainer.placement, hold=trainer.hold)
    fresh = trainer.fresh_weights([row["weight"] for row in plan.report if row["from"] == "fresh"])
    return unflatten(weights | fresh), plan


def _sources(
    start: WarmStart, model: ModelDef, wanted: Collection[str] | None = None
) -> list[tuple[str, Arrays, LoadPlan]]:
    """Returns where the weights come from: `start`, and what is beside it, each with what it is asked for.

    wanted: names of the weights that are asked for, None for all; what has none of them is not opened.
    """
    sources, taken = [], list[str]()
    while True:
        arrays = open_weights(start.checkpoint, lora_scale=start.lora_scale)
        also = tuple(f"^{re.escape(name)}$" for name in taken)
        plan = base_plan(dataclasses.replace(start, reinitialize=(*start.reinitialize, *also)), model, arrays)
        sources.append((start.checkpoint, arrays, plan))
        taken += plan.rows
        if start.beside is None or (wanted is not None and set(wanted) <= set(taken)):
            return sources
        start = start.beside


def _check_frozen(start: WarmStart, trainer: "Trainer", plan: LoadPlan) -> None:
    names = flatten(trainer.abstract.frozen)
    _check_held(start, {row["weight"] for row in plan.report if row["from"] == "fresh" and row["weight"] in names})


def _check_held(start: WarmStart, fresh: Iterable[str]) -> None:
    missing = sorted(fresh)
    if missing:
        raise CheckpointError(
            f"frozen weights that {start.checkpoint} does not have: {', '.join(missing)}; they are kept with the run "
            "with save_frozen=True only"
        )


def frozen_from(start: WarmStart, trainer: "Trainer") -> Params:
    """Returns the frozen weights of a run again, from where it started.

    Raises:
        CheckpointError, WeightsError: as `warm_start`; or some of them started fresh, and are nowhere.
    """
    names = flatten(trainer.abstract.frozen)
    weights: Params = {}
    for _, arrays, plan in _sources(start, trainer.model, names):
        only = dataclasses.replace(plan, rows={name: rows for name, rows in plan.rows.items() if name in names})
        weights |= read_weights(arrays, only, shardings=trainer.placement, hold=trainer.hold)
    _check_held(start, names.keys() - weights.keys())
    return unflatten(weights)
