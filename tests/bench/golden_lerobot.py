"""LeRobot's own code beside ours: does it open what we write, and do we read what it writes?

Runs in an environment of its own with lerobot, never in that of the trainer, except for `ours`. No network is used.

    python -m tests.bench.golden_lerobot ours DIR            # trainer: writes datasets and what they hold
    python tests/bench/golden_lerobot.py check DIR           # lerobot 0.4.4: opens them and compares
    python tests/bench/golden_lerobot.py write tests/data/golden/lerobot_v21     # lerobot 0.3.3, numpy 2.2
    python tests/bench/golden_lerobot.py write tests/data/golden/lerobot_v30     # lerobot 0.4.4

`ours` converts a small dataset to videos of each encoder and to pictures, and writes one of several files. `check`
compares every number, text and picture, the statistics of numbers, and frames of other times (delta_timestamps); it
exits with 1 where they differ.

`write` lets lerobot record 3 episodes with one camera as video and one as pictures, and stores beside the dataset
expected.npz: what lerobot itself then returns for every step, by its names: numbers, "task" as UTF-8 with a length per
step, and pictures as uint8 (T, H, W, 3).
"""

import argparse
import importlib.metadata
import inspect
import itertools
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

FPS, LENGTHS = 10, (6, 4, 7)
TASKS = ("put the cube into the bowl", "öffne die Schublade")
VIDEO, PICTURES = "observation.images.front", "observation.images.wrist"
SIZES = {VIDEO: (48, 64), PICTURES: (16, 24)}
LEVELS = 2  # of 255, by which two decoders' conversions of the same frame to RGB may differ
STATS: dict[str, Callable[..., np.ndarray]] = {"min": np.min, "max": np.max, "mean": np.mean, "std": np.std}


def _dataset(root: Path, **options: Any) -> Any:
    """Opens a dataset with lerobot, without asking the hub."""
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    return LeRobotDataset("local/dataset", root=root, video_backend="pyav", **options)


def _save(path: Path, arrays: dict[str, Any]) -> None:
    np.savez_compressed(path, **arrays)


def _pixels(picture: Any) -> np.ndarray:
    """Returns (H, W, 3) uint8 of lerobot's (3, H, W) on [0, 1]."""
    return np.round(picture.numpy().transpose(1, 2, 0) * 255).astype(np.uint8)


# ---- What we write ---------------------------------------------------------------------------------------------------


def ours(directory: Path) -> None:
    from openpi_like.data.convert import to_lerobot
    from openpi_like.data.index import open_index
    from openpi_like.data.lerobot_writer import Column, LeRobotFormat, LeRobotWriter
    from openpi_like.data.video_writer import ENCODERS
    from tests.data.toy_lerobot import FRONT, WRIST, pictures, rows, write_v21

    shutil.rmtree(directory, ignore_errors=True)
    source = write_v21(directory / "source", {FRONT: "video", WRIST: "image"})
    outs = [directory / name for name in (*ENCODERS, "pictures", "files")]
    for out in outs[:-1]:
        to_lerobot(source, out, videos=out.name if out.name in ENCODERS else None)
    columns = {"action": Column("float32", (3,)), "note": Column("string"), VIDEO: Column("video")}
    form = LeRobotFormat(12.5, data_mb=1e-3, video_mb=4e-3)  # so that there are several files
    with LeRobotWriter(outs[-1], columns, form) as writer:
        for episode, length in enumerate((9, 14, 5, 8)):
            values = {"action": rows(episode, length)["action"], VIDEO: iter(pictures(episode, length))}
            notes = [f"{episode}/é/{step}" for step in range(length)]
            writer.add_episode(values | {"note": notes}, [TASKS[step % 2] for step in range(length)])
    for out in outs:
        index = open_index(out, "train", index_dir=directory / "index")
        held: dict[str, Any] = dict(index.columns)
        for key in index.images:
            held[key] = np.stack([index.read_pixels(step, key) for step in range(index.steps)])
        for key, texts in index.texts.items():
            held[key] = np.array([texts.table[i] for i in texts.ids])
        _save(directory / f"{out.name}.npz", held | {"fps": index.split.rate, "start": index.episode_start})


def check(directory: Path) -> int:
    print(f"lerobot {importlib.metadata.version('lerobot')}")
    problems = []
    for path in sorted(directory.glob("*.npz")):
        root = directory / path.stem
        with np.load(path) as file:
            held = {key: file[key] for key in file.files}
        fps, start = float(held.pop("fps")), held.pop("start")
        found, far = _compare(root, held)
        found += _compare_stats(root, held) + _compare_times(root, held, fps, start)
        print(f"{path.stem}: {len(held['task'])} steps, pictures differ by at most {far} of 255; {len(found)} problems")
        problems += [f"{path.stem}: {problem}" for problem in found]
    print("\n".join(problems) or "all is the same")
    return 1 if problems else 0


def _compare(root: Path, held: dict[str, np.ndarray]) -> tuple[list[str], int]:
    dataset, problems, far = _dataset(root), [], 0
    if len(dataset) != len(held["task"]):
        problems.append(f"{len(dataset)} steps, expected {len(held['task'])}")
    for step in range(len(dataset)):
        item = dataset[step]
        for key, values in held.items():
            if values.dtype.kind == "U":
                if item[key] != values[step]:
                    problems.append(f"step {step}: {key} is {item[key]!r}, expected {values[step]!r}")
            elif key.startswith("observation.images."):
                off = int(np.abs(_pixels(item[key]).astype(int) - values[step]).max())
                far = max(far, off)
                if off > LEVELS:
                    problems.append(f"step {step}: {key} is {off} levels off")
            else:
                got = item[key].numpy()
                # lerobot gives float32 of float64
                if not np.array_equal(got, values[step].astype(got.dtype)):
                    problems.append(f"step {step}: {key} is {got}, expected {values[step]}")
    return problems, far


def _compare_stats(root: Path, held: dict[str, np.ndarray]) -> list[str]:
    stats, problems = _dataset(root).meta.stats, []
    for key, values in held.items():
        if values.dtype.kind == "U":
            continue
        picture = key.startswith("observation.images.")
        for name, function in STATS.items():
            expected = function(values / 255, axis=(0, 1, 2)) if picture else function(values.astype(float), axis=0)
            # of pictures that were compressed afterwards, the levels differ
            far = (0.1 if name in ("min", "max") else 0.02) if picture else 1e-9
            if not np.allclose(stats[key][name].reshape(np.shape(expected)), expected, 1e-6, far):
                problems.append(f"{key}: {name} is {stats[key][name].tolist()}, expected {expected}")
    return problems


def _compare_times(root: Path, held: dict[str, np.ndarray], fps: float, start: np.ndarray) -> list[str]:
    times = {"action": [0.0, 1 / fps, 2 / fps], VIDEO: [-1 / fps, 0.0]}
    dataset, problems = _dataset(root, delta_timestamps=times), []
    for first, end in itertools.pairwise(start):
        for step in (first, (first + end) // 2, end - 1):
            item = dataset[int(step)]
            steps = np.clip(step + np.arange(3), first, end - 1)
            if not np.array_equal(item["action"].numpy(), held["action"][steps]):
                problems.append(f"step {step}: the actions of {steps} are not theirs")
            for picture, of in zip(item[VIDEO], np.clip([step - 1, step], first, end - 1), strict=True):
                if np.abs(_pixels(picture).astype(int) - held[VIDEO][of]).max() > LEVELS:
                    problems.append(f"step {step}: the frame of step {of} is not its")
    return problems


# ---- What lerobot writes ---------------------------------------------------------------------------------------------


def _picture(key: str, episode: int, step: int) -> np.ndarray:
    """Returns (H, W, 3): columns of soft colours that move with each step, and a square that says which episode."""
    height, width = SIZES[key]
    x, phase = np.arange(width)[:, None], np.array([0.0, 1.2, 2.4]) + 0.7 * episode
    picture = np.empty((height, width, 3), np.uint8)
    picture[:] = np.round(120 + 90 * np.sin((x + 4 * step) / 20 + phase))
    picture[8 * (episode % 2) :, 8 * episode :][:8, :8] = 230
    return picture


def write(directory: Path) -> int:
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    features: dict[str, Any] = {
        key: {"dtype": kind, "shape": (*SIZES[key], 3), "names": ["height", "width", "channels"]}
        for key, kind in ((VIDEO, "video"), (PICTURES, "image"))
    }
    features |= {key: {"dtype": "float32", "shape": (3,), "names": None} for key in ("observation.state", "action")}
    features |= {"next.success": {"dtype": "bool", "shape": (1,), "names": None}}
    features |= {"force": {"dtype": "float64", "shape": (1,), "names": None}}
    rng = np.random.default_rng(3)
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch) / "dataset"
        dataset = LeRobotDataset.create("local/dataset", FPS, features, root=root, robot_type="toy")
        inside = "task" not in inspect.signature(dataset.add_frame).parameters  # of newer versions
        for episode, length in enumerate(LENGTHS):
            for step in range(length):
                frame: dict[str, Any] = {key: _picture(key, episode, step) for key in SIZES}
                frame |= {key: rng.normal(size=3).astype(np.float32) for key in ("observation.state", "action")}
                frame |= {"next.success": np.array([step == length - 1]), "force": rng.normal(size=1)}
                task = TASKS[episode % 2]
                dataset.add_frame(frame | {"task": task}) if inside else dataset.add_frame(frame, task=task)
            dataset.save_episode()
        if hasattr(dataset, "finalize"):
            dataset.finalize()
        opened = _dataset(root)
        items = [opened[step] for step in range(len(opened))]
        shutil.rmtree(directory, ignore_errors=True)
        shutil.copytree(root, directory, ignore=shutil.ignore_patterns("images", ".cache", "*.lock"))
    held = {
        key: np.stack([_pixels(item[key]) if key in SIZES else item[key].numpy() for item in items])
        for key in items[0]
        if key != "task" and not key.endswith("_is_pad")
    }
    held["task"] = np.array([item["task"] for item in items])
    _save(directory / "expected.npz", held)
    size = sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
    print(f"lerobot {importlib.metadata.version('lerobot')}: {directory}, {size / 1000:.0f} kB")
    return 0


if __name__ == "__main__":
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": tempfile.mkdtemp()}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("ours", "check", "write"))
    parser.add_argument("directory", type=Path)
    args = parser.parse_args()
    sys.exit({"ours": ours, "check": check, "write": write}[args.command](args.directory))
