"""Runs a study: trains every arm of a table on the same data for the same steps, drives them all in the same episodes,
and prints success with intervals:

    python train/study.py configs/studies/policies.py --run runs/studies/policies

What is trained, in which order and from what is in the file's `study`; what must be equal is checked before anything is
trained. It can be stopped at any moment: started again, it skips the finished steps and the interrupted one goes on.
Numbers are in `<run>/results.json`, the table as Markdown in `<run>/study.md`.
"""

import dataclasses
import json
import os
import runpy
import sys
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.table import Table

from openpi_like.config import load_run, near_names, override
from openpi_like.job import Job
from openpi_like.models.weights import weight_shapes
from openpi_like.serve.evaluation import read_episodes
from openpi_like.train.checkpoints.checkpoint import find_step
from openpi_like.train.checkpoints.contract import read_contract
from openpi_like.train.study import Study, slug, study_rows, unequal
from openpi_like.train.watching.metrics import read_metrics

ROOT = Path(__file__).resolve().parents[1]


@dataclasses.dataclass(frozen=True)
class Args:
    """Runs a study. study: its file. run: directory for all that it makes. set: overrides of every arm's config.

    only: arms to run, default all. episodes: instead of the study's own. workers: simulator processes.
    """

    study: Annotated[Path, tyro.conf.Positional]
    run: Path
    set: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    episodes: int | None = None
    workers: int = 2


def load_study(path: Path) -> Study:
    """Returns the `study` of a file.

    Raises:
        ValueError: there is no such file, or it has none.
    """
    if not path.is_file():
        raise ValueError(f"no study {path}; in {path.parent}: {sorted(p.name for p in path.parent.glob('*.py'))}")
    found = runpy.run_path(str(path)).get("study")
    if not isinstance(found, Study):
        raise ValueError(f"{path}: expected a `study` of openpi_like.train.study.Study, got {type(found).__name__}")
    return found


def cell(row: dict[str, Any]) -> str:
    low, high = row["interval"]
    return f"{row['successes']}/{row['episodes']} [{low:.2f}, {high:.2f}]"


def lines(rows: list[dict[str, Any]], more: dict[str, dict[str, Any]]) -> list[list[str]]:
    """Returns the table, its head first."""
    tasks = list(rows[0]["tasks"])
    table = [["policy", *tasks, "all", f"beside {rows[0]['arm']}", "p", "ms a step", "weights"]]
    for row in rows:
        low, high = row.get("difference", (0.0, 0.0))
        beside = f"[{low:+.2f}, {high:+.2f}]" if "difference" in row else ""
        p = f"{row['p']:.2g}" if "p" in row else ""
        of = more[row["arm"]]
        cells = [*(cell(row["tasks"][t]) for t in tasks), cell(row), beside, p, f"{of['step_ms']:.0f}"]
        table.append([row["arm"], *cells, f"{of['weights'] / 1e6:.2f} M"])
    return table


def measured(run: Path, name: str, batch_size: int) -> dict[str, Any]:
    """Returns what training an arm says of itself: the median time of a step, and how many weights it has."""
    rates = sorted(
        line["samples_per_s"] for line in read_metrics(run / slug(name) / "metrics.jsonl") if "samples_per_s" in line
    )
    shapes = weight_shapes(read_contract(find_step(run / slug(name))).policy)
    weights = sum(int(leaf.size) for leaf in shapes.values())
    step_ms = 1e3 * batch_size / rates[len(rates) // 2] if rates else float("nan")
    return {"step_ms": step_ms, "weights": weights}


def main(args: Args, console: Console) -> None:
    args = dataclasses.replace(args, study=args.study.resolve(), run=args.run.resolve())
    study = load_study(args.study)
    unknown = sorted(set(args.only) - set(study.arms))
    if unknown:
        raise ValueError(f"--only: no arms {unknown}; {near_names(unknown[0], list(study.arms))}")
    os.chdir(ROOT)
    arms = {name: arm for name, arm in study.arms.items() if not args.only or name in args.only}
    configs = {n: override(load_run(a.config), (*args.set, *a.set)) for n, a in arms.items() if a.driven}
    problems = unequal(configs, study.varies)
    if problems:
        raise ValueError("arms cannot be compared:\n  " + "\n  ".join(problems))

    job = Job(args.run, "study", console)
    for name, arm in arms.items():
        run_dir = args.run / slug(name)
        sets = [f"run_dir={run_dir}", *args.set, *arm.set]
        if arm.start is not None:
            sets += [
                f"warm_start.checkpoint={args.run / slug(arm.start)}",
                f"warm_start.reinitialize={arm.reinitialize!r}",
            ]
        if arm.own_statistics:
            sets.append(f"stats={run_dir / 'stats'}")
            job.step(f"statistics of {name}", ["data/stats.py", "--config", arm.config, "--set", *sets])
        job.step(f"train {name}", ["train/train.py", arm.config, *sets])
        if arm.driven:
            port = ["--port-file", str(args.run / f"{slug(name)}.port")]
            episodes = str(args.episodes or study.episodes)
            drive = ["serve/rollout.py", "--robot", study.robot, "--policy", "trained", "--episodes", episodes]
            drive += [
                "--tasks",
                *study.tasks,
                "--out",
                str(args.run / f"{slug(name)}.jsonl"),
                "--workers",
                str(args.workers),
            ]
            server = ["serve/policy_server.py", str(run_dir), "--port", "0", *port]
            server += ["--step", "best"] if study.best else []
            job.step(f"drive {study.robot} with {name}", [*drive, *port], server=server)

    if not configs:  # --only of arms that prepare others
        return
    found = {
        name: {(e.task, e.seed): e.success for e in read_episodes(args.run / f"{slug(name)}.jsonl")} for name in configs
    }
    rows, more = study_rows(found), {name: measured(args.run, name, c.batch_size) for name, c in configs.items()}
    head, *body = lines(rows, more)
    table = Table(*head, title=args.study.stem)
    for row in body:
        table.add_row(*row)
    console.print(table)
    markdown = ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *body)]
    (args.run / "study.md").write_text("\n".join(markdown) + "\n")
    result = {**{k: job.record[k] for k in ("date", "hardware", "seconds")}, "rows": rows, "measured": more}
    (args.run / "results.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    try:
        main(tyro.cli(Args), Console(width=200))
    except (ValueError, FileNotFoundError) as e:
        sys.exit(f"no study: {e}")
