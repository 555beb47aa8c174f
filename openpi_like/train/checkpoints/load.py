"""A checkpoint as what serving needs: the policy with its weights, robots, normalisation, tokenisers."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from openpi_like.config import from_json, near_names
from openpi_like.data.normalize import Normalization
from openpi_like.data.text import TextTokenizer
from openpi_like.models.arrays import OrbaxArrays
from openpi_like.models.weights import WeightsError, flatten, plan_load, read_weights, unflatten
from openpi_like.robots import Robot
from openpi_like.train.checkpoints.checkpoint import Step, find_step
from openpi_like.train.checkpoints.contract import CheckpointError, Contract, read_record
from openpi_like.train.checkpoints.warm_start import open_weights
from openpi_like.train.state import ModelDef, Params


@dataclasses.dataclass(frozen=True)
class PolicyParts:
    """A trained policy as serving needs it.

    model: the bound module. renderer: see `Contract.renderers`. sampling_options: see `Contract.sampling_options`.
    source: directory of the step, None where it is from none.
    """

    model: Any
    robots: tuple[Robot, ...]
    normalizations: dict[str, Normalization]
    tokenizer: TextTokenizer
    contract_hash: str
    step: int
    renderer: dict[str, str | None]
    sampling_options: dict[str, Any] = dataclasses.field(default_factory=dict)
    source: Path | None = None


def _read_weights(step_dir: Path, model: ModelDef, *, average: bool, dtype: str | None) -> Params:
    """Reads the averaged weights, or the raw ones where no average was kept, as of memory, or `average` is False."""
    item = step_dir / ("ema" if average and (step_dir / "ema").is_dir() else "params")
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            target = jax.tree.map(
                lambda m: jax.ShapeDtypeStruct(m.shape, dtype if dtype and m.shape else m.dtype, sharding=device),
                checkpointer.metadata(item).item_metadata.tree,
                is_leaf=lambda x: hasattr(x, "shape"),
            )
            weights = flatten(checkpointer.restore(item, target))
        if beside := model.memory - weights.keys():
            raw = OrbaxArrays(step_dir / "params")
            for name in beside & raw.shapes.keys():
                x = raw.read(name)
                weights[name] = jax.device_put(x.astype(dtype) if dtype and x.shape else x, device)
        return unflatten(weights)
    except Exception as e:  # Orbax raises bare Exception for a damaged array
        first = str(e.__cause__ or e).split("\n")[0]
        raise CheckpointError(f"cannot read the weights {item}: {first}; they are damaged or incomplete") from e


def _merged_weights(step_dir: Path, config: Any, *, average: bool, dtype: str | None) -> Params:
    """Reads trained and frozen weights as one set, the overlay of LoRA merged, one weight at a time."""
    try:
        arrays = open_weights(step_dir, average=average)
        weights = read_weights(arrays, plan_load(config, arrays, fmt="ours"), dtype=dtype or "float32")
    except WeightsError as e:
        raise CheckpointError(f"cannot read the weights {step_dir}: {e}") from e
    return unflatten(jax.device_put(weights, jax.local_devices()[0]))


def load_policy_parts(
    directory: str | Path, step: Step = None, *, ema: bool = True, dtype: str | None = None
) -> PolicyParts:
    """Loads everything that serving needs from a checkpoint directory.

    Where only some weights were trained, the others are read from the base of the run, and LoRA is merged.
    step: see `find_step`.
    dtype: of the weights; None as stored. "bfloat16" halves the memory, and the time where weights are what is read.

    Raises:
        CheckpointError: missing, damaged, or its weights do not fit its own model config.
    """
    step_dir = find_step(directory, step)
    record = read_record(step_dir)
    contract: Contract = from_json(record["contract"])
    model = ModelDef(contract.policy)
    if record.get("base") is None:
        params = _read_weights(step_dir, model, average=ema, dtype=dtype)
    else:
        params = _merged_weights(step_dir, contract.policy, average=ema, dtype=dtype)
    have, want = ({k: tuple(v.shape) for k, v in flatten(of).items()} for of in (params, model.shapes))
    problems = misfits(have, want)
    if problems:
        lines = [f"{name}: {problem}" for name, problem in problems.items()]
        raise CheckpointError(f"{step_dir}: weights do not fit the model config:\n  " + "\n  ".join(lines))
    return PolicyParts(
        model=model.bind(params),
        robots=contract.robots,
        normalizations=contract.normalizations,
        tokenizer=contract.text_tokenizer(),
        contract_hash=record["hash"],
        step=int(record["step"]),
        renderer=contract.renderers,
        sampling_options=contract.sampling_options(),
        source=step_dir,
    )


def misfits(have: Mapping[str, tuple[int, ...]], want: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """Returns what is wrong with arrays of these shapes, by name, where others are expected."""
    problems = {k: f"missing, {near_names(k, list(have))}" for k in sorted(want.keys() - have.keys())}
    problems |= {k: "not part of this model" for k in sorted(have.keys() - want.keys())}
    both = sorted(have.keys() & want.keys())
    return problems | {k: f"got shape {have[k]}, expected {want[k]}" for k in both if have[k] != want[k]}
