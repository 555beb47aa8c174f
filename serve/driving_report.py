"""Makes the report of driving: `python serve/driving_report.py runs/driving` writes report.html, one file without
external resources, and report.json, the same numbers.

It reads RUN/rollouts/*.jsonl (serve/rollout.py; a file is a policy, by its name), or RUN/*.jsonl of a study
(train/study.py), RUN/open_loop/*.jsonl (serve/open_loop.py), and RUN/frames/*.gif, or RUN/frames/POLICY/*.gif; a study
has no films.
"""

import dataclasses
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from matplotlib.figure import Figure

from openpi_like import html_page
from openpi_like.driving.closed_loop import GENTLE, policy_rows, problems, thoughts
from openpi_like.driving.open_loop_scores import (
    BASELINES,
    CONSTANT_VELOCITY,
    CONVENTIONS,
    DRIVERS_PLAN,
    METRICS,
    STANDING_STILL,
    FrameResult,
    read_frames,
    rows,
    shown,
)
from openpi_like.driving.planning_metrics import STEPS_PER_S
from openpi_like.serve.evaluation import Episode, read_episodes

_COLOURS = ("#16a34a", "#2563eb", "#d97706", "#9333ea", "#dc2626", "#0891b2", "#4b5563", "#db2777")
_METRICS = {"l2": "L2, m", "collision": "collisions on the grid, %", "exact_collision": "collisions, exact, %"}
_AGAINST = {"driven": "what was driven", "plan": "the driver's own plan"}
_THOUGHTS = 5  # of a drive, at most


@dataclasses.dataclass(frozen=True)
class Args:
    """Makes the report of driving. run: the directory that holds rollouts, open_loop and frames."""

    run: Annotated[Path, tyro.conf.Positional]


# ---- Numbers ---------------------------------------------------------------------------------------------------------


def collect(run: Path) -> dict[str, Any]:
    """Returns all numbers of the report.

    Raises:
        SystemExit: inputs are missing, or are not whole; lists all of them.
    """
    drives, wrong = dict[str, list[Episode]](), list[str]()
    asked = dict[str, list[FrameResult]]()
    study = (run / "study.json").is_file()
    rollouts = run if study else run / "rollouts"
    for path in sorted(rollouts.glob("*.jsonl")):
        try:
            drives[path.stem] = read_episodes(path)
        except ValueError as e:
            wrong.append(str(e))
    for path in sorted((run / "open_loop").glob("*.jsonl")):
        try:
            asked[path.stem] = read_frames(path)
        except ValueError as e:
            wrong.append(str(e))
    wrong += problems(drives)
    wrong += [f"{name}: no frames; ask again with serve/open_loop.py" for name, found in asked.items() if not found]
    wrong += [
        f"{name}: frames of several policies, {sorted(labels)}; expected those of one"
        for name, found in asked.items()
        if len(labels := {r.label for r in found}) > 1
    ]
    about = [(found[0].label, found[0].against) for found in asked.values() if found]
    wrong += [
        f"{label or 'the baselines'}: two files in {run / 'open_loop'} against {against!r}; remove one of them"
        for label, against in sorted(set(about))
        if about.count((label, against)) > 1
    ]
    if not drives and not wrong:
        wrong.append(f"no drives in {rollouts}, see serve/rollout.py")
    if not any((run / "open_loop").glob("*.jsonl")):
        wrong.append(f"no frames in {run / 'open_loop'}, see serve/open_loop.py")
    if not films(run) and not study:
        wrong.append(f"no films in {run / 'frames'}, see --frames-dir of serve/rollout.py")
    if wrong:
        sys.exit("cannot make the report:\n  " + "\n  ".join(wrong))
    return {
        "closed_loop": policy_rows(drives),
        "thoughts": thoughts(drives),
        "renderers": sorted({e.renderer for of in drives.values() for e in of}),
        "open_loop": open_loop(list(asked.values())),
    }


def open_loop(files: Sequence[Sequence[FrameResult]]) -> list[dict[str, Any]]:
    """Returns the scores of all policies and baselines, those together that were asked at the same frames."""
    groups: dict[Any, list[Sequence[FrameResult]]] = {}
    for found in files:
        places = frozenset((r.data, r.against, r.episode, r.step) for r in found)
        groups.setdefault(places, []).append(found)
    tables = []
    for of in groups.values():
        scored = [row for found in of if found[0].label for row in rows(found, found[0].label)[:1]] + rows(of[0])
        latency = {
            found[0].label: float(np.median([r.latency_ms for r in found if r.latency_ms is not None]))
            for found in of
            if any(r.latency_ms is not None for r in found)
        }
        some = of[0]
        tables.append(
            {
                "against": some[0].against,
                "frames": len(some),
                "drives": len({r.episode for r in some}),
                "truth_collides": sum(any(r.truth.collided) for r in some),
                "rows": scored,
                "latency_ms": latency,
            }
        )
    return tables


def films(run: Path) -> dict[str, bytes]:
    """Returns name -> GIF, of one policy after the other."""
    root = run / "frames"
    paths = [*sorted(root.glob("*.gif")), *sorted(root.glob("*/*.gif"))]
    return {_named(p.relative_to(root)): p.read_bytes() for p in paths}


def _named(path: Path) -> str:
    return ": ".join(path.with_suffix("").parts).replace("ego_vehicle_", "").replace("_", " ")


# ---- Plots -----------------------------------------------------------------------------------------------------------


def colours(numbers: dict[str, Any]) -> dict[str, str]:
    """Returns the colour of each policy, the same in all plots."""
    named = [row["policy"] for row in numbers["closed_loop"]]
    named += [row["name"] for group in numbers["open_loop"] for row in group["rows"] if row["name"] not in BASELINES]
    return {name: _COLOURS[i % len(_COLOURS)] for i, name in enumerate(dict.fromkeys(named))}


def success_plot(policies: list[dict[str, Any]], colour_of: dict[str, str]) -> Figure:
    """Success of every policy over all tasks, with its interval."""
    figure = Figure(figsize=(11, 0.45 * len(policies) + 0.9), layout="constrained")
    axes = figure.subplots()
    for y, row in enumerate(policies):
        colour, rate = colour_of[row["policy"]], row["successes"] / row["episodes"]
        axes.plot(row["interval"], [y, y], color=colour, lw=3, solid_capstyle="round")
        axes.plot(rate, y, "o", color=colour, ms=8)
        axes.annotate(f"{rate:.0%}", (rate, y), (0, 7), textcoords="offset points", ha="center", fontsize=9)
    axes.set_yticks(range(len(policies)), [row["policy"] for row in policies])
    axes.set_ylim(len(policies) - 0.4, -0.7)
    axes.set_xlim(-0.02, 1.02)
    axes.set_xlabel("success in layouts for evaluation, Wilson 95 % interval")
    axes.grid(axis="x", color="#f3f4f6")
    return figure


def horizon_plot(group: dict[str, Any], colour_of: dict[str, str]) -> Figure:
    """Distance to the truth, waypoint by waypoint; without standing still, which is far above."""
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    axes = figure.subplots()
    grey = {CONSTANT_VELOCITY: "#9ca3af", DRIVERS_PLAN: "#4b5563"}
    for row in (r for r in group["rows"] if r["name"] != STANDING_STILL):
        numbers = np.array(row["horizon"], float)  # None becomes NaN
        seconds = np.arange(1, len(numbers) + 1) / STEPS_PER_S
        colour, line = {**colour_of, **grey}[row["name"]], "--" if row["name"] in grey else "o-"
        axes.plot(seconds, numbers[:, 0], line, color=colour, ms=4, label=row["name"])
        axes.fill_between(seconds, numbers[:, 1], numbers[:, 2], color=colour, alpha=0.15, lw=0)
    axes.set_xlabel("seconds ahead")
    axes.set_ylabel("metres from the truth")
    axes.set_ylim(bottom=0)
    axes.grid(color="#f3f4f6")
    axes.legend(frameon=False, fontsize=9)
    return figure


# ---- The page --------------------------------------------------------------------------------------------------------


def _share(row: dict[str, Any]) -> str:
    low, high = row["interval"]
    return f"{row['successes']}/{row['episodes']}  [{low:.2f}, {high:.2f}]"


def _closed_loop(policies: list[dict[str, Any]], colour_of: dict[str, str]) -> Iterator[str]:
    head = ["policy", "success", "collided", "off the road", "progress", "seconds", "p", "only it / only the first"]
    body = []
    for row in policies:
        beside = [f"{row['p']:.3g}", f"{row['better']} / {row['worse']}"] if row.get("paired") else ["", ""]
        time = "" if row["seconds"] is None else f"{row['seconds']:.1f}"
        wrong = [f"{row[what]}/{row['episodes']}" for what in ("collided", "off_road")]
        body.append([row["policy"], _share(row), *wrong, f"{row['progress']:.0%}", time, *beside])
    yield html_page.plot(success_plot(policies, colour_of))
    yield html_page.table(head, body)
    paired = sorted({row["paired"] for row in policies[1:]})
    said = f" in the {' or '.join(map(str, paired))} episodes that both drove" if paired else ""
    yield html_page.note(
        f"Success: the goal is reached without a collision and on the road. p: McNemar's exact test beside "
        f"{policies[0]['policy']}{said}. Progress: mean share of the route. Seconds: median of the drives that "
        "succeeded."
    )
    head = ["policy", f"under {GENTLE:g} m/s^2", f"aside under {GENTLE:g} m/s^2"]
    head += ["largest acceleration, m/s^2", "aside, m/s^2", "jerk, m/s^3", "median answer, ms"]
    body = []
    for row in policies:
        largest = [f"{row['largest'][what]:.2f}" for what in ("acceleration", "lateral", "jerk")]
        latency = "" if row["latency_ms"] is None else f"{row['latency_ms']:.1f}"
        body.append([row["policy"], f"{row['gentle']:.0%}", f"{row['gentle_aside']:.0%}", *largest, latency])
    yield html_page.table(head, body)
    yield html_page.note("Comfort: shares of drives, and means over drives of the largest value of each.")


def _by_task(policies: list[dict[str, Any]]) -> str:
    tasks = sorted({task for row in policies for task in row["tasks"]})
    body = [
        [task, *(_share(row["tasks"][task]) if task in row["tasks"] else "not driven" for row in policies)]
        for task in tasks
    ]
    return html_page.table(["task", *(row["policy"] for row in policies)], body)


def _open_loop(group: dict[str, Any], colour_of: dict[str, str]) -> Iterator[str]:
    yield html_page.plot(horizon_plot(group, colour_of))
    for convention, title in CONVENTIONS.items():
        body = [
            [
                _METRICS[metric] if i == 0 else "",
                row["name"],
                *(shown(number) for number in row["table"][convention][metric].values()),
            ]
            for metric in METRICS
            for i, row in enumerate(group["rows"])
        ]
        yield f"<p>{title}</p>"
        yield html_page.table(["", "", "1 s", "2 s", "3 s", "avg"], body)
    latency = ", ".join(f"{name} {ms:.1f}" for name, ms in group["latency_ms"].items())
    yield html_page.note(
        f"{group['frames']} frames of {group['drives']} drives; the truth itself collides at "
        f"{group['truth_collides']} of them. Intervals at 95 %: of means from a bootstrap over drives, of shares at "
        "one step, and where nothing was seen, Wilson's. "
        + (f"Median milliseconds of an answer: {latency}. " if latency else "")
        + "The truth is a drive that was disturbed now and then, so that the driver's own plan misses it, too."
        * (group["against"] == "driven")
    )


def _thoughts(written: list[dict[str, Any]]) -> Iterator[str]:
    """Returns the section of what policies wrote before they acted, if any did."""
    body = []
    for row in written:
        said = [f"{step}: {text}" for step, text in row["thoughts"][:_THOUGHTS]]
        said += [f"... {left} more"] if (left := len(row["thoughts"]) - _THOUGHTS) > 0 else []
        body.append([row["policy"], row["task"], " | ".join(said), "success" if row["success"] else "no success"])
    if body:
        table = html_page.table(["policy", "task", "from which step on, and what", "outcome"], body)
        yield html_page.section("What policies wrote before they acted", table)


def _headline(numbers: dict[str, Any]) -> list[tuple[str, str]]:
    first, *others = numbers["closed_loop"]
    best = max(others or [first], key=lambda row: row["successes"] / row["episodes"])
    # Of policies where there are any, and against what was driven.
    order = lambda g: (all(row["name"] in BASELINES for row in g["rows"]), g["against"] != "driven")  # noqa: E731
    group = min(numbers["open_loop"], key=order)
    scored, truth = group["rows"], _AGAINST[group["against"]]
    near = {row["name"]: row["table"]["uniad"]["l2"]["avg"][0] for row in scored}
    policies = {name: x for name, x in near.items() if name not in BASELINES and x is not None}
    nearest = min(policies, key=lambda name: policies[name]) if policies else CONSTANT_VELOCITY
    rate = [f"{row['successes'] / row['episodes']:.0%}" for row in (best, first)]
    return [
        (rate[0], f"of its drives {best['policy']} succeeds"),
        (rate[1], f"of its drives {first['policy']} succeeds"),
        (f"{best['collided']}/{best['episodes']}", f"drives of {best['policy']} with a collision"),
        (
            f"{near[nearest]:.2f} m" if near[nearest] is not None else "?",
            f"L2 of {nearest}, mean at 1, 2, 3 s, to {truth}",
        ),
    ]


def page(numbers: dict[str, Any], pictures: dict[str, bytes]) -> str:
    """Returns the report as HTML. pictures: name -> GIF."""
    policies, colour_of = numbers["closed_loop"], colours(numbers)
    sections = [
        html_page.section("Closed loop", *_closed_loop(policies, colour_of)),
        html_page.section("Success by task", _by_task(policies)),
        *(
            html_page.section(f"Open loop, against {_AGAINST[g['against']]}", *_open_loop(g, colour_of))
            for g in numbers["open_loop"]
        ),
        html_page.section(
            "Drives, from above, and what the six cameras see",
            html_page.gallery(((name, gif, "gif") for name, gif in pictures.items()), columns=3),
        ),
        *_thoughts(numbers["thoughts"]),
    ]
    note = f"{sum(row['episodes'] for row in policies)} drives, images by {', '.join(numbers['renderers'])}"
    return html_page.page("openpi_like driving", "Driving a simulated car", note, _headline(numbers), sections)


def main(args: Args) -> None:
    numbers = collect(args.run)
    (args.run / "report.json").write_text(json.dumps(numbers, indent=1))
    (args.run / "report.html").write_text(page(numbers, films(args.run)))
    print(f"{args.run / 'report.html'} and {args.run / 'report.json'}")


if __name__ == "__main__":
    main(tyro.cli(Args))
