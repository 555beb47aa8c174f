"""Our reader of LeRobot datasets beside lerobot's own loader, also with openpi's resizing, on the same videos:

    python3 -m venv ~/lerobot && ~/lerobot/bin/pip install lerobot==0.4.4 psutil
    python tests/bench/bench_lerobot.py --lerobot-python ~/lerobot/bin/python --openpi ~/openpi --data /tmp/cubes

The dataset is made by lerobot's own writer: two cameras, AV1 as it encodes it. Every reader draws the same number of
random samples (two pictures, a state, 16 actions) in a process of its own, in turns; a frame is one picture. lerobot
gives float pictures at full size, openpi and ours uint8 of 224 pixels. Memory is that of all its processes.
"""

import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from openpi_like.data.index import open_index
from openpi_like.robots import ActionField, Camera, Robot, StateField

REPOSITORY = Path(__file__).resolve().parents[2]
SIDE = Path(__file__).with_name("lerobot_side.py")
ROBOT = Robot(
    name="cubes",
    cameras=tuple(Camera(slot, f"observation.images.{slot}") for slot in ("front", "wrist")),
    state=(StateField("joints", "observation.state", 6),),
    action=(ActionField("joints", "action", 6),),
    control_hz=30.0,
    action_horizon=16,
    execute_steps=8,
    language_key="task",
)


@dataclasses.dataclass(frozen=True)
class Args:
    """See the file's head. lerobot_python: an interpreter that has lerobot and psutil. openpi: a checkout, or None.

    data: where the dataset is, or is to be made. episodes, length, height, width: of one that is made.
    workers: processes of each reader (0: its own), measured one after the other. backend: of lerobot's decoding.
    """

    lerobot_python: Path
    data: Path
    openpi: Path | None = None
    episodes: int = 20
    length: int = 150
    height: int = 480
    width: int = 640
    batch: int = 32
    workers: tuple[int, ...] = (0, 2)
    seconds: float = 15.0
    rounds: int = 3
    backend: str = "torchcodec"
    pixels: int = 32


def side(args: Args, *words: Any) -> str:
    """Runs the part with lerobot; returns what it printed."""
    paths = [] if args.openpi is None else [str(args.openpi / "packages" / "openpi-client" / "src")]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    command = [str(args.lerobot_python), str(SIDE), *map(str, words)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return done.stdout


def theirs(args: Args, workers: int, *, resize: int) -> dict[str, float]:
    printed = side(args, "load", args.data, resize, workers, args.batch, args.seconds, args.backend)
    return json.loads(next(line for line in printed.splitlines() if line.startswith("RESULT ")).removeprefix("RESULT "))


def ours(args: Args, workers: int) -> dict[str, float]:
    """Runs our loader in a process of its own, as `data/bench.py` does."""
    command = [sys.executable, __file__, "ours", str(args.data), str(workers), str(args.batch), str(args.seconds)]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if done.returncode or not lines:
        raise SystemExit(f"ours failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return json.loads(lines[0].removeprefix("RESULT "))


def measure_ours(data: str, workers: str, batch: str, seconds: str) -> None:
    import runpy
    import time

    program = runpy.run_path(str(REPOSITORY / "data" / "bench.py"))
    program["open_one"].__globals__["find_robot"] = lambda _: ROBOT
    asked = program["Args"](
        Path(data), "cubes", num_workers=int(workers), num_threads=2 if workers == "0" else 1,
        batch_size=int(batch), seconds=float(seconds), warm_up=3,
    )  # fmt: skip
    loader = program["open_one"](asked, Console(quiet=True))
    started = time.perf_counter()
    next(loader)
    first = time.perf_counter() - started
    found = program["measure"](loader, asked)
    loader.close()
    row = {
        "frames/s": found["samples_per_s"] * found["images"],
        "cpu_ms": found["cpu_ms"] / found["images"],
        "resident": found["resident"],
        "first": first,
    }
    print("RESULT " + json.dumps(row))


def compare_pixels(args: Args, console: Console) -> None:
    """Prints how far our pictures are from those that lerobot decodes."""
    index = open_index(args.data, "train")
    with tempfile.TemporaryDirectory() as folder:
        for backend in dict.fromkeys((args.backend, "pyav")):
            out = Path(folder) / f"{backend}.npz"
            side(args, "pixels", args.data, out, backend, args.pixels)
            with np.load(out) as stored:
                at, images = stored["at"], stored["images"]
            mine = np.array([[index.read_pixels(int(i), camera.key) for camera in ROBOT.cameras] for i in at])
            apart = np.abs(mine.astype(int) - images)
            console.print(
                f"{len(at) * len(ROBOT.cameras)} pictures beside lerobot's ({backend}): {(apart > 0).mean():.2%} of "
                f"values differ, by {apart.max()} of 255 at most, {apart.mean():.4f} on average"
            )
    index.close()


def main(args: Args, console: Console) -> None:
    if not (args.data / "meta" / "info.json").is_file():
        side(args, "write", args.data, args.episodes, args.length, args.height, args.width)
    compare_pixels(args, console)
    names = ["lerobot", *(["lerobot, resized as openpi does"] if args.openpi else []), "ours"]
    for workers in args.workers:
        found: dict[str, list[dict[str, float]]] = {name: [] for name in names}
        for _ in range(args.rounds):
            for name in names:
                resize = 224 if "openpi" in name else 0
                found[name].append(ours(args, workers) if name == "ours" else theirs(args, workers, resize=resize))
        table = Table(title=f"{workers} worker processes, batch {args.batch}: medians of {args.rounds} rounds")
        for column in ("", "frames/s", "CPU ms a frame", "MiB", "first batch, s"):
            table.add_column(column, justify="left" if not column else "right")
        for name in names:
            row = {key: statistics.median(r[key] for r in found[name]) for key in found[name][0]}
            table.add_row(
                name,
                f"{row['frames/s']:,.0f}",
                f"{row['cpu_ms']:.2f}",
                f"{row['resident']:,.0f}",
                f"{row['first']:.2f}",
            )
        console.print(table)


if __name__ == "__main__":
    if sys.argv[1:2] == ["ours"]:
        measure_ours(*sys.argv[2:])
    else:
        main(tyro.cli(Args), Console(width=120))
