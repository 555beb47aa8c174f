"""The part of bench_lerobot.py and bench_new_robot.py that runs where lerobot is installed: writes datasets, and loads
them as peers do."""

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from lerobot.datasets.lerobot_dataset import LeRobotDataset

HORIZON = 16
KEYS = ("observation.images.front", "observation.images.wrist")


def scenes(rng: np.random.Generator, frames: int, height: int, width: int) -> Iterator[np.ndarray]:
    """Yields pictures of a table with things that move, with the noise of a camera."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    still = np.stack([120 + 60 * np.sin(x / 40 + c) + 40 * np.cos(y / 55 + 2 * c) for c in range(3)], axis=-1)
    places, colours = rng.uniform(0.2, 0.8, (5, 2)), rng.integers(0, 256, (5, 3))
    for t in range(frames):
        image = still.copy()
        for i, ((py, px), colour) in enumerate(zip(places, colours, strict=True)):
            cy, cx = height * (py + 0.1 * np.sin(t / 20 + i)), width * (px + 0.1 * np.cos(t / 25 + i))
            image[(abs(y - cy) < height / 14) & (abs(x - cx) < width / 16)] = colour
        yield np.clip(image + rng.normal(0, 3, image.shape), 0, 255).astype(np.uint8)


def write(root: str, episodes: int, length: int, height: int, width: int) -> None:
    features: dict[str, Any] = {
        key: {"dtype": "video", "shape": (height, width, 3), "names": ["height", "width", "channels"]} for key in KEYS
    }
    names = [f"joint_{i}" for i in range(6)]
    features |= {k: {"dtype": "float32", "shape": (6,), "names": names} for k in ("observation.state", "action")}
    dataset = LeRobotDataset.create("bench/cubes", fps=30, features=features, root=root, use_videos=True)
    rng = np.random.default_rng(0)
    for episode in range(episodes):
        shown = [scenes(rng, length, height, width) for _ in KEYS]
        for t, images in enumerate(zip(*shown, strict=True)):
            state = np.sin(np.arange(6) + t / 15 + episode).astype(np.float32)
            frame = {"observation.state": state, "action": state + np.float32(0.01), "task": "sort the cubes"}
            dataset.add_frame(frame | dict(zip(KEYS, images, strict=True)))
        dataset.save_episode()
    if hasattr(dataset, "finalize"):
        dataset.finalize()


def lab(root: str, episodes: str) -> None:
    """Writes recorded episodes, files with images, state, action and task, in the columns of a lab's own robot."""
    names = ["x", "y", "z", "gripper"]
    features: dict[str, Any] = {
        "observation.images.front": {"dtype": "video", "shape": (256, 256, 3), "names": ["height", "width", "channels"]}
    }
    features |= {k: {"dtype": "float32", "shape": (4,), "names": names} for k in ("observation.state", "action")}
    dataset = LeRobotDataset.create("lab/own", fps=20, features=features, root=root, use_videos=True)
    for path in sorted(Path(episodes).glob("*.npz")):
        with np.load(path) as episode:
            rows = zip(episode["images"], episode["state"], episode["action"], strict=True)
            for image, state, action in rows:
                said = {"observation.state": state, "action": action, "task": str(episode["task"])}
                dataset.add_frame({"observation.images.front": image, **said})
        dataset.save_episode()
    if hasattr(dataset, "finalize"):
        dataset.finalize()


class Resized(torch.utils.data.Dataset):
    """The samples as openpi's loader makes them: its own resizing of each picture, on uint8."""

    def __init__(self, dataset: LeRobotDataset, size: int) -> None:
        self._dataset, self._size = dataset, size

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, i: int) -> dict[str, Any]:
        from openpi_client import image_tools

        sample = self._dataset[i]
        for key in KEYS:
            image = (255 * sample[key]).to(torch.uint8).permute(1, 2, 0).numpy()
            sample[key] = torch.from_numpy(image_tools.resize_with_pad(image, self._size, self._size).copy())
        return sample


def usage() -> tuple[float, float]:
    own = psutil.Process()
    processes = [own, *own.children(recursive=True)]
    cpu = sum(t.user + t.system for t in (p.cpu_times() for p in processes))
    return cpu, sum(p.memory_info().rss for p in processes) / 2**20


def load(root: str, resize: str, workers: int, batch: int, seconds: float, backend: str) -> dict[str, float]:
    dataset: Any = LeRobotDataset(
        "bench/cubes", root=root, delta_timestamps={"action": [t / 30 for t in range(HORIZON)]}, video_backend=backend
    )
    if int(resize):
        dataset = Resized(dataset, int(resize))
    generator = torch.Generator()
    generator.manual_seed(0)
    started = time.perf_counter()
    loader = torch.utils.data.DataLoader(
        dataset, batch_size=batch, shuffle=True, num_workers=workers, generator=generator, drop_last=True,
        multiprocessing_context="spawn" if workers else None, persistent_workers=workers > 0,
    )  # fmt: skip

    def forever() -> Iterator[Any]:
        while True:
            yield from loader

    batches = forever()
    next(batches)
    first = time.perf_counter() - started
    for _ in range(2):
        next(batches)
    cpu, _ = usage()
    started, samples = time.perf_counter(), 0
    while time.perf_counter() - started < seconds:
        next(batches)
        samples += batch
    took = time.perf_counter() - started
    after, resident = usage()
    return {
        "frames/s": samples * len(KEYS) / took,
        "cpu_ms": 1e3 * (after - cpu) / (samples * len(KEYS)),
        "resident": resident,
        "first": first,
    }


def pixels(root: str, out: str, backend: str, count: int) -> None:
    """Writes pictures as lerobot decodes them, (count, cameras, H, W, 3) uint8."""
    dataset = LeRobotDataset("bench/cubes", root=root, video_backend=backend)
    at = np.random.default_rng(1).choice(len(dataset), count, replace=False)
    shown = [[(255 * dataset[int(i)][k]).round().to(torch.uint8).permute(1, 2, 0).numpy() for k in KEYS] for i in at]
    np.savez(out, at=at, images=np.array(shown))


if __name__ == "__main__":
    what, root, *rest = sys.argv[1:]
    if what == "write":
        write(root, *map(int, rest))
    elif what == "lab":
        lab(root, rest[0])
    elif what == "pixels":
        pixels(root, rest[0], rest[1], int(rest[2]))
    else:
        resize, workers, batch, seconds, backend = rest
        print("RESULT " + json.dumps(load(root, resize, int(workers), int(batch), float(seconds), backend)))
