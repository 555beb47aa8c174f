"""Measures the loader alone: samples per second, CPU time, memory, and how long a training step would wait for data:

    python data/bench.py runs/data/sawyer_sim/1.0.0 --robot sawyer --num-threads 4
    python data/bench.py --config configs/demo_pretrain.py --set data.num_workers=2 --step-ms 120

A dataset is read with statistics of its own, made on the spot; a run is read as train/train.py would on one host, and
needs its statistics and tokenizers. Augmentation is part of the training step and is not measured here. What another
process does meanwhile is in the numbers, so measure on a quiet machine, and more than once.
"""

import dataclasses
import os
import sys
import time
from pathlib import Path
from typing import Annotated

import psutil
import tyro
from rich.console import Console
from rich.table import Table

from openpi_like.batch import ActionTokens, Batch, EntityTokens
from openpi_like.config import load_run, override
from openpi_like.data.config import DataConfig, MixtureEntry
from openpi_like.data.dataset import open_dataset
from openpi_like.data.fast import FastTokenizer
from openpi_like.data.loader import Loader, make_loader
from openpi_like.data.prompts import Pi0Prompt, PromptFormat
from openpi_like.data.sentencepiece_model import fit_text_tokenizer
from openpi_like.data.stats import compute_normalization
from openpi_like.data.text import TextTokenizer, read_tokenizer
from openpi_like.robots.find import find_robot

MIB = 2**20


@dataclasses.dataclass(frozen=True)
class Args:
    """See the file's head. Give a TFDS directory and its robot, or a run.

    data, robot, split: TFDS directory, and the robot as data/stats.py takes it. cameras: of the robot, how many of its
    first ones are read (0: all). size: pixels, height and width, that images are brought to. num_threads, num_workers,
    prefetch, max_corrupt_fraction: see `DataConfig`. index_dir: where indexes are kept (default: in the data).
    config, set: a run, and overrides of it, key=value. The options above do not apply to it.
    batch_size: 0 takes that of the run, or 32. step_ms: how long a training step is taken to last.
    seconds: how long to measure, after `warm_up` batches.
    """

    data: Annotated[Path | None, tyro.conf.Positional] = None
    robot: str | None = None
    split: str = "train"
    cameras: int = 0
    size: int = 224
    num_threads: int = 2
    num_workers: int = 0
    prefetch: int = 4
    index_dir: Path | None = None
    max_corrupt_fraction: float = 0.0
    config: Path | None = None
    set: tuple[str, ...] = ()
    batch_size: int = 0
    step_ms: float = 0.0
    seconds: float = 20.0
    warm_up: int = 20

    def __post_init__(self) -> None:
        if (self.config is None) == (self.data is None) or (self.data is None) != (self.robot is None):
            raise ValueError("give a TFDS directory with --robot, or a run with --config")


@dataclasses.dataclass(frozen=True)
class Shapes:
    """The part of a policy's config that a loader needs, large enough for one robot."""

    cameras: tuple[str, ...]
    image_size: tuple[int, int]
    state_dim: int
    action_dim: int
    action_horizon: int
    prompt_len: int
    vocab_size: int
    resize: str = "cubic"
    prompt_format: PromptFormat = Pi0Prompt()
    image_slots: tuple[int, ...] = ()
    action_tokens: ActionTokens | None = None
    reads_episodes: bool = False
    answer_len: int = 0
    robots: tuple[str, ...] = ()
    entities: tuple[EntityTokens, ...] = ()
    perception: None = None


def open_one(args: Args, console: Console) -> Loader:
    """Returns the loader of one dataset; says how long its index and statistics took."""
    assert args.data is not None
    assert args.robot is not None
    robot = find_robot(args.robot)
    robot = dataclasses.replace(robot, cameras=robot.cameras[: args.cameras or None])
    started = time.perf_counter()
    dataset = open_dataset(
        args.data, robot, args.split, index_dir=args.index_dir, max_corrupt_fraction=args.max_corrupt_fraction
    )
    index = dataset.index
    console.print(f"index: {index.steps:,} steps of {index.episodes:,} episodes, {time.perf_counter() - started:.2f} s")
    started = time.perf_counter()
    normalization = compute_normalization(dataset)
    console.print(f"statistics: {time.perf_counter() - started:.2f} s")
    keys = [k for k in (robot.language_key, *robot.language_alternatives) if k is not None]
    texts = {t for k in keys for t in (index.texts | index.episode_texts)[k].table} or {robot.default_prompt or ""}
    model = fit_text_tokenizer([*texts, "no instruction"], 4000)  # some datasets have none
    length = int(max(TextTokenizer(model, 10_000).encode(text)[1].sum() for text in texts))
    tokenizer = TextTokenizer(model, length)
    policy = Shapes(
        cameras=tuple(c.name for c in robot.cameras),
        image_size=(args.size, args.size),
        state_dim=robot.state_size,
        action_dim=robot.action_size,
        action_horizon=robot.action_horizon,
        prompt_len=length,
        vocab_size=tokenizer.vocab_size,
    )
    config = DataConfig(
        (MixtureEntry(robot, str(args.data), split=args.split),),
        num_threads=args.num_threads,
        num_workers=args.num_workers,
        prefetch=args.prefetch,
        index_dir=None if args.index_dir is None else str(args.index_dir),
        max_corrupt_fraction=args.max_corrupt_fraction,
    )
    dataset.close()
    return make_loader(
        config,
        batch_size=args.batch_size or 32,
        policy=policy,
        tokenizer=tokenizer,
        normalizations={robot.name: normalization},
    )


def open_run(args: Args) -> Loader:
    """Returns the loader of a run."""
    assert args.config is not None
    run = override(load_run(args.config), args.set)
    if run.tokenizer is None:
        raise ValueError(
            f"{args.config}: tokenizer=None is taken from a checkpoint; give the file with --set tokenizer="
        )
    return make_loader(
        run.data,
        batch_size=args.batch_size or run.batch_size,
        policy=run.model,
        tokenizer=TextTokenizer.of_policy(read_tokenizer(run.tokenizer), run.model),
        normalizations=run.normalizations(),
        action_tokenizer=None if run.action_tokenizer is None else FastTokenizer.load(run.action_tokenizer),
    )


def usage() -> tuple[float, float]:
    """Returns CPU seconds and resident MiB of this process and its workers."""
    own = psutil.Process()
    processes = [own, *own.children(recursive=True)]
    cpu = sum(t.user + t.system for t in (p.cpu_times() for p in processes))
    return cpu, sum(p.memory_info().rss for p in processes) / MIB


def measure(loader: Loader, args: Args) -> dict[str, float]:
    """Draws batches for `seconds`, sleeping for the time of a step after each; memory is in MiB."""
    for _ in range(args.warm_up):
        next(loader)
    cpu, resident = usage()
    position, waited, started, took = loader.position, loader.wait_seconds, time.perf_counter(), 0.0
    while took < args.seconds:
        batch = next(loader)
        time.sleep(args.step_ms / 1e3)
        took = time.perf_counter() - started
    cpu_after, resident_after = usage()
    samples = loader.position - position
    return {
        "samples": samples,
        "samples_per_s": samples / took,
        "cpu_ms": (cpu_after - cpu) / samples * 1e3,
        "images": images_per_sample(batch),
        "cores": (cpu_after - cpu) / took,
        "wait": (loader.wait_seconds - waited) / took,
        "resident_before": resident,
        "resident": resident_after,
    }


def images_per_sample(batch: Batch) -> float:
    """Returns how many cameras the samples of a batch have, on average."""
    return float(sum(mask.mean() for mask in batch["image_mask"].values()))


def main(args: Args, console: Console) -> None:
    started = time.perf_counter()
    loader = open_run(args) if args.data is None else open_one(args, console)
    opened = time.perf_counter()
    next(loader)
    first = time.perf_counter()
    since = time.time() - psutil.Process().create_time()
    found = measure(loader, args)
    loader.close()
    table = Table(show_header=False)
    for name, value in {
        "opened in": f"{opened - started:.2f} s",
        "first batch": f"{first - opened:.2f} s after that, {since:.2f} s after the process started",
        "samples/s": f"{found['samples_per_s']:,.0f}, over {found['samples']:,} samples",
        "CPU per sample": f"{found['cpu_ms']:.3f} ms; per image {found['cpu_ms'] / found['images']:.3f} ms",
        "cores in use": f"{found['cores']:.2f} of {os.cpu_count()}",
        "waited for data": f"{found['wait']:.0%} of the time, with steps of {args.step_ms:g} ms",
        "resident": f"{found['resident_before']:,.0f} MiB before, {found['resident']:,.0f} MiB after that",
    }.items():
        table.add_row(name, value)
    console.print(table)


if __name__ == "__main__":
    try:
        main(tyro.cli(Args), Console(highlight=False))
    except (ValueError, FileNotFoundError) as e:
        sys.exit(str(e))
