"""Drives a suite of simulated tasks, against a policy server or with the simulators' experts, and compares.

    python serve/policy_server.py runs/my_run --port-file port &
    python serve/evaluate.py pusht --policy my_run --port-file port --out runs/evaluation
    python serve/evaluate.py pusht --policy expert --out runs/evaluation

Any server of openpi's protocol can be driven; one that is not serve/policy_server.py says nothing of robots, so how it
is asked is said here:

    python serve/evaluate.py aloha --policy theirs --dialect openpi_aloha --execute-steps 25 --out runs/evaluation

Layouts, horizons and what counts as success are fixed (`openpi_like/robots/sims/suites.py`), so that policies meet in
the same episodes: success with 95 % intervals (Wilson), and beside another policy McNemar's exact test. Run again after
an interruption, it goes on. How each file came about is in a JSON beside it.
"""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.table import Table

from openpi_like.config import near_names
from openpi_like.robots.sims import make_sim
from openpi_like.robots.sims.suites import SUITES, Suite, suite_of
from openpi_like.serve.closed_loop import Driving, Films, Layout, StoppedError, drive_all, still_to_drive
from openpi_like.serve.dialects import DIALECTS
from openpi_like.serve.pilot import Senses
from openpi_like.serve.results import held, read_results, read_training, suite_rows, write_about

ROOT = Path(__file__).resolve().parents[1]
PARAPHRASES = Path("paraphrases")
"""As `--words`: not a file, but what the suite has for this."""


@dataclasses.dataclass(frozen=True)
class Args:
    """Drives a suite of simulated tasks, against a policy server or with the simulators' experts, and compares.

    suite: its name; "list" shows all of them. policy: its name in results; "expert" is the simulators' own. out:
    directory of results, of all suites. port_file: read the port from this file, as the server writes it. dialect: how
    the server is asked. execute_steps: of each chunk, if not as the server says. tasks: some of the suite's, as TASK or
    ROBOT/TASK. episodes: of each task, if not as the suite says. blind: pictures are grey. deaf: the instruction says
    nothing of the task. words: JSON file, task -> list of instructions instead of the simulator's; "paraphrases" are
    those that the suite has for this. films: of failures, so many of each task. beside: policy that the others are
    compared with. training: JSON file of what the policy's training took, see `openpi_like.serve.results.TRAINING`,
    which is kept beside its results. workers: processes, each with a simulator and a connection.
    """

    suite: Annotated[str, tyro.conf.Positional]
    policy: str = ""
    out: Path = Path("runs/evaluation")
    host: str = "127.0.0.1"
    port: int = 8000
    port_file: Path | None = None
    dialect: str = "own"
    execute_steps: int | None = None
    tasks: tuple[str, ...] = ()
    episodes: int | None = None
    blind: bool = False
    deaf: bool = False
    words: Path | None = None
    films: int = 1
    beside: str | None = None
    training: Path | None = None
    workers: int = 2

    def __post_init__(self) -> None:
        problems = []
        if self.dialect not in DIALECTS:
            problems.append(f"--dialect {self.dialect}; {near_names(self.dialect, list(DIALECTS))}")
        if "/" in self.policy or (not self.policy and self.suite != "list"):
            problems.append(f"--policy {self.policy!r}, expected a name for its file of results")
        if self.policy == "expert" and (self.blind or self.deaf or self.words):
            problems.append("--policy expert with --blind, --deaf or --words: an expert is told and shown nothing")
        for name in ("episodes", "execute_steps", "workers"):
            if (value := getattr(self, name)) is not None and value < 1:
                problems.append(f"--{name.replace('_', '-')} {value}, expected at least 1")
        if self.films < 0:
            problems.append(f"--films {self.films}, expected 0 or more")
        if problems:
            raise ValueError("; ".join(problems))


def read_words(path: Path | None, suite: Suite) -> dict[str, tuple[str, ...]]:
    """Returns the instructions of a file, or the suite's `PARAPHRASES`, by task of the suite.

    Raises:
        ValueError: it is not such a file, it names other tasks, or the suite has no paraphrases.
    """
    if path is None:
        return {}
    if path == PARAPHRASES:
        if not suite.paraphrases:
            having = ", ".join(name for name, other in SUITES.items() if other.paraphrases)
            raise ValueError(f"--words {path}: this suite has none of its own, as {having} have; expected a JSON file")
        return dict(suite.paraphrases)
    try:
        words = dict(json.loads(path.read_text()).items())
    except (OSError, ValueError, AttributeError) as e:
        raise ValueError(f"--words {path}: not a JSON file, task -> list of instructions: {e}") from e
    known = sorted({task for of in suite.tasks.values() for task in of})
    problems = [f"no task {task!r}; {near_names(task, known)}" for task in words if task not in known]
    problems += [
        f"{task!r} has {of!r}, expected a list of texts that are not empty"
        for task, of in words.items()
        if not (isinstance(of, list) and of and all(isinstance(w, str) and w.strip() for w in of))
    ]
    if problems:
        raise ValueError(f"--words {path}: {'; '.join(problems)}")
    return {task: tuple(of) for task, of in words.items()}


def layouts(suite: Suite, tasks: tuple[str, ...], episodes: int | None) -> list[Layout]:
    """Returns the episodes of a suite, or of some of its tasks, those of a robot together.

    Raises:
        ValueError: it has no such task.
    """
    named = {f"{robot}/{task}": (robot, task) for robot, of in suite.tasks.items() for task in of}
    chosen = [n for n, (_, task) in named.items() if not tasks or n in tasks or task in tasks]
    known = [*named, *(task for _, task in named.values())]
    if unknown := [t for t in tasks if t not in known]:
        raise ValueError("; ".join(f"the suite has no task {t!r}; {near_names(t, known)}" for t in unknown))
    seeds = range(suite.first_seed, suite.first_seed + (episodes or suite.episodes))
    return [Layout(*named[name], seed) for name in chosen for seed in seeds]


def show_suites(console: Console) -> None:
    table = Table("suite", "robots", "tasks", "episodes of each", "what it is, and success")
    for name, suite in SUITES.items():
        tasks = sum(len(of) for of in suite.tasks.values())
        table.add_row(name, ", ".join(suite.tasks), str(tasks), str(suite.episodes), f"{suite.about}. {suite.success}")
    console.print(table)


def shown(rows: list[dict[str, Any]], title: str) -> Table:
    """Returns the table of a suite: a row per task, a column per policy."""
    table = Table("task", *(row["policy"] for row in rows), title=title)

    def cell(rate: dict[str, Any] | None) -> str:
        if rate is None:
            return ""
        low, high = rate["interval"]
        return f"{rate['successes']}/{rate['episodes']} [{low:.2f}, {high:.2f}]"

    tasks = dict.fromkeys(task for row in rows for task in row["tasks"])
    for task in tasks:
        table.add_row(task, *(cell(row["tasks"].get(task)) for row in rows))
    table.add_section()
    table.add_row("all", *(cell(row) for row in rows))
    table.add_row("mean of tasks", *(f"{row['mean_of_tasks']:.3f}" for row in rows))
    for what in dict.fromkeys(what for row in rows for what in row["measures"]):
        table.add_row(what, *(f"{row['measures'][what]:.3f}" if what in row["measures"] else "" for row in rows))
    if any("beside" in row for row in rows):
        beside = [
            "{} of {} [{:+.2f}, {:+.2f}], p {:.2g}".format(row["beside"], row["common"], *row["difference"], row["p"])
            if "beside" in row
            else ""
            for row in rows
        ]
        table.add_row("beside", *beside)
    return table


def main(args: Args, console: Console) -> None:
    if args.suite == "list":
        show_suites(console)
        return
    suite = suite_of(args.suite)
    wanted = layouts(suite, args.tasks, args.episodes)
    senses = Senses(args.blind, args.deaf, read_words(args.words, suite))
    sims = {robot: make_sim(robot) for robot in dict.fromkeys(layout.robot for layout in wanted)}
    out = args.out / args.suite / f"{args.policy}.jsonl"
    if args.beside is not None and not (out.parent / f"{args.beside}.jsonl").is_file():
        there = sorted(p.stem for p in out.parent.glob("*.jsonl"))
        raise ValueError(f"--beside {args.beside}: it was not driven in {out.parent}; there are {there}")
    training = {} if args.training is None else {"training": read_training(args.training)}
    port = int(args.port_file.read_text()) if args.port_file is not None else args.port
    how = Driving(
        args.policy,
        "expert" if args.policy == "expert" else "server",
        args.host,
        port,
        args.dialect,
        args.execute_steps,
        senses,
        films=Films(out.parent / "films" / args.policy, most=args.films) if args.films else None,
    )
    server = how.check([(sim.robot, sim.renderer) for sim in sims.values()])
    about = {
        "dialect": args.dialect,
        "execute_steps": args.execute_steps,
        "senses": dataclasses.asdict(senses),
        "max_steps": {robot: sim.max_steps for robot, sim in sims.items()},
        "renderers": {robot: sim.renderer for robot, sim in sims.items()},
        "server": {key: value for key, value in server.items() if key != "robots"},
        **training,
    }
    with held(out):
        write_about(out, about, len(still_to_drive(wanted, out)), ROOT)
        episodes = drive_all(how, wanted, out, args.workers, console, f"{args.suite} {args.policy}")
    latency = sorted(ms for e in episodes for ms in e.latency_ms)
    found = read_results(out.parent, {args.policy, args.beside or args.policy, "expert"})
    chosen = {name: {k: e for k, e in of.items() if Layout(*k) in set(wanted)} for name, of in found.items()}
    console.print(shown(suite_rows({n: of for n, of in chosen.items() if of}, args.beside), args.suite))
    if latency:
        p99 = latency[min(len(latency) - 1, int(0.99 * len(latency)))]
        console.print(f"{len(latency)} requests, {latency[len(latency) // 2]:.1f} ms (median), {p99:.1f} ms (p99)")


if __name__ == "__main__":
    try:
        main(tyro.cli(Args), Console(width=200))
    except StoppedError as e:
        sys.exit(f"stopped: {e}")
    except (ValueError, FileNotFoundError) as e:
        sys.exit(f"not evaluated: {e}")
