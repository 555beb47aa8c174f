"""Rewrites a dataset with smaller images, once, so that training reads and decodes less:

    python data/prepare.py DIR --out prepared/bridge/1.0.0 --height 256 --width 256 --workers 8

Colour images larger than the box are shrunk to fit into it and stored as JPEG; all else is copied byte for byte. The
result is a TFDS directory with the same splits and shards. Run it again after an interruption: shards that are done are
kept. Where a robot tells an absent camera by the size of its images (`Camera.min_bytes`), it needs another size for the
new ones. This is optional: training reads the dataset as it is published. --beam runs on Apache Beam (apache-beam).
"""

import dataclasses
import logging
import sys
from typing import Annotated, Literal

import tyro
from rich.console import Console
from rich.progress import Progress

from openpi_like.data.files import Url, locate
from openpi_like.data.prepare import Prepare, plan, write_info, write_shards


@dataclasses.dataclass(frozen=True)
class Args:
    """data: TFDS directory, or its URL. out: directory to write, best called as the dataset and its version.

    height, width: the box in pixels. encoding, quality: of colour images; quality is that of JPEG, with 4:2:0 colours.
    file_format: "array_record" is for readers that need random access; other RLDS readers want "tfrecord".
    splits: default all. workers: processes. beam: options of a Beam pipeline, e.g. runner=DirectRunner.
    """

    data: Annotated[str, tyro.conf.Positional]
    out: str
    height: int = 256
    width: int = 256
    encoding: Literal["jpeg", "png"] = "jpeg"
    quality: int = 95
    file_format: Literal["tfrecord", "array_record"] = "tfrecord"
    splits: tuple[str, ...] = ()
    workers: int = 1
    beam: tuple[str, ...] = ()


def main(args: Args, console: Console) -> None:
    out = locate(args.out)
    if isinstance(out, Url):
        sys.exit(
            f"--out {args.out} is in a store, expected a folder of this machine or a mounted one; copy it from there"
        )
    config = Prepare(args.height, args.width, args.encoding, args.quality, args.file_format)
    tasks = plan(args.data, out, config, args.splits)
    if args.beam:
        try:
            from openpi_like.data import beam
        except ImportError as e:
            sys.exit(f"--beam needs Apache Beam ({e}); pip install 'openpi-like[beam]', then --no-deps apache-beam")
        beam.write_shards(tasks, [f"--{option}" for option in args.beam])
    else:
        with Progress(console=console, transient=True) as bar:
            shards = bar.add_task("shards", total=len(tasks))
            write_shards(tasks, workers=args.workers, progress=lambda done, _: bar.update(shards, completed=done))
    done = write_info(args.data, out, config, tasks)
    before, after = sum(d.images_before for d in done), sum(d.images_after for d in done)
    console.print(
        f"{sum(d.records for d in done):,} episodes in {len(done)} shards; colour images had {before / 1e6:,.1f} MB "
        f"and have {after / 1e6:,.1f}; written to {args.out}"
    )


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        main(tyro.cli(Args), Console(highlight=False))
    except (ValueError, OSError) as e:
        sys.exit(str(e))
