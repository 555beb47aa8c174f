"""Shows what is in a TFDS directory, and what looks wrong in it:

    python data/show.py runs/data/sawyer_sim/1.0.0 --out report.html

Fields, lengths of episodes, control rate, ranges of all numbers, instructions, cameras, and suspected traps, each with
the numbers it rests on. --out writes a report as one HTML file, with histograms and a contact sheet of the cameras, or,
if it ends in .png or .jpg, the contact sheet alone.

Least and greatest values, values that are not finite, ends of episodes and texts are those of all steps. The rest is of
whole episodes, evenly spaced, with at most --steps steps: quantiles, histograms, and what is suspected of movements.
"""

import collections
import dataclasses
import io
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from matplotlib.figure import Figure
from PIL import Image
from rich.console import Console
from rich.table import Column, Table

from openpi_like import html_page
from openpi_like.data.episode_sample import SAMPLE, Sample, bounds, rows, time_gaps
from openpi_like.data.images import fit
from openpi_like.data.index import FrameIndex, open_index
from openpi_like.data.schema import DatasetError
from openpi_like.data.traps import Trap, action_keys, find_traps, state_keys
from openpi_like.robots.oxe import ROBOTS

TILE = (128, 128)
PICTURES = (".png", ".jpg", ".jpeg")


@dataclasses.dataclass(frozen=True)
class Args:
    """data: TFDS directory, or its URL. out: report (.html) or contact sheet (.png, .jpg) to write.

    episodes, frames: how many of each, evenly spaced, the sheet shows, a row per episode and a block of columns per
    camera. samples: images per camera that are looked at for traps. texts: instructions listed, most frequent first.
    steps: of which quantiles, histograms and suspicions are, 100 bytes of memory each for an arm.
    index_dir, max_corrupt_fraction: see `openpi_like.data.index.open_index`.
    """

    data: Annotated[str, tyro.conf.Positional]
    split: str = "train"
    out: Path | None = None
    episodes: int = 6
    frames: int = 5
    samples: int = 32
    texts: int = 20
    steps: int = SAMPLE
    index_dir: Path | None = None
    max_corrupt_fraction: float = 0.0

    def __post_init__(self) -> None:
        least = {k: getattr(self, k) for k in ("episodes", "frames", "samples", "texts", "steps")}
        problems = [f"--{k} {n}, expected at least 1" for k, n in least.items() if n < 1]
        if self.out is not None and self.out.suffix.lower() not in (".html", *PICTURES):
            problems.append(f"--out {self.out}, expected a name that ends in .html, {', '.join(PICTURES)}")
        if self.out is not None and not self.out.parent.is_dir():
            problems.append(f"--out {self.out}: there is no directory {self.out.parent}; make it first")
        if problems:
            raise ValueError("; ".join(problems))


@dataclasses.dataclass(frozen=True)
class Rows:
    """A table, for the terminal and for HTML."""

    title: str
    head: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]

    def terminal(self) -> Table:
        columns = (Column(name, overflow="fold") for name in self.head)
        table = Table(*columns, title=self.title, title_justify="left")
        for row in self.rows:
            table.add_row(*(cell.replace("[", r"\[") for cell in row))
        return table

    def html(self) -> str:
        return html_page.section(self.title, html_page.table(self.head, self.rows))


# ---- Tables ----------------------------------------------------------------------------------------------------------


def fields(index: FrameIndex) -> Rows:
    """All fields, with the range of the numeric ones."""
    found = []
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
            found.append((f"{level}: {key}", f.kind, f.dtype, str(f.shape), note))
    return Rows("Fields", ("field", "kind", "type", "shape", "range or examples"), found)


def ranges(sample: Sample) -> Rows:
    """Every dim of the actions and of what is observed."""
    index, found = sample.index, []
    for key in (*action_keys(index), *state_keys(index)):
        low, high = bounds(rows(index, key)).astype(np.float64)
        x = sample.rows(key).astype(np.float64)
        q01, middle, q99 = np.nanquantile(x, [0.01, 0.5, 0.99], axis=0)
        for d in range(x.shape[1]):
            values = (low[d], q01[d], middle[d], q99[d], high[d], np.nanmean(x[:, d]), np.nanstd(x[:, d]))
            found.append((f"{key}[{d}]", *(f"{v:.4g}" for v in values)))
    title = "Numbers" if sample.whole else f"Numbers: min and max of all steps, the others of {sample}"
    return Rows(title, ("dim", "min", "q01", "median", "q99", "max", "mean", "std"), found)


def texts(index: FrameIndex, most: int) -> Rows:
    """The most frequent texts of every text field, by the episodes that have them."""
    found = []
    first = np.asarray(index.episode_start[:-1])
    for key, text in index.texts.items():
        counts = collections.Counter(text.ids[first].tolist())
        found += [(key, text.table[i] or "(empty)", f"{n:,}") for i, n in counts.most_common(most)]
        if len(counts) > most:
            found.append((key, f"... and {len(counts) - most:,} more", ""))
    return Rows("Texts", ("field", "text at the first step", "episodes"), found)


def cameras(index: FrameIndex, samples: dict[str, tuple[np.ndarray, list[np.ndarray]]]) -> Rows:
    """What the cameras deliver, by the sampled images."""
    found = []
    for key in index.images:
        if key not in samples:
            feature = index.schema.steps[key]
            found.append((key, f"{feature.dtype} of shape {feature.shape}, not shown", "", "", ""))
            continue
        steps, images = samples[key]
        formats = {index.image_encoding(int(s), key) for s in steps}
        sizes = sorted({f"{i.shape[0]} x {i.shape[1]}" for i in images})
        bytes_ = np.asarray(index.images[key][:, 1])
        found.append(
            (
                key,
                ", ".join(sorted(formats)),
                ", ".join(sizes),
                f"{bytes_.min():,} .. {bytes_.max():,}",
                f"{np.mean([i.mean() for i in images]):.0f}",
            )
        )
    return Rows("Cameras", ("camera", "format", "height x width", "bytes", "mean brightness of 255"), found)


def control_rate(sample: Sample) -> str:
    """The rate by a time stamp of the steps, where there is one that grows within episodes."""
    if (found := time_gaps(sample)) is None:
        return "not in the data (a Robot has to say it)"
    key, gaps = found
    gap = float(np.median(gaps))
    return f"{gap:g} of {key} between steps in the median ({1 / gap:.3g} Hz, if those are seconds)"


def suspicions(found: Sequence[Trap], sample: Sample) -> Rows:
    head = ("suspicion", "field", "found", "what to do")
    where = "" if sample.whole else f" in {sample}"
    return Rows(f"Suspected traps{where}: {len(found)}", head, [(t.kind, t.key, t.found, t.advice) for t in found])


# ---- Pictures --------------------------------------------------------------------------------------------------------


def image(index: FrameIndex, step: int, key: str) -> np.ndarray:
    try:
        return index.read_pixels(step, key)
    except DatasetError:
        raise
    except ValueError as e:
        raise ValueError(f"{index.where(step)}: cannot decode {key}: {e}") from e


def colour_cameras(index: FrameIndex) -> list[str]:
    """Cameras that are pictures, and not depth or masks."""
    features = {k: index.schema.steps[k] for k in index.images}
    return [k for k, f in features.items() if f.dtype == "uint8" and f.shape[2:] == (3,)]


def contact_sheet(index: FrameIndex, episodes: int, frames: int) -> Image.Image:
    """Evenly spaced frames: a row per episode, a block of columns per camera."""
    height, width = TILE
    keys = colour_cameras(index)
    chosen = np.unique(np.linspace(0, index.episodes - 1, episodes).round().astype(int))
    out = np.zeros((len(chosen) * height, max(1, len(keys)) * frames * width, 3), np.uint8)
    for row, episode in enumerate(chosen):
        first, end = index.episode_start[episode : episode + 2]
        steps = np.linspace(first, end - 1, frames).round().astype(int)
        for column, (key, step) in enumerate((key, step) for key in keys for step in steps):
            tile = out[row * height : (row + 1) * height, column * width : (column + 1) * width]
            fit(image(index, int(step), key), tile)
    return Image.fromarray(out)


def histograms(panels: Sequence[tuple[str, np.ndarray]], columns: int = 6) -> str:
    """A grid of histograms, as an HTML image."""
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(2.4 * columns, 1.7 * lines), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).reshape(-1)
    for axis, (title, values) in zip(axes, panels, strict=False):
        axis.hist(values[np.isfinite(values)], bins=40)
        axis.set_title(title, fontsize=7)
        axis.tick_params(labelsize=6)
    for axis in axes[len(panels) :]:
        axis.axis("off")
    return html_page.plot(figure, dpi=80)


def write_report(args: Args, sample: Sample, summary: str, tables: Sequence[Rows], out: Path) -> None:
    index, section = sample.index, html_page.section
    sheet = io.BytesIO()
    contact_sheet(index, args.episodes, args.frames).save(sheet, format="jpeg", quality=85)
    panels = [
        (f"{key}[{d}]", values)
        for key in (*action_keys(index), *state_keys(index))
        for d, values in enumerate(sample.rows(key).T)
    ]
    sections = [
        *(table.html() for table in tables),
        section(
            "Steps per episode", histograms([("steps", np.diff(index.episode_start).astype(np.float64))], columns=1)
        ),
        section(f"Histograms of {sample}", histograms(panels)) if panels else "",
        section(
            "Contact sheet",
            html_page.note(f"cameras from left to right: {', '.join(colour_cameras(index))}"),
            f'<img class="plot" alt="" src="{html_page.data_uri(sheet.getvalue(), "jpeg")}">',
        ),
    ]
    out.write_text(html_page.page(str(index.split), str(index.split), summary, (), sections))


def main(args: Args, console: Console) -> None:
    index = open_index(args.data, args.split, index_dir=args.index_dir, max_corrupt_fraction=args.max_corrupt_fraction)
    sample, lengths = Sample.take(index, args.steps), np.diff(index.episode_start)
    summary = (
        f"{index.episodes:,} episodes, {index.steps:,} steps; an episode has {lengths.min()} to {lengths.max()} steps, "
        f"{np.median(lengths):g} in the median; control rate: {control_rate(sample)}"
    )
    steps = np.unique(np.linspace(0, index.steps - 1, args.samples).round().astype(int))
    images = {key: (steps, [image(index, int(s), key) for s in steps]) for key in colour_cameras(index)}
    tables = [
        suspicions(find_traps(sample, images), sample),
        fields(index),
        ranges(sample),
        texts(index, args.texts),
        cameras(index, images),
    ]
    console.print(f"{index.split}: {summary}")
    for table in (*tables[1:], tables[0]):  # what is suspected comes last, where a terminal stays
        if table.rows:
            console.print(table.terminal())
    if not tables[0].rows:
        console.print("nothing suspicious found")
    if args.out is not None:
        if args.out.suffix.lower() in PICTURES:
            contact_sheet(index, args.episodes, args.frames).save(args.out)
            console.print(f"cameras from left to right: {', '.join(colour_cameras(index))}")
        else:
            write_report(args, sample, summary, tables, args.out)
        console.print(f"written to {args.out}")
    known = index.split.dataset in ROBOTS
    console.print(
        f"next: {f'--robot {index.split.dataset} describes it (openpi_like/robots/oxe.py), or ' if known else ''}"
        f"python data/draft_robot.py {args.data} --out my_robot.py",
        markup=False, soft_wrap=True,
    )  # fmt: skip


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        main(tyro.cli(Args), Console(highlight=False))
    except (ValueError, OSError) as e:
        sys.exit(str(e))
