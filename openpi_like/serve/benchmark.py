"""The numbers of the benchmark page: what policies did in suites, how each number came about, and which have moved."""

import json
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from openpi_like.robots.sims.suites import SUITES
from openpi_like.serve.evaluation import mcnemar
from openpi_like.serve.results import read_results, suite_rows

EXPERT = "expert"


def collect(run: Path) -> dict[str, Any]:
    """Returns all numbers of a directory of results (serve/evaluate.py): suite -> policy -> its row, how it was driven,
    and its share of the expert's success.

    Raises:
        ValueError: there are none, or a file of results has no JSON beside it that says how it came about; lists all.
    """
    suites, problems = {}, []
    for folder in sorted(p for p in run.iterdir() if p.is_dir()) if run.is_dir() else []:
        try:
            found = {name: episodes for name, episodes in read_results(folder).items() if episodes}
        except ValueError as e:
            problems.append(str(e))
            continue
        policies: dict[str, Any] = {}
        for row in suite_rows(found):
            about = folder / f"{row['policy']}.json"
            if not about.is_file():
                problems.append(
                    f"no {about}, which says how {row['policy']} was driven; drive it with serve/evaluate.py"
                )
                continue
            latency = sorted(ms for e in found[row["policy"]].values() for ms in e.latency_ms)
            policies[row["policy"]] = {
                **{key: row[key] for key in ("successes", "episodes", "interval", "tasks", "mean_of_tasks")},
                "of_expert": _of_expert(found, row["policy"]),
                "median_ms": latency[len(latency) // 2] if latency else None,
                "about": json.loads(about.read_text()),
            }
        if policies:
            pairs = [
                {"policies": [a, b], "common": len(both := sorted(found[a].keys() & found[b].keys()))}
                | {"p": mcnemar([found[a][k].success for k in both], [found[b][k].success for k in both])}
                for a, b in _pairs(list(policies))
            ]
            suites[folder.name] = {"policies": policies, "pairs": pairs}
    if not suites and not problems:
        problems.append(f"no results in {run}: expected SUITE/POLICY.jsonl, see serve/evaluate.py")
    if problems:
        raise ValueError("; ".join(problems))
    return {"suites": suites}


def _pairs(names: Sequence[str]) -> Iterator[tuple[str, str]]:
    policies = [n for n in names if n != EXPERT]
    yield from ((a, b) for i, a in enumerate(policies) for b in policies[i + 1 :])


def _of_expert(found: Mapping[str, Mapping[Any, Any]], policy: str) -> float | None:
    """Mean over tasks of success, by that of the expert in the layouts that both drove."""
    if policy == EXPERT or EXPERT not in found:
        return None
    both = found[policy].keys() & found[EXPERT].keys()
    tasks = {key[:2] for key in both}
    if not tasks:
        return None
    ours = [sum(found[policy][k].success for k in both if k[:2] == t) / sum(k[:2] == t for k in both) for t in tasks]
    theirs = [sum(found[EXPERT][k].success for k in both if k[:2] == t) / sum(k[:2] == t for k in both) for t in tasks]
    return sum(ours) / sum(theirs) if sum(theirs) else None


def moved(published: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Returns which numbers are not what was published: rates whose intervals do not touch, in words.

    Suites, policies and tasks that are in one of them alone are left out.
    """
    lines = []
    for suite, policy, task, before in _rates(published):
        after = {(s, p, t): rate for s, p, t, rate in _rates(now)}.get((suite, policy, task))
        if after is None:
            continue
        (low, high), (new_low, new_high) = before["interval"], after["interval"]
        if new_low > high or new_high < low:
            lines.append(f"{suite}, {policy}, {task}: {shown(before)} was published, now {shown(after)}")
    return lines


def _rates(numbers: Mapping[str, Any]) -> Iterator[tuple[str, str, str, Mapping[str, Any]]]:
    for suite, of in numbers["suites"].items():
        for policy, row in of["policies"].items():
            yield suite, policy, "all tasks", row
            yield from ((suite, policy, task, rate) for task, rate in row["tasks"].items())


def shown(rate: Mapping[str, Any]) -> str:
    """Returns a rate of success as text, with its interval."""
    low, high = rate["interval"]
    return f"{rate['successes']}/{rate['episodes']} [{low:.2f}, {high:.2f}]"


def page(numbers: Mapping[str, Any], figures: str) -> str:
    """Returns the page as Markdown. figures: folder of the figures, as the page links to it."""
    parts = [
        "# Benchmarks\n\n"
        "Written by `serve/benchmark_page.py` from the results of `serve/evaluate.py`; not by hand. Success has 95 % "
        "Wilson\nintervals; layouts are new to every policy and the same for all. p is of McNemar's exact test in the "
        "layouts that both\ndrove. Where each number comes from is at the end."
    ]
    for suite, of in numbers["suites"].items():
        about = SUITES.get(suite)
        said = f"{about.about}. Done is a task when {about.success}." if about else ""
        said = said[:1].upper() + said[1:]
        parts.append(
            f"## {suite}\n\n{textwrap.fill(said, 144)}".rstrip() + f"\n\n![success in {suite}]({figures}/{suite}.svg)\n"
        )
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
        parts.append(_table(head, rows))
        tasks = dict.fromkeys(t for row in of["policies"].values() for t in row["tasks"])
        if len(tasks) > 1:
            cells = [
                [t, *(_few(row["tasks"][t]) if t in row["tasks"] else "" for row in of["policies"].values())]
                for t in tasks
            ]
            parts.append(_table(["task", *of["policies"]], cells))
        if of["pairs"]:
            rows = [[*pair["policies"], str(pair["common"]), f"{pair['p']:.2g}"] for pair in of["pairs"]]
            parts.append(_table(["policy", "beside", "episodes of both", "p"], rows))
    parts.append("## Where each number comes from")
    rows = [
        [suite, name, f"`{run['command']}`", (run["commit"] or "unknown")[:8], run["date"], hardware(run)]
        for suite, of in numbers["suites"].items()
        for name, row in of["policies"].items()
        for run in row["about"]["runs"][-1:]
    ]
    parts.append(_table(["suite", "policy", "command", "commit", "date", "hardware"], rows))
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


def hardware(run: Mapping[str, Any]) -> str:
    """Returns on what something ran, as text. run: see `openpi_like.serve.results.provenance`."""
    return f"{run['hardware']['cores']} cores, {run['hardware']['cpu']}"


def _few(rate: Mapping[str, Any]) -> str:
    return f"{rate['successes']}/{rate['episodes']}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in lines)
