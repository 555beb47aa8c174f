"""One policy for all simulated arms: demonstrations, training, and suites with it, deaf, blind, and with the experts.

    python train/generalist.py

Each step is one of the project's own programs. It can be stopped at any moment and goes on where it was; numbers are
in `<run>/evaluation`, of which serve/benchmark_page.py makes a page.
"""

import dataclasses
import os
from pathlib import Path
from typing import Literal

import tyro
from rich.console import Console

from openpi_like.config import load_run
from openpi_like.job import SIMULATED, Job
from openpi_like.robots.sims.suites import suite_of

ROOT = Path(__file__).resolve().parents[1]
CONFIG = "configs/generalist.py"
# Demonstrations of each task, more or fewer of some robots, and for validation; training steps; episodes of each task.
SCALES: dict[str, dict[str, int | None]] = {
    "full": {"demos": 60, "pusht": 2_400, "aloha": 300, "val": 4, "steps": 24_000, "episodes": None},
    "pulse": {"demos": 1, "pusht": 1, "aloha": 1, "val": 1, "steps": 2, "episodes": 1},
}
BASELINES = {"blind": ["--blind"], "deaf": ["--deaf"]}


@dataclasses.dataclass(frozen=True)
class Args:
    """One policy for all simulated arms.

    scale: how much of everything; "pulse" only shows that the parts fit together. suites: whose robots and tasks are
    learned and driven; the config's own. run: directory for all that it makes. workers: simulator processes.
    """

    scale: Literal["full", "pulse"] = "full"
    suites: tuple[str, ...] = ("metaworld_30", "robosuite_arms", "fetch", "pusht", "aloha")
    run: Path = Path("runs/generalist")
    workers: int = 2


def main(args: Args, console: Console) -> None:
    os.chdir(ROOT)  # where the steps' programs are
    n, run = SCALES[args.scale], str(args.run)
    tasks = {robot: of for name in args.suites for robot, of in suite_of(name).tasks.items()}
    places = {entry.robot.name: i for i, entry in enumerate(load_run(CONFIG).data.entries)}
    if missing := [robot for robot in places if robot not in tasks]:
        raise ValueError(f"--suites {args.suites}: none is of {missing}, which {CONFIG} learns")
    job, workers = Job(args.run, "generalist", console), ["--workers", str(args.workers)]

    # ---- 1. Demonstrations, statistics, words ------------------------------------------------------------------------
    data = {robot: f"{run}/data/{robot}_sim/1.0.0" for robot in places}
    for robot in places:
        count = ["--episodes-per-task", str(n.get(robot, n["demos"])), "--val-episodes-per-task", str(n["val"])]
        make = ["data/make_demos.py", "--robot", robot, "--out", f"{run}/data", *count, *workers]
        job.step(f"demonstrations of {robot}", [*make, "--tasks", *tasks[robot]])
    sets = [f"data.entries.{i}.path={data[robot]}" for robot, i in places.items()]
    sets += [f"stats={run}/stats", f"tokenizer={run}/text.model"]
    job.step(
        "statistics and text tokeniser",
        ["data/stats.py", "--config", CONFIG, "--set", *sets],
        ["data/fit_text.py", "--data", *data.values(), "--out", f"{run}/text.model", "--vocab-size", "1024"],
    )

    # ---- 2. Training -------------------------------------------------------------------------------------------------
    length = [f"steps={n['steps']}", f"optimizer.decay_steps={max(n['steps'] or 0, 200)}"]
    job.step("train", ["train/train.py", CONFIG, f"run_dir={run}/policy", *sets, *length])

    # ---- 3. The suites -----------------------------------------------------------------------------------------------
    port = ["--port-file", f"{run}/port"]
    server = ["serve/policy_server.py", f"{run}/policy", "--port", "0", *port, *SIMULATED]
    episodes = [] if n["episodes"] is None else ["--episodes", str(n["episodes"])]

    def evaluate(suite: str, policy: str, *more: str) -> list[str]:
        return [
            "serve/evaluate.py",
            suite,
            "--policy",
            policy,
            "--out",
            f"{run}/evaluation",
            *episodes,
            *workers,
            *more,
        ]

    for suite in args.suites:
        job.step(f"{suite} with the experts", evaluate(suite, "expert"))
        job.step(f"{suite} with the policy", evaluate(suite, "generalist", *port), server=server)
        for name, senses in BASELINES.items():
            told = evaluate(suite, f"generalist_{name}", *senses, *port)
            job.step(f"{suite} with the policy, {name}", told, server=server)


if __name__ == "__main__":
    main(tyro.cli(Args), Console(highlight=False))
