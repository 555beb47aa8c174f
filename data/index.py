"""Builds the indexes of datasets, which training does otherwise when it starts, and says what they hold:

    python data/index.py /data/open_x/* --workers 16
    python data/index.py gs://gresearch/robotics/bridge/0.1.0 --split train
    python data/index.py /data/open_x/fractal20220817_data --decode

A directory may be one dataset or hold many. A build that was stopped goes on where it was. Building verifies checksums,
but does not look into images: `--decode` decodes every one, and names those at which training would stop.
"""

import dataclasses
import functools
import logging
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
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
from openpi_like.data.images import decode, decode_depth
from openpi_like.data.index import FrameIndex, open_index
from openpi_like.data.schema import DatasetError, find_datasets, split_names


@dataclasses.dataclass(frozen=True)
class Args:
    """data: TFDS directories or directories of these, as paths or URLs. split: which; default all that each has.

    workers: processes that read; default one per core. index_dir: where indexes are kept (default: in the data, or the
    cache directory). max_corrupt_fraction: part of the records of a split that may be damaged or missing. decode: look
    into every image and list those that are damaged, as a failure.
    """

    data: Annotated[tuple[str, ...], tyro.conf.Positional]
    split: tuple[str, ...] = ()
    workers: int = os.cpu_count() or 1
    index_dir: Path | None = None
    max_corrupt_fraction: float = 0.0
    decode: bool = False


BLOCK = 256  # steps whose images one thread decodes at a time


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


def damaged_images(index: FrameIndex, workers: int, report: Callable[[int, int], None]) -> list[str]:
    """Decodes every image in threads; returns where one cannot be, and why. report: bytes that are done, and of all."""

    def damaged(step: int, key: str) -> str | None:
        dtype = index.schema.steps[key].dtype
        try:
            data = index.read_image(step, key)
            if dtype == "uint8":
                decode(data)
            else:
                decode_depth(data, dtype)
        except DatasetError as e:
            return str(e)
        except ValueError as e:
            return f"{index.where(step)}: cannot decode {key}: {e}"
        return None

    def check(start: int) -> tuple[int, list[str]]:
        steps = range(start, min(start + BLOCK, index.steps))
        found = [damaged(step, key) for step in steps for key in index.images]
        size = sum(int(spans[start : steps.stop, 1].sum()) for spans in index.images.values())
        return size, [problem for problem in found if problem is not None]

    problems, done = [], 0
    total = sum(int(spans[:, 1].sum()) for spans in index.images.values())
    report(done, total)
    with ThreadPoolExecutor(workers) as pool:
        for size, found in pool.map(check, range(0, index.steps, BLOCK)):
            problems += found
            done += size
            report(done, total)
    index.close()
    return problems


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
                damaged = damaged_images(index, args.workers, functools.partial(show, progress, task))
                progress.update(task, visible=False)
                problems += damaged
                count = index.steps * len(index.images)
                notes.append(f"{index.split}: {len(damaged):,} of {count:,} images cannot be decoded")
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
