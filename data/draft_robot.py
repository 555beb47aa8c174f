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
from openpi_like.data.index import open_index
from openpi_like.data.layouts import read_schema, split_names
from openpi_like.data.schema import DatasetError, Feature, Schema
from openpi_like.data.traps import gripper_dims, trigger_gripper
from openpi_like.robots.oxe import ROBOTS

MAX_SIZE = 64  # longer vectors are embeddings or point clouds
UNKNOWN = '"?"'
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
    """Dims [start, start + size) of a numeric field, which belong together.

    hint: what is known of them. names: of the dims, where the dataset has them.
    """

    name: str
    key: str
    start: int
    size: int
    hint: str
    names: tuple[str, ...] = ()


def last(key: str) -> str:
    """Returns the last part of a key: "state" of observation/state and of observation.state."""
    return re.split(r"[/.]", key)[-1]


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


def numeric(features: Sequence[Feature], what: str) -> tuple[list[Feature], list[Feature]]:
    """Returns the numeric fields of the state or of the action that a robot would use, and the others."""
    pattern = r"actions?(_dict)?\b" if what == "action" else r"(observations?|obs)[/.]"
    found = [f for f in features if f.kind == "numeric" and f.dtype.startswith("float") and re.match(pattern, f.key)]
    # A vector of all of it, where there is one, repeats the other fields.
    whole = [f for f in found if last(f.key) in ("state", "proprio", "qpos", "action", "actions")]
    used = [f for f in (whole or found) if size(f) <= MAX_SIZE and "terminate" not in f.key][: 1 if whole else None]
    return used, [f for f in found if f not in used]


def runs(feature: Feature, sample: Sample | None, taken: set[str]) -> list[Run]:
    """Returns the fields that one vector is cut into: before, at and behind each suspected gripper."""
    n = size(feature)
    x = None if sample is None else sample.rows(feature.key)
    named = {d for d, name in enumerate(feature.names) if "grip" in name.lower()}
    found_in = set() if x is None or feature.names else set(gripper_dims(x))  # a name says more than numbers
    grippers = set(range(n)) if "grip" in feature.key else named | found_in
    cuts = [0, *(d for d in range(1, n) if d in grippers or d - 1 in grippers), n]
    ends = np.empty((0, 2)) if sample is None else bounds(rows(sample.index, feature.key)).T
    found = []
    for start, end in itertools.pairwise(cuts):
        base = "gripper" if start in grippers else re.sub(r"\W+", "_", last(feature.key))
        name = next(c for c in (base, *(f"{base}_{i}" for i in range(2, n + 99))) if c not in taken)
        taken.add(name)
        hint = ""
        if len(ends):
            ranges = [f"{low:.3g} .. {high:.3g}" for low, high in ends[start:end][:SHOWN]]
            hint = "; ".join(ranges) + ("; ..." if end - start > SHOWN else "")
        if start in grippers:
            kind = "triggers" if x is not None and trigger_gripper("", x[:, start:end]) else "positions"
            hint = f"a gripper? then replace unit by gripper=Gripper(open=..., closed=...) for {kind} {hint}".rstrip()
        found.append(Run(name, feature.key, start, end - start, hint, feature.names[start:end]))
    return found


def language(features: Sequence[Feature]) -> str | None:
    texts = sorted(f.key for f in features if f.kind == "text")
    words = ("language_instruction", "instruction", "language", "task")
    return next((k for word in words for k in texts if word in k), None)


def draft(name: str, origin: str, schema: Schema, sample: Sample | None) -> str:
    """Returns the Python file."""
    rate = None if sample is None else sample.index.split.rate
    features = list(schema.steps.values())
    lines = [
        f'"""{name}, drafted from {origin}.',
        "",
        f"Complete every {UNKNOWN} and 0: the robot is refused until then.",
        '"""',
        "",
        "from openpi_like.robots import ActionField, Camera, Gripper, Robot, StateField",
        "",
        "# Units: m, mm, cm, rad, deg, px, m/s, rad/s, or 1 for numbers without one. Cut a vector into fields where",
        '# units change, and declare rotations (rotation="rpy", ...), see openpi_like/robots/robot.py. Commands are',
        '# "absolute" or "delta". Look at the data with data/show.py before you believe any of this.',
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
    for what, cls, extra in (("state", "StateField", ""), ("action", "ActionField", ', command="?"')):
        used, others = numeric(features, what)
        lines.append(f"    {what}=(")
        taken: set[str] = set()
        for run in (r for f in used for r in runs(f, sample, taken)):
            start = f", start={run.start}" if run.start else ""
            names = f", names=({''.join(f'{quoted(n)}, ' for n in run.names).rstrip()})" if run.names else ""
            if run.hint:
                lines.append(f"        # {run.hint}")
            lines.append(f'        {cls}("{run.name}", {quoted(run.key)}, {run.size}{start}, unit="?"{extra}{names}),')
        lines += [f"        # not used: {f.key}, {f.dtype} of shape {f.shape}" for f in others]
        lines.append("    ),")
    key = language(features) or language(list(schema.episode.values()))
    lines += [
        *chunks(rate),
        f"    language_key={quoted(key) if key else None},",
        *([] if key else ["    default_prompt=None,  # the dataset has no instruction: say what the robot does"]),
        ")",
    ]
    return "\n".join(lines) + "\n"


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
        f'written to {args.out}: complete {text.count(UNKNOWN) - 1} "?" and {zeros} 0, then\n'  # one is explained
        f"  python data/stats.py --robot {args.out} --data {args.data} --out stats/{name}.json\n"
        f"  python data/bench.py {args.data} --robot {args.out}\n"
        f'and in a run\'s config: find_robot("{args.out}") of openpi_like.robots',
        markup=False,
    )


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        main(tyro.cli(Args), Console(highlight=False, soft_wrap=True))
    except (ValueError, OSError) as e:
        sys.exit(str(e))
