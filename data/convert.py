"""Converts a dataset of any layout that is read here to LeRobot v3.0 or to RLDS:

    python data/convert.py DIR --to lerobot --out converted/bridge --fps 5 --leave-out 'episode_metadata/*'
    python data/convert.py DIR --to rlds --out converted/so101/1.0.0 --pictures png

Numbers and texts keep their values, and pictures that are stored one by one their bytes (LeRobot: with --videos none).
What the other layout cannot hold is listed, and refused until --leave-out names it. The result appears when it is
complete: a run that was stopped leaves DIR.incomplete, which the next one replaces.
"""

import dataclasses
import logging
import os
import sys
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console
from rich.progress import Progress

from openpi_like.data.convert import Conversion, to_lerobot, to_rlds
from openpi_like.data.files import Url, locate
from openpi_like.data.rlds_tables import RldsFormat


@dataclasses.dataclass(frozen=True)
class Args:
    """data: directory of a dataset, or its URL. to, out: what to write, and where; RLDS is best called NAME/1.0.0.

    split: default all. fps: steps in a second, where the dataset does not say it. leave_out: fields to do without, or
    patterns of them. rename: OLD=NEW, where the rules give no good name.
    text: the field that is LeRobot's task; default the instruction, or the only text. instruction: that of all steps,
        where no field has one.
    videos: how LeRobot stores pictures; "none": as they are. robot_type: what LeRobot shows; default as the
        dataset says.
    pictures, quality: how frames of videos and raw pictures are stored one by one; quality is that of JPEG.
    file_format: of RLDS; "array_record" is for readers that need random access, other readers want "tfrecord".
    max_corrupt_fraction: part of the episodes that may be damaged, and are then skipped. workers: processes that index.
    """

    data: Annotated[str, tyro.conf.Positional]
    to: Literal["lerobot", "rlds"]
    out: str
    split: tuple[str, ...] = ()
    fps: float | None = None
    leave_out: tuple[str, ...] = ()
    rename: tuple[str, ...] = ()
    text: str | None = None
    instruction: str | None = None
    videos: Literal["libx264", "libsvtav1", "none"] = "libx264"
    robot_type: str | None = None
    pictures: Literal["jpeg", "png"] = "jpeg"
    quality: int = 95
    file_format: Literal["tfrecord", "array_record"] = "tfrecord"
    max_corrupt_fraction: float = 0.0
    workers: int = 1


def main(args: Args, console: Console) -> None:
    if isinstance(locate(args.out), Url):
        sys.exit(
            f"--out {args.out} is in a store, expected a folder of this machine or a mounted one; copy it from there"
        )
    if wrong := [pair for pair in args.rename if "=" not in pair]:
        sys.exit(f"--rename {' '.join(wrong)}: expected OLD=NEW")
    out = Path(args.out)
    conversion = Conversion(
        args.split, args.leave_out, dict(pair.split("=", 1) for pair in args.rename), args.pictures, args.quality,
        args.max_corrupt_fraction, args.workers,
    )  # fmt: skip
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task("episodes", total=None)

        def progress(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        if args.to == "lerobot":
            videos = None if args.videos == "none" else args.videos
            done = to_lerobot(
                args.data, out, conversion, fps=args.fps, text=args.text, instruction=args.instruction, videos=videos,
                robot_type=args.robot_type, progress=progress,
            )  # fmt: skip
        else:
            if args.text is not None or args.instruction is not None:
                sys.exit("--text and --instruction are for LeRobot; RLDS keeps all texts, --rename OLD=NEW names one")
            done = to_rlds(
                args.data, out, conversion, fps=args.fps, form=RldsFormat(args.file_format), progress=progress
            )
    for key, name in sorted(done.names.items()):
        console.print(f"{key} -> {name}{', encoded again' if key in done.encoded else ''}", markup=False)
    if done.left_out:
        console.print(f"left out: {', '.join(done.left_out)}", markup=False)
    if done.skipped:
        console.print(f"skipped {len(done.skipped)} damaged episodes:", *done.skipped, sep="\n  ", markup=False)
    console.print(f"{done.episodes:,} episodes of {done.steps:,} steps written to {args.out}", markup=False)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    os.environ.setdefault("SVT_LOG", "1")  # the encoder of AV1 else prints its settings for every episode
    try:
        main(tyro.cli(Args), Console(highlight=False))
    except (ValueError, OSError) as e:
        sys.exit(str(e))
