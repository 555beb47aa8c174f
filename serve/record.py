"""Writes what a robot recorded (openpi_like.serve.recorder) as RLDS, which it can be trained on the same day:

    python serve/record.py spool --out recorded --robot my_robot.py

writes recorded/my_robot_recorded/1.0.0, and once there are more episodes, 1.1.0 with all of them. Everything is looked
at first: sizes, rate, missing frames, values that are not finite. If any episode is unfit, all that is wrong is said
and nothing is written; --leave-out goes on without it. Unfinished episodes, of programs that were killed, are named,
and stay in the spool until they are kept (as they are) or dropped (set aside under another name):

    python serve/record.py spool --keep 20261127T101502.120-3fa2c1 --drop 20261127T101930.007-9b11de
"""

import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from openpi_like.config import near_names
from openpi_like.data.prepare import Prepare
from openpi_like.data.schema import DatasetError
from openpi_like.robots.find import find_robot
from openpi_like.robots.robot import Robot
from openpi_like.serve.recorded import (
    Limits,
    Looked,
    encoding_problems,
    kind_problems,
    look,
    metadata_kinds,
    plan,
    write,
)
from openpi_like.serve.spool import Recording, RecordingError, conclude, drop, open_spool

_ANY_SIZE = 1 << 20  # px, of a box that shrinks nothing


@dataclasses.dataclass(frozen=True)
class Args:
    """Writes what a robot recorded as RLDS.

    spool: directory of the recorder. out: directory for datasets. robot: as for data/stats.py. name: of the dataset,
    default ROBOT_recorded. val: part of the episodes that go to a split for validation.
    images: "recorded" keeps them as they are (PNG of a recorder of ours), "jpeg" is much smaller. quality: of JPEG.
    keep: unfinished episodes to finish as they are, by name, or "all". drop: episodes to set aside.
    leave_out: episodes that stay in the spool and are not written. limits: up to where an episode is fit.
    file_format: "array_record" is for readers that need random access.
    """

    spool: Annotated[Path, tyro.conf.Positional]
    out: Path | None = None
    robot: str | None = None
    name: str | None = None
    val: float = 0.0
    images: Literal["recorded", "jpeg"] = "recorded"
    quality: int = 95
    keep: tuple[str, ...] = ()
    drop: tuple[str, ...] = ()
    leave_out: tuple[str, ...] = ()
    limits: Limits = Limits()
    file_format: Literal["tfrecord", "array_record"] = "tfrecord"

    def __post_init__(self) -> None:
        problems = []
        if (self.out is None) != (self.robot is None):
            problems.append("give --out and --robot together")
        if not 0 <= self.val < 1:
            problems.append(f"--val {self.val}, expected a fraction in [0, 1)")
        if self.out is None and not (self.keep or self.drop):
            problems.append("give --out and --robot to write a dataset, or --keep or --drop")
        if problems:
            raise ValueError("; ".join(problems))


def settle(args: Args, console: Console) -> list[Recording]:
    """Keeps and drops what was asked for; returns the recordings that are left."""
    recordings = open_spool(args.spool)
    names = {r.name for r in recordings}
    asked = {*args.keep, *args.drop, *args.leave_out} - {"all"}
    if unknown := sorted(asked - names):
        raise RecordingError(
            "; ".join(f"{args.spool} has no episode {n!r}, {near_names(n, sorted(names))}" for n in unknown)
        )
    left = []
    for r in recordings:
        if r.name in args.drop:
            console.print(f"dropped {r.name}: now {drop(r.path).name}")
            continue
        if not r.finished and r.name in (names if "all" in args.keep else args.keep):
            r = conclude(r, None, "unfinished, kept")
            console.print(f"kept {r.name}: {r.steps} steps")
        left.append(r)
    return left


def chosen(args: Args, recordings: Sequence[Recording], console: Console) -> list[Recording]:
    """Returns the finished episodes that are not left out, and names the others."""
    open_ones = [r for r in recordings if not r.finished]
    for r in open_ones:
        cut = f", and {r.cut_bytes} bytes of a step that was cut off" if r.cut_bytes else ""
        console.print(
            f"[yellow]unfinished:[/] {r.name}, robot {r.head['robot']}, {r.steps} steps{cut}; "
            f"--keep {r.name} or --drop {r.name}"
        )
    done = [r for r in recordings if r.finished and r.name not in args.leave_out]
    if not done:
        raise RecordingError(f"{args.spool} has no finished episode to write; {len(open_ones)} are unfinished")
    return done


def report(looked: Sequence[Looked], console: Console, *, kept: bool) -> None:
    """Prints what the episodes are.

    kept: pictures stay as they were recorded.

    Raises:
        RecordingError: an episode is unfit, or they do not fit each other; says everything that is wrong.
    """
    table = Table("episode", "steps", "Hz", "expert", "success", "policy", "notes")
    for x in looked:
        success = {True: "yes", False: "no", None: "?"}[x.recording.success]
        policy = x.recording.head["policy"].get("step", "")
        expert = f"{x.expert / max(1, len(x.action)):.0%}"
        notes = "; ".join(x.notes)
        table.add_row(x.recording.name, str(len(x.action)), f"{x.rate_hz:.1f}", expert, success, str(policy), notes)
    console.print(table)
    _, said, wrong = metadata_kinds(looked)
    for note in said:
        console.print(note, markup=False)
    wrong += kind_problems(looked)
    wrong += encoding_problems(looked) if kept else []
    wrong += [f"{x.recording.path}: {problem}" for x in looked for problem in x.problems]
    if wrong:
        unfit = " ".join(x.recording.name for x in looked if x.problems)
        go_on = f"\nto go on without these episodes: --leave-out {unfit}" if unfit else ""
        raise RecordingError("\n  ".join([f"{len(wrong)} problems, nothing is written:", *wrong]) + go_on)


def convert(args: Args, robot: Robot, recordings: Sequence[Recording], console: Console) -> None:
    assert args.out is not None
    name = args.name or f"{robot.name}_recorded"
    todo = plan(args.out, name, robot, recordings, args.val)
    if todo.unchanged:
        console.print(f"{args.out / name / str(todo.before)} has all {len(recordings)} episodes, nothing to do")
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # its greetings would break the progress bar
    with Progress(*columns, console=console, refresh_per_second=2) as progress:
        bar = progress.add_task("looking", total=len(recordings))
        looked = []
        for r in recordings:
            looked.append(look(r, robot, args.limits))
            progress.advance(bar)
    report(looked, console, kept=args.images == "recorded")
    with Progress(*columns, console=console, refresh_per_second=2) as progress:
        bar = progress.add_task(f"writing {name} {todo.version}", total=len(looked))
        images = Prepare(_ANY_SIZE, _ANY_SIZE, "jpeg", args.quality) if args.images == "jpeg" else None
        directory = write(
            *(args.out, name, robot, looked, todo),
            images=images,
            file_format=args.file_format,
            on_episode=lambda: progress.advance(bar),
        )
    counts = ", ".join(f"{split} {len(of)}" for split, of in todo.splits.items())
    size = sum(f.stat().st_size for f in directory.iterdir() if f.is_file()) / 1e6
    since = f", {len(todo.new)} more than {todo.before}" if todo.before else ""
    console.print(f"{directory}: {counts} episodes{since}; {sum(len(x.action) for x in looked)} steps, {size:.0f} MB")


def main(args: Args, console: Console) -> None:
    recordings = settle(args, console)
    if args.robot is not None:
        robot = find_robot(args.robot)
        convert(args, robot, chosen(args, recordings, console), console)


if __name__ == "__main__":
    try:
        main(tyro.cli(Args), Console(highlight=False, soft_wrap=True))
    except (ValueError, DatasetError, FileExistsError, ModuleNotFoundError) as e:
        sys.exit(str(e))
