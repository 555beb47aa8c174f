"""Kills a reader of data at random moments and shows that what it read in all its lives is what one life would read:

    python tests/bench/bench_kill.py --data /tmp/oxe/b64/1.0.0 ../shared/data/bridge_dataset/1.0.0
    python tests/bench/bench_kill.py --data RLDS LEROBOT_V21 LEROBOT_V30 HDF5_DIRECTORY --robots widowx a.py b.py c.py

The reader draws batches of a mixture and writes a digest of every sample, all of its arrays, to a file it only appends
to; every few batches it saves its position, one integer, as train/train.py does with a checkpoint. The parent ends it
with SIGKILL and starts it again with other numbers of hosts, worker processes and threads, as often as asked. Then an
uninterrupted reader with one of each goes as far. Exit code 1 where the two differ in a sample.
"""

import dataclasses
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import tyro
from rich.console import Console

from openpi_like.data.config import DataConfig, MixtureEntry
from openpi_like.data.dataset import EpisodeDataset
from openpi_like.data.index import open_index
from openpi_like.data.loader import make_loader
from openpi_like.data.sentencepiece_model import fit_text_tokenizer
from openpi_like.data.stats import compute_normalization
from openpi_like.data.text import TextTokenizer
from openpi_like.robots import Robot
from openpi_like.robots.find import find_robot
from tests.data.toy import Shapes

REPOSITORY = Path(__file__).resolve().parents[2]
HOSTS_WORKERS = ((1, 0), (2, 0), (4, 0), (8, 0), (1, 1), (1, 2), (2, 1))
THREADS = (1, 2, 3)
POSITION, DIGESTS = "position", "digests"
DIGEST_BYTES = 16
RECORD = 8 + DIGEST_BYTES


@dataclasses.dataclass(frozen=True)
class Args:
    """See the file's head. data: datasets of any layout, mixed with weights 1, 2, ... kills: how often it is killed.

    robots: whose they are, one for all of them or one each.

    batches: drawn between two kills, at most. save_every: batches from one saved position to the next. camera_dropout,
    group_episodes: of the loader; no groups where it is 0.
    """

    data: tuple[Path, ...]
    robots: tuple[str, ...] = ("widowx",)
    kills: int = 20
    batch_size: int = 32
    batches: int = 60
    save_every: int = 7
    seed: int = 0
    camera_dropout: float = 0.3
    group_episodes: int = 8

    def __post_init__(self) -> None:
        if self.kills < 1:
            raise ValueError(f"kills={self.kills}, expected at least 1")
        if len(self.robots) not in (1, len(self.data)):
            raise ValueError(f"{len(self.robots)} robots for {len(self.data)} datasets, expected one, or one each")


def shapes(robots: list[Robot]) -> Shapes:
    """Returns what a loader needs of a policy's config, large enough for all robots."""
    return Shapes(
        cameras=tuple(sorted({camera.name for robot in robots for camera in robot.cameras})),
        image_size=(224, 224),
        state_dim=max(robot.state_size for robot in robots),
        action_dim=max(robot.action_size for robot in robots),
        action_horizon=max(robot.action_horizon for robot in robots),
        prompt_len=64,
        vocab_size=4000,
    )


# ---- The reader ------------------------------------------------------------------------------------------------------


def leaves(batch: Any, name: str = "") -> list[tuple[str, np.ndarray]]:
    """All arrays of a batch, by name, in the order of their names."""
    if not isinstance(batch, dict):
        return [(name, np.ascontiguousarray(batch))]
    return [leaf for key in sorted(batch) for leaf in leaves(batch[key], f"{name}/{key}")]


def digests(batch: Any) -> list[bytes]:
    """One digest per sample, of all its arrays."""
    arrays = leaves(batch)
    out = []
    for i in range(len(batch["state"])):
        digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
        for name, array in arrays:
            digest.update(f"{name} {array.dtype} {array.shape[1:]}".encode() + array[i].tobytes())
        out.append(digest.digest())
    return out


def read(
    *,
    data: list[str],
    robots: list[str],
    work: Path,
    seed: int,
    batch_size: int,
    save_every: int,
    camera_dropout: float,
    group_episodes: int,
    until: int,
    hosts: int,
    num_workers: int,
    num_threads: int,
) -> None:
    """Reads from the saved position to sample `until`. All hosts are in this process and keep step with each other."""
    found = [find_robot(name) for name in robots * (len(data) if len(robots) == 1 else 1)]
    mixed = [dataclasses.replace(robot, name=f"{robot.name}_{i}") for i, robot in enumerate(found)]
    policy = shapes(mixed)
    datasets = [EpisodeDataset(open_index(d, "train", index_dir=work), r) for d, r in zip(data, mixed, strict=True)]
    texts = {text for d in datasets for text in d.prompts(np.arange(len(d)))}
    tokenizer = TextTokenizer(fit_text_tokenizer(texts, 4000), policy.prompt_len)
    normalizations = {d.robot.name: compute_normalization(d) for d in datasets}
    mixture = tuple(MixtureEntry(r, d, weight=i + 1) for i, (d, r) in enumerate(zip(data, mixed, strict=True)))
    config = DataConfig(
        mixture,
        seed=seed,
        camera_dropout=camera_dropout,
        group_episodes=group_episodes or None,
        index_dir=str(work),
        num_workers=num_workers,
        num_threads=num_threads,
    )
    start = int((work / POSITION).read_text()) if (work / POSITION).exists() else 0
    loaders = [
        make_loader(
            config,
            batch_size=batch_size,
            policy=policy,
            tokenizer=tokenizer,
            normalizations=normalizations,
            start=start,
            process_index=host,
            process_count=hosts,
        )
        for host in range(hosts)
    ]
    with (work / DIGESTS).open("ab", buffering=0) as file:
        for step in range(1, (until - start) // batch_size + 1):
            position = loaders[0].position
            rows = [digests(next(loader)) for loader in loaders]
            append(file, position, [row for of_hosts in zip(*rows, strict=True) for row in of_hosts])
            if step % save_every == 0 or loaders[0].position >= until:
                (work / "position.new").write_text(str(loaders[0].position))
                (work / "position.new").replace(work / POSITION)
    for loader in loaders:
        loader.close()


def append(file: BinaryIO, position: int, rows: list[bytes]) -> None:
    """Appends the digests of samples `position`, `position` + 1, ... by one write."""
    file.write(b"".join((position + i).to_bytes(8, "little") + row for i, row in enumerate(rows)))


# ---- The parent ------------------------------------------------------------------------------------------------------


def spawn(args: Args, work: Path, until: int, **how: int) -> subprocess.Popen:
    spec = {
        "data": [str(d.resolve()) for d in args.data],
        "robots": list(args.robots),
        "work": str(work),
        "seed": args.seed,
        "batch_size": args.batch_size,
        "save_every": args.save_every,
        "camera_dropout": args.camera_dropout,
        "group_episodes": args.group_episodes,
        "until": until,
        **how,
    }
    return subprocess.Popen(
        [sys.executable, __file__, "--child", json.dumps(spec)],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.DEVNULL,
        start_new_session=True,  # so that its worker processes die with it
    )


def drawn(work: Path, batch_size: int) -> int:
    """Batches in the file of digests, of all lives."""
    file = work / DIGESTS
    return file.stat().st_size // (batch_size * RECORD) if file.exists() else 0


def stream(work: Path) -> tuple[dict[int, bytes], int]:
    """Digests by position, and how many samples were read again; ends the program where these differ."""
    raw = (work / DIGESTS).read_bytes()
    found: dict[int, bytes] = {}
    for at in range(0, len(raw), RECORD):
        position, digest = int.from_bytes(raw[at : at + 8], "little"), raw[at + 8 : at + RECORD]
        if found.setdefault(position, digest) != digest:
            sys.exit(f"sample {position} was read twice and was not the same")
    return found, len(raw) // RECORD - len(found)


def main(args: Args, console: Console) -> None:
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as directory:
        lives, whole = Path(directory, "lives"), Path(directory, "whole")
        lives.mkdir()
        whole.mkdir()
        for kill in range(args.kills):
            hosts, workers = rng.choice(HOSTS_WORKERS)
            how = {"hosts": hosts, "num_workers": workers, "num_threads": rng.choice(THREADS)}
            # Some are killed while they start: imports, indexes, the first batch.
            target = drawn(lives, args.batch_size) + rng.choice([0, rng.randint(1, args.batches)])
            child = spawn(args, lives, 1 << 40, **how)
            while drawn(lives, args.batch_size) < target and child.poll() is None:
                time.sleep(1e-3)
            time.sleep(rng.uniform(0, 2) if drawn(lives, args.batch_size) == target == 0 else rng.uniform(0, 0.2))
            if child.poll() is not None:
                sys.exit(f"a reader with {how} ended by itself with code {child.returncode}")
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
            if (lives / DIGESTS).exists():  # a write may be cut by the end of the process
                os.truncate(lives / DIGESTS, (lives / DIGESTS).stat().st_size // RECORD * RECORD)
            saved = int((lives / POSITION).read_text()) if (lives / POSITION).exists() else 0
            console.print(
                f"kill {kill + 1}: {how}, {drawn(lives, args.batch_size)} batches so far, position {saved} saved"
            )
        until = (saved // args.batch_size + args.save_every) * args.batch_size
        for work, hosts in ((lives, 8), (whole, 1)):
            last = spawn(args, work, until, hosts=hosts, num_workers=0, num_threads=1)
            if last.wait():
                sys.exit(f"the last reader in {work.name} ended with code {last.returncode}")
        got, again = stream(lives)
        expected, _ = stream(whole)
        got = {position: digest for position, digest in got.items() if position < until}
        wrong = [p for p in sorted(expected.keys() | got.keys()) if got.get(p) != expected.get(p)]
        console.print(
            f"{args.kills} kills: {len(expected):,} samples, {again:,} of them read again after a kill; "
            f"{len(wrong)} differ from those of an uninterrupted reader"
        )
        if wrong:
            sys.exit(f"the first that differs is sample {wrong[0]}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        given = json.loads(sys.argv[2])
        read(**(given | {"work": Path(given["work"])}))
    else:
        main(tyro.cli(Args), Console(highlight=False, soft_wrap=True))
