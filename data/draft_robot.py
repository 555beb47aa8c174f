"""Writes a draft of a Robot for a dataset, to be completed:

    python data/draft_robot.py DIR --out my_robot.py

It takes from what the dataset says of itself (RLDS, LeRobot or HDF5), and from the numbers where records are there,
what can be known: cameras, state and action fields with their sizes and names, the rate, instruction, gripper suspects.
What cannot be known is written as "?" or 0, and a robot that still has one of these is refused by name: units, gripper
conventions, what actions command, the control rate and chunks.
"""

import dataclasses
import itertools
import keyword
import logging
import math
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from rich.console import Console

from openpi_like.data import files
from openpi_like.data.episode_sample import Sample, bounds, rows
from openpi_like.data.field_roles import WHOLE, in_observation, is_action, is_state, last
from openpi_like.data.index import open_index
from openpi_like.data.layouts import read_schema, split_names
from openpi_like.data.schema import DatasetError, Feature, MissingPackageError, Schema
from openpi_like.data.traps import angle_wraps, floats, gripper_dims, trigger_gripper
from openpi_like.robots.dim_names import Group, groups
from openpi_like.robots.find import blanks_of
from openpi_like.robots.oxe import ROBOTS
from openpi_like.robots.representations import ROTATIONS, UNITS

MAX_SIZE = 64  # longer vectors are embeddings or point clouds
UNKNOWN = '"?"'
WIDTH = 120  # characters of a line, where it can be broken
SHOWN = 8  # dims whose range is written into one comment


@dataclasses.dataclass(frozen=True)
class Args:
    """data: directory of the dataset, or its URL. out: the Python file to write; its name becomes the robot's.

    split: whose records are looked at, by default the first there is. index_dir: where indexes are kept.
    """

    data: Annotated[str, tyro.conf.Positional]
    out: Path
    split: str | None = None
    index_dir: Path | None = None

    def __post_init__(self) -> None:
        name, problems = self.out.stem, []
        if self.out.suffix != ".py" or not name.isidentifier() or keyword.iskeyword(name):
            problems.append(f"--out {self.out}, expected a Python file that can be imported, like my_robot.py")
        if name in sys.stdlib_module_names:
            problems.append(f"--out {self.out}: {name} is a module of Python, choose another name")
        if self.out.exists():
            problems.append(f"--out {self.out} exists; delete it, or choose another name")
        if not self.out.parent.is_dir():
            problems.append(f"--out {self.out}: there is no directory {self.out.parent}; make it first")
        if problems:
            raise ValueError("; ".join(problems))


@dataclasses.dataclass(frozen=True)
class Run:
    """Dims of a numeric field, which belong together.

    hint: their ranges. names: of the dims, where the dataset has them. guessed: what they are is only known from their
    numbers. wraps: angles that jump by a turn. triggers: values of a trigger gripper.
    """

    name: str
    key: str
    group: Group
    hint: str
    names: tuple[str, ...] = ()
    guessed: bool = False
    wraps: bool = False
    triggers: bool = False


def cameras(features: Sequence[Feature]) -> tuple[list[tuple[str, Feature]], list[Feature]]:
    """Returns (slot name, image) of the colour cameras, and the images that are left out."""
    colour = [f for f in features if f.kind == "image" and f.dtype == "uint8" and f.shape[2:] == (3,)]
    names: list[str] = []
    for f in colour:
        words = re.split(r"[^a-z]+", last(f.key).lower())
        mounted = any(w in ("wrist", "hand", "gripper", "eye", "inhand") for w in words)
        side = next((f"_{s}" for s in ("left", "right") if s in words), "") if mounted else ""
        name = ("wrist" if mounted else "base") + side
        same = sum(re.fullmatch(rf"{name}(_\d+)?", n) is not None for n in names)
        names.append(f"{name}_{same}" if same else name)
    return list(zip(names, colour, strict=True)), [f for f in features if f.kind == "image" and f not in colour]


def size(feature: Feature) -> int:
    return math.prod(d for d in feature.shape if d is not None)


def numeric(features: Sequence[Feature], what: str) -> tuple[list[Feature], dict[str, str]]:
    """Returns the fields that a robot would use, and key -> why others are not used. what: "state" or "action"."""
    belongs = is_action if what == "action" else is_state
    found = [f for f in features if f.kind == "numeric" and belongs(f.key)]
    why: dict[str, str] = {}
    for f in found:
        if "terminate" in f.key:
            why[f.key] = "says that an episode ends"
        elif not 0 < size(f) <= MAX_SIZE:
            why[f.key] = f"has {size(f)} values, expected 1 to {MAX_SIZE}"
        elif f.dtype == "bool" or not (f.dtype.startswith("float") or last(f.key) in WHOLE):
            why[f.key] = "no floats: as a rule a flag or a count"
    fit = [f for f in found if f.key not in why]
    if whole := next((f for f in fit if last(f.key) in WHOLE), None):
        used = [whole]
        reason = f"{whole.key} has all of the {what}, as a rule"
    else:
        used = [f for f in fit if what == "action" or in_observation(f.key)] or fit
        reason = "not among what is observed"
    return used, {f.key: why.get(f.key, reason) for f in found if f not in used}


def runs(feature: Feature, sample: Sample | None, taken: set[str]) -> list[Run]:
    """Returns the fields that one vector is cut into: by the names of its dims, or else at suspected grippers."""
    n = size(feature)
    x = None if sample is None else floats(sample.rows(feature.key))
    if "grip" in feature.key:
        cut = [Group(d, 1, "gripper") for d in range(n)]
    elif feature.names:
        cut = groups(feature.names)
    else:  # a name would say more than numbers
        grippers = set() if x is None else set(gripper_dims(x))
        ends = [0, *(d for d in range(1, n) if d in grippers or d - 1 in grippers), n]
        cut = [Group(a, b - a, "gripper" if a in grippers else "") for a, b in itertools.pairwise(ends)]
    seen = np.empty((0, 2)) if sample is None else bounds(rows(sample.index, feature.key)).T
    found = []
    for group in cut:
        start, end = group.start, group.start + group.size
        base = re.sub(r"_.*", "", group.kind.replace("quaternion", "rotation")) or re.sub(
            r"\W+", "_", last(feature.key)
        )
        name = next(c for c in (base, *(f"{base}_{i}" for i in range(2, n + 99))) if c not in taken)
        taken.add(name)
        ranges = [f"{low:.3g} .. {high:.3g}" for low, high in seen[start:end][:SHOWN]]
        hint = "; ".join(ranges) + ("; ..." if group.size > SHOWN and ranges else "")
        of = None if x is None else x[:, start:end]
        guessed = group.kind == "gripper" and not feature.names and "grip" not in feature.key
        wraps = sample is not None and of is not None and angle_wraps("", of, sample.starts) is not None
        triggers = of is not None and trigger_gripper("", of) is not None
        found.append(Run(name, feature.key, group, hint, feature.names[start:end], guessed, wraps, triggers))
    return found


def field_lines(run: Run, what: str, states: Sequence[Run]) -> list[str]:
    """Returns the lines of one field, "state" or "action": what is known of it, and blanks for what is not.

    states: the fields of the state, where it is an action.
    """
    kind, action = run.group.kind, what == "action"
    options, hints = [], [run.hint] if run.hint else []
    if kind == "gripper":
        trigger = ', convention="trigger"' if action and run.triggers else ""
        options.append(f"gripper=Gripper(open={UNKNOWN}, closed={UNKNOWN}{trigger})")
        if run.guessed:
            hints.append(f"by its numbers a gripper; if it is none, unit={UNKNOWN} in place of gripper=")
        if trigger:
            hints.append("-1, 0 and 1, mostly 0: triggers, not positions")
    elif kind.startswith("quaternion"):
        options += [f'rotation="{kind}"', 'model_rotation="rotation_6d"']
    else:
        options.append(f"unit={UNKNOWN}")
    if kind == "rotation":
        options.append(f"rotation={UNKNOWN}")
        if action:
            hints.append("rotation=None if they are no rotation, but parts of the largest turn in a step")
        if run.wraps:
            options.append('model_rotation="rotation_6d"')
            hints.append("the numbers jump by a turn, six-dimensional ones do not")
    if action and kind != "gripper":
        options.append(f"command={UNKNOWN}")
        same = next((s.name for s in states if s.names and s.names == run.names), None)
        if same is not None:
            hints.append(f'targets may be predicted from where the robot is: relative_to="{same}"')
    if run.names:
        options.append(f"names=({', '.join(map(quoted, run.names))}{',' if len(run.names) == 1 else ''})")
    start = [f"start={run.group.start}"] if run.group.start else []
    head = f"        {'ActionField' if action else 'StateField'}("
    arguments = [f'"{run.name}"', quoted(run.key), str(run.group.size), *start, *options]
    written = ", ".join(arguments)
    if len(head + written) > WIDTH - 2:
        written = "".join(f"\n            {argument}," for argument in arguments) + "\n        "
    return [*(f"        # {hint}" for hint in hints), f"{head}{written}),"]


def language(features: Sequence[Feature]) -> str | None:
    texts = sorted(f.key for f in features if f.kind == "text")
    words = ("language_instruction", "instruction", "language", "task")
    return next((k for word in words for k in texts if word in k), None)


def draft(name: str, origin: str, schema: Schema, sample: Sample | None) -> str:
    """Returns the Python file."""
    rate = None if sample is None else sample.index.split.rate
    # What is not in the index, such as texts that are not UTF-8, no robot can use.
    lost = {} if sample is None else {k: v for k, v in sample.index.left_out.items() if k in schema.steps}
    features = [f for f in schema.steps.values() if f.key not in lost]
    lines = [
        f'"""{name}, drafted from {origin}.',
        "",
        f"Fill in every {UNKNOWN} and 0: the robot is refused until then, and the error says what may stand there.",
        '"""',
        "",
        "from openpi_like.robots import ActionField, Camera, Gripper, Robot, StateField",
        "",
        f"# Units: {', '.join(UNITS)}; 1 is for numbers without one, such as parts of the largest step.",
        f"# Rotations: {', '.join(ROTATIONS)}; rpy are angles about fixed axes.",
        "# Commands: absolute (targets), delta (changes) or velocity. Grippers: numbers of an open and a closed one.",
        "# Cut a vector into more fields where units change. Comments above a field are ranges of its numbers.",
        f"{name.upper()} = Robot(",
        f'    name="{name}",',
        "    cameras=(",
    ]
    seen, left = cameras(features)
    for slot, f in seen:
        height, width = (None if d is None else int(d) for d in f.shape[:2])
        sizes = np.zeros(0, np.int64) if sample is None else sample.index.images[f.key][sample.steps, 1]
        if len(sizes) > 1 and sizes.min() == sizes.max() and f.encoding != "raw":
            lines.append(f"        # every image has {sizes[0]:,} bytes: a camera that was absent?")
        lines.append(f'        Camera("{slot}", {quoted(f.key)}, {height}, {width}),')
    lines += [f"        # {f.key}: {f.dtype} of shape {f.shape} is not a colour image" for f in left]
    lines.append("    ),")
    states: list[Run] = []
    told = {f.key for f in (*(f for _, f in seen), *left)} | lost.keys()
    for what in ("state", "action"):
        used, others = numeric(features, what)
        lines.append(f"    {what}=(")
        taken: set[str] = set()
        found = [run for f in used for run in runs(f, sample, taken)]
        lines += [line for run in found for line in field_lines(run, what, states)]
        states = states or found
        lines += [f"        # not used: {described(schema.steps[k])}: {why}" for k, why in others.items()]
        lines.append("    ),")
        told |= {f.key for f in used} | others.keys()
    key = language(features) or language(list(schema.episode.values()))
    lines += [
        *chunks(rate),
        f"    language_key={quoted(key) if key else None},",
        *([] if key else ["    default_prompt=None,  # the dataset has no instruction: say what the robot does"]),
        *(f"    # not used: {k}: {why}" for k, why in lost.items()),
        *(f"    # not used: {rest(f)}" for f in features if f.key not in told | {key}),
        ")",
    ]
    return "\n".join(lines) + "\n"


def described(feature: Feature) -> str:
    return f"{feature.key}, {feature.dtype} of shape {feature.shape}"


def rest(feature: Feature) -> str:
    """Returns what a field is that is neither a camera, nor state, action or instruction."""
    if feature.kind == "text":
        return f"{feature.key}, a text"
    why = "by its name neither state nor action" if feature.kind == "numeric" else "cannot be read"
    return f"{described(feature)}: {why}"


def chunks(rate: float | None) -> list[str]:
    """Returns the rate and the chunks: of a second, half of it executed, where the dataset says how long that is."""
    if rate is None:
        return [
            "    control_hz=0.0,  # how many actions the robot executes in a second",
            "    action_horizon=0,  # actions in a predicted chunk",
            "    execute_steps=0,  # how many of them are executed before the next",
        ]
    return [
        f"    control_hz={rate},  # as the dataset says",
        f"    action_horizon={max(round(rate), 1)},  # actions in a predicted chunk: of a second",
        f"    execute_steps={max(round(rate) // 2, 1)},  # how many of them are executed before the next",
    ]


def quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def main(args: Args, console: Console) -> None:
    directory = files.locate(args.data)
    schema = read_schema(directory)
    sample, name = None, args.out.stem
    try:
        split = args.split or split_names(directory)[0]
        index = open_index(directory, split, index_dir=args.index_dir)
        sample, origin = Sample.take(index), str(index.split)
    except MissingPackageError:
        raise
    except DatasetError as e:
        if args.split is not None:
            raise
        origin = f"what {args.data} says of itself"
        console.print(f"records cannot be read, so the draft has no numbers: {e}", markup=False)
    text = draft(name, origin, schema, sample)
    args.out.write_text(text)
    console.print(text, markup=False)
    zeros = "no" if sample is not None and sample.index.split.rate else "three"
    if sample is not None and sample.index.split.dataset in ROBOTS:
        known = sample.index.split.dataset
        console.print(f"{known} is in openpi_like/robots/oxe.py: --robot {known} may be all you need", markup=False)
    console.print(
        f'written to {args.out}: fill in {sum(map(len, blanks_of(text).values()))} "?" and {zeros} 0, then\n'
        f"  python data/check_robot.py {args.data} --robot {args.out} --out {args.out.with_suffix('.html')}\n"
        f"  python train/finetune.py {args.out} {args.data} --from CHECKPOINT",
        markup=False,
    )


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        main(tyro.cli(Args), Console(highlight=False, soft_wrap=True))
    except (ValueError, OSError) as e:
        sys.exit(str(e))
