"""Kills a training run at random moments and shows that it ends as one that was never killed:

    python train/demo.py --scale pulse --run runs/pulse        # data for it, once
    python tests/bench/bench_kill_train.py runs/pulse

Three runs of the same length: one in one life; one killed `kills` times with SIGKILL and started again on the same
devices, whose losses must be equal to the bit; one killed as often and started again each time on other numbers of
devices and processes, whose losses must be equal up to rounding. In all of them every process writes a digest of each
sample that it trains on: they must be the same, and none may be missing. Exit code 1 where something differs.
"""

import dataclasses
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console

from openpi_like.train.watching.metrics import read_metrics

ROOT = Path(__file__).resolve().parents[2]
SAME = (2, 1)  # devices of a process, processes
OTHERS = ((1, 1), (4, 1), (1, 2), (2, 2), (8, 1), (4, 2))
ROUNDING = 2e-5
# Runs train/train.py with a record of what it trains on.
RECORDER = """
import hashlib, runpy, sys
import jax, numpy as np
import openpi_like.train.sharding as sharding

record, program, *sys.argv[1:] = sys.argv[1:]
sys.argv[0] = program
put, file = sharding.put_batch, open(record, "a", buffering=1)


def put_and_record(batch, mesh):
    if isinstance(batch, dict) and "position" in batch and "dataset_id" in batch:
        leaves = [np.ascontiguousarray(x) for x in jax.tree.leaves(batch)]
        for i, (high, low) in enumerate(batch["position"].tolist()):
            digest = hashlib.blake2b(b"".join(x[i].tobytes() for x in leaves), digest_size=12).hexdigest()
            file.write(f"{(high << 32) + low} {digest}\\n")
    return put(batch, mesh)


sharding.put_batch = put_and_record
runpy.run_path(program, run_name="__main__")
"""


@dataclasses.dataclass(frozen=True)
class Args:
    """See the file's head. data: a finished demo. kills: of each run. steps: of each run. seed: of when to kill."""

    data: Annotated[Path, tyro.conf.Positional]
    kills: int = 7
    steps: int = 80
    seed: int = 0


class Run:
    """A run and its record, in a folder of its own."""

    def __init__(self, args: Args, folder: Path) -> None:
        self._args, self.folder = args, folder
        folder.mkdir(parents=True)
        (folder / "recorder.py").write_text(RECORDER)
        self.samples: dict[int, set[str]] = {}
        self._life = 0

    def start(self, devices: int, processes: int) -> list[subprocess.Popen[bytes]]:
        data = self._args.data
        overrides = [f"data.entries.{i}.path={data}/data/{r}_sim/1.0.0" for i, r in enumerate(("sawyer", "pusht"))]
        overrides += [f"run_dir={self.folder}/run", f"stats={data}/stats", f"tokenizer={data}/text.model"]
        overrides += [f"steps={self._args.steps}", "batch_size=8", "log_every=1", "save_every=4"]
        overrides += ["validate_every=1000", "validation_batches=1", "validation_batch_size=8", "draw_batch=False"]
        with socket.create_server(("127.0.0.1", 0)) as server:
            address = f"localhost:{server.getsockname()[1]}"
        self._life += 1
        started = []
        for rank in range(processes):
            where = [f"hosts.coordinator={address}", f"hosts.count={processes}", f"hosts.rank={rank}"]
            record = self.folder / f"samples-{self._life}-{rank}"
            program = [str(self.folder / "recorder.py"), str(record), str(ROOT / "train" / "train.py")]
            command = [sys.executable, *program, str(ROOT / "configs" / "demo_pretrain.py"), *overrides]
            environment = {
                **os.environ,
                "PYTHONPATH": str(ROOT),
                "JAX_PLATFORMS": "cpu",
                "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
                "JAX_COMPILATION_CACHE_DIR": str(self.folder.parent / "compiled"),
                "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            }
            log = (self.folder / f"log-{self._life}-{rank}").open("wb")
            several = where if processes > 1 else ["hosts.count=1"]
            started.append(subprocess.Popen([*command, *several], cwd=ROOT, env=environment, stdout=log, stderr=log))
        return started

    def lines(self) -> list[dict[str, Any]]:
        return [line for line in read_metrics(self.folder / "run" / "metrics.jsonl") if line["split"] == "train"]

    def live(self, devices: int, processes: int, until: int | None, pause: float = 0.0) -> None:
        """Runs to the end, or until so many steps are in the log, and then some seconds, and kills it.

        A life that would have ended so before it did anything does one step more.
        """
        before = len(self.lines())
        started = self.start(devices, processes)
        if until is not None:
            while len(lines := self.lines()) <= before or lines[-1]["step"] < until:
                self._check_alive(started)
                before = min(before, len(lines))  # what will be done twice is removed when it resumes
                time.sleep(0.02)
            time.sleep(pause)
            self._check_alive(started)
            for process in started:
                process.send_signal(signal.SIGKILL)
        codes = [process.wait() for process in started]
        if until is None and any(codes):
            self._ended(codes)

    def _check_alive(self, started: list[subprocess.Popen[bytes]]) -> None:
        codes = [process.poll() for process in started]
        if any(code is not None for code in codes):
            for process in started:
                process.kill()
            self._ended(codes)

    def _ended(self, codes: Sequence[int | None]) -> None:
        logs = [p.read_text()[-3000:] for p in sorted(self.folder.glob(f"log-{self._life}-*"))]
        raise SystemExit(f"a life that was not killed ended with {codes}:\n" + "\n".join(logs))

    def read_samples(self) -> dict[int, set[str]]:
        """Returns the digests by position, of all lives; one each, where nothing differs."""
        samples: dict[int, set[str]] = {}
        for record in self.folder.glob("samples-*"):
            for line in record.read_text().split("\n")[:-1]:  # the last one may be cut
                position, digest = line.split()
                samples.setdefault(int(position), set()).add(digest)
        return samples


def main(args: Args) -> int:
    console, chance = Console(), random.Random(args.seed)
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        whole = Run(args, Path(folder) / "whole")
        whole.live(*SAME, until=None)
        expected, samples = whole.lines(), whole.read_samples()
        trained = args.steps * 8
        for name, places in (("same devices", [SAME]), ("other devices and processes", list(OTHERS))):
            run = Run(args, Path(folder) / name.replace(" ", "_"))
            deaths = sorted(chance.sample(range(2, args.steps - 3), args.kills))
            for i, step in enumerate(deaths):
                run.live(*places[i % len(places)], until=step, pause=chance.uniform(0, 0.5))
            run.live(*SAME, until=None)
            got, seen = run.lines(), run.read_samples()
            losses = [abs(a["loss"] - b["loss"]) / abs(b["loss"]) for a, b in zip(got, expected, strict=True)]
            differ = sum(seen.get(p) != samples[p] for p in range(trained))
            bits = sum(
                a["loss"] == b["loss"] and a["grad_norm"] == b["grad_norm"] for a, b in zip(got, expected, strict=True)
            )
            console.print(
                f"{name}: killed after steps {deaths}; {trained} samples, {differ} differ; losses of {bits} of "
                f"{args.steps} steps equal to the bit, largest difference {max(losses):.2g}"
            )
            failed |= differ > 0 or max(losses) > (0 if places == [SAME] else ROUNDING)
            failed |= [line["step"] for line in got] != list(range(1, args.steps + 1))
    console.print(json.dumps({"failed": bool(failed)}))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Args)))
