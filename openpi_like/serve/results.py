"""What a policy did in a suite: `<out>/<suite>/<policy>.jsonl`, an episode a line, and beside it a JSON of how it was
driven. Policies of one folder were driven in the same layouts, or are compared in those that they have in common."""

import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from openpi_like.job import cpu
from openpi_like.serve.evaluation import Episode, mcnemar, newcombe, read_episodes, wilson

PACKAGES = ("openpi-like", "numpy", "mujoco", "metaworld", "robosuite", "highway-env")
KEPT = ("dialect", "execute_steps", "senses", "max_steps", "renderers", "server")
"""What must not change while a file is added to."""


def provenance(root: Path) -> dict[str, Any]:
    """Returns what a number needs beside it: the command, the commit, the machine, the date, versions."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""

    commit = git("rev-parse", "HEAD")
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "command": " ".join(["python", *sys.argv]),
        "commit": (commit + (" and changes" if git("status", "--porcelain") else "")) or None,
        "hardware": {"cpu": cpu(), "cores": os.cpu_count(), "python": platform.python_version()},
        "date": datetime.date.today().isoformat(),
        "versions": versions,
    }


def write_about(path: Path, how: Mapping[str, Any], root: Path) -> None:
    """Writes, beside the results at `path`, how they came about; a run that goes on adds to it.

    how: of `KEPT`.

    Raises:
        ValueError: what is there was driven otherwise.
    """
    about, now = path.with_suffix(".json"), json.loads(json.dumps(how, default=str))
    runs = []
    if about.is_file():
        before = json.loads(about.read_text())
        changed = [key for key in KEPT if before.get(key) != now.get(key)]
        differs = [f"{key} was {before.get(key)!r}, is {now.get(key)!r}" for key in changed]
        if differs:
            raise ValueError(
                f"{path} was driven otherwise: {'; '.join(differs)}; give the policy another name, or remove the file"
            )
        runs = before["runs"]
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = about.with_suffix(".tmp")
    temporary.write_text(json.dumps({**now, "runs": [*runs, provenance(root)]}, indent=1) + "\n")
    os.replace(temporary, about)


def read_results(folder: Path) -> dict[str, dict[tuple[str, str, int], Episode]]:
    """Returns policy -> (robot, task, seed) -> episode, of all files of a suite's folder, the expert's last.

    Raises:
        ValueError: a file is not one of episodes, or has one twice.
    """
    found, problems = {}, []
    for path in sorted(folder.glob("*.jsonl"), key=lambda p: (p.stem == "expert", p.stem)):
        episodes = read_episodes(path)
        found[path.stem] = {(e.robot, e.task, e.seed): e for e in episodes}
        if len(found[path.stem]) < len(episodes):
            problems.append(f"{path}: {len(episodes) - len(found[path.stem])} episodes twice")
    if problems:
        raise ValueError("; ".join(problems))
    return found


def suite_rows(
    found: Mapping[str, Mapping[tuple[str, str, int], Episode]], beside: str | None = None
) -> list[dict[str, Any]]:
    """Returns a row for each policy: success by robot and task, of all episodes with Wilson's interval, the mean of the
    tasks' rates, and, in the layouts that both drove, beside another policy: the difference with its interval
    (Newcombe) and McNemar's exact p.

    beside: a policy of `found`; None: no comparison.

    Raises:
        ValueError: there is no such policy.
    """
    if beside is not None and beside not in found:
        raise ValueError(f"no policy {beside!r} to be compared with; there are {sorted(found)}")
    rows = []
    for name, episodes in found.items():
        if not episodes:
            continue
        tasks: dict[str, list[bool]] = {}
        for (robot, task, _), episode in sorted(episodes.items()):
            tasks.setdefault(f"{robot} {task}", []).append(episode.success)
        row = {"policy": name, **_rate([s for of in tasks.values() for s in of])}
        row["tasks"] = {task: _rate(of) for task, of in tasks.items()}
        row["mean_of_tasks"] = sum(sum(of) / len(of) for of in tasks.values()) / len(tasks)
        if beside is not None and name != beside:
            both = sorted(episodes.keys() & found[beside].keys())
            ours, theirs = [episodes[k].success for k in both], [found[beside][k].success for k in both]
            if both:
                row |= {"beside": beside, "common": len(both)}
                row |= {"difference": newcombe(theirs, ours), "p": mcnemar(theirs, ours)}
        rows.append(row)
    return rows


def _rate(outcomes: Sequence[bool]) -> dict[str, Any]:
    return {"successes": sum(outcomes), "episodes": len(outcomes), "interval": wilson(sum(outcomes), len(outcomes))}
