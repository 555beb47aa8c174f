"""Results of benchmarks as JSON lines, how they came about, success rates, films of failures. For the clients beside
this file."""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import json
import math
import os
import platform
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any, Mapping, Sequence

import numpy as np

Z95 = 1.959964  # of a 95 % interval
FRAMES = 60  # of a film, at most


class BenchmarkError(RuntimeError):
    """Something outside of these programs is not as it has to be; the text says what to do."""


FIELDS = (
    *("robot", "task", "policy", "seed", "success", "steps", "renderer"),
    *("latency_ms", "expert_steps", "thoughts", "measures"),
)
"""Of a line of results: those of `openpi_like.serve.evaluation.Episode`, which reads it."""
PACKAGES = ("libero", "hf-libero", "robosuite", "mujoco", "simpler_env", "mani_skill2_real2sim", "sapien", "pybullet")


def append_line(path: Path, line: Mapping[str, Any]) -> None:
    """Adds an episode to a file of JSON lines."""
    with path.open("a") as f:
        f.write(json.dumps(line) + "\n")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Returns the episodes of a file, none where there is none; a last line that a kill cut short is removed from it.

    Raises:
        BenchmarkError: a complete line is no episode.
    """
    if not path.is_file():
        return []
    *whole, cut = path.read_text().split("\n")
    if cut:
        path.write_text("".join(line + "\n" for line in whole))
    lines = []
    for i, text in enumerate(whole):
        try:
            line = json.loads(text)
        except ValueError:
            line = None
        if not isinstance(line, dict) or not {"robot", "task", "policy", "seed", "success"} <= set(line):
            raise BenchmarkError(f"{path}, line {i + 1}: not an episode; give another --out, or remove the file")
        lines.append(line)
    return lines


def write_about(path: Path, how: Mapping[str, Any], episodes: int) -> None:
    """Writes, beside the results at `path`, how they come about, in the form that `serve/benchmark_page.py` reads; a
    run that goes on adds to it.

    how: what must not change while a file is added to. episodes: that are driven now; with none, nothing is written.

    Raises:
        BenchmarkError: what is there was driven otherwise, or nothing says how.
    """
    about, now = path.with_suffix(".json"), json.loads(json.dumps(how, default=str))
    runs = []
    if path.is_file() and path.stat().st_size:
        if not about.is_file():
            raise BenchmarkError(f"no {about} says how the episodes of {path} were driven; give another --out")
        before = json.loads(about.read_text())
        differs = [f"{k} was {before.get(k)!r}, is {now[k]!r}" for k in now if before.get(k) != now[k]]
        if differs:
            raise BenchmarkError(f"{path} was driven otherwise: {'; '.join(differs)}; give another --out")
        runs = before["runs"]
    if not episodes:
        return
    temporary = about.with_suffix(".tmp")
    temporary.write_text(json.dumps({**now, "runs": [*runs, {**_origin(), "episodes": episodes}]}, indent=1) + "\n")
    os.replace(str(temporary), str(about))


def _origin() -> dict[str, Any]:
    """As `openpi_like.provenance.provenance`, which is not there. The folder may lie in no repository."""

    def git(*words: str) -> str | None:
        command = ["git", "-C", str(Path(__file__).resolve().parent), *words]
        try:
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        except OSError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        named = [x for x in Path("/proc/cpuinfo").read_text().splitlines() if x.startswith("model name")]
        cpu = named[0].split(":", 1)[1].strip() if named else cpu
    found = {}
    for name in ("numpy", "openpi-client", *PACKAGES):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    # A key of the server is nobody's business: the file is made to be shown.
    said = [re.sub("(?<=^--api-key=).*", "...", w) for w in sys.argv]
    said = ["..." if before == "--api-key" else word for before, word in zip(["", *said], said)]
    return {
        "command": " ".join(["python", *map(shlex.quote, said)]),
        "commit": git("rev-parse", "HEAD"),
        "changed": bool(git("status", "--porcelain")),
        "hardware": {"cpu": cpu, "cores": os.cpu_count(), "python": platform.python_version()},
        "date": datetime.date.today().isoformat(),
        "versions": found,
    }


def wilson(successes: int, n: int) -> tuple[float, float]:
    """Returns the 95 % Wilson interval of a success rate, n >= 1."""
    p, z2 = successes / n, Z95 * Z95
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    return max(0.0, centre - half), min(1.0, centre + half)


def counted(successes: int, n: int) -> str:
    """Returns "k/n rate [low, high]"."""
    low, high = wilson(successes, n)
    return f"{successes:4}/{n:<4} {successes / n:6.1%} [{low:.1%}, {high:.1%}]"


def success_rates(lines: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns a text per task with its interval, then the mean of the tasks' rates and all episodes together."""
    tasks: dict[str, list[bool]] = {}
    for line in lines:
        tasks.setdefault(line["task"], []).append(bool(line["success"]))
    if not tasks:
        return ["no episodes"]
    texts = [f"{counted(sum(of), len(of))}  {task}" for task, of in tasks.items()]
    rates = [sum(of) / len(of) for of in tasks.values()]
    together = [success for of in tasks.values() for success in of]
    mean = f"mean of the rates of {len(tasks)} tasks: {sum(rates) / len(rates):.1%}"
    return [*texts, mean, f"{counted(sum(together), len(together))}  all episodes together"]


def versions(*packages: str) -> str:
    """Returns "NAME VERSION, ..." of those that are installed: results of two simulators do not compare."""
    found = []
    for name in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found.append(f"{name} {importlib.metadata.version(name)}")
    return ", ".join(found)


class Films:
    """Keeps films of episodes that failed, at most so many of each task."""

    def __init__(self, directory: Path | None, per_task: int) -> None:
        self._directory, self._per_task = directory, per_task
        self._kept: dict[str, int] = {}

    def wants(self, task: str) -> bool:
        """Returns whether frames are collected for an episode of this task."""
        return self._directory is not None and self._kept.get(task, 0) < self._per_task

    def keep(self, task: str, seed: int, frames: Sequence[np.ndarray]) -> None:
        """Writes a GIF of at most `FRAMES` frames, evenly spaced."""
        from PIL import Image

        assert self._directory is not None
        self._directory.mkdir(parents=True, exist_ok=True)
        chosen = np.unique(np.linspace(0, len(frames) - 1, min(len(frames), FRAMES)).round().astype(int))
        images = [Image.fromarray(frames[i]).quantize(64, method=Image.Quantize.FASTOCTREE) for i in chosen]
        path = self._directory / f"{re.sub(r'[^A-Za-z0-9]+', '_', task)}_{seed}.gif"
        images[0].save(path, save_all=True, append_images=images[1:], duration=100, loop=0)
        self._kept[task] = self._kept.get(task, 0) + 1
