"""Computes the normalisation statistics of one robot from its datasets, without reading an image:

    python data/stats.py --robot sawyer --data runs/data/sawyer_sim/1.0.0 --out runs/stats/sawyer.json

Several directories after --data are counted as one dataset.
"""

import dataclasses
import logging
import sys
from pathlib import Path

import tyro
from rich.console import Console
from rich.table import Table

from openpi_like.data.dataset import EpisodeDataset
from openpi_like.data.index import open_index
from openpi_like.data.normalize import FieldStats
from openpi_like.data.stats import compute_normalization, save_normalization
from openpi_like.robots import find_robot


@dataclasses.dataclass(frozen=True)
class Args:
    """Statistics of states and encoded action chunks.

    robot: a file of openpi_like/robots ("sawyer"), or module and object ("my_robots.arm:ARM").
    data: TFDS directories. out: the JSON file to write; a run looks for `<robot name>.json`.
    split: which split. frame_stride: take every n-th frame. index_dir: where indexes are kept (default: in the data).
    """

    robot: str
    data: tuple[Path, ...]
    out: Path
    split: str = "train"
    frame_stride: int = 1
    index_dir: Path | None = None


def table(what: str, stats: FieldStats, degenerate: tuple[str, ...]) -> Table:
    """Returns the statistics as a table."""
    shown = Table("dim", "mean", "std", "q01", "q99", "min", "max", "", title=f"{what}, {stats.count:,} values")
    for i, name in enumerate(stats.names):
        columns = (stats.mean, stats.std, stats.q01, stats.q99, stats.min, stats.max)
        note = "constant: centred, not scaled" if name in degenerate else ""
        shown.add_row(name.replace("[", r"\["), *(f"{c[i]:.4g}" for c in columns), note)
    return shown


def main(args: Args) -> None:
    console = Console()
    try:
        robot = find_robot(args.robot)
    except ValueError as e:
        sys.exit(str(e))
    datasets = [
        EpisodeDataset(open_index(path, args.split, index_dir=args.index_dir), robot, frame_stride=args.frame_stride)
        for path in args.data
    ]
    normalization = compute_normalization(*datasets)
    save_normalization(normalization, args.out)
    frames, episodes = sum(map(len, datasets)), sum(d.index.episodes for d in datasets)
    console.print(f"robot {robot.name}: {frames:,} frames of {episodes:,} episodes, mode {normalization.mode}")
    for what, stats in (("state", normalization.state), ("action chunks", normalization.action)):
        console.print(table(what, stats, stats.degenerate(normalization.mode)))
    console.print(f"written to {args.out}")


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    main(tyro.cli(Args))
