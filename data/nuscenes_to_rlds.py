"""Writes scenes of nuScenes as an RLDS dataset for the ego vehicle: plans of six waypoints, at 2 Hz.

    python data/nuscenes_to_rlds.py PATH_TO_NUSCENES --split mini_train mini_val --out OUT
    python data/nuscenes_to_rlds.py PATH_TO_NUSCENES --version v1.0-trainval --scenes train.txt val.txt --out OUT

PATH_TO_NUSCENES is the folder that holds "samples", "v1.0-..." and, where it was downloaded, "can_bus". The first
command knows its scenes; a file of names, one a line, is a split that is called as the file is. With neither, every
scene goes into the split "every". The result is OUT/nuscenes/1.0.0; what its numbers are is said in
openpi_like/driving/nuscenes/episodes.py.
"""

import collections
import dataclasses
import functools
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

import rich.progress
import rich.table
import tyro
from rich.console import Console

from openpi_like.data.rlds_writer import Episode, dataset_directory, write_rlds
from openpi_like.driving.nuscenes.episodes import HISTORY, Options, steps_of, to_episode
from openpi_like.driving.nuscenes.scenes import Scene, check_images, read_scenes
from openpi_like.driving.nuscenes.splits import read_scene_names, split_scenes
from openpi_like.driving.nuscenes.tables import read_tables
from openpi_like.robots.ego_vehicle import EGO_VEHICLE


@dataclasses.dataclass(frozen=True)
class Args:
    """root: folder of nuScenes. version: its folder of tables. out: directory for datasets.

    split: mini_train, mini_val, or both. scenes: files of names of scenes, each a split that is called as the file is.
    name: of the dataset, below OUT.
    beginning: steps at the beginning of a scene, without two seconds of history, are left out; or the history is
        extrapolated as published code does, and `history_known` says how much of it is real.
    steering_ratio: rad of the steering wheel for a rad of the front wheels.
    file_format: "array_record" is for readers that need random access; other RLDS readers want "tfrecord".
    """

    root: Annotated[Path, tyro.conf.Positional]
    out: Path
    version: str = "v1.0-mini"
    split: tuple[str, ...] = ()
    scenes: tuple[Path, ...] = ()
    name: str = "nuscenes"
    beginning: Literal["leave_out", "extrapolate"] = "leave_out"
    steering_ratio: float = 16.6
    file_format: Literal["tfrecord", "array_record"] = "tfrecord"


def main(args: Args, console: Console) -> Path:
    """Reads, checks and writes; returns the dataset's directory.

    Raises:
        ValueError: splits that are unknown or share scenes, or a copy of nuScenes that is not whole.
        FileExistsError: there is such a dataset.
    """
    if (there := dataset_directory(args.out, args.name)).exists():
        raise FileExistsError(f"{there} exists; delete it to write it again, or choose another --out or --name")
    options = Options(args.beginning, args.steering_ratio)
    chosen = splits_of(args)
    tables = read_tables(args.root, args.version)
    names = [name for split in chosen.values() for name in split]
    scenes = {scene.name: scene for scene in read_scenes(tables, names if chosen else None)}
    del tables  # some GB
    splits = {name: [scenes[n] for n in of] for name, of in chosen.items()} or {"every": list(scenes.values())}
    short = [scene for scene in scenes.values() if not steps_of(scene, options)]
    kept = {name: [scene for scene in of if scene not in short] for name, of in splits.items()}
    if empty := [name for name, of in kept.items() if not of]:
        raise ValueError(f"all scenes of {', '.join(empty)} are too short for a history, expected longer ones")
    check_images(args.root, [scene for of in kept.values() for scene in of])

    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # its greetings would break the progress bar
    counts: dict[str, collections.Counter[str]] = {name: collections.Counter() for name in kept}
    with rich.progress.Progress(console=console, transient=True) as progress:
        bar = progress.add_task("scenes", total=sum(map(len, kept.values())))
        path = write_rlds(
            args.out,
            args.name,
            EGO_VEHICLE,
            {name: _episodes(args.root, of, options, counts[name]) for name, of in kept.items()},
            description="Keyframes of nuScenes with plans of six waypoints in the frame of LIDAR_TOP, right and ahead.",
            metadata={
                "source": f"nuScenes {args.version}",
                "scenes": {name: [scene.name for scene in of] for name, of in kept.items()},
                **dataclasses.asdict(options),
            },
            file_format=args.file_format,
            on_episode=lambda: progress.advance(bar),
        )
    _summary(console, counts, short)
    console.print(f"written to {path}", markup=False)
    return path


def splits_of(args: Args) -> dict[str, tuple[str, ...]]:
    """Returns name of a split -> its scenes; empty where every scene is meant.

    Raises:
        ValueError: lists that are unknown, empty, called alike, or that share scenes; all of these at once.
    """
    splits, problems = dict[str, tuple[str, ...]](), list[str]()
    sources = [(name, functools.partial(split_scenes, name)) for name in args.split]
    sources += [(path.stem, functools.partial(read_scene_names, path)) for path in args.scenes]
    for name, scenes_of in sources:
        try:
            names = scenes_of()
        except OSError as e:
            problems.append(f"{e.filename}: {e.strerror}, expected a file of names of scenes, one a line")
            continue
        except ValueError as e:
            problems.append(str(e))
            continue
        if name in splits:
            problems.append(f"split {name!r} is given twice, rename one")
        for other, of in splits.items():
            if shared := sorted(set(of) & set(names)):
                problems.append(f"splits {other!r} and {name!r} share {len(shared)} scenes, such as {shared[0]}")
        splits[name] = names
    if problems:
        raise ValueError("\n".join(problems))
    return splits


def _episodes(root: Path, scenes: list[Scene], options: Options, count: collections.Counter[str]) -> Iterator[Episode]:
    for scene in scenes:
        episode = to_episode(root, scene, options)
        known = episode.steps["plan_known"]
        count["scenes"] += 1
        count["steps"] += len(known)
        count["plans cut by the end"] += int((known < EGO_VEHICLE.action_horizon).sum())
        count["left out, no history"] += int(episode.metadata["left_out_steps"])
        count["steps without CAN bus"] += int((~episode.steps["can_bus"]).sum())
        count["longest interval, ms"] = max(
            count["longest interval, ms"], round(1000 * float(episode.metadata["longest_interval_s"]))
        )
        yield episode


def _summary(console: Console, counts: dict[str, collections.Counter[str]], short: list[Scene]) -> None:
    columns = list(next(iter(counts.values())))
    table = rich.table.Table("split", *columns)
    for name, count in counts.items():
        table.add_row(name, *(f"{count[column]:,}" for column in columns))
    console.print(table)
    if short:
        names = ", ".join(scene.name for scene in short)
        console.print(f"left out, fewer than {HISTORY + 1} keyframes: {names}", markup=False)


if __name__ == "__main__":
    try:
        main(tyro.cli(Args), Console(highlight=False))
    except (ValueError, OSError) as e:
        sys.exit(str(e))
