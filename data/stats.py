"""Computes normalisation statistics from the numbers of datasets, without reading an image; of one robot:

    python data/stats.py --robot sawyer --data runs/data/sawyer_sim/1.0.0 --out runs/stats/sawyer.json

or those that a run needs and that are not in its stats directory yet, of every robot over all its datasets:

    python data/stats.py --config configs/demo_pretrain.py --workers 8

Several directories after --data are counted as one dataset. Statistics that exist, of a released policy for instance,
can be measured on a dataset instead: --use stats.json in place of --out. --beam runs on Apache Beam (apache-beam).
"""

import contextlib
import dataclasses
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console
from rich.progress import Progress
from rich.table import Column, Table

from openpi_like.config import load_run, override
from openpi_like.data.dataset import EpisodeDataset, open_dataset
from openpi_like.data.normalize import FieldStats, Normalization
from openpi_like.data.stats import (
    AGAIN,
    Coverage,
    compute_coverage,
    compute_normalization,
    counted,
    load_normalization,
    save_normalization,
)
from openpi_like.robots.find import find_robot
from openpi_like.robots.robot import Robot


@dataclasses.dataclass(frozen=True)
class Args:
    """Statistics of states and encoded action chunks.

    robot: a robot of openpi_like/robots ("sawyer"), a file ("my_robot.py", or "my_robots.py:ARM" where it has several),
        or module and object ("my_robots.arm:ARM").
    data: TFDS directories, or their URLs. out: the JSON file to write; a run looks for `<robot name>.json`.
    use: a file of statistics to measure on this data; nothing is written.
    split: which split, or a part of one, "train[:95%]". frame_stride: take every n-th frame.
    index_dir: where indexes are kept (default: in the data). max_corrupt_fraction: see `open_dataset`.
    config: a run, in place of all the above. set: its overrides, key=value. again: also compute statistics that exist.
    workers: processes; the numbers do not depend on them. beam: options of a Beam pipeline, e.g. runner=DirectRunner.
    """

    robot: str | None = None
    data: tuple[str, ...] = ()
    out: Path | None = None
    use: Path | None = None
    split: str = "train"
    frame_stride: int = 1
    index_dir: Path | None = None
    max_corrupt_fraction: float = 0.0
    config: Path | None = None
    set: tuple[str, ...] = ()
    again: bool = False
    workers: int = 1
    beam: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        problems = []
        if self.config is None:
            if self.robot is None or not self.data or (self.out is None) == (self.use is None):
                problems.append("give --robot, --data and one of --out and --use; or give --config")
            if self.set or self.again:
                problems.append("--set and --again belong to --config")
        elif self.robot is not None or self.data or self.out is not None or self.use is not None:
            problems.append("--config says robots, data and files; leave out --robot, --data, --out and --use")
        if self.workers < 1:
            problems.append(f"--workers {self.workers}, expected at least 1")
        if problems:
            raise ValueError("; ".join(problems))


def table(what: str, stats: FieldStats, degenerate: tuple[str, ...], coverage: Coverage) -> Table:
    """Returns the statistics, and what they make of the data, as a table."""
    head = ("dim", "mean", "std", "q01", "q99", "min", "max", "outside q01..q99", "largest normalised", "")
    shown = Table(*(Column(h, overflow="fold") for h in head), title=f"{what}, {stats.count:,} values")
    for i, name in enumerate(stats.names):
        columns = (stats.mean, stats.std, stats.q01, stats.q99, stats.min, stats.max)
        note = "constant: centred, not scaled" if name in degenerate else ""
        shown.add_row(
            name.replace("[", r"\["),
            *(f"{c[i]:.4g}" for c in columns),
            f"{coverage.outside[i] / coverage.count:.2%}",
            f"{coverage.largest[i]:.3g}",
            note,
        )
    return shown


def beam() -> Any:
    """Returns our pipelines."""
    try:
        from openpi_like.data import beam
    except ImportError as e:
        sys.exit(f"--beam needs Apache Beam ({e}); pip install 'openpi-like[beam]', then --no-deps apache-beam")
    return beam


def compute(args: Args, datasets: Sequence[EpisodeDataset], out: Path, console: Console) -> None:
    """Writes the statistics of one robot's datasets to `out`, and reports them."""
    if args.beam:
        out.parent.mkdir(parents=True, exist_ok=True)
        normalization, coverage = beam().write_normalization(datasets, str(out), options(args))
        report(normalization, coverage, datasets, console)
    else:
        with bar(f"statistics of {datasets[0].robot.name}", console) as progress:
            normalization = compute_normalization(*datasets, workers=args.workers, progress=progress)
        save_normalization(normalization, out)
        measure(args, normalization, datasets, out, console)
    console.print(f"written to {out}")


def measure(
    args: Args, normalization: Normalization, datasets: Sequence[EpisodeDataset], path: Path, console: Console
) -> None:
    """Reports how statistics, those of the file `path`, suit datasets."""
    if args.beam:
        coverage = beam().compute_coverage(normalization, datasets, str(path), options(args))
    else:
        with bar(f"coverage of {normalization.robot}", console) as progress:
            coverage = compute_coverage(normalization, *datasets, workers=args.workers, progress=progress)
    report(normalization, coverage, datasets, console)


def options(args: Args) -> list[str]:
    """Returns the pipeline's options as Beam wants them."""
    return [f"--{option}" for option in args.beam]


@contextlib.contextmanager
def bar(what: str, console: Console) -> Iterator[Callable[[int, int], None]]:
    """Shows a progress bar; gives what moves it."""
    with Progress(console=console, transient=True) as shown:
        task = shown.add_task(what, total=None)
        yield lambda done, total: shown.update(task, completed=done, total=total)


def report(
    normalization: Normalization,
    covered: tuple[Coverage, Coverage],
    datasets: Sequence[EpisodeDataset],
    console: Console,
) -> None:
    frames, episodes = sum(map(len, datasets)), sum(d.episodes for d in datasets)
    console.print(f"robot {normalization.robot}: {frames:,} frames of {episodes:,} episodes, mode {normalization.mode}")
    fields = (normalization.state, normalization.action)
    for what, stats, coverage in zip(("state", "action chunks"), fields, covered, strict=True):
        console.print(table(what, stats, stats.degenerate(normalization.mode), coverage))


def check(path: Path, robot: Robot, datasets: Sequence[EpisodeDataset]) -> None:
    """Raises ValueError where statistics are not of this robot and this data."""
    before, now = load_normalization(path, robot).data, counted(datasets)
    if before and sorted(before) != sorted(now):
        raise ValueError(
            f"{path}: statistics of other data:\n  "
            + "\n  ".join(before)
            + "\nthe run has\n  "
            + "\n  ".join(now)
            + f"\n{AGAIN}"
        )


def main(args: Args, console: Console) -> None:
    if args.config is None:
        assert args.robot is not None  # Args has checked it
        robot = find_robot(args.robot)
        datasets = [
            open_dataset(
                path,
                robot,
                args.split,
                frame_stride=args.frame_stride,
                index_dir=args.index_dir,
                max_corrupt_fraction=args.max_corrupt_fraction,
            )
            for path in args.data
        ]
        if args.use is not None:
            measure(args, load_normalization(args.use, robot), datasets, args.use, console)
        else:
            assert args.out is not None
            compute(args, datasets, args.out, console)
        return
    run = override(load_run(args.config), args.set)
    if not run.statistics.needs_own:
        console.print(f"nothing to compute: the run takes its statistics from elsewhere, {run.statistics}")
        return
    from openpi_like.data.config import open_datasets  # slow to import, and workers import this file

    robots, opened = {entry.robot.name: entry.robot for entry in run.data.entries}, open_datasets(run.data)
    for robot in robots.values():
        # The same files for two purposes (see MixtureEntry.text_key) are counted once.
        of_robot = {
            (entry.path, entry.split, entry.selection): dataset
            for entry, dataset in zip(run.data.entries, opened, strict=True)
            if dataset is not None and entry.robot.name == robot.name
        }
        out = Path(run.stats) / f"{robot.name}.json"
        if out.is_file() and not args.again:
            check(out, robot, list(of_robot.values()))
            console.print(f"robot {robot.name}: {out} is there")
        else:
            compute(args, list(of_robot.values()), out, console)


if __name__ == "__main__":
    logging.basicConfig(format="%(message)s")
    logging.getLogger("openpi_like").setLevel(logging.INFO)
    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax reports every array it reads
    try:
        main(tyro.cli(Args), Console(highlight=False))
    except (ValueError, OSError) as e:
        sys.exit(str(e))
