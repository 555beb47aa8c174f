"""What policies can do: demonstrations, training, and suites with the policy, with it deaf and blind, and with experts.

    make benchmark
    python train/benchmark.py --scale full

The small one is MT-10, within an hour on two cores; it is compared with the numbers that were published. The full one
is one policy for all simulated arms, which takes hours. Each step is one of the project's own programs. It can be
stopped at any moment and goes on where it was; numbers are in `<run>/evaluation`, of which serve/benchmark_page.py
makes the page.
"""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Literal

import tyro
from rich.console import Console

from openpi_like.config import load_run
from openpi_like.job import SIMULATED, Job
from openpi_like.models.weights import weight_shapes
from openpi_like.robots.sims.suites import suite_of

ROOT = Path(__file__).resolve().parents[1]
PUBLISHED = ROOT / "docs" / "benchmarks.json"
SENSES = {"": [], "_blind": ["--blind"], "_deaf": ["--deaf"]}


@dataclasses.dataclass(frozen=True)
class Scale:
    """How much of everything. policy: its name in results. config: of its run. suites: whose robots and tasks are
    learned and driven. demos: of each task, of all robots but those in `more`. val: held out. steps: of training.
    episodes: of each task, None as the suites say.
    """

    policy: str
    config: str
    suites: tuple[str, ...]
    steps: int
    demos: int = 60
    more: tuple[tuple[str, int], ...] = ()
    val: int = 4
    episodes: int | None = None


SMALL = Scale("pi0_mt10", "configs/mt10.py", ("metaworld_mt10",), 6_000)
ARMS = ("metaworld_30", "robosuite_arms", "fetch", "pusht", "aloha")
SCALES = {
    "small": SMALL,
    "full": Scale("pi0_all", "configs/generalist.py", ARMS, 16_000, more=(("pusht", 2_400), ("aloha", 300))),
    "pulse": dataclasses.replace(SMALL, steps=2, demos=1, val=1, episodes=1),
}


@dataclasses.dataclass(frozen=True)
class Args:
    """What policies can do. scale: how much of everything; "pulse" only shows that the parts fit together. run:
    directory for all that it makes, default runs/benchmark, or runs/SCALE. workers: simulator processes.
    """

    scale: Literal["small", "full", "pulse"] = "small"
    run: Path | None = None
    workers: int = 2


def main(args: Args, console: Console) -> None:
    os.chdir(ROOT)  # where the steps' programs are
    of = SCALES[args.scale]
    folder = args.run or Path("runs") / {"small": "benchmark"}.get(args.scale, f"benchmark_{args.scale}")
    run, workers = str(folder), ["--workers", str(args.workers)]
    places = {entry.robot.name: i for i, entry in enumerate(load_run(of.config).data.entries)}
    tasks: dict[str, dict[str, None]] = {robot: {} for robot in places}
    for suite in of.suites:
        for robot, names in suite_of(suite).tasks.items():
            tasks[robot] |= dict.fromkeys(names)
    job = Job(folder, "benchmark", console)

    # ---- 1. Demonstrations, statistics, words ------------------------------------------------------------------------
    data = {robot: f"{run}/data/{robot}_sim/1.0.0" for robot in places}
    for robot in places:
        count = ["--episodes-per-task", str(dict(of.more).get(robot, of.demos)), "--val-episodes-per-task", str(of.val)]
        make = ["data/make_demos.py", "--robot", robot, "--out", f"{run}/data", *count, *workers]
        job.step(f"demonstrations of {robot}", [*make, "--tasks", *tasks[robot]])
    sets = [f"data.entries.{i}.path={data[robot]}" for robot, i in places.items()]
    sets += [f"stats={run}/stats", f"tokenizer={run}/text.model"]
    words = ["--vocab-size", str(load_run(of.config).model.vocab_size)]
    job.step(
        "statistics and text tokeniser",
        ["data/stats.py", "--config", of.config, "--set", *sets],
        ["data/fit_text.py", "--data", *data.values(), "--out", f"{run}/text.model", *words],
    )

    # ---- 2. Training -------------------------------------------------------------------------------------------------
    length = [f"steps={of.steps}", f"optimizer.decay_steps={max(of.steps, 200)}"]
    job.step("train", ["train/train.py", of.config, f"run_dir={run}/{of.policy}", *sets, *length])
    config = load_run(of.config)
    took = {
        "seconds": job.record["seconds"]["train"],
        "cores": os.cpu_count(),
        "steps": of.steps,
        "batch_size": config.batch_size,
        "weights": sum(int(leaf.size) for leaf in weight_shapes(config.model).values()),
        "memory_mb": None,
    }
    training = folder / f"{of.policy}.json"
    training.write_text(json.dumps(took, indent=1) + "\n")

    # ---- 3. The suites -----------------------------------------------------------------------------------------------
    port = ["--port-file", f"{run}/port"]
    server = ["serve/policy_server.py", f"{run}/{of.policy}", "--port", "0", *port, *SIMULATED]
    into = ["--out", f"{run}/evaluation", *workers, *([] if of.episodes is None else ["--episodes", str(of.episodes)])]
    for suite in of.suites:
        drive = ["serve/evaluate.py", suite, *into]
        job.step(f"{suite} with the experts", [*drive, "--policy", "expert"])
        own = ["--training", str(training), *port]
        told = [[*drive, "--policy", f"{of.policy}{name}", *senses, *own] for name, senses in SENSES.items()]
        job.step(f"{suite} with the policy, with it blind, and deaf", *told, server=server)

    # ---- 4. Beside what was published --------------------------------------------------------------------------------
    if PUBLISHED.is_file():
        compare = ["serve/benchmark_page.py", f"{run}/evaluation", "--compare", str(PUBLISHED)]
        sys.exit(subprocess.run([sys.executable, *compare]).returncode)


if __name__ == "__main__":
    main(tyro.cli(Args), Console(highlight=False))
