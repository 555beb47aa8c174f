"""Where a number comes from: the command, the commit, the machine, the date, versions."""

import contextlib
import datetime
import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

PACKAGES = (
    *("openpi-like", "numpy", "mujoco", "metaworld", "robosuite", "gymnasium-robotics", "gym-aloha", "gym-pusht"),
    *("pymunk", "highway-env", "jax", "flax"),
)


def provenance(root: Path) -> dict[str, Any]:
    """Returns what a number needs beside it: the command, the commit, the machine, the date, versions. commit: None
    where there is no repository, or no git; changed: whether files differ from it."""

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True)
        except OSError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "command": shlex.join(["python", *sys.argv]),
        "commit": git("rev-parse", "HEAD"),
        "changed": bool(git("status", "--porcelain")),
        "hardware": {"cpu": cpu(), "cores": os.cpu_count(), "python": platform.python_version()},
        "date": datetime.date.today().isoformat(),
        "versions": versions,
    }


def cpu() -> str:
    """Returns the name of this machine's processor."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def commit(run: Mapping[str, Any]) -> str:
    """Returns at which commit something ran, as text. run: see `provenance`."""
    return "unknown" if run["commit"] is None else run["commit"][:8] + (" and changes" if run["changed"] else "")


def hardware(run: Mapping[str, Any]) -> str:
    """Returns on what something ran, as text."""
    return f"{run['hardware']['cores']} cores, {run['hardware']['cpu']}"
