"""Self-contained checkpoints: weights, optimiser and data position, and everything that serving depends on.

Layout of `<directory>/<step>/` (Orbax):
    params/     raw float32 weights                    ema/    their moving average (what is served), when kept
    opt_state/  optax state                            contract/  one JSON object, see `Contract`
"""

import base64
import dataclasses
import hashlib
import importlib.metadata
import json
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from rich.console import Console
from rich.table import Table

from openpi_like.config import from_json, near_names, to_json
from openpi_like.data.normalize import Normalization
from openpi_like.data.text import TextTokenizer
from openpi_like.robots import Robot
from openpi_like.train.state import ModelDef, Params, TrainState

FORMAT = 1


class CheckpointError(ValueError):
    """A checkpoint is missing, damaged, or not of the kind asked for."""


@dataclasses.dataclass(frozen=True)
class Contract:
    """What serving depends on. Its hash is checked when it is read, and sent to every client.

    policy: the model's config. robots and normalizations: by robot. tokenizer: SentencePiece model, base64.
    renderers: robot name -> how the training images were rendered, for simulated robots; None for real ones.
    """

    policy: Any
    robots: tuple[Robot, ...]
    normalizations: dict[str, Normalization]
    tokenizer: str
    renderers: dict[str, str | None]

    def hash(self) -> str:
        """Returns the SHA-256 of the contract as canonical JSON."""
        return hashlib.sha256(json.dumps(to_json(self), sort_keys=True).encode()).hexdigest()

    def text_tokenizer(self) -> TextTokenizer:
        """Returns the tokenizer of the policy's prompts."""
        return TextTokenizer(base64.b64decode(self.tokenizer), self.policy.prompt_len)


@dataclasses.dataclass(frozen=True)
class PolicyParts:
    """A trained policy as serving needs it. model: the bound module; renderer: see `Contract.renderers`."""

    model: Any
    robots: tuple[Robot, ...]
    normalizations: dict[str, Normalization]
    tokenizer: TextTokenizer
    contract_hash: str
    step: int
    renderer: dict[str, str | None]


def encode_tokenizer(model: bytes) -> str:
    """Returns a SentencePiece model as the text `Contract.tokenizer` holds."""
    return base64.b64encode(model).decode("ascii")


class Checkpointer:
    """Saves asynchronously and restores; one per run directory."""

    def __init__(self, directory: str | Path, *, keep: int = 2) -> None:
        """keep: how many of the newest steps stay on disk."""
        self.directory = Path(directory).resolve()
        # Only complete steps count: Orbax renames a step into place when all of it is written, and what a kill left
        # behind is removed here.
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True)
        self._manager = ocp.CheckpointManager(self.directory, options=options)

    def latest_step(self) -> int | None:
        """Returns the newest complete step, or None."""
        return self._manager.latest_step()

    def save(self, state: TrainState, *, position: int, contract: Contract, config: Any) -> None:
        """Starts saving; returns once the arrays are copied, before they are written.

        position: global sample index of the next batch. config: the run's, for the record.
        """
        step = int(state.step)
        record = {
            "format": FORMAT,
            "step": step,
            "position": position,
            "contract": to_json(contract),
            "hash": contract.hash(),
            "config": to_json(config),
            "versions": {p: importlib.metadata.version(p) for p in ("jax", "flax", "optax", "orbax-checkpoint")},
        }
        items: dict[str, Any] = {
            "params": ocp.args.StandardSave(state.params),
            "opt_state": ocp.args.StandardSave(state.opt_state),
            "contract": ocp.args.JsonSave(record),
        }
        if state.ema is not None:
            items["ema"] = ocp.args.StandardSave(state.ema)
        self._manager.save(step, args=ocp.args.Composite(**items))

    def restore(self, abstract: TrainState, shardings: TrainState, *, contract: Contract) -> tuple[TrainState, int]:
        """Returns the newest state, placed as `shardings` say, and the data position that belongs to it.

        Raises:
            CheckpointError: no step, or its contract is not `contract` (other robots, statistics, model ...).
        """
        step = self.latest_step()
        if step is None:
            raise CheckpointError(f"no complete checkpoint in {self.directory}")
        record = read_record(self.directory / str(step))
        if record["hash"] != contract.hash():
            raise CheckpointError(
                f"cannot resume from {self.directory}/{step}: this run differs in {_differences(record, contract)}; "
                "train into another directory, or use warm_start to begin from these weights"
            )

        def target(tree: Any, placed: Any) -> Any:
            return ocp.args.StandardRestore(
                jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), tree, placed)
            )

        items = {name: target(getattr(abstract, name), getattr(shardings, name)) for name in ("params", "opt_state")}
        if abstract.ema is not None:
            items["ema"] = target(abstract.ema, shardings.ema)
        restored = self._manager.restore(step, args=ocp.args.Composite(**items))
        state = TrainState(
            step=jax.device_put(np.int32(step), shardings.step),
            params=restored["params"],
            ema=restored["ema"] if abstract.ema is not None else None,
            opt_state=restored["opt_state"],
        )
        return state, int(record["position"])

    def close(self) -> None:
        """Waits until everything is on disk."""
        self._manager.wait_until_finished()
        self._manager.close()


def _differences(record: dict[str, Any], contract: Contract) -> str:
    stored, now = record["contract"], to_json(contract)
    return ", ".join(k for k in now if stored.get(k) != now[k]) or "nothing visible (the stored hash is wrong)"


def find_step(directory: str | Path, step: int | None = None) -> Path:
    """Returns the directory of one step: `directory` itself, or the newest (or given) step in it or its `checkpoints`.

    Raises:
        CheckpointError: there is none; says what is there instead.
    """
    directory = Path(directory).resolve()
    if not directory.is_dir():
        beside = sorted(p.name for p in directory.parent.iterdir() if p.is_dir()) if directory.parent.is_dir() else []
        raise CheckpointError(f"no checkpoint directory {directory}; in {directory.parent}: {beside or 'nothing'}")
    if step is None and (directory / "contract").is_dir():
        return directory
    root = directory / "checkpoints" if (directory / "checkpoints").is_dir() else directory
    steps = {int(p.name): p for p in root.iterdir() if p.name.isdigit() and (p / "contract").is_dir()}
    if not steps:
        raise CheckpointError(
            f"{directory} holds no complete checkpoint; expected a directory per step with params/ and contract/, "
            f"got {sorted(p.name for p in root.iterdir()) or 'an empty directory'}"
        )
    if step is not None and step not in steps:
        raise CheckpointError(f"{directory} has no step {step}; steps there: {sorted(steps)}")
    return steps[max(steps) if step is None else step]


def read_record(step_dir: Path) -> dict[str, Any]:
    """Returns the JSON record of one step, with its hash checked.

    Raises:
        CheckpointError: unreadable, of another format, or changed after it was written.
    """
    try:
        with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as checkpointer:
            record = checkpointer.restore(step_dir / "contract")
    except (OSError, ValueError) as e:
        raise CheckpointError(f"cannot read the contract of {step_dir}: {e}; the checkpoint is damaged") from e
    if record.get("format") != FORMAT:
        raise CheckpointError(f"{step_dir}: format {record.get('format')!r}, expected {FORMAT}; use a matching version")
    digest = hashlib.sha256(json.dumps(record["contract"], sort_keys=True).encode()).hexdigest()
    if digest != record["hash"]:
        raise CheckpointError(
            f"{step_dir}: contract hash {digest[:12]}, expected {record['hash'][:12]}; the contract was changed after "
            "training, so normalisation or robots may not fit the weights: take the original directory"
        )
    return record


def read_contract(step_dir: Path) -> Contract:
    """Returns the contract of one step."""
    return from_json(read_record(step_dir)["contract"])


def _read_weights(step_dir: Path, *, average: bool = True, shardings: Params | None = None) -> Params:
    """Reads the averaged weights, or the raw ones where no average was kept or `average` is False."""
    item = step_dir / ("ema" if average and (step_dir / "ema").is_dir() else "params")
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            if shardings is None:
                device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
                shapes = checkpointer.metadata(item).item_metadata.tree
                shardings = jax.tree.map(lambda _: device, shapes, is_leaf=lambda x: hasattr(x, "shape"))
            else:
                shapes = checkpointer.metadata(item).item_metadata.tree
            target = jax.tree.map(
                lambda m, s: jax.ShapeDtypeStruct(m.shape, m.dtype, sharding=s),
                shapes,
                shardings,
                is_leaf=lambda x: hasattr(x, "shape"),
            )
            return checkpointer.restore(item, target)
    except Exception as e:  # Orbax raises bare Exception for a damaged array
        first = str(e.__cause__ or e).split("\n")[0]
        raise CheckpointError(f"cannot read the weights {item}: {first}; they are damaged or incomplete") from e


def load_policy_parts(directory: str | Path, step: int | None = None, *, ema: bool = True) -> PolicyParts:
    """Loads everything that serving needs from a checkpoint directory.

    Raises:
        CheckpointError: missing, damaged, or its weights do not fit its own model config.
    """
    step_dir = find_step(directory, step)
    record = read_record(step_dir)
    contract: Contract = from_json(record["contract"])
    model = ModelDef(contract.policy)
    params = _read_weights(step_dir, average=ema)
    problems = _mismatches(params, model.shapes)
    if problems:
        raise CheckpointError(f"{step_dir}: weights do not fit the model config:\n  " + "\n  ".join(problems))
    return PolicyParts(
        model=model.bind(params),
        robots=contract.robots,
        normalizations=contract.normalizations,
        tokenizer=contract.text_tokenizer(),
        contract_hash=record["hash"],
        step=int(record["step"]),
        renderer=contract.renderers,
    )


def flatten(tree: Params, prefix: str = "") -> dict[str, Any]:
    """Returns a nested dict as {"a/b/c": leaf}."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat.update(flatten(value, f"{prefix}{key}/") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return flat


def unflatten(flat: dict[str, Any]) -> Params:
    """Inverse of `flatten`."""
    tree: Params = {}
    for path, value in flat.items():
        *parents, leaf = path.split("/")
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[leaf] = value
    return tree


def _mismatches(params: Params, shapes: Params) -> list[str]:
    have, want = flatten(params), flatten(shapes)
    problems = [f"{k}: missing, {near_names(k, list(have))}" for k in sorted(want.keys() - have.keys())]
    problems += [f"{k}: not part of this model" for k in sorted(have.keys() - want.keys())]
    problems += [
        f"{k}: got shape {tuple(have[k].shape)}, expected {want[k].shape}"
        for k in sorted(have.keys() & want.keys())
        if tuple(have[k].shape) != tuple(want[k].shape)
    ]
    return problems


@dataclasses.dataclass(frozen=True)
class WarmStart:
    """Start from the weights of another run.

    checkpoint: its directory. reinitialize: regular expressions of weights that start fresh although the checkpoint has
    them, or that it may lack; whatever else differs is an error, so nothing is loaded partly without being asked for.
    """

    checkpoint: str
    reinitialize: tuple[str, ...] = ()


def warm_start(start: WarmStart, fresh: Params, shardings: Params) -> tuple[Params, list[dict[str, str]]]:
    """Returns weights taken from a checkpoint where they fit, and a report with one row per weight.

    fresh: freshly initialised weights. A row is {"weight", "shape", "from": "checkpoint"|"fresh", "why"}.

    Raises:
        CheckpointError: a weight differs and no pattern of `start.reinitialize` allows it; lists all of them, and
            patterns that match nothing.
    """
    step_dir = find_step(start.checkpoint)
    with ocp.StandardCheckpointer() as checkpointer:
        item = step_dir / ("ema" if (step_dir / "ema").is_dir() else "params")
        stored = flatten(checkpointer.metadata(item).item_metadata.tree)
    wanted, placed = flatten(fresh), flatten(shardings)
    allowed = {k: next((p for p in start.reinitialize if re.search(p, k)), None) for k in wanted | stored}
    unused = [p for p in start.reinitialize if not any(re.search(p, k) for k in wanted)]
    problems = [f"pattern {p!r} matches no weight; {near_names(p, list(wanted))}" for p in unused]
    rows, take = [], []
    for k in sorted(wanted | stored):
        have = tuple(stored[k].shape) if k in stored else None
        want = tuple(wanted[k].shape) if k in wanted else None
        if want is None:
            problems.append(f"{k}: only in the checkpoint, not part of this model")
        elif allowed[k]:
            kept = "the checkpoint has none" if have is None else f"the checkpoint has {have}"
            rows.append({"weight": k, "shape": str(want), "from": "fresh", "why": f"asked by {allowed[k]!r}, {kept}"})
        elif have == want:
            take.append(k)
            rows.append({"weight": k, "shape": str(want), "from": "checkpoint", "why": "same name and shape"})
        else:
            problems.append(f"{k}: the checkpoint has {have or 'none'}, this model {want}")
    if problems:
        raise CheckpointError(
            f"cannot start from {step_dir}:\n  " + "\n  ".join(problems) + "\nallow what may start fresh with "
            "warm_start.reinitialize, a tuple of regular expressions"
        )
    everywhere = next(iter(placed.values()))
    tree_shardings = unflatten({k: placed[k] if k in take else _anywhere(everywhere) for k in stored})
    loaded = flatten(_read_weights(step_dir, shardings=tree_shardings))
    return unflatten({k: loaded[k] if k in take else wanted[k] for k in wanted}), rows


def _anywhere(like: Any) -> Any:
    return jax.sharding.NamedSharding(like.mesh, jax.sharding.PartitionSpec())


def print_load_report(rows: list[dict[str, str]], console: Console) -> None:
    """Prints one line per weight: taken from the checkpoint or fresh, and why."""
    table = Table(title="weights", show_lines=False)
    for column in ("weight", "shape", "from", "why"):
        table.add_column(column)
    for row in rows:
        style = None if row["from"] == "checkpoint" else "yellow"
        table.add_row(row["weight"], row["shape"], row["from"], row["why"], style=style)
    console.print(table)
