"""A config that fine-tunes a checkpoint to a robot: what fits, what starts fresh, what is held out; written as a file.

What is decided here stands in the file, in words of the library, and is there to be changed.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from openpi_like.config import from_json, load_run, near_names
from openpi_like.data import files
from openpi_like.data.dataset import open_dataset
from openpi_like.data.index import FrameIndex
from openpi_like.data.layouts import split_names
from openpi_like.data.selection import INTERVENED, SUCCESS, Selection
from openpi_like.data.text import TextTokenizer, read_tokenizer
from openpi_like.data.tokenizer import Tokenizer
from openpi_like.models.released import RELEASED, find_model
from openpi_like.models.weights import plan_load, weight_shapes
from openpi_like.robots import Robot, policy_problems
from openpi_like.robots.find import find_robot
from openpi_like.train.checkpoints.checkpoint import find_step, is_run
from openpi_like.train.checkpoints.contract import CheckpointError, Contract, read_contract, read_record
from openpi_like.train.checkpoints.warm_start import open_weights
from openpi_like.train.optimizer import OptimizerConfig
from openpi_like.train.presets import PRESETS, patterns
from openpi_like.train.statistics import Blended, Own, Pretrained, pretrained

LINE = 120  # characters of a line, at most, where it can be broken
_LONGEST = 4_096  # tokens by which a prompt may be longer than the policy's
STATISTICS: dict[str, Any] = {"own": Own, "pretrained": Pretrained, "blended": Blended}
SELECTIONS = {
    "all": Selection(),
    "success": Selection(success=SUCCESS),
    "corrections": Selection(intervened=INTERVENED, success=SUCCESS),
}


# By name, what stands in the file; given the cameras at a wrist, whose geometry stays.
AUGMENTATIONS: dict[str, Callable[[tuple[str, ...]], str | None]] = {
    "colours": lambda wrist: call("Augment.colours"),
    "openpi": lambda wrist: call("Augment.openpi", wrist_cameras=wrist or None),
    "octo": lambda wrist: call("Augment.octo", wrist_cameras=wrist or None),
    "none": lambda wrist: None,
}


@dataclasses.dataclass(frozen=True)
class FineTuning:
    """What is asked for.

    robot, data: as `find_robot` and `open_dataset` take them. start: a run of ours, or published weights.
    preset, statistics, selection: names in `PRESETS`, `STATISTICS` and `SELECTIONS`. statistics_of: see
        `Pretrained.robot`.
    run_dir: of the new run; statistics are kept in it.
    fresh: weights whose sizes the robot changes may start fresh. held_out: percent of the episodes of a dataset without
        a split "val" that are not trained on; 0 trains on all of them, and then nothing says which step is best.
    steps: at most. patience: validations, every `validate_every` steps, without a better one before the run stops.
    peak_lr: None is that of the run that it starts from, or 2.5e-5, times `Preset.rate`. The optimizer is of the run's
        kind, with its other numbers; of published weights AdamW.
    augment: random changes of training images, a name in `AUGMENTATIONS`.
    model, tokenizer, action_tokenizer: of published weights, which do not know: a name in `RELEASED` or a config file,
        and the files of the tokenizers.
    """

    robot: str
    data: tuple[str, ...]
    start: str
    run_dir: str
    preset: str = "full"
    statistics: str = "own"
    statistics_of: str | None = None
    selection: str = "all"
    fresh: bool = False
    held_out: int = 10
    steps: int = 10_000
    batch_size: int = 32
    validate_every: int = 500
    patience: int = 10
    peak_lr: float | None = None
    augment: str = "colours"
    model: str | None = None
    tokenizer: str | None = None
    action_tokenizer: str | None = None

    def __post_init__(self) -> None:
        problems = []
        for name, known in (("preset", PRESETS), ("statistics", STATISTICS), ("selection", SELECTIONS)):
            if getattr(self, name) not in known:
                problems.append(f"{name}={getattr(self, name)!r}; {near_names(getattr(self, name), list(known))}")
        if self.statistics_of is not None and self.statistics == "own":
            problems.append(f"statistics_of={self.statistics_of!r} is for pretrained or blended statistics")
        if not self.data:
            problems.append("data: none, expected at least one dataset")
        if not 0 <= self.held_out <= 50:
            problems.append(f"held_out={self.held_out}, expected 0 to 50 percent of the episodes")
        problems += [
            f"{name}={getattr(self, name)}, expected at least 1"
            for name in ("steps", "batch_size", "validate_every", "patience")
            if getattr(self, name) < 1
        ]
        of_published = ("model", "tokenizer", "action_tokenizer")
        given = [name for name in of_published if getattr(self, name) is not None]
        if is_run(self.start) and given:
            problems.append(f"{', '.join(given)}: {self.start} is a run, which knows its own; leave them out")
        elif not is_run(self.start):
            if not Path(self.start).exists():
                problems.append(f"no checkpoint {self.start}")
            problems += [
                f"{name}: missing, {self.start} is no run of ours; expected {what}"
                for name, what in (
                    ("model", f"one of {', '.join(RELEASED)}, or a config file with its sizes"),
                    ("tokenizer", "the file or directory of the tokenizer of its prompts"),
                )
                if getattr(self, name) is None
            ]
        if problems:
            raise ValueError("fine-tuning:\n  " + "\n  ".join(problems))

    @property
    def contract(self) -> Contract | None:
        """That of the run it starts from; None where it starts from published weights."""
        return read_contract(find_step(self.start)) if is_run(self.start) else None


@dataclasses.dataclass(frozen=True)
class Written:
    """A config as text, and what was decided for it, a line each."""

    text: str
    notes: tuple[str, ...]


def policy_of(run: str, **changes: Any) -> Any:
    """Returns the config of the policy of a run, with changes."""
    return dataclasses.replace(read_contract(find_step(run)).policy, **changes)


def optimizer_of(run: str, **changes: Any) -> OptimizerConfig:
    """Returns the optimizer of a run, with changes; AdamW where it does not say."""
    stored = read_record(find_step(run))["config"].get("optimizer")
    return dataclasses.replace(OptimizerConfig() if stored is None else from_json(stored), **changes)


# ---- What fits -------------------------------------------------------------------------------------------------------


def fitted(policy: Any, robot: Robot, *, fresh: bool) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Returns the changes of a policy's config for a robot, and names of the weights that are other ones for them.

    Cameras become the robot's, those that the policy has already first and in its own order; weights belong to none of
    them. Sizes that suffice stay; the horizon becomes the robot's where no weight depends on it.
    fresh: whether there may be such weights.

    Raises:
        ValueError: some are needed and `fresh` is False, or the cameras have no place among the words; lists all.
    """
    slots = tuple(c.name for c in robot.cameras)
    cameras = tuple(name for name in policy.cameras if name in slots)
    cameras += tuple(name for name in slots if name not in cameras)
    changes: dict[str, Any] = {} if cameras == policy.cameras else {"cameras": cameras}
    if policy.image_slots and len(cameras) != len(policy.image_slots):
        if len(set(policy.image_slots)) > 1:
            raise ValueError(
                f"images stand at {policy.image_slots} of the policy's prompt, one for each of {len(policy.cameras)} "
                f"cameras, and robot {robot.name!r} has {len(cameras)}: write the config by hand, with image_slots"
            )
        changes["image_slots"] = policy.image_slots[:1] * len(cameras)
    have = {name: leaf.shape for name, leaf in weight_shapes(policy).items()}

    def others(more: dict[str, Any]) -> list[str]:
        """Returns the weights that have another shape, or are not there, with these changes."""
        now = {name: leaf.shape for name, leaf in weight_shapes(dataclasses.replace(policy, **changes, **more)).items()}
        return sorted(name for name, shape in now.items() if have.get(name) != shape)

    needs = {"state_dim": robot.state_size, "action_dim": robot.action_size, "action_horizon": robot.action_horizon}
    grown = {name: size for name, size in needs.items() if size > getattr(policy, name)}
    if robot.action_horizon < policy.action_horizon and not others({"action_horizon": robot.action_horizon}):
        changes["action_horizon"] = robot.action_horizon
    names = others(grown)
    if names and not fresh:
        sizes = ", ".join(f"{name} {size}, the policy has {getattr(policy, name)}" for name, size in grown.items())
        raise ValueError(
            f"robot {robot.name!r} is larger than the policy: {sizes}\n  {', '.join(names)} would start fresh; allow "
            "it with --fresh, or give the robot fewer dims or a shorter horizon"
        )
    return changes | grown, tuple(names)


def recorded(index: FrameIndex) -> str | None:
    """Returns how recorded episodes ended and how much of them an expert did; None where nothing says so."""
    said = []
    if SUCCESS in index.episode_columns:
        ends = index.episode_columns[SUCCESS].ravel()
        failed, unknown = int((ends == 0).sum()), int((ends < 0).sum())
        said.append(f"{failed} of {len(ends)} episodes failed, of {unknown} it is not known")
    if INTERVENED in index.columns:
        acts = index.columns[INTERVENED].ravel() > 0
        said.append(f"an expert acted at {int(acts.sum())} of {len(acts)} steps")
    return "; ".join(said) or None


def splits(path: str, robot: Robot, held_out: int, selection: str = "all") -> tuple[str, str | None, str]:
    """Returns what of a dataset is trained on and what is held out, as `MixtureEntry` has them, and that in words.

    A split "val" is held out where there is one; else the last episodes are, so many percent, at least one.

    Raises:
        DatasetError: the dataset cannot be read as this robot's, or does not have what the selection looks at.
        ValueError: it has too few episodes to hold out any.
    """
    dataset = open_dataset(path, robot, "train", selection=SELECTIONS[selection])
    episodes, kept, outcome = dataset.index.episodes, len(dataset), recorded(dataset.index)
    dataset.close()
    split, val_split, said = _splits(path, robot, held_out, selection, episodes)
    if outcome is not None:
        others = [name for name in SELECTIONS if name != selection]
        said += f"; {outcome}; --selection {selection} trains on {kept} steps (or {' or '.join(others)})"
    return split, val_split, said


def _splits(path: str, robot: Robot, held_out: int, selection: str, episodes: int) -> tuple[str, str | None, str]:
    if "val" in split_names(files.locate(path)):
        open_dataset(path, robot, "val", selection=SELECTIONS[selection]).close()
        return "train", "val", f"{path}: {episodes} episodes; its own split val is held out"
    if not held_out:
        return "train", None, f"{path}: {episodes} episodes, none held out"
    if episodes < 2:
        raise ValueError(
            f"{path}: {episodes} episode, of which none can be held out; record more, or give --held-out 0"
        )
    percent = 100 - max(held_out, math.ceil(100 / episodes))  # at least one episode
    count = round(percent * episodes / 100)  # as open_dataset counts
    said = f"{path}: {count} of {episodes} episodes are trained on, {episodes - count} held out"
    return f"train[:{percent}%]", f"train[{percent}%:]", said


def longest_prompt(path: str, robot: Robot, policy: Any, tokenizer: Tokenizer) -> int:
    """Returns how many tokens the longest prompt of a dataset has, as the policy reads prompts.

    A state in the prompt is one that is spelled long: at its lower end in every other dim, at its upper end in others.

    Raises:
        DatasetError: the dataset cannot be read as this robot's.
    """
    keys, texts = [k for k in (robot.language_key, *robot.language_alternatives) if k is not None], set()
    for split in ("train", *({"val"} & set(split_names(files.locate(path))))):
        dataset = open_dataset(path, robot, split)
        texts |= {text for key in keys for text in dataset.index.text_table(key)}
        dataset.close()
    texts = texts or {robot.default_prompt or ""}
    roomy = TextTokenizer.of_policy(tokenizer, dataclasses.replace(policy, prompt_len=policy.prompt_len + _LONGEST))
    state = np.where(np.arange(robot.state_size) % 2, 1.0, -1.0).astype(np.float32)
    return max(int(roomy.encode(text, state)[1].sum()) for text in texts)


def check_loads(asked: FineTuning, policy: Any, fresh: Sequence[str]) -> None:
    """Reads names and shapes of the checkpoint's weights, and compares them with the policy's.

    Raises:
        WeightsError: they are not of such a policy; lists every weight.
    """
    plan_load(policy, open_weights(asked.start), reinitialize=fresh)


def learning_rate(asked: FineTuning) -> float:
    """Returns the peak of the learning rate, see `FineTuning.peak_lr` and `Preset.peak_lr`."""
    if asked.peak_lr is not None:
        return asked.peak_lr
    base = optimizer_of(asked.start) if is_run(asked.start) else OptimizerConfig()
    return PRESETS[asked.preset].peak_lr(base.peak_lr)


# ---- The file --------------------------------------------------------------------------------------------------------


def write_config(asked: FineTuning, path: Path) -> Written:
    """Writes the config of a fine-tuning, loads it, and returns it. What is there already must be the same.

    Raises:
        FileExistsError: another config is there.
        ValueError, DatasetError, WeightsError, CheckpointError: robot, data and checkpoint do not fit each other.
    """
    written = make_config(asked, path)
    if path.is_file() and path.read_text() != written.text:
        raise FileExistsError(
            f"{path} is there and says something else; python train/train.py {path} goes on with it as it is; or give "
            "another --run-dir"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(written.text)
    load_run(path)
    return written


def make_config(asked: FineTuning, path: Path) -> Written:
    """Returns the config of a fine-tuning, as it would stand at `path`.

    Raises:
        ValueError, DatasetError, WeightsError, CheckpointError: as `write_config`.
    """
    contract = asked.contract
    policy = find_model(asked.model or "") if contract is None else contract.policy
    if not hasattr(policy, "action_dim"):
        raise ValueError(f"{asked.start} holds a {type(policy).__name__}, which samples no actions; expected a policy")
    robot, mode = find_robot(asked.robot), _normalization(contract, policy)
    changed_mode = robot.normalization != mode
    robot = dataclasses.replace(robot, normalization=mode)
    changes, fresh = fitted(policy, robot, fresh=asked.fresh)
    model = dataclasses.replace(policy, **changes)
    fast = None if contract is None else contract.fast_tokenizer()
    problems = [*policy_problems(robot, model), *model.robot_problems(robot, fast)]
    if model.action_tokens is not None and contract is None and asked.action_tokenizer is None:
        problems.append("--action-tokenizer: missing; the directory of the FAST tokenizer of these weights")
    if STATISTICS[asked.statistics].needs_start:
        try:
            pretrained(robot, asked.statistics_of, contract)
        except CheckpointError as e:
            problems.append(str(e))
    if problems:
        raise ValueError(f"robot {robot.name!r} and {asked.start} do not fit each other:\n  " + "\n  ".join(problems))
    PRESETS[asked.preset].trainable(model)
    short = _short(fresh, weight_shapes(model))
    check_loads(asked, model, short)
    parts = [splits(data, robot, asked.held_out, asked.selection) for data in asked.data]
    tokenizer = read_tokenizer(asked.tokenizer or "") if contract is None else contract.tokenizer
    needed = max(longest_prompt(data, robot, model, tokenizer) for data in asked.data)
    if needed > model.prompt_len:
        changes["prompt_len"] = needed

    notes = [said for _, _, said in parts]
    if changed_mode:
        notes.append(f"robot {robot.name!r} is normalised by {mode!r}, as the checkpoint's weights want it")
    lost = [c for c in policy.cameras if c not in model.cameras]
    new = [c for c in model.cameras if c not in policy.cameras]
    if lost or new:
        which = f"new: {', '.join(new) or 'none'}; gone: {', '.join(lost) or 'none'}"
        notes.append(f"cameras: {', '.join(model.cameras)}; {which}")
    notes += [f"{name}: {getattr(policy, name)} -> {size}" for name, size in changes.items() if name != "cameras"]
    if fresh:
        notes.append(f"start fresh: {', '.join(fresh)}")
    text = _text(asked, path, mode if changed_mode else None, changes, short, [part[:2] for part in parts])
    return Written(text, tuple(notes))


def _normalization(contract: Contract | None, policy: Any) -> str:
    """Returns how a checkpoint's weights are used to see numbers."""
    modes = {r.normalization for r in contract.robots} if contract is not None else set()
    return modes.pop() if len(modes) == 1 else policy.released_normalization()


def _short(names: Sequence[str], every: Iterable[str]) -> tuple[str, ...]:
    """Returns regular expressions of weights and of no others: where all of a part are meant, one for the part."""
    meant, parts = set(names), []
    others = {"/".join(name.split("/")[:n]) for name in set(every) - meant for n in range(1, name.count("/") + 2)}
    for name in sorted(names):
        words = name.split("/")
        part = next(p for p in ("/".join(words[:n]) for n in range(1, len(words) + 1)) if p not in others)
        parts.append(part)
    return patterns(sorted(set(parts)))


def literal(value: Any) -> str:
    """Returns a value as it would stand in a file of ours."""
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, tuple):
        return "(" + ", ".join(map(literal, value)) + ("," if len(value) == 1 else "") + ")"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:_}" if value >= 1000 else str(value)
    return repr(value)


def call(name: str, *positional: str, **options: Any) -> str:
    """Returns a call as it would stand there. positional: as they are. options: values, of which None is left out."""
    named = (f"{key}={literal(value)}" for key, value in options.items() if value is not None)
    return f"{name}({', '.join([*positional, *named])})"


def _text(
    asked: FineTuning,
    path: Path,
    mode: str | None,
    changes: dict[str, Any],
    fresh: tuple[str, ...],
    parts: list[tuple[str, str | None]],
) -> str:
    """mode: normalisation of the robot, where it is changed. parts: see `splits`."""
    robot = call("find_robot", literal(asked.robot))
    if mode is not None:
        robot = call("dataclasses.replace", robot, normalization=mode)
    published = asked.model is not None
    if published:
        model = call("dataclasses.replace", call("find_model", literal(asked.model)), **changes)
    else:
        model = call("finetune.policy_of", "START", **changes)
    data, entries = _entries(asked.data, parts, SELECTIONS[asked.selection])
    held_out = any(val_split is not None for _, val_split in parts)
    wrist = tuple(c.name for c in find_robot(asked.robot).cameras if "wrist" in c.name)
    augment = AUGMENTATIONS[asked.augment](wrist)
    statistics = call(f"statistics.{STATISTICS[asked.statistics].__name__}", robot=asked.statistics_of)
    steps, rate, every = asked.steps, learning_rate(asked), min(asked.validate_every, asked.steps)
    rates: dict[str, Any] = {"peak_lr": rate, "end_lr": float(f"{rate / 100:.3g}")}
    rates |= {"warmup_steps": min(100, steps - 1), "decay_steps": max(steps, 2)}
    optimizer = call("OptimizerConfig", **rates) if published else call("finetune.optimizer_of", "START", **rates)
    lines = [
        f'"""Fine-tunes {asked.start} to {asked.robot}: python train/train.py {path}"""',
        "",
        *(["import dataclasses", ""] if published or mode is not None else []),
        *(["from openpi_like.data.augment import Augment"] if augment is not None else []),
        "from openpi_like.data.config import DataConfig, MixtureEntry",
        *(["from openpi_like.data.selection import Selection"] if asked.selection != "all" else []),
        *(["from openpi_like.models.released import find_model"] if published else []),
        "from openpi_like.robots.find import find_robot",
        f"from openpi_like.train import {'' if published else 'finetune, '}presets, statistics",
        *(["from openpi_like.train.checkpoints.checkpoint import Keep"] if held_out else []),
        "from openpi_like.train.checkpoints.warm_start import WarmStart",
        "from openpi_like.train.config import TrainConfig",
        *(["from openpi_like.train.optimizer import OptimizerConfig"] if published else []),
        "",
        f"START = {literal(asked.start)}",
        *data,
        f"ROBOT = {robot}",
        f"MODEL = {model}",
        "",
        "config = TrainConfig(",
        f"    run_dir={literal(asked.run_dir)},",
        "    model=MODEL,",
        "    data=DataConfig(",
        *(f"        {line}" for line in entries),
        *([f"        augment={augment},"] if augment is not None else []),
        "    ),",
        f"    stats={literal(str(Path(asked.run_dir) / 'stats'))},",
        f"    statistics={statistics},",
        f"    tokenizer={literal(asked.tokenizer)},",
        *([f"    action_tokenizer={literal(asked.action_tokenizer)},"] if asked.action_tokenizer is not None else []),
        f"    warm_start={call('WarmStart', 'START', reinitialize=fresh or None)},",
        f"    trainable=presets.{asked.preset}(MODEL),",
        f"    batch_size={asked.batch_size},",
        f"    steps={literal(steps)},",
        f"    optimizer={optimizer},",
        f"    validate_every={literal(every)},",
        f"    save_every={literal(every)},",
        *(['    keep=Keep(best=1, metric="action_error"),', f"    patience={asked.patience},"] if held_out else []),
        ")",
    ]
    return "\n".join(lines) + "\n"


def _entries(
    data: tuple[str, ...], parts: list[tuple[str, str | None]], selection: Selection
) -> tuple[list[str], list[str]]:
    """Returns lines that stand before the config, and those of its entries: one for all datasets where that will do."""
    changed = {f.name: v for f in dataclasses.fields(selection) if (v := getattr(selection, f.name)) != f.default}

    def entry(path: str, split: str, val_split: str | None) -> str:
        options = ["ROBOT", path, *([f"split={literal(split)}"] if split != "train" else [])]
        options += [f"val_split={literal(val_split)}"] if val_split != "val" else []
        options += ["selection=SELECTION"] if changed else []
        return call("MixtureEntry", *options)

    before = [f"SELECTION = {call('Selection', **changed)}"] if changed else []
    if len(data) == 1 and len(only := entry(literal(data[0]), *parts[0])) <= LINE - len("        entries=(,),"):
        return before, [f"entries=({only},),"]
    if len(data) > 1 and len(set(parts)) == 1:
        return [*before, f"DATA = {literal(data)}"], [f"entries=tuple({entry('path', *parts[0])} for path in DATA),"]
    each = [entry(literal(path), *part) for path, part in zip(data, parts, strict=True)]
    return before, ["entries=(", *(f"    {one}," for one in each), "),"]
