"""What a policy did in a suite: `<out>/<suite>/<policy>.jsonl`, an episode a line, and beside it a JSON of how it was
driven. Policies of one folder were driven in the same layouts, or are compared in those that they have in common."""

import contextlib
import fcntl
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from openpi_like.provenance import provenance
from openpi_like.serve.evaluation import Episode, mcnemar, paired_difference, read_episodes, wilson

KEPT = ("dialect", "execute_steps", "senses", "server")
"""What must not change while a file is added to; nor `max_steps` and `renderers` of a robot."""
_BY_ROBOT = ("max_steps", "renderers")
TRAINING = ("seconds", "cores", "steps", "batch_size", "weights", "memory_mb")
"""What a policy's training took: of its wall time, with so many cores, and the most memory, of processes together;
numbers, None where one is not known. Beside these, `what`, a text: by which code, what differs."""


def read_training(path: Path) -> dict[str, Any]:
    """Returns what a policy's training took, of a JSON file.

    Raises:
        ValueError: it is not such a file.
    """
    try:
        took = dict(json.loads(path.read_text()).items())
    except (OSError, ValueError, AttributeError) as e:
        raise ValueError(f"{path}: not a JSON file of what a training took: {e}") from e
    problems = [
        f"{name} is {took.get(name, 'missing')!r}, expected a number above 0, or null"
        for name in TRAINING
        if name not in took or not (took[name] is None or (type(took[name]) in (int, float) and took[name] > 0))
    ]
    problems += [
        f"{name}: expected {', '.join((*TRAINING, 'what'))}" for name in took if name not in (*TRAINING, "what")
    ]
    if not isinstance(took.get("what", ""), str):
        problems.append("what is no text")
    if problems:
        raise ValueError(f"{path}: {'; '.join(problems)}")
    return took


@contextlib.contextmanager
def held(path: Path) -> Iterator[None]:
    """Keeps other processes from driving for the same file of results meanwhile.

    Raises:
        ValueError: one does.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            raise ValueError(f"{path} is being driven by another process; wait for it, or stop it") from e
        yield


def write_about(path: Path, how: Mapping[str, Any], episodes: int, root: Path) -> None:
    """Writes, beside the results at `path`, how they come about; a run that goes on adds to it.

    how: of `KEPT`, and `max_steps` and `renderers` by robot. episodes: that are driven now; with none, nothing is
    written.

    Raises:
        ValueError: what is there was driven otherwise, or nothing says how.
    """
    about, now = path.with_suffix(".json"), json.loads(json.dumps(how, default=str))
    runs = []
    if path.is_file() and path.stat().st_size:
        if not about.is_file():
            raise ValueError(
                f"{path} has episodes, and no {about.name} says how they were driven; give the policy another name"
            )
        before = json.loads(about.read_text())
        differs = [f"{k} was {before.get(k)!r}, is {now.get(k)!r}" for k in KEPT if before.get(k) != now.get(k)]
        for k in _BY_ROBOT:
            was, of = before.get(k, {}), now.get(k, {})
            differs += [f"{k} of {r} was {was[r]!r}, is {of[r]!r}" for r in was.keys() & of.keys() if was[r] != of[r]]
            now[k] = was | of
        if differs:
            raise ValueError(
                f"{path} was driven otherwise: {'; '.join(differs)}; give the policy another name, or remove "
                f"{path.name} and {about.name}"
            )
        runs = before["runs"]
    if not episodes:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = about.with_suffix(".tmp")
    run = {**provenance(root), "episodes": episodes}
    temporary.write_text(json.dumps({**now, "runs": [*runs, run]}, indent=1) + "\n")
    os.replace(temporary, about)


def read_results(folder: Path, policies: Iterable[str] | None = None) -> dict[str, dict[tuple[str, str, int], Episode]]:
    """Returns policy -> (robot, task, seed) -> episode, of files of a suite's folder, the expert's last.

    policies: those to read, where there are such; None reads all.

    Raises:
        ValueError: a file is not one of episodes, or has one twice.
    """
    found, problems = {}, []
    paths = [p for p in folder.glob("*.jsonl") if policies is None or p.stem in policies]
    for path in sorted(paths, key=lambda p: (p.stem == "expert", p.stem)):
        episodes = read_episodes(path)
        found[path.stem] = {(e.robot, e.task, e.seed): e for e in episodes}
        twice = len(episodes) - len(found[path.stem])
        if twice:
            problems.append(f"{path}: {twice} episodes are there twice; remove the file and drive them again")
    if problems:
        raise ValueError("; ".join(problems))
    return found


def suite_rows(
    found: Mapping[str, Mapping[tuple[str, str, int], Episode]], beside: str | None = None
) -> list[dict[str, Any]]:
    """Returns a row for each policy: success by robot and task, of all episodes with Wilson's interval, the mean of the
    tasks' rates, the means of what simulators measured (`Sim.measures`) in the episodes that have it, and, in the
    layouts that both drove, beside another policy: the difference with its interval (Newcombe's for pairs) and
    McNemar's exact p.

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
        measured: dict[str, list[float]] = {}
        for episode in episodes.values():
            for what, value in episode.measures.items():
                measured.setdefault(what, []).append(value)
        row["measures"] = {what: sum(of) / len(of) for what, of in measured.items()}
        if beside is not None and name != beside:
            both = sorted(episodes.keys() & found[beside].keys())
            ours, theirs = [episodes[k].success for k in both], [found[beside][k].success for k in both]
            if both:
                row |= {"beside": beside, "common": len(both)}
                row |= {"difference": paired_difference(theirs, ours), "p": mcnemar(theirs, ours)}
        rows.append(row)
    return rows


def _rate(outcomes: Sequence[bool]) -> dict[str, Any]:
    return {"successes": sum(outcomes), "episodes": len(outcomes), "interval": wilson(sum(outcomes), len(outcomes))}
