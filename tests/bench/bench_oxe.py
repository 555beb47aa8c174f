"""The loader beside octo's and openpi's tf.data pipelines and beside what decoding alone costs, on the same files:

    python tests/bench/make_oxe.py --bridge ... --photos ... --out /tmp/oxe
    python tests/bench/bench_oxe.py --data /tmp/oxe --octo ~/octo --dlimp ~/dlimp --openpi ~/openpi/src

Peers are imported from their sources by `peer_python`, which needs what they import (TensorFlow, tensorflow-datasets,
huggingface-hub, tqdm-loggable); without sources, ours runs alone. Every pipeline is a process of its own, they take
turns, and before each of them the files are read once, so that the page cache is warm. CPU is user and system time of
the process and its children in the timed window, per frame; "others" is what everything else on the machine took
meanwhile, in cores, which should be close to none.
"""

import collections
import dataclasses
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
import psutil
import scipy.spatial
import simplejpeg
import tyro
from PIL import Image
from rich.console import Console
from rich.table import Table

from openpi_like.data.images import decode, fit
from openpi_like.data.index import open_index

REPOSITORY = Path(__file__).resolve().parents[2]
CHILD = Path(__file__).with_name("oxe_pipelines.py")
SIZE = 224
STATES = (10_000, 2_048)  # samples skipped and looked at, for the quality of shuffles
IMAGES = 64  # compared pixel by pixel

Part = Literal["one", "small", "mixture", "scaling", "soak", "shuffle", "pixels"]


@dataclasses.dataclass(frozen=True)
class Args:
    """See the file's head. data: what make_oxe.py wrote. octo, dlimp, openpi: directories to import them from.

    photos: pictures for the comparison of pixels, beside those of b256. rounds: turns of each pipeline on one dataset,
    of which the median counts. parts: one dataset of 256 pixels; of 64 pixels; a mixture of 24; scaling with threads
    and processes; memory over `soak` samples of a mixture of 64 pixels; quality of the shuffle; pixels against octo's.
    """

    data: Path
    octo: Path | None = None
    dlimp: Path | None = None
    openpi: Path | None = None
    peer_python: Path = Path(sys.executable)
    photos: Path | None = None
    seconds: float = 15.0
    rounds: int = 2
    buffer: int = 10_000
    soak: int = 1_000_000
    parts: tuple[Part, ...] = ("one", "small", "mixture", "scaling", "soak", "shuffle", "pixels")
    out: Path | None = None


# ---- One process -----------------------------------------------------------------------------------------------------


def tree(pid: int) -> list[psutil.Process]:
    process = psutil.Process(pid)
    return [process, *process.children(recursive=True)]


def cpu_seconds(pid: int) -> float:
    """User and system time of a process and its children, those that have ended included."""
    total = 0.0
    for process in tree(pid):
        times = process.cpu_times()
        total += times.user + times.system
    own = psutil.Process(pid).cpu_times()
    return total + own.children_user + own.children_system


def busy_seconds() -> float:
    """CPU time of the whole machine that was not idle."""
    times = psutil.cpu_times()
    return sum(times) - times.idle - getattr(times, "iowait", 0.0) - times.guest - times.guest_nice


def peak_mb(pid: int) -> float:
    """Sum of what each process of the tree had resident at its peak."""
    peaks = 0
    for process in tree(pid):
        status = Path(f"/proc/{process.pid}/status").read_text()
        peaks += int(status.split("VmHWM:")[1].split()[0])
    return peaks / 1e3


def warm(directories: Sequence[str]) -> None:
    """Reads the files of datasets, which the system may have dropped from memory meanwhile."""
    for file in sorted({f.resolve() for d in directories for f in Path(d).iterdir() if f.is_file()}):
        with file.open("rb", buffering=0) as opened:
            while opened.read(1 << 24):
                pass


def run(args: Args, pipeline: str, **spec: Any) -> dict[str, float]:
    """Runs one pipeline in a process and returns what was measured of it from outside."""
    peer = pipeline in ("octo", "openpi", "octo_pixels")
    sources = [str(p.resolve()) for p in (args.octo, args.dlimp, args.openpi) if peer and p is not None]
    spec = {"buffer": args.buffer, "seconds": args.seconds, **spec, "pipeline": pipeline, "sources": sources}
    python = os.fspath(args.peer_python) if peer else sys.executable
    warm(spec["data"])
    environment = os.environ | {
        "PYTHONPATH": str(REPOSITORY),
        "PYTHONDONTWRITEBYTECODE": "",  # modules are compiled once, as where a package is installed
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "CUDA_VISIBLE_DEVICES": "",
    }
    with tempfile.TemporaryFile("w+") as errors:
        spawned = time.perf_counter()
        child = subprocess.Popen(
            [python, os.fspath(CHILD), json.dumps(spec)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            env=environment,
            text=True,
        )
        assert child.stdout is not None
        moments: dict[str, dict[str, float]] = {}
        resident: list[float] = []
        for line in child.stdout:
            if not line.startswith('{"moment"'):
                continue  # peers print too
            moment = json.loads(line)
            moment |= {"cpu": cpu_seconds(child.pid), "busy": busy_seconds()}
            moments[moment["moment"]] = moment
            if moment["moment"] == "part":
                resident.append(sum(p.memory_info().rss for p in tree(child.pid)) / 1e6)
            if moment["moment"] == "end":
                moment["peak_mb"] = peak_mb(child.pid)
                break
        child.kill()
        child.wait()
        if "end" not in moments:
            errors.seek(0)
            raise RuntimeError(f"{pipeline} {spec}: ended without a result:\n{errors.read()[-4000:]}")
    end = moments["end"]
    row = {k: v for k, v in end.items() if k not in ("moment", "time", "cpu", "busy", "released")}
    if resident:
        row |= {"resident_mb": resident[0], "growth": max(resident) / resident[0] - 1}
    if "first" in moments:
        row["first_s"] = moments["first"]["time"] - spawned
    if "start" in moments:
        start, frames = moments["start"], end["frames"]
        wall, cpu = end["time"] - start["time"], end["cpu"] - start["cpu"]
        row |= {
            "frames_s": frames / wall,
            "cpu_ms": cpu / frames * 1e3,
            "others": (end["busy"] - start["busy"] - cpu) / wall,
        }
        if pipeline == "gil":
            row["released_ms"] = (end["released"] - start["released"]) / frames * 1e3
    return row


def median(rows: list[dict[str, float]]) -> dict[str, float]:
    return {k: float(np.median([r[k] for r in rows])) for k in rows[0]}


def take_turns(
    args: Args, console: Console, jobs: dict[str, tuple[str, dict[str, Any]]], rounds: int
) -> dict[str, dict[str, float]]:
    """Runs jobs, name -> (pipeline, spec), one after the other, `rounds` times; returns medians."""
    rows = collections.defaultdict(list)
    for _ in range(rounds):
        for name, (pipeline, spec) in jobs.items():
            rows[name].append(run(args, pipeline, **spec))
            console.print(f"  {name}: {', '.join(f'{k} {v:.4g}' for k, v in rows[name][-1].items())}", style="dim")
    return {name: median(of) for name, of in rows.items()}


def show(console: Console, title: str, rows: dict[str, dict[str, float]], against: dict[str, str]) -> None:
    """Prints rows; against: name of a peer's row -> that of ours which does the same, to give multiples of."""
    measures = {"cpu_ms": "CPU ms/frame", "first_s": "first batch s", "peak_mb": "peak RSS MB"}
    table = Table("pipeline", "frames/s", *measures.values(), "others", *(f"x {k}" for k in measures), title=title)
    for name, row in rows.items():
        own = rows[against.get(name, name)]
        table.add_row(
            name,
            f"{row['frames_s']:,.0f}",
            f"{row['cpu_ms']:.3f}",
            f"{row['first_s']:.2f}",
            f"{row['peak_mb']:,.0f}",
            f"{row['others']:.2f}",
            *("" if own is row else f"{row[k] / own[k]:.1f}" for k in measures),
        )
    console.print(table)


# ---- Shuffles and pixels ---------------------------------------------------------------------------------------------


def shuffle_quality(states: np.ndarray, data: Path) -> float:
    """Different episodes among consecutive samples, as a part of what a uniform shuffle would give; 1 is perfect.

    Samples are told by their states, which differ in every frame of these datasets.
    """
    index = open_index(data, "train")
    known = np.asarray(index.columns["observation/state"])
    distance, frames = scipy.spatial.cKDTree(known).query(states)
    if distance.max() > 1e-4:
        raise RuntimeError(f"a state is {distance.max():.2g} away from any that {data} holds")
    start = np.asarray(index.episode_start)
    seen = len(np.unique(np.searchsorted(start, frames, side="right")))
    total, drawn = index.steps, len(states)

    def log_choose(n: int) -> float:
        return math.lgamma(n + 1) - math.lgamma(drawn + 1) - math.lgamma(n - drawn + 1)

    missed = [math.exp(log_choose(total - n) - log_choose(total)) for n in np.diff(start)]
    return float(seen / (len(missed) - sum(missed)))


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / np.mean(np.square(a.astype(np.float64) - b))))


def jpegs(args: Args) -> dict[str, list[bytes]]:
    """Images to compare: those of the benchmark, and photos brought to 256 x 256 with nothing added."""
    found: dict[str, list[bytes]] = {"b256": []}
    index = open_index(args.data / "b256" / "1.0.0", "train")
    for step in np.linspace(0, index.episode_start[20] - 1, IMAGES).astype(int):
        found["b256"].append(index.read_image(step, "observation/image_0"))
    if args.photos is not None:
        found["photos"] = []
        rng = np.random.default_rng(0)
        photos = [np.asarray(Image.open(path).convert("RGB")) for path in sorted(args.photos.glob("*.png"))]
        for i in range(IMAGES):
            photo = photos[i % len(photos)]
            side = int(rng.uniform(0.8, 1) * min(photo.shape[:2]))
            top, left = (int(rng.integers(room - side + 1)) for room in photo.shape[:2])
            crop = photo[top : top + side, left : left + side]
            image = cv2.resize(crop, (256, 256), interpolation=cv2.INTER_AREA if side > 256 else cv2.INTER_CUBIC)
            found["photos"].append(simplejpeg.encode_jpeg(image, quality=95, colorsubsampling="420"))
    return found


def compare_pixels(args: Args, console: Console) -> dict[str, dict[str, float]]:
    """PSNR between our images and octo's: of 224 pixels, and of the decoders alone."""
    results = {}
    table = Table("images", "resized to 224, dB", "decoded only, dB", "difference", title="PSNR against octo's images")
    for name, images in jpegs(args).items():
        with tempfile.TemporaryDirectory() as work:
            for i, data in enumerate(images):
                Path(work, f"{i:03d}.jpg").write_bytes(data)
            run(args, "octo_pixels", data=[], work=work, out=f"{work}/octo.npz")
            resized, decoded = [], []
            with np.load(f"{work}/octo.npz") as theirs:
                for i, data in enumerate(images):
                    image, out = decode(data), np.empty((SIZE, SIZE, 3), np.uint8)
                    fit(image, out)
                    decoded.append(psnr(image, theirs[f"{i:03d} decoded"]))
                    resized.append(psnr(out, theirs[f"{i:03d} resized"]))
        results[name] = {"resized_db": float(np.mean(resized)), "decoded_db": float(np.mean(decoded))}
        gap = results[name]["decoded_db"] - results[name]["resized_db"]
        table.add_row(name, f"{np.mean(resized):.2f}", f"{np.mean(decoded):.2f}", f"{gap:+.2f}")
    console.print(table)
    return results


# ---- All of it -------------------------------------------------------------------------------------------------------


def main(args: Args, console: Console) -> None:
    octo, openpi = (path is not None and args.dlimp is not None for path in (args.octo, args.openpi))
    large, small = ([str(args.data / name / "1.0.0")] for name in ("b256", "b64"))
    mix, soak = (sorted(str(p / "1.0.0") for p in (args.data / "mix").glob(f"{name}_*")) for name in ("b256", "b64"))
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as work:

        def prepare(data: list[str], horizon: int) -> None:
            row = run(args, "prepare", data=data, work=work, horizon=horizon)
            console.print(
                f"{Path(data[0]).parent.name}{f' and {len(data) - 1} more' if len(data) > 1 else ''}: "
                f"{row['steps']:,.0f} frames, indexes {row['index_s']:.1f} s, statistics {row['stats_s']:.1f} s "
                f"(horizon {horizon})"
            )

        def jobs(data: list[str]) -> dict[str, tuple[str, dict[str, Any]]]:
            base: dict[str, Any] = {"data": data, "work": work}
            out: dict[str, tuple[str, dict[str, Any]]] = {
                "ours": ("ours", base),
                "ours, augmented": ("ours", base | {"augment": True}),
                "augmentation alone": ("augmentation", base | {"augment": True}),
            }
            if octo:
                out["octo"] = ("octo", base)
                out["octo, augmented"] = ("octo", base | {"augment": True})
            return out

        against = {"octo": "ours", "octo, augmented": "ours, augmented"}
        for data, part, title, rounds in (
            (large, "one", "256 px JPEG to 224, one camera, horizon 4, batch 32", args.rounds),
            (small, "small", "64 px JPEG to 224, one camera, horizon 4, batch 32", 1),
        ):
            if part not in args.parts:
                continue
            prepare(data, 4)
            if octo:
                run(args, "octo", data=data, work=work, states=[0, 32], out=f"{work}/states.npy")  # its statistics
            rows = take_turns(args, console, jobs(data), rounds)
            show(console, title, rows, against)
            results[part] = rows
            if part == "one":
                two: dict[str, Any] = {"data": data, "work": work, "cameras": 2, "horizon": 16}
                compared: dict[str, tuple[str, dict[str, Any]]] = {"ours, 2 cameras": ("ours", two)}
                if openpi:
                    compared["openpi, not resized"] = ("openpi", two | {"resize": False})
                    compared["openpi"] = ("openpi", two)
                prepare(data, 16)
                rows = take_turns(args, console, compared, args.rounds)
                title = "256 px JPEG to 224, two cameras, horizon 16, batch 32"
                show(console, title, rows, dict.fromkeys(compared, "ours, 2 cameras"))
                results["two cameras"] = rows

        if "scaling" in args.parts:
            prepare(large, 4)
            base: dict[str, Any] = {"data": large, "work": work}
            scaling: dict[str, tuple[str, dict[str, Any]]] = {
                "decode and resize alone": ("limit", base | {"threads": 1}),
                "decode and resize alone, 2 threads": ("limit", base | {"threads": 2}),
                "ours, 1 thread": ("ours", base | {"threads": 1}),
                "ours, 2 threads": ("ours", base | {"threads": 2}),
                "ours, 1 process": ("ours", base | {"workers": 1, "threads": 1}),
                "ours, 2 processes": ("ours", base | {"workers": 2, "threads": 1}),
                "ours, 1 thread, timed inside": ("gil", base | {"threads": 1}),
            }
            rows = take_turns(args, console, scaling, args.rounds)
            show(console, "scaling, 256 px JPEG to 224, one camera", rows, {})
            floor, one, timed = (
                rows[k] for k in ("decode and resize alone", "ours, 1 thread", "ours, 1 thread, timed inside")
            )
            held = timed["cpu_ms"] - timed["released_ms"]
            console.print(
                f"decode and resize alone cost {floor['cpu_ms']:.3f} ms a frame; the loader is at "
                f"{floor['cpu_ms'] / one['cpu_ms']:.0%} of that limit with one thread, at "
                f"{floor['cpu_ms'] / rows['ours, 2 threads']['cpu_ms']:.0%} with two\n"
                f"1 -> 2 threads: {rows['ours, 2 threads']['frames_s'] / one['frames_s']:.2f} x; 1 -> 2 processes: "
                f"{rows['ours, 2 processes']['frames_s'] / rows['ours, 1 process']['frames_s']:.2f} x\n"
                f"outside of calls that release the GIL: {held:.3f} of {timed['cpu_ms']:.3f} ms a frame, so threads of "
                f"one process end at {1e3 / held:,.0f} frames/s, about {timed['cpu_ms'] / held:.1f} threads; processes "
                "go on from there"
            )
            results["scaling"] = rows

        if "mixture" in args.parts:
            prepare(mix, 4)
            base = {"data": mix, "work": work, "buffer": args.buffer}
            mixed: dict[str, tuple[str, dict[str, Any]]] = {"ours": ("ours", base)}
            if octo:
                # The first time it computes statistics.
                mixed = {"octo, first time": ("octo", base | {"warm_up": 0, "seconds": 1.0})} | mixed
                mixed["octo"] = ("octo", base)
            rows = take_turns(args, console, mixed, 1)
            show(console, f"mixture of {len(mix)} datasets of 256 px", rows, dict.fromkeys(mixed, "ours"))
            results["mixture"] = rows

        if "soak" in args.parts:
            prepare(soak, 4)
            row = run(args, "ours", data=soak, work=work, samples=args.soak)
            console.print(
                f"{args.soak:,} samples of a mixture of {len(soak)}: {row['frames_s']:,.0f} frames/s, resident "
                f"{row['resident_mb']:.0f} MB after a twentieth of them, at most {row['growth']:+.1%} later"
            )
            results["soak"] = row

        if "shuffle" in args.parts:
            prepare(large, 4)
            results["shuffle"] = {}
            for name, present in (("ours", True), ("octo", octo), ("openpi", openpi)):
                if present:
                    out = f"{work}/states.npy"
                    run(args, name, data=large, work=work, resize=False, states=STATES, out=out)
                    results["shuffle"][name] = shuffle_quality(np.load(out), Path(large[0]))
            console.print(
                f"different episodes among {STATES[1]:,} samples (after {STATES[0]:,}), of what a uniform shuffle "
                f"gives, with buffers of {args.buffer:,}: "
                + ", ".join(f"{name} {value:.2f}" for name, value in results["shuffle"].items())
            )

        if "pixels" in args.parts and octo:
            results["pixels"] = compare_pixels(args, console)
    if args.out is not None:
        args.out.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main(tyro.cli(Args), Console(highlight=False, width=140, soft_wrap=True))
