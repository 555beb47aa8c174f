"""Computes the normalisation statistics of one robot from its datasets, without reading an image:

    python data/stats.py --robot sawyer --data runs/data/sawyer_sim/1.0.0 --out runs/stats/sawyer.json

Several directories after --data are counted as one dataset.
"""

import dataclasses
import importlib
import logging
from pathlib import Path

import tyro
from rich.console import Console
from rich.table import Table

from openpi_like.config import near_names
from openpi_like.data.dataset import EpisodeDataset
from openpi_like.data.index import open_index
from openpi_like.data.normalize import FieldStats
from openpi_like.data.stats import compute_normalization, save_normalization
from openpi_like.robots import Robot


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


def find_robot(name: str) -> Robot:
    """Returns the robot called "sawyer" or "module:OBJECT"."""
    module, _, attribute = name.partition(":") if ":" in name else (f"openpi_like.robots.{name}", "", name.upper())
    try:
        robot = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as e:
        folder = Path(__file__).parents[1] / "openpi_like" / "robots"
        known = sorted(p.stem for p in folder.glob("[!_]*.py") if p.stem != "robot")
        raise SystemExit(f"no robot {name!r} ({e}); {near_names(name, known)}; or give module:OBJECT") from e
    if not isinstance(robot, Robot):
        raise SystemExit(f"{module}:{attribute} is a {type(robot).__name__}, expected a Robot")
    return robot


def table(what: str, stats: FieldStats, degenerate: tuple[str, ...]) -> Table:
    """Returns the statistics as a table."""
    shown = Table("dim", "mean", "std", "q01", "q99", "min", "max", "", title=f"{what}, {stats.count:,} values")
    for i, name in enumerate(stats.names):
        columns = (stats.mean, stats.std, stats.q01, stats.q99, stats.min, stats.max)
        note = "constant: centred, not scaled" if name in degenerate else ""
        shown.add_row(name.replace("[", r"\["), *(f"{c[i]:.4g}" for c in columns), note)
    return shown


def main(args: Args) -> None:
    robot, console = find_robot(args.robot), Console()
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
