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
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from openpi_like.config import from_json, near_names, to_json
from openpi_like.data.fast import FastFiles, FastTokenizer
from openpi_like.data.loader import action_token_problems
from openpi_like.data.normalize import Normalization
from openpi_like.data.text import TextTokenizer
from openpi_like.models.pi0_fast import ActionDecoding, Pi0FastConfig
from openpi_like.models.weights import (
    Arrays,
    LoadPlan,
    WeightsError,
    flatten,
    open_arrays,
    plan_load,
    read_weights,
    unflatten,
)
from openpi_like.robots import Robot, policy_problems
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
    action_tokenizer: FastFiles | None = None

    def hash(self) -> str:
        """Returns the SHA-256 of the contract as canonical JSON."""
        return hashlib.sha256(json.dumps(to_json(self), sort_keys=True).encode()).hexdigest()

    def text_tokenizer(self) -> TextTokenizer:
        """Returns the tokenizer of the policy's prompts and answers."""
        p = self.policy
        return TextTokenizer(
            base64.b64decode(self.tokenizer), p.prompt_len, prompt_format=p.prompt_format, answer_len=p.answer_len
        )

    def fast_tokenizer(self) -> FastTokenizer | None:
        """Returns the tokenizer of actions, where the policy has action tokens."""
        return None if self.action_tokenizer is None else FastTokenizer(self.action_tokenizer)

    def sampling_options(self) -> dict[str, Any]:
        """Returns what `sample_actions` of this policy needs besides an observation, by name."""
        if not isinstance(self.policy, Pi0FastConfig):
            return {}
        tokenizer = self.fast_tokenizer()
        assert tokenizer is not None  # contract_problems has checked it
        tables = tokenizer.tables(self.policy.action_horizon * self.policy.action_dim, count=self.policy.tokens.count)
        begin = np.array(self.text_tokenizer().action_indicator(), np.int32)
        return {"decoding": ActionDecoding(**dataclasses.asdict(tables), begin=begin)}


@dataclasses.dataclass(frozen=True)
class PolicyParts:
    """A trained policy as serving needs it.

    model: the bound module. renderer: see `Contract.renderers`. sampling_options: see `Contract.sampling_options`.
    """

    model: Any
    robots: tuple[Robot, ...]
    normalizations: dict[str, Normalization]
    tokenizer: TextTokenizer
    contract_hash: str
    step: int
    renderer: dict[str, str | None]
    sampling_options: dict[str, Any] = dataclasses.field(default_factory=dict)


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

    def save(self, state: TrainState, *, position: int, order: dict[str, Any], contract: Contract, config: Any) -> None:
        """Starts saving; returns once the arrays are copied, before they are written.

        position: global sample index of the next batch. order: what positions stand for, `Loader.order`. config: the
        run's, for the record.
        """
        step = int(state.step)
        record = {
            "format": FORMAT,
            "step": step,
            "position": position,
            "order": order,
            "config": to_json(config),
            **_contract_record(contract),
        }
        items: dict[str, Any] = {
            "params": ocp.args.StandardSave(state.params),
            "opt_state": ocp.args.StandardSave(state.opt_state),
            "contract": ocp.args.JsonSave(record),
        }
        if state.ema is not None:
            items["ema"] = ocp.args.StandardSave(state.ema)
        self._manager.save(step, args=ocp.args.Composite(**items))

    def restore(
        self, abstract: TrainState, shardings: TrainState, *, contract: Contract
    ) -> tuple[TrainState, int, dict[str, Any] | None]:
        """Returns the newest state, placed as `shardings` say, and the data position and order that belong to it.

        The order is None where nothing was trained, as in the weights that `save_policy` writes, and where it was not
        recorded yet.

        Raises:
            CheckpointError: no step, or its contract is not `contract` (other robots, statistics, model ...).
        """
        step = self.latest_step()
        if step is None:
            raise CheckpointError(f"no complete checkpoint in {self.directory}")
        record = read_record(self.directory / str(step))
        # Read back first: what this version added to robots and configs has its default in an older record.
        stored = from_json(record["contract"])
        if stored.hash() != contract.hash():
            raise CheckpointError(
                f"cannot resume from {self.directory}/{step}: this run differs in {_differences(stored, contract)}; "
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
        return state, int(record["position"]), record.get("order")

    def close(self) -> None:
        """Waits until everything is on disk."""
        self._manager.wait_until_finished()
        self._manager.close()


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
    record = {"format": FORMAT, "step": 0, "position": 0, "config": {"origin": origin}, **_contract_record(contract)}
    items = {"params": ocp.args.StandardSave(params), "contract": ocp.args.JsonSave(record)}
    manager.save(0, args=ocp.args.Composite(**items))
    manager.wait_until_finished()
    manager.close()
    return directory / "0"


def contract_problems(contract: Contract, *, drop_cameras: Sequence[str] = ()) -> list[str]:
    """Returns what of robots, statistics and tokenizers does not fit the policy. drop_cameras: it need not see them."""
    policy = contract.policy
    if not hasattr(policy, "action_dim"):
        return [f"{type(policy).__name__} samples no actions; expected a policy, such as Pi0Config"]
    problems = []
    for robot in contract.robots:
        found = policy_problems(robot, policy, drop_cameras=drop_cameras)
        try:
            contract.normalizations[robot.name].check(robot)
        except (KeyError, ValueError) as e:
            found.append(str(e))
        problems += [f"robot {robot.name!r}: {p}" for p in found]
    try:
        tokenizer, action_tokenizer = contract.text_tokenizer(), contract.fast_tokenizer()
    except ValueError as e:
        return [*problems, str(e)]
    if tokenizer.vocab_size > policy.vocab_size:
        problems.append(f"the tokenizer has {tokenizer.vocab_size} ids, the policy knows {policy.vocab_size}")
    problems += action_token_problems(policy, tokenizer, action_tokenizer)
    if isinstance(policy, Pi0FastConfig) and action_tokenizer is not None:
        least = action_tokenizer.tables(policy.action_horizon * policy.action_dim).least
        for robot in contract.robots:
            size = robot.action_horizon * robot.action_size
            needs = int(least[min(size, len(least) - 1), 0])
            if needs > policy.answer_len:
                problems.append(
                    f"robot {robot.name!r}: a chunk of {size} coefficients takes at least {needs} action tokens, the "
                    f"policy has room for {policy.answer_len}"
                )
    return problems


def _contract_record(contract: Contract) -> dict[str, Any]:
    packages = ("jax", "flax", "optax", "orbax-checkpoint")
    return {
        "contract": to_json(contract),
        "hash": contract.hash(),
        "versions": {p: importlib.metadata.version(p) for p in packages},
    }


def _differences(stored: Contract, contract: Contract) -> str:
    before, now = to_json(stored), to_json(contract)
    return ", ".join(k for k in now if before[k] != now[k])


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


def _read_weights(step_dir: Path, *, average: bool, dtype: str | None) -> Params:
    """Reads the averaged weights, or the raw ones where no average was kept or `average` is False."""
    item = step_dir / ("ema" if average and (step_dir / "ema").is_dir() else "params")
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            target = jax.tree.map(
                lambda m: jax.ShapeDtypeStruct(m.shape, m.dtype if dtype is None else dtype, sharding=device),
                checkpointer.metadata(item).item_metadata.tree,
                is_leaf=lambda x: hasattr(x, "shape"),
            )
            return checkpointer.restore(item, target)
    except Exception as e:  # Orbax raises bare Exception for a damaged array
        first = str(e.__cause__ or e).split("\n")[0]
        raise CheckpointError(f"cannot read the weights {item}: {first}; they are damaged or incomplete") from e


def load_policy_parts(
    directory: str | Path, step: int | None = None, *, ema: bool = True, dtype: str | None = None
) -> PolicyParts:
    """Loads everything that serving needs from a checkpoint directory.

    dtype: of the weights; None as stored. "bfloat16" halves the memory, and the time where weights are what is read.

    Raises:
        CheckpointError: missing, damaged, or its weights do not fit its own model config.
    """
    step_dir = find_step(directory, step)
    record = read_record(step_dir)
    contract: Contract = from_json(record["contract"])
    model = ModelDef(contract.policy)
    params = _read_weights(step_dir, average=ema, dtype=dtype)
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
        sampling_options=contract.sampling_options(),
    )


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
    """Start from the weights of another run, or from published ones.

    checkpoint: directory of a run, or weights that `openpi_like.models.weights.open_arrays` opens.
    reinitialize: regular expressions of weights that start fresh although the checkpoint has them, or that it may lack;
        whatever else differs is an error, so nothing is loaded partly without being asked for.
    drop: regular expressions of arrays of the checkpoint (in its own names) that this model has no place for.
    format: of published weights, a name in `openpi_like.models.formats.FORMATS`; None recognises it by its names.
    lora_scale: merges LoRA weights of openpi, see `openpi_like.models.weights.LoraMerged`.
    """

    checkpoint: str
    reinitialize: tuple[str, ...] = ()
    drop: tuple[str, ...] = ()
    format: str | None = None
    lora_scale: float | None = None


def is_run(path: str | Path) -> bool:
    """Says whether a directory is one of our checkpoints or runs, rather than published weights."""
    path = Path(path)
    return any((path / name).is_dir() for name in ("checkpoints", "contract")) or any(path.glob("[0-9]*/contract"))


def open_weights(checkpoint: str | Path, *, lora_scale: float | None = None) -> Arrays:
    """Opens the (averaged, where kept) weights of one of our checkpoints, or published ones.

    Raises:
        CheckpointError, WeightsError: there are none, or they cannot be read.
    """
    if not is_run(checkpoint):
        return open_arrays(checkpoint, lora_scale=lora_scale)
    if lora_scale is not None:
        raise WeightsError(f"lora_scale={lora_scale} is for published weights, {checkpoint} is a run; leave it out")
    step_dir = find_step(checkpoint)
    return open_arrays(step_dir / ("ema" if (step_dir / "ema").is_dir() else "params"))


def warm_start(
    start: WarmStart, config: Any, shardings: Params, fresh: Callable[[Sequence[str]], dict[str, Any]]
) -> tuple[Params, LoadPlan]:
    """Returns weights taken from a checkpoint where they fit and fresh where asked for, and what was done.

    shardings: nested, one per weight. fresh: returns freshly initialised weights, flat, for these names.

    Raises:
        CheckpointError, WeightsError: a weight differs and no pattern of `start.reinitialize` allows it; lists all of
            them, and patterns that match nothing.
    """
    arrays = open_weights(start.checkpoint, lora_scale=start.lora_scale)
    try:
        plan = plan_load(config, arrays, fmt=start.format, reinitialize=start.reinitialize, drop=start.drop)
    except WeightsError as e:
        raise WeightsError(
            f"cannot start from {start.checkpoint}: {e}\nallow what may start fresh with warm_start.reinitialize, and "
            "what may be left out with warm_start.drop (tuples of regular expressions)"
        ) from e
    weights = read_weights(config, arrays, plan, shardings=flatten(shardings))
    return unflatten(weights | fresh([row["weight"] for row in plan.report if row["from"] == "fresh"])), plan
