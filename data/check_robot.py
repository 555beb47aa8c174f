"""Checks the description of a robot on its data, and says what to change:

    python data/check_robot.py runs/data/sawyer_sim/1.0.0 --robot sawyer --out check.html

Units, rate, limits, gripper polarity, targets or changes, rotations, lag between command and state, where the actions
lead (in a simulator too, where there is one), values that are cut, language, and cameras as the policy sees them.
--out writes a page with plots and pictures. --strict exits with 1 when something looks wrong, for scripts.

It looks at whole episodes, evenly spaced, with at most --steps steps. data/show.py looks at data without a robot.
"""

import dataclasses
import logging
import math
import sys
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.table import Column, Table

from openpi_like.data.index import open_index
from openpi_like.data.robot_check import RobotSample, check_robot
from openpi_like.data.robot_check.report import HEAD, report
from openpi_like.data.robot_check.robot_sample import STEPS
from openpi_like.robots.find import find_robot

STYLES = {"found": "", "suspect": "yellow", "error": "red"}


@dataclasses.dataclass(frozen=True)
class Args:
    """data: TFDS directory, or its URL. robot: a name ("sawyer") or a file ("my_robot.py"), see data/stats.py.

    out: HTML page to write. split: of the data. steps: that are looked at, at most. rate: steps per second of the data,
    where you know it and they do not say it. image_size: height and width that the policy sees. simulate: episodes that
    are replayed in a simulator of the robot, where there is one. strict: exit with 1 when something is suspected.
    index_dir, max_corrupt_fraction: see `openpi_like.data.index.open_index`.
    """

    data: Annotated[str, tyro.conf.Positional]
    robot: str
    out: Path | None = None
    split: str = "train"
    steps: int = STEPS
    rate: float | None = None
    image_size: tuple[int, int] = (224, 224)
    simulate: int = 2
    strict: bool = False
    index_dir: Path | None = None
    max_corrupt_fraction: float = 0.0

    def __post_init__(self) -> None:
        problems = [f"--steps {self.steps}, expected at least 1"] if self.steps < 1 else []
        if self.rate is not None and not 0 < self.rate < math.inf:
            problems.append(f"--rate {self.rate}, expected a number above 0")
        if min(self.image_size) < 1:
            problems.append(f"--image-size {self.image_size}, expected at least 1 x 1")
        if self.simulate < 0:
            problems.append(f"--simulate {self.simulate}, expected at least 0")
        if self.out is not None and self.out.suffix.lower() != ".html":
            problems.append(f"--out {self.out}, expected a name that ends in .html")
        if self.out is not None and not self.out.parent.is_dir():
            problems.append(f"--out {self.out}: there is no directory {self.out.parent}; make it first")
        if problems:
            raise ValueError("; ".join(problems))


def main(args: Args, console: Console) -> bool:
    """Returns whether nothing looks wrong."""
    index = open_index(args.data, args.split, index_dir=args.index_dir, max_corrupt_fraction=args.max_corrupt_fraction)
    sample = RobotSample.take(
        index,
        find_robot(args.robot),
        rate=args.rate,
        most=args.steps,
        image_size=args.image_size,
        simulate=args.simulate,
        max_corrupt_fraction=args.max_corrupt_fraction,
    )
    console.print(f"robot {sample.robot.name} on {index.split}: {sample.sample}", markup=False)
    found = check_robot(sample)
    for name, findings in found.items():
        table = Table(*(Column(h, overflow="fold") for h in HEAD), title=name, title_justify="left")
        for f in findings:
            cells = (f.level, f.about, f.message, f.advice)
            table.add_row(*(c.replace("[", r"\[") for c in cells), style=STYLES[f.level])
        console.print(table)
    suspected = [f for findings in found.values() for f in findings if f.level != "found"]
    for f in suspected:  # once more where a terminal stays
        console.print(f"{f.level}: {f.about + ': ' if f.about else ''}{f.message}; {f.advice}", markup=False)
    if not suspected:
        console.print("nothing looks wrong")
    if args.out is not None:
        args.out.write_text(report(sample, found))
        console.print(f"written to {args.out}", markup=False)
    return not suspected


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        args = tyro.cli(Args)
        clean = main(args, Console(highlight=False))
    except (ValueError, OSError) as e:
        sys.exit(str(e))
    sys.exit(1 if args.strict and not clean else 0)
