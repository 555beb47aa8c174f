"""Builds the indexes of datasets, which training does otherwise when it starts, and says what they hold:

    python data/index.py /data/open_x/* --workers 16
    python data/index.py gs://gresearch/robotics/bridge/0.1.0 --split train
    python data/index.py /data/open_x/fractal20220817_data --decode

A directory may be one dataset or hold many. What was stopped goes on where it was. Building verifies checksums, but
does not look into images: `--decode` decodes every one, names those that are damaged, and records them with the index,
so that training can leave their frames out instead of stopping at them.
"""

import dataclasses
import functools
import logging
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from rich.console import Console
from rich.logging import RichHandler
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table

from openpi_like.data import files
from openpi_like.data.damage import check_images, image_problem
from openpi_like.data.index import FrameIndex, open_index
from openpi_like.data.layouts import find_datasets, split_names
from openpi_like.data.schema import DatasetError


@dataclasses.dataclass(frozen=True)
class Args:
    """data: TFDS directories or directories of these, as paths or URLs. split: which; default all that each has.

    workers: processes that read; default one per core. index_dir: where indexes are kept (default: in the data, or the
    cache directory). max_corrupt_fraction: part of the records of a split that may be damaged or missing. decode: look
    into every image, unless that was done before; it is a failure if a larger part than that of the steps is damaged.
    """

    data: Annotated[tuple[str, ...], tyro.conf.Positional]
    split: tuple[str, ...] = ()
    workers: int = os.cpu_count() or 1
    index_dir: Path | None = None
    max_corrupt_fraction: float = 0.0
    decode: bool = False


SHOWN = 20  # damaged images listed of one split


def row(index: FrameIndex, seconds: float, built: bool) -> list[str]:
    """Returns the cells of a split: name, episodes, steps, size, size of the index per step, time and speed."""
    megabytes = sum(s.size for s in index.split.stats if s is not None) / 1e6
    size = sum(p.stat().st_size for p in index.path.rglob("*"))
    took = [f"{seconds:.1f}", f"{megabytes / seconds:,.0f}"] if built else ["was there", ""]
    counts = [f"{index.episodes:,}", f"{index.steps:,}", f"{megabytes:,.1f}", f"{size / index.steps:,.0f}"]
    return [str(index.split), *counts, *took]


def remarks(index: FrameIndex) -> list[str]:
    """Returns what a user should know: fields without a column, empty texts, records that were skipped."""
    lines = [f"{key} is left out: {why}" for key, why in index.left_out.items()]
    for key, texts in index.texts.items():
        empty = int(np.isin(texts.ids, [i for i, text in enumerate(texts.table) if not text.strip()]).sum())
        if empty:
            lines.append(f"{key} is empty in {empty:,} steps")
    if index.skipped:
        lines.append(f"{len(index.skipped):,} damaged records are skipped, the first: {index.skipped[0]}")
    return lines


def decode(index: FrameIndex, args: Args, report: Callable[[int, int], None]) -> tuple[list[str], list[str]]:
    """Decodes all images; returns what a user should know, and what is wrong. report: see `check_images`."""
    before = " before" if index.checked else ""
    index = check_images(index, workers=args.workers, progress=report)
    count, damaged = index.steps * len(index.images), sum(map(len, index.damaged.values()))
    summary = f"{index.split}: all {count:,} images were decoded{before}, {damaged:,} of them are damaged"
    if not damaged:
        return [summary], []
    lines = []
    for key, steps in index.damaged.items():
        empty = int((index.images[key][:, 1][steps] == 0).sum())
        lines.append(f"  {key}: {len(steps):,} of {index.steps:,} are damaged, {empty:,} of these are empty")
        if empty:
            lines.append("    (a Camera with min_bytes=1 takes an empty image for that of an absent camera)")
    first = sorted((int(step), key) for key, steps in index.damaged.items() for step in steps[:SHOWN])[:SHOWN]
    lines += [f"  {image_problem(index, step, key)}" for step, key in first]
    lines += [f"  ... and {damaged - len(first):,} more"] * (damaged > len(first))
    index.close()
    lost = len(np.unique(np.concatenate(list(index.damaged.values()))))
    if lost <= args.max_corrupt_fraction * index.steps:
        return [summary, *lines], []
    wrong = (
        f"{index.split}: {lost:,} of {index.steps:,} steps have a damaged image, tolerated are "
        f"{args.max_corrupt_fraction:g} of them (max_corrupt_fraction); copy these files again, or tolerate them:"
    )
    return [summary], [wrong, *lines]


def show(progress: Progress, task: TaskID, done: int, total: int) -> None:
    progress.update(task, completed=done, total=total)


def main(args: Args, console: Console) -> None:
    table = Table("split", "episodes", "steps", "MB", "index bytes/step", "seconds", "MB/s")
    notes, problems = [], []
    found = []
    for place in args.data:
        try:
            for directory in find_datasets(files.locate(place)):
                found += [(directory, split) for split in args.split or split_names(directory)]
        except DatasetError as e:
            problems.append(str(e))
    bars = (
        TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*bars, console=console, transient=True) as progress:
        for directory, split in found:
            task = progress.add_task(f"{directory} {split}", total=None)

            started = time.perf_counter()
            try:
                index = open_index(
                    directory,
                    split,
                    index_dir=args.index_dir,
                    max_corrupt_fraction=args.max_corrupt_fraction,
                    workers=args.workers,
                    progress=functools.partial(show, progress, task),
                )
            except DatasetError as e:
                problems.append(str(e))
                continue
            finally:
                built = progress.tasks[task].total is not None
                progress.update(task, visible=False)
            table.add_row(*row(index, time.perf_counter() - started, built))
            notes += [f"{index.split}: {line}" for line in remarks(index)]
            if args.decode:
                task = progress.add_task(f"{directory} {split}, images", total=None)
                try:
                    told, wrong = decode(index, args, functools.partial(show, progress, task))
                except DatasetError as e:
                    told, wrong = [], [str(e)]
                progress.update(task, visible=False)
                notes += told
                problems += wrong
    console.print(table)
    for line in notes:
        console.print(line, markup=False, highlight=False)
    if problems:
        sys.exit("\n".join(problems))


if __name__ == "__main__":
    shared = Console()
    logging.basicConfig(
        level=logging.INFO, format="%(message)s",
        handlers=[RichHandler(console=shared, show_time=False, show_path=False, show_level=False)],
    )  # fmt: skip
    main(tyro.cli(Args), shared)
