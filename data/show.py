"""Shows what is in a TFDS directory: fields, episodes, instructions, and a sheet of pictures.

python data/show.py runs/data/sawyer_sim/1.0.0 --out sheet.png
"""

import dataclasses
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from PIL import Image
from rich.console import Console
from rich.table import Table

from openpi_like.data.images import decode, fit
from openpi_like.data.index import FrameIndex, open_index

_TILE = (128, 128)


@dataclasses.dataclass(frozen=True)
class Args:
    """data: TFDS directory. out: picture to write, a row per episode and a block of columns per camera.

    episodes, frames: how many of each, evenly spaced, the sheet shows. index_dir: where indexes are kept.
    """

    data: Annotated[Path, tyro.conf.Positional]
    split: str = "train"
    out: Path | None = None
    episodes: int = 6
    frames: int = 5
    index_dir: Path | None = None


def fields(index: FrameIndex) -> Table:
    """Returns a table of all fields, with the range of the numeric ones."""
    table = Table("field", "kind", "type", "shape", "range or examples", title=str(index.split))
    for level, features in (("step", index.schema.steps), ("episode", index.schema.episode)):
        columns = index.columns if level == "step" else index.episode_columns
        texts = index.texts if level == "step" else index.episode_texts
        for key, f in features.items():
            note = index.left_out.get(key, "")
            if key in columns:
                note = f"{float(columns[key].min()):.4g} .. {float(columns[key].max()):.4g}"
            elif key in texts:
                note = f"{len(texts[key].table)} different, e.g. {texts[key].table[0]!r}"
            elif key in index.images and level == "step":
                note = f"{index.images[key][:, 1].mean() / 1024:.1f} KiB on average"
            table.add_row(f"{level}: {key}", f.kind, f.dtype, str(f.shape), note)
    return table


def sheet(index: FrameIndex, episodes: int, frames: int) -> np.ndarray:
    """Returns a picture of evenly spaced frames: a row per episode, a block of columns per camera."""
    height, width = _TILE
    cameras = list(index.images)
    chosen = np.unique(np.linspace(0, index.episodes - 1, episodes).round().astype(int))
    out = np.zeros((len(chosen) * height, len(cameras) * frames * width, 3), np.uint8)
    for row, episode in enumerate(chosen):
        first, end = index.episode_start[episode : episode + 2]
        steps = np.linspace(first, end - 1, frames).round().astype(int)
        for column, (key, step) in enumerate((key, step) for key in cameras for step in steps):
            image = decode(index.read_image(int(step), key))
            tile = out[row * height : (row + 1) * height, column * width : (column + 1) * width]
            fit(image, tile)
    return out


def main(args: Args) -> None:
    index, console = open_index(args.data, args.split, index_dir=args.index_dir), Console()
    console.print(fields(index))
    lengths = np.diff(index.episode_start)
    console.print(
        f"{index.episodes:,} episodes, {index.steps:,} steps; an episode has {lengths.min()} to {lengths.max()} steps, "
        f"{np.median(lengths):g} in the median"
    )
    if args.out is not None:
        Image.fromarray(sheet(index, args.episodes, args.frames)).save(args.out)
        console.print(f"cameras from left to right: {', '.join(index.images)}; written to {args.out}")


if __name__ == "__main__":
    main(tyro.cli(Args))
