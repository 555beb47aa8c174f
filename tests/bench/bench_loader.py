"""Samples per second and CPU time per frame of the loader:

    python tests/bench/bench_loader.py --data DIR --robot widowx

Page cache warm, after 20 batches of warm-up. CPU time is that of the whole process, per sample, divided by its cameras.
"""

import dataclasses
import importlib
import resource
import tempfile
import time
from pathlib import Path

import tyro

from openpi_like.data.dataset import EpisodeDataset
from openpi_like.data.index import open_index
from openpi_like.data.loader import DataConfig, MixtureEntry, make_loader
from openpi_like.data.stats import compute_normalization
from openpi_like.data.text import TextTokenizer, fit_text_tokenizer


@dataclasses.dataclass(frozen=True)
class Args:
    """robot: a file of openpi_like/robots. size: pixels, height and width, that images are brought to."""

    data: Path
    robot: str = "widowx"
    split: str = "train"
    batch_size: int = 32
    size: int = 224
    num_threads: int = 2
    batches: int = 100
    cameras: int = 1


@dataclasses.dataclass(frozen=True)
class Shapes:
    """The part of a policy's config that a loader needs."""

    cameras: tuple[str, ...]
    image_size: tuple[int, int]
    state_dim: int = 32
    action_dim: int = 32
    action_horizon: int = 50
    prompt_len: int = 128
    vocab_size: int = 2000
    resize: str = "cubic"
    prompt_format: str = "pi0"
    action_tokens: None = None


def main(args: Args) -> None:
    robot = getattr(importlib.import_module(f"openpi_like.robots.{args.robot}"), args.robot.upper())
    robot = dataclasses.replace(robot, cameras=robot.cameras[: args.cameras])
    with tempfile.TemporaryDirectory() as index_dir:
        started = time.perf_counter()
        index = open_index(args.data, args.split, index_dir=index_dir)
        built = time.perf_counter() - started
        dataset = EpisodeDataset(index, robot)
        size = sum(p.stat().st_size for p in Path(index_dir).rglob("*"))
        print(f"index: {index.steps:,} steps in {built:.2f} s, {size / index.steps:.0f} bytes a step")
        started = time.perf_counter()
        normalization = compute_normalization(dataset)
        print(f"statistics: {time.perf_counter() - started:.2f} s")
        texts = [robot.default_prompt] if robot.language_key is None else index.texts[robot.language_key].table
        shapes = Shapes(tuple(c.name for c in robot.cameras), (args.size, args.size))
        started = time.perf_counter()
        loader = make_loader(
            DataConfig((MixtureEntry(robot, str(args.data), split=args.split),), index_dir=index_dir,
                       num_threads=args.num_threads),
            batch_size=args.batch_size,
            policy=shapes,
            tokenizer=TextTokenizer(fit_text_tokenizer([t or "" for t in texts], 1000), shapes.prompt_len),
            normalizations={robot.name: normalization},
        )  # fmt: skip
        next(loader)
        print(f"first batch: {time.perf_counter() - started:.2f} s")
        for _ in range(20):
            next(loader)
        started, cpu = time.perf_counter(), time.process_time()
        for _ in range(args.batches):
            next(loader)
        samples = args.batches * args.batch_size
        seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
        loader.close()
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(
            f"{samples / seconds:,.0f} samples/s, {cpu / samples / args.cameras * 1e3:.3f} ms CPU per image, "
            f"{memory:.0f} MiB resident at most"
        )


if __name__ == "__main__":
    main(tyro.cli(Args))
