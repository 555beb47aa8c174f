"""Runs a study: trains every arm of a table on the same data for the same steps, drives them all in the same episodes,
and prints success with intervals:

    python train/study.py configs/studies/policies.py --run runs/studies/policies

What is trained, in which order and from what is in the file's `study`, a `Study` or a `Matrix` of them; what must be
equal is checked before anything is trained. It can be stopped at any moment: started again, it skips the finished steps
and the interrupted one goes on. Numbers are in `<run>/results.json`, the table as Markdown in `<run>/study.md`, with
what policies wrote that write before they act.
"""

import ast
import dataclasses
import json
import os
import runpy
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.table import Table

from openpi_like.config import load_run, near_names, override
from openpi_like.job import SIMULATED, Job
from openpi_like.models.weights import weight_shapes
from openpi_like.serve.evaluation import read_episodes, that_thought, thoughts_text
from openpi_like.train.checkpoints.checkpoint import find_step, stored_scores
from openpi_like.train.checkpoints.contract import read_contract
from openpi_like.train.config import TrainConfig
from openpi_like.train.study import Arm, Matrix, Study, slug, study_rows, unequal_parts
from openpi_like.train.watching.metrics import read_metrics

ROOT = Path(__file__).resolve().parents[1]


@dataclasses.dataclass(frozen=True)
class Args:
    """Runs a study. study: its file. run: directory for all that it makes. set: overrides of every arm's config.

    only: arms to run, default all. episodes: of each task, instead of the study's own. workers: simulator processes.
    """

    study: Annotated[Path, tyro.conf.Positional]
    run: Path
    set: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    episodes: int | None = None
    workers: int = 2


def load_study(path: Path) -> Study | Matrix:
    """Returns the `study` of a file.

    Raises:
        ValueError: there is no such file, or it has none.
    """
    if not path.is_file():
        raise ValueError(f"no study {path}; in {path.parent}: {sorted(p.name for p in path.parent.glob('*.py'))}")
    found = runpy.run_path(str(path)).get("study")
    if not isinstance(found, Study | Matrix):
        expected = "a `study`, a Study or a Matrix of openpi_like.train.study"
        raise ValueError(f"{path}: expected {expected}, got {type(found).__name__}")
    return found


def cell(row: dict[str, Any]) -> str:
    low, high = row["interval"]
    return f"{row['successes']}/{row['episodes']} [{low:.2f}, {high:.2f}]"


def lines(rows: list[dict[str, Any]], more: dict[str, dict[str, Any]]) -> list[list[str]]:
    """Returns the table, its head first."""
    tasks = list(rows[0]["tasks"])
    table = [["policy", *tasks, "all", "beside", "p", "ms a step", "weights"]]
    for row in rows:
        beside = "{} [{:+.2f}, {:+.2f}]".format(row["beside"], *row["difference"]) if "beside" in row else ""
        p = f"{row['p']:.2g}" if "p" in row else ""
        of = more[row["arm"]]
        step = "" if of["step_ms"] is None else f"{of['step_ms']:.0f}"
        cells = [*(cell(row["tasks"][t]) for t in tasks), cell(row), beside, p, step]
        table.append([row["arm"], *cells, f"{of['weights'] / 1e6:.2f} M"])
    return table


def measured(run_dir: Path, config: TrainConfig) -> dict[str, Any]:
    """Returns what a run says of itself: the median time of a step (None: it has none), how many weights it has, the
    step that is driven and its score."""
    rates = sorted(line["samples_per_s"] for line in read_metrics(run_dir / "metrics.jsonl") if "samples_per_s" in line)
    step = find_step(run_dir, "best" if config.keep.best else None)
    weights = sum(int(leaf.size) for leaf in weight_shapes(read_contract(step).policy).values())
    step_ms = 1e3 * config.batch_size / rates[len(rates) // 2] if rates else None
    return {"step_ms": step_ms, "weights": weights, "step": int(step.name), "scores": stored_scores(step)}


def together(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns what the runs of an arm have in common: the median time of a step, and the most weights."""
    times = sorted(run["step_ms"] for run in runs if run["step_ms"] is not None)
    return {"step_ms": times[len(times) // 2] if times else None, "weights": max(run["weights"] for run in runs)}


def run_arm(job: Job, args: Args, study: Study, part: str, name: str, config: TrainConfig | None) -> None:
    """Trains an arm of a study, and drives it where it has a `config`, as steps of the job. part: see `Study.parts`."""
    arm, folder, of = study.arms[name], args.run / slug(part), f"{part}: " if part else ""
    run_dir = folder / slug(study.run_of(name))
    sets = [f"run_dir={run_dir}", *args.set, *arm.set]
    if arm.start is not None:
        sets += [f"warm_start.checkpoint={folder / slug(arm.start)}", f"warm_start.reinitialize={arm.reinitialize!r}"]
    if arm.own_statistics:
        sets.append(f"stats={run_dir / 'stats'}")
        job.step(f"{of}statistics of {name}", ["data/stats.py", "--config", arm.config, "--set", *sets])
    if arm.same_run is None:
        job.step(f"{of}train {name}", ["train/train.py", arm.config, *sets])
    if config is None:
        return
    port = ["--port-file", str(folder / f"{slug(name)}.port")]
    drive = ["serve/rollout.py", "--robot", study.robot, "--policy", "trained"]
    drive += ["--episodes", str(args.episodes or study.episodes), "--tasks", *study.tasks]
    drive += ["--out", str(folder / f"{slug(name)}.jsonl"), "--workers", str(args.workers)]
    server = ["serve/policy_server.py", str(run_dir), "--port", "0", *port, *SIMULATED, *arm.serve]
    server += ["--step", "best"] if config.keep.best else []
    job.step(f"{of}drive {study.robot} with {name}", [*drive, *port], server=server)
    if study.also:
        also = [word.format(folder=folder, arm=slug(name)) for word in study.also]
        job.step(f"{of}{Path(also[0]).stem} with {name}", [*also, *port], server=server)


def markdown(head: list[str], body: list[list[str]]) -> str:
    return "".join("| " + " | ".join(row) + " |\n" for row in (head, ["---"] * len(head), *body))


def written(thoughts: list[dict[str, Any]]) -> str:
    """Returns a table of what policies wrote before they acted, in the first episode of each task."""
    outcomes = ("no success", "success")
    body = [[t["arm"], t["task"], t["thoughts"].replace("|", "\\|"), outcomes[t["success"]]] for t in thoughts]
    return markdown(["policy", "task", "from which control step on, and what it wrote", "outcome"], body)


def main(args: Args, console: Console) -> None:
    args = dataclasses.replace(args, study=args.study.resolve(), run=args.run.resolve())
    study = load_study(args.study)
    names = dict.fromkeys(name for part in study.parts.values() for name in part.arms)
    unknown = sorted(set(args.only) - set(names))
    if unknown:
        raise ValueError(f"--only: no arms {unknown}; {near_names(unknown[0], list(names))}")
    os.chdir(ROOT)

    def chosen(arms: Mapping[str, Arm]) -> dict[str, Arm]:
        return {name: arm for name, arm in arms.items() if not args.only or name in args.only}

    configs = {
        part: {
            name: override(load_run(of.config_of(name)[0]), (*args.set, *of.config_of(name)[1]))
            for name, arm in chosen(of.arms).items()
            if arm.driven
        }
        for part, of in study.parts.items()
    }
    problems = unequal_parts(study, configs)
    if problems:
        raise ValueError("arms cannot be compared:\n  " + "\n  ".join(problems))

    job = Job(args.run, "study", console)
    for part, of in study.parts.items():
        for name in chosen(of.arms):
            run_arm(job, args, of, part, name, configs[part].get(name))

    driven = list(next(iter(configs.values())))
    if not driven:  # --only of arms that prepare others
        return
    folders = {part: args.run / slug(part) for part in configs}
    episodes = {
        name: {part: read_episodes(folder / f"{slug(name)}.jsonl") for part, folder in folders.items()}
        for name in driven
    }
    found: dict[str, dict[tuple[str, int], bool]] = {
        name: {(study.place(part, e.task), e.seed): e.success for part, of in parts.items() for e in of}
        for name, parts in episodes.items()
    }
    thoughts = [
        {"arm": name, "task": study.place(part, e.task), "success": e.success, "thoughts": thoughts_text(e)}
        for name, parts in episodes.items()
        for part, of in parts.items()
        for e in that_thought(of)
    ]
    runs = {
        name: {
            part: measured(folder / slug(study.parts[part].run_of(name)), configs[part][name])
            for part, folder in folders.items()
        }
        for name in driven
    }
    more = {name: together(list(of.values())) for name, of in runs.items()}
    rows = study_rows(found, {name: base for name, base in study.beside.items() if base in found})
    head, *body = study.lay_out(lines(rows, more))
    table = Table(*head, title=args.study.stem)
    for row in body:
        table.add_row(*row)
    console.print(table)
    (args.run / "study.md").write_text(markdown(head, body) + (f"\n{written(thoughts)}" if thoughts else ""))
    about = " ".join((ast.get_docstring(ast.parse(args.study.read_text())) or "").split("\n\n")[0].split())
    file = str(args.study.relative_to(ROOT) if args.study.is_relative_to(ROOT) else args.study.name)
    shown = {"file": file, "about": about, "table": [head, *body], **job.origin()}
    result = {"rows": rows, "measured": more, "runs": runs, "thoughts": thoughts}
    (args.run / "results.json").write_text(json.dumps({**shown, **result}, indent=1) + "\n")


if __name__ == "__main__":
    try:
        main(tyro.cli(Args), Console(width=200))
    except (ValueError, FileNotFoundError) as e:
        sys.exit(f"no study: {e}")
