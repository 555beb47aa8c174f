"""Driving, end to end, in the simulator: what `make demo-driving` runs.

Demonstrations of ten manoeuvres, a policy that plans six waypoints from six cameras and from what the simulator says
of vehicles and lanes, its drives closed loop against a server, its plans beside recorded drives, the expert beside
both, and a report. Each step is one of the project's own programs. It can be stopped at any moment and goes on where it
was.
"""

import dataclasses
import os
from pathlib import Path
from typing import Literal

import tyro
from rich.console import Console

from openpi_like.job import SHALLOW, SIMULATED, Job

ROOT = Path(__file__).resolve().parents[1]
CONFIG = "configs/driving/scene.py"
# Demonstrations of each task for training and for validation, training steps, drives of each task, recorded frames.
SCALES: dict[str, dict[str, int]] = {
    "demo": {"demos": 60, "val": 6, "steps": 2_000, "drives": 10, "frames": 300},
    "pulse": {"demos": 1, "val": 1, "steps": 2, "drives": 1, "frames": 4},
}


@dataclasses.dataclass(frozen=True)
class Args:
    """Driving, end to end, in the simulator.

    scale: how much of everything; "pulse" only shows that the parts fit together. run: directory for all that it makes.
    workers: simulator processes. tasks: of the simulator's, all by default.
    """

    scale: Literal["demo", "pulse"] = "demo"
    run: Path = Path("runs/demo_driving")
    workers: int = 2
    tasks: tuple[str, ...] = ()


def main(args: Args, console: Console) -> None:
    os.chdir(ROOT)  # where the steps' programs are
    n, run = SCALES[args.scale], str(args.run)
    job = Job(args.run, "demo", console)
    data, stats, text = f"{run}/data/ego_vehicle_sim/1.0.0", f"{run}/stats", f"{run}/text.model"
    tasks = ["--tasks", *args.tasks] if args.tasks else []
    workers = ["--workers", str(args.workers)]

    # ---- 1. Demonstrations, statistics, words ------------------------------------------------------------------------
    count = ["--episodes-per-task", str(n["demos"]), "--val-episodes-per-task", str(n["val"])]
    job.step(
        "demonstrations",
        ["data/make_demos.py", "--robot", "ego_vehicle", "--out", f"{run}/data", *count, *workers, *tasks],
    )
    sets = [f"data.entries.0.path={data}", f"stats={stats}", f"tokenizer={text}"]
    job.step(
        "statistics and text tokeniser",
        ["data/stats.py", "--config", CONFIG, "--set", *sets],
        ["data/fit_text.py", "--data", data, "--out", text],
    )

    # ---- 2. Training -------------------------------------------------------------------------------------------------
    length = [f"steps={n['steps']}", f"optimizer.decay_steps={max(n['steps'], 100)}"]
    small = SHALLOW if args.scale == "pulse" else ()
    job.step("train", ["train/train.py", CONFIG, f"run_dir={run}/scene", *sets, *length, *small])

    # ---- 3. Driving, and plans beside recorded drives ----------------------------------------------------------------
    port = ["--port-file", f"{run}/scene.port"]

    def rollout(policy: str, *more: str) -> list[str]:
        out = ["--out", f"{run}/rollouts/{'scene' if policy == 'trained' else policy}.jsonl"]
        episodes = ["--episodes", str(n["drives"]), *workers, *tasks]
        return ["serve/rollout.py", "--robot", "ego_vehicle", "--policy", policy, *episodes, *out, *more]

    films = ["--frames-dir", f"{run}/frames", "--frame-size", "192"]
    beside = ["--data", data, "--robot", "ego_vehicle", "--label", "scene", "--frames", str(n["frames"])]
    job.step(
        "drive",
        rollout("trained", *port, *films),
        ["serve/open_loop.py", *beside, "--out", f"{run}/open_loop/scene.jsonl", *port],
        server=["serve/policy_server.py", f"{run}/scene", "--port", "0", *port, *SIMULATED],
    )
    job.step("the expert on the same routes", rollout("expert"))

    # ---- 4. Report ---------------------------------------------------------------------------------------------------
    job.step("report", ["serve/driving_report.py", run])
    total = sum(job.record["seconds"].values())
    console.print(f"\n[bold]{run}/report.html[/] and {run}/report.json; {total / 60:.1f} minutes in all")


if __name__ == "__main__":
    main(tyro.cli(Args), Console(highlight=False))
