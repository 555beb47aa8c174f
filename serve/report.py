"""Makes the report of a demo run: `python serve/report.py runs/demo` writes report.html, one file without external
resources, and report.json, the same numbers.
"""

import dataclasses
import html
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from matplotlib.figure import Figure

from openpi_like import html_page
from openpi_like.serve.evaluation import Episode, read_episodes, success_rows, that_thought, thoughts_text
from openpi_like.train.watching.metrics import read_metrics

# What runs are called, by how the names of their directories begin; what follows is a robot.
RUNS = {"pretrain": "pretraining", "finetune_": "fine-tuning to ", "scratch_": "from scratch on "}
COLOURS = {"trained": "#2563eb", "scratch": "#d97706", "expert": "#16a34a", "untrained": "#9ca3af"}


@dataclasses.dataclass(frozen=True)
class Args:
    """Makes the report of a demo run. run: its directory."""

    run: Annotated[Path, tyro.conf.Positional]


def collect(run: Path) -> dict[str, Any]:
    """Returns all numbers of the report.

    Raises:
        SystemExit: inputs are missing; lists all of them.
    """
    demo, rollouts = run / "demo.json", sorted((run / "rollouts").glob("*.jsonl"))
    runs = [path.name for start in RUNS for path in sorted(run.glob(f"{start}*")) if path.is_dir()]
    finetuned = [name for name in runs if name.startswith("finetune_")]
    needed = [demo, *(run / name / "load_report.json" for name in finetuned)]
    needed += [run / name / "metrics.jsonl" for name in dict.fromkeys(("pretrain", *runs))]
    missing = [f"no {path}" for path in needed if not path.is_file()]
    if not finetuned:
        missing.append(f"no fine-tuning, {run / 'finetune_ROBOT'}")
    if not rollouts:
        missing.append(f"no results in {run / 'rollouts'}, see serve/rollout.py")
    if missing:
        sys.exit("cannot make the report:\n  " + "\n  ".join(missing) + "\n`make demo` makes all of them")
    record = json.loads(demo.read_text())
    episodes = [e for path in rollouts for e in read_episodes(path)]
    weights = {name: json.loads((run / name / "load_report.json").read_text()) for name in finetuned}
    numbers: dict[str, Any] = {key: record[key] for key in ("date", "hardware", "seconds", "commands")}
    numbers["success"] = success_rows(episodes)
    numbers["renderers"] = {e.robot: e.renderer for e in episodes}
    numbers["latency_ms"] = {r: _latency(episodes, r) for r in sorted({e.robot for e in episodes if e.latency_ms})}
    numbers["thoughts"] = [
        {"robot": e.robot, "task": e.task, "success": e.success, "thoughts": thoughts_text(e)}
        for e in that_thought(e for e in episodes if e.policy == "trained")
    ]
    numbers["training"] = {name: _training(run / name / "metrics.jsonl") for name in runs}
    numbers["weights"] = {
        name: {
            "loaded": sum(row["from"] == "checkpoint" for row in rows),
            "fresh": [row for row in rows if row["from"] == "fresh"],
        }
        for name, rows in weights.items()
    }
    return numbers


def _thoughts(rows: list[dict[str, Any]]) -> list[str]:
    """Returns the section of what policies wrote before they acted, if any did."""
    if not rows:
        return []
    body = [[row["robot"], row["task"], row["thoughts"], "success" if row["success"] else "no success"] for row in rows]
    table = html_page.table(["robot", "task", "from which control step on, and what", "outcome"], body)
    return [html_page.section("What the policies wrote before they acted", table)]


def _title(run: str) -> str:
    """Returns what a run is called, by the name of its directory."""
    start = next(start for start in RUNS if run.startswith(start))
    return RUNS[start] + run.removeprefix(start)


def _latency(episodes: list[Episode], robot: str) -> dict[str, float]:
    times = [ms for e in episodes if e.robot == robot and e.policy == "trained" for ms in e.latency_ms]
    p50, p95, p99 = np.percentile(times, [50, 95, 99]) if times else (float("nan"),) * 3
    return {"requests": len(times), "p50": float(p50), "p95": float(p95), "p99": float(p99)}


def _training(path: Path) -> dict[str, Any]:
    lines = read_metrics(path)
    train, val = ([line for line in lines if line["split"] == split] for split in ("train", "val"))
    errors = {k: v for k, v in val[-1].items() if k.startswith("action_mae/")}
    return {
        "steps": train[-1]["step"],
        "loss_first": train[0]["loss"],
        "loss_last": train[-1]["loss"],
        "step_time": float(np.median([line["step_time"] for line in train])),
        "data_wait": float(np.mean([line["data_wait"] for line in train])),
        "validation_loss": {k.removeprefix("loss/"): v for k, v in val[-1].items() if k.startswith("loss/")},
        "action_mae": {k.removeprefix("action_mae/"): v for k, v in errors.items()},
        "curves": {
            "train": [[line["step"], line["loss"]] for line in train],
            **{
                f"held out, {k.removeprefix('loss/')}": [[line["step"], line[k]] for line in val]
                for k in val[-1]
                if k.startswith("loss/")
            },
        },
    }


_OFFSETS = {"trained": 0.0, "expert": -0.22, "scratch": 0.22, "untrained": 0.22}


def success_plot(rows: list[dict[str, Any]]) -> Figure:
    """Success rates with their intervals, one line per task."""
    tasks = list(dict.fromkeys((row["robot"], row["task"]) for row in rows))
    figure = Figure(figsize=(11, 0.42 * len(tasks) + 1.1), layout="constrained")
    axes = figure.subplots()
    for row in rows:
        y = tasks.index((row["robot"], row["task"])) + _OFFSETS[row["policy"]]
        rate, colour = row["successes"] / row["episodes"], COLOURS[row["policy"]]
        axes.plot([row["wilson_low"], row["wilson_high"]], [y, y], color=colour, lw=2.5, solid_capstyle="round")
        axes.plot(rate, y, "o", color=colour, ms=6)
    for policy, colour in COLOURS.items():
        axes.plot([], [], "o-", color=colour, label=policy)
    axes.set_yticks(range(len(tasks)), [f"{robot}  {task}" for robot, task in tasks])
    axes.invert_yaxis()
    axes.set_xlim(-0.02, 1.02)
    axes.axvline(0.8, color="#d1d5db", ls="--", lw=1, zorder=0)
    axes.set_xlabel("success rate on held-out layouts, Wilson 95 % interval")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, frameon=False)
    axes.grid(axis="x", color="#f3f4f6")
    return figure


def loss_plot(training: dict[str, Any]) -> Figure:
    """Training and held-out loss of every run."""
    figure = Figure(figsize=(max(11, 4 * len(training)), 3.2), layout="constrained")
    panels = figure.subplots(1, len(training), squeeze=False)[0]
    for axes, (name, values) in zip(panels, training.items(), strict=True):
        for label, curve in values["curves"].items():
            steps, losses = zip(*curve, strict=True)
            axes.plot(steps, losses, "-" if label == "train" else "o-", lw=1.5, ms=4, label=label)
        axes.set_title(_title(name), fontsize=11)
        axes.set_xlabel("step")
        axes.set_yscale("log")
        axes.grid(color="#f3f4f6", which="both")
        axes.legend(frameon=False, fontsize=9)
    panels[0].set_ylabel("flow-matching loss")
    return figure


def time_plot(seconds: dict[str, float]) -> Figure:
    """Time of every step."""
    figure = Figure(figsize=(11, 0.3 * len(seconds) + 0.7), layout="constrained")
    axes = figure.subplots()
    axes.barh(list(seconds), list(seconds.values()), color="#93c5fd")
    axes.bar_label(axes.containers[0], fmt="%.0f s", padding=4, fontsize=9)  # type: ignore[arg-type]
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_xlabel("seconds")
    return figure


def _success_table(rows: list[dict[str, Any]]) -> str:
    by_task: dict[tuple[str, str], dict[str, str]] = {}
    for row in rows:
        interval = f"{row['successes']}/{row['episodes']}  [{row['wilson_low']:.2f}, {row['wilson_high']:.2f}]"
        by_task.setdefault((row["robot"], row["task"]), {})[row["policy"]] = interval
    body = [[*task, *(cells.get(policy, "not driven") for policy in COLOURS)] for task, cells in by_task.items()]
    return html_page.table(["robot", "task", *COLOURS], body)


def page(numbers: dict[str, Any], films: dict[str, bytes]) -> str:
    """Returns the report as HTML. films: name -> GIF."""
    trained = [row for row in numbers["success"] if row["policy"] == "trained"]
    good = [row for row in trained if row["successes"] / row["episodes"] >= 0.8]
    minutes = sum(numbers["seconds"].values()) / 60
    p50 = {robot: latency["p50"] for robot, latency in numbers["latency_ms"].items()}
    hardware = numbers["hardware"]
    headline = [
        (f"{len(good)} of {len(trained)}", "tasks at 80 % success or better"),
        (f"{min(p50.values()):.1f} ms" if p50 else "none", "median round trip of the fastest robot"),
        (f"{1 / numbers['training']['pretrain']['step_time']:.1f}", "training steps per second, pretraining"),
        (f"{minutes:.1f} min", "from nothing to this page"),
    ]
    errors = [
        [_title(run), *name.split("/", 1), f"{value:.4g}"]
        for run, of in numbers["training"].items()
        for name, value in of["action_mae"].items()
    ]
    latency = [
        [robot, v["requests"], f"{v['p50']:.1f}", f"{v['p95']:.1f}", f"{v['p99']:.1f}"]
        for robot, v in numbers["latency_ms"].items()
    ]
    runs = [
        [
            _title(name),
            t["steps"],
            f"{t['loss_first']:.3f}",
            f"{t['loss_last']:.3f}",
            f"{1 / t['step_time']:.1f}",
            f"{t['data_wait']:.1%}",
        ]
        for name, t in numbers["training"].items()
    ]
    started = "".join(
        f"<p>{html.escape(_title(name))}: {of['loaded']} weights came from the pretrained checkpoint, "
        f"{len(of['fresh'])} started fresh</p>"
        + (html_page.table(["weight", "shape", "why"], [[r["weight"], r["shape"], r["why"]] for r in of["fresh"]]))
        for name, of in numbers["weights"].items()
    )
    commands = "".join(
        f"<p>{html.escape(step)}</p><pre>{html.escape(c)}</pre>" for step, c in numbers["commands"].items()
    )
    renderers = ", ".join(f"{robot}: {renderer}" for robot, renderer in numbers["renderers"].items())
    subtitle = " · ".join(
        [
            numbers["date"],
            f"{hardware['cpu']}, {hardware['cores']} cores",
            f"Python {hardware['python']}",
            f"images by {renderers}",
        ]
    )
    section, table, note, plot = html_page.section, html_page.table, html_page.note, html_page.plot
    sections = [
        section(
            "Success, closed loop over websockets",
            plot(success_plot(numbers["success"])),
            _success_table(numbers["success"]),
        ),
        section(
            "Rollouts of the trained policies", html_page.gallery((name, gif, "gif") for name, gif in films.items())
        ),
        *_thoughts(numbers["thoughts"]),
        section(
            "Loss",
            plot(loss_plot(numbers["training"])),
            table(["run", "steps", "first loss", "last loss", "steps/s", "waiting for data"], runs),
            note(
                "The held-out loss is that of the averaged weights on episodes never trained on, on a fixed grid of "
                "noise and flow times, so it is not on the scale of the training loss."
            ),
        ),
        section(
            "Action error on held-out episodes",
            table(["run", "robot", "dim [unit]", "mean absolute error of sampled chunks"], errors),
        ),
        section(
            "Latency of the trained policies",
            table(["robot", "requests", "p50 ms", "p95 ms", "p99 ms"], latency),
            note(
                "Round trip as the robot's process sees it: packing, websocket, inference with ten flow steps, "
                "unpacking; server and simulators share the machine."
            ),
        ),
        section("What fine-tuning started from", started),
        section("Time of each step", plot(time_plot(numbers["seconds"]))),
        section("Each step alone", commands),
    ]
    return html_page.page("openpi_like demo", "From demonstrations to driven robots", subtitle, headline, sections)


def main(args: Args) -> None:
    numbers = collect(args.run)
    films = {path.stem.replace("_", " "): path.read_bytes() for path in sorted((args.run / "frames").glob("*.gif"))}
    (args.run / "report.json").write_text(json.dumps(numbers, indent=1))
    (args.run / "report.html").write_text(page(numbers, films))
    print(f"{args.run / 'report.html'} and {args.run / 'report.json'}")


if __name__ == "__main__":
    main(tyro.cli(Args))
