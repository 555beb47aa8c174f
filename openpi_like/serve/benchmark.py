"""The numbers of the benchmark page: what policies did in suites, how each number came about, and which have moved."""

import dataclasses
import json
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from openpi_like.provenance import commit, hardware
from openpi_like.robots.sims.suites import SUITES
from openpi_like.serve.evaluation import Episode, mcnemar, paired_difference
from openpi_like.serve.results import read_results, suite_rows

EXPERT = "expert"
_Episodes = Mapping[tuple[str, str, int], Episode]


def collect(run: Path, studies: Sequence[Path] = ()) -> dict[str, Any]:
    """Returns all numbers of a directory of results (serve/evaluate.py): suite -> policy -> its row, how it was driven,
    and its share of the expert's success. Of a policy that has not driven all layouts of a suite, only how many it did.

    studies: directories of train/study.py and train/scaling.py, whose results are kept as they are.

    Raises:
        ValueError: there are none, a file of results has no JSON beside it that says how it came about, or a study is
            not finished; lists all.
    """
    suites, problems = {}, []
    for folder in sorted(p for p in run.iterdir() if p.is_dir()) if run.is_dir() else []:
        try:
            found = {name: episodes for name, episodes in read_results(folder).items() if episodes}
        except ValueError as e:
            problems.append(str(e))
            continue
        problems += [
            f"no {folder / name}.json, which says how {name} was driven; drive it with serve/evaluate.py"
            for name in found
            if not (folder / f"{name}.json").is_file()
        ]
        if not found or problems:
            continue
        wanted = _layouts(folder.name)
        whole = {name: _of(episodes, wanted) for name, episodes in found.items() if wanted <= episodes.keys()}
        suites[folder.name] = {
            "policies": {
                row["policy"]: {
                    **{
                        key: row[key]
                        for key in ("successes", "episodes", "interval", "tasks", "mean_of_tasks", "measures")
                    },
                    "outcomes": _outcomes(whole[row["policy"]]),
                    "of_expert": _of_expert(whole, row["policy"]),
                    "median_ms": _median([ms for e in whole[row["policy"]].values() for ms in e.latency_ms]),
                    "about": json.loads((folder / f"{row['policy']}.json").read_text()),
                }
                for row in suite_rows(whole)
            },
            "unfinished": {
                name: [len(episodes.keys() & wanted), len(wanted)]
                for name, episodes in found.items()
                if name not in whole
            },
            "pairs": [_pair(whole, a, b) for a, b in _pairs(list(whole))],
        }
    if not suites and not problems:
        problems.append(f"no results in {run}: expected SUITE/POLICY.jsonl, see serve/evaluate.py")
    told = dict[str, Any]()
    for folder in studies:
        path = folder / "results.json"
        study = json.loads(path.read_text()) if path.is_file() else {}
        told[study.get("file", "").removeprefix("configs/").removesuffix(".py")] = study
        missing = [key for key in ("file", "about", "table", "command", "commits") if key not in study]
        if missing:
            problems.append(f"{path}: no {', '.join(missing)}; run train/study.py or train/scaling.py to its end")
    if problems:
        raise ValueError("; ".join(problems))
    return {"suites": suites, "studies": told}


def _layouts(suite: str) -> set[tuple[str, str, int]]:
    """Returns all layouts of a suite, none of one that is not ours."""
    of = SUITES.get(suite)
    if of is None:
        return set()
    seeds = range(of.first_seed, of.first_seed + of.episodes)
    return {(robot, task, seed) for robot, tasks in of.tasks.items() for task in tasks for seed in seeds}


def _of(episodes: _Episodes, wanted: set[tuple[str, str, int]]) -> _Episodes:
    return {k: e for k, e in episodes.items() if not wanted or k in wanted}


def _outcomes(episodes: _Episodes) -> dict[str, dict[str, int]]:
    outcomes: dict[str, dict[str, int]] = {}
    for (robot, task, seed), episode in sorted(episodes.items()):
        outcomes.setdefault(f"{robot} {task}", {})[str(seed)] = int(episode.success)
    return outcomes


def _median(values: Sequence[float]) -> float | None:
    return sorted(values)[len(values) // 2] if values else None


def _pairs(names: Sequence[str]) -> Iterator[tuple[str, str]]:
    policies = [n for n in names if n != EXPERT]
    yield from ((a, b) for i, a in enumerate(policies) for b in policies[i + 1 :])


def _pair(found: Mapping[str, _Episodes], a: str, b: str) -> dict[str, Any]:
    both = sorted(found[a].keys() & found[b].keys())
    first, second = ([found[name][k].success for k in both] for name in (a, b))
    return {"policies": [a, b], "common": len(both), "p": mcnemar(first, second) if both else 1.0}


def _of_expert(found: Mapping[str, _Episodes], policy: str) -> float | None:
    """Mean success over tasks, divided by that of the expert; None where it did nothing, or was not driven."""
    if policy == EXPERT or EXPERT not in found:
        return None
    ours, theirs = ({row["policy"]: row for row in suite_rows(found)}[name] for name in (policy, EXPERT))
    same = ours["tasks"].keys() == theirs["tasks"].keys()
    return ours["mean_of_tasks"] / theirs["mean_of_tasks"] if same and theirs["successes"] else None


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Numbers beside published ones. moved: which are others, in words. compared: how many were, of which one in
    twenty is another by chance alone. missing, new: suites' policies that only the published have, and these."""

    moved: tuple[str, ...]
    compared: int
    missing: tuple[str, ...]
    new: tuple[str, ...]

    def lines(self) -> list[str]:
        """Returns all of it as text."""
        said = f"{len(self.moved)} of {self.compared} numbers have moved beyond their intervals"
        by_chance = f"; by chance alone about {self.compared / 20:.0f} would" if self.compared >= 20 else ""
        others = (("not driven now", self.missing), ("not published", self.new))
        return [*self.moved, said + by_chance, *(f"{what}: {'; '.join(of)}" for what, of in others if of)]


def compare(published: Mapping[str, Any], now: Mapping[str, Any]) -> Comparison:
    """Returns what is not as it was published: rates whose difference in the layouts that both have has a 95 % interval
    without zero, of each suite and policy, and of each task.

    Raises:
        ValueError: they have nothing in common.
    """
    before, after, lines = dict(_rates(published)), dict(_rates(now)), []
    both = sorted(before.keys() & after.keys())
    if not both:
        raise ValueError("nothing to compare: no policy was driven in a suite that is in the published numbers")
    for what in both:
        seeds = sorted(before[what].keys() & after[what].keys())
        old, new = ([bool(of[what][seed]) for seed in seeds] for of in (before, after))
        low, high = paired_difference(old, new)
        if low > 0 or high < 0:
            change = f"{sum(old)}/{len(seeds)} was published, now {sum(new)}/{len(seeds)}: [{low:+.2f}, {high:+.2f}]"
            lines.append(f"{', '.join(what)}: {change}")
    policies = [dict.fromkeys(f"{what[0]}, {what[1]}" for what in sorted(of)) for of in (before, after)]
    missing, further = (tuple(p for p in a if p not in b) for a, b in (policies, policies[::-1]))
    return Comparison(tuple(lines), len(both), missing, further)


def _rates(numbers: Mapping[str, Any]) -> Iterator[tuple[tuple[str, str, str], dict[str, int]]]:
    """Yields (suite, policy, task) and outcomes by layout: of all tasks, and of each where there are several."""
    for suite, of in numbers["suites"].items():
        for policy, row in of["policies"].items():
            tasks = row["outcomes"]
            yield (suite, policy, "all tasks"), {f"{t} {s}": x for t, by in tasks.items() for s, x in by.items()}
            if len(tasks) > 1:
                yield from (((suite, policy, task), by) for task, by in tasks.items())


def shown(rate: Mapping[str, Any]) -> str:
    """Returns a rate of success as text, with its interval."""
    low, high = rate["interval"]
    return f"{rate['successes']}/{rate['episodes']} [{low:.2f}, {high:.2f}]"


def page(numbers: Mapping[str, Any], figures: str) -> str:
    """Returns the page as Markdown. figures: folder of the figures, as the page links to it."""
    parts = [
        "# Benchmarks\n\n"
        "Written by `serve/benchmark_page.py` from results of `serve/evaluate.py`. Success has 95 % Wilson intervals; "
        "layouts are new to every\npolicy and the same for all. p is of McNemar's exact test, of each pair alone. Each "
        "policy is one training run, whose chance no interval\nhas in it. Where numbers come from is at the end."
    ]
    for suite, of in numbers["suites"].items():
        about = SUITES.get(suite)
        said = f"{about.about}. Done is a task when {about.success}." if about else "Driven by a program of its own."
        parts.append(f"## {suite}\n\n{textwrap.fill(said[:1].upper() + said[1:], 144)}")
        parts += [f"![success in {suite}]({figures}/{suite}.svg)"] if of["policies"] else []
        head = ["policy", "episodes done", "mean of tasks", "of the expert's", "ms a request (median)"]
        rows = [
            [
                name,
                shown(row),
                f"{row['mean_of_tasks']:.2f}",
                "" if row["of_expert"] is None else f"{row['of_expert']:.0%}",
                "" if row["median_ms"] is None else f"{row['median_ms']:.1f}",
            ]
            for name, row in of["policies"].items()
        ]
        for name, (driven, wanted) in of["unfinished"].items():
            rows.append([name, f"unfinished: {driven} of {wanted} layouts", "", "", ""])
        parts.append(_table(head, rows))
        tasks = dict.fromkeys(t for row in of["policies"].values() for t in row["tasks"])
        if len(tasks) > 1:
            each = [row["tasks"] for row in of["policies"].values()]
            cells = [[t, *(_few(rates[t]) if t in rates else "" for rates in each)] for t in tasks]
            parts.append(_table(["task", *of["policies"]], cells))
        measures = dict.fromkeys(what for row in of["policies"].values() for what in row["measures"])
        if measures:
            rows = [
                [name, *(f"{row['measures'][what]:.3f}" if what in row["measures"] else "" for what in measures)]
                for name, row in of["policies"].items()
            ]
            parts.append(_table(["mean of episodes", *measures], rows))
        if of["pairs"]:
            rows = [[*pair["policies"], str(pair["common"]), f"{pair['p']:.2g}"] for pair in of["pairs"]]
            parts.append(_table(["policy", "beside", "episodes of both", "p"], rows))
    for name, study in numbers["studies"].items():
        parts.append(f"## {name}\n\n{textwrap.fill(study['about'], 144)}")
        parts += [f"![{name}]({figures}/{drawn(name)})", _study_table(study)]
    took = [
        [suite, name, *_training(row["about"]["training"])]
        for suite, of in numbers["suites"].items()
        for name, row in of["policies"].items()
        if "training" in row["about"]
    ]
    if took:
        parts.append("## What training took")
        parts.append(
            _table(["suite", "policy", "minutes", "cores", "steps", "of samples", "weights", "memory", ""], took)
        )
    parts.append("## Where each number comes from")
    rows = [
        [suite, name, str(run["episodes"]), f"`{run['command']}`", commit(run), run["date"], hardware(run)]
        for suite, of in numbers["suites"].items()
        for name, row in of["policies"].items()
        for run in row["about"]["runs"]
    ]
    rows += [
        [name, "", "", f"`{study['command']}`", ", ".join(study["commits"]), study["date"], hardware(study)]
        for name, study in numbers["studies"].items()
    ]
    parts.append(_table(["suite", "policy", "episodes to drive", "command", "commit", "date", "hardware"], rows))
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


def _study_table(study: Mapping[str, Any]) -> str:
    """Returns a study's own table; where it is of many tasks, with the intervals of all tasks together alone."""
    head, *rows = study["table"]
    tasks = study["rows"][0]["tasks"] if "rows" in study else {}
    short = [name in tasks and len(tasks) > 3 for name in head]
    return _table(head, [[c.split(" [")[0] if s else c for c, s in zip(row, short, strict=True)] for row in rows])


def drawn(study: str) -> str:
    """Returns the file of a study's figure."""
    return f"{study.replace('/', '_')}.svg"


def _training(took: Mapping[str, Any]) -> list[str]:
    def said(name: str, form: str, unit: float = 1.0) -> str:
        return "" if took[name] is None else form.format(took[name] / unit)

    sizes = [said("seconds", "{:.1f}", 60.0), said("cores", "{:.0f}"), said("steps", "{:,.0f}")]
    sizes += [said("batch_size", "{:.0f}"), said("weights", "{:.2f} M", 1e6), said("memory_mb", "{:.1f} GB", 1e3)]
    return [*sizes, took.get("what", "")]


def _few(rate: Mapping[str, Any]) -> str:
    return f"{rate['successes']}/{rate['episodes']}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in lines)
