"""The main job, end to end, on simulated robots: what `make demo` runs.

Each step is one of the project's own programs; the exact command is printed, timed and put into the report. The demo
can be stopped at any moment: started again, it skips the finished steps and the interrupted one goes on where it was.
`--scale full` makes more demonstrations and trains longer, into another directory.
"""

import dataclasses
import os
from pathlib import Path
from typing import Literal

import tyro
from rich.console import Console

from openpi_like.job import SHALLOW, SIMULATED, Job

ROOT = Path(__file__).resolve().parents[1]
# Tasks of a robot; episodes per task and robot for training, and for validation; training steps; and episodes per task
# to drive.
SCALES: dict[str, dict[str, int]] = {
    "demo": {
        "tasks": 11,
        "sawyer": 48,
        "pusht": 20,
        "metaworld_fetch": 8,
        "val": 4,
        "pretrain": 2_500,
        "finetune_metaworld_fetch": 300,
        "episodes": 20,
    },
    "full": {
        "tasks": 11,
        "sawyer": 100,
        "pusht": 3_300,
        "metaworld_fetch": 8,
        "aloha": 300,
        "val": 10,
        "pretrain": 6_000,
        "finetune_metaworld_fetch": 300,
        "finetune_aloha": 8_000,
        "finetune_pusht": 6_000,
        "episodes": 50,
    },
    "pulse": {
        "tasks": 2,
        "sawyer": 1,
        "pusht": 1,
        "metaworld_fetch": 1,
        "val": 1,
        "pretrain": 2,
        "finetune_metaworld_fetch": 2,
        "episodes": 1,
    },
}
# Of the tasks that the simulated robots know, those of this demo.
TASKS = {
    "sawyer": (
        "button-press-topdown",
        "button-press",
        "coffee-button",
        "window-open",
        "window-close",
        "faucet-open",
        "faucet-close",
        "drawer-open",
        "door-close",
    ),
    # All that it reaches; no arm shows pretraining the last three.
    "metaworld_fetch": (
        "drawer-open",
        "faucet-open",
        "faucet-close",
        "window-open",
        "window-close",
        "button-press",
        "coffee-button",
        "door-close",
        "drawer-close",
        "handle-press",
        "plate-slide",
    ),
}
PRETRAINED = ("sawyer", "pusht")
NEW = "metaworld_fetch"  # a robot that pretraining never saw; it is also trained from scratch, for as many steps
CONSOLE = Console(highlight=False)


@dataclasses.dataclass(frozen=True)
class Args:
    """The main job, end to end, on simulated robots.

    scale: how much of everything; "pulse" only shows that the parts fit together. run: directory for all that it makes,
    default runs/SCALE. workers: simulator processes.
    """

    scale: Literal["demo", "full", "pulse"] = "demo"
    run: Path | None = None
    workers: int = 2


def main(args: Args) -> None:
    os.chdir(ROOT)  # where the steps' programs are
    n, run = SCALES[args.scale], str(args.run or Path("runs") / args.scale)
    demo = Job(Path(run), "demo", CONSOLE)
    finetuned = [robot for robot in SCALES["full"] if f"finetune_{robot}" in n]
    robots = list(dict.fromkeys([*PRETRAINED, *finetuned]))
    data, stats, workers = f"{run}/data", f"{run}/stats", ["--workers", str(args.workers)]
    tasks = {robot: ["--tasks", *names[: n["tasks"]]] for robot, names in TASKS.items()}
    sets = {robot: f"{data}/{robot}_sim/1.0.0" for robot in robots}

    # ---- 1. Demonstrations, 2. statistics ----------------------------------------------------------------------------
    for robot in robots:
        count = ["--episodes-per-task", str(n[robot]), "--val-episodes-per-task", str(n["val"])]
        make = ["data/make_demos.py", "--robot", robot, "--out", data, *count, *workers, *tasks.get(robot, [])]
        demo.step(f"demonstrations of {robot}", make)
    demo.step(
        "statistics and text tokeniser",
        *(["data/stats.py", "--robot", r, "--data", sets[r], "--out", f"{stats}/{r}.json"] for r in PRETRAINED),
        ["data/fit_text.py", "--data", *sets.values(), "--out", f"{run}/text.model"],
    )

    # ---- 3. Pretraining, 4. fine-tuning ------------------------------------------------------------------------------
    def config_of(config: str, entries: tuple[str, ...], stats: str) -> list[str]:
        return [config, f"stats={stats}", *(f"data.entries.{i}.path={sets[robot]}" for i, robot in enumerate(entries))]

    def train(of: list[str], name: str, steps: int, *more: str) -> list[str]:
        length = [f"steps={steps}", f"optimizer.decay_steps={max(steps, 100)}"]
        small = SHALLOW if args.scale == "pulse" else ()
        return ["train/train.py", *of, f"run_dir={run}/{name}", *length, *small, *more]

    tokenizer = f"tokenizer={run}/text.model"
    pretrain = config_of("configs/demo_pretrain.py", PRETRAINED, stats)
    all_of_them = " and ".join(PRETRAINED)
    demo.step(f"pretrain on {all_of_them}", train(pretrain, "pretrain", n["pretrain"], tokenizer))
    demo.step("an untrained policy to compare with", train(pretrain, "untrained", 0, tokenizer))
    start = f"warm_start.checkpoint={run}/pretrain"
    for robot in finetuned:
        steps, name = n[f"finetune_{robot}"], f"finetune_{robot}"
        # Statistics of the run itself: those of actions relative to a state depend on the length of its chunks.
        config, *overrides = of = config_of(f"configs/demo_{name}.py", (robot,), f"{stats}_{robot}")
        statistics = ["data/stats.py", "--config", config, "--set", *overrides]
        demo.step(f"fine-tune to {robot}", statistics, train(of, name, steps, start))
        if robot == NEW:
            scratch = train(of, f"scratch_{robot}", steps, tokenizer, "warm_start=None")
            demo.step(f"the same steps on {robot} from scratch", scratch)

    # ---- 5. Serving, and driving the simulators from another process -------------------------------------------------
    def rollout(robot: str, policy: str, *more: str) -> list[str]:
        # An untrained policy never succeeds early, and a few episodes show that it does not.
        driven = n["episodes"] if policy != "untrained" else max(1, n["episodes"] // 10)
        out = ["--out", f"{run}/rollouts/{robot}_{policy}.jsonl"]
        episodes = ["--episodes", str(driven), *workers, *tasks.get(robot, [])]
        return ["serve/rollout.py", "--robot", robot, "--policy", policy, *episodes, *out, *more]

    def drive(policy: str, checkpoint: str, *driven: str) -> None:
        port = ["--port-file", f"{run}/{checkpoint}/port"]
        frames = ["--frames-dir", f"{run}/frames"] if policy == "trained" else []
        demo.step(
            f"drive {' and '.join(driven)} with {checkpoint}",
            *(rollout(robot, policy, *port, *frames) for robot in driven),
            server=["serve/policy_server.py", f"{run}/{checkpoint}", "--port", "0", *port, *SIMULATED],
        )

    drive("trained", "pretrain", *(robot for robot in PRETRAINED if robot not in finetuned))
    for robot in finetuned:
        drive("trained", f"finetune_{robot}", robot)
    drive("scratch", f"scratch_{NEW}", NEW)
    drive("untrained", "untrained", *PRETRAINED)
    demo.step("experts on the same layouts", *(rollout(robot, "expert") for robot in robots))

    # ---- 6. Report ---------------------------------------------------------------------------------------------------
    demo.step("report", ["serve/report.py", run])
    total = sum(demo.record["seconds"].values())
    CONSOLE.print(f"\n[bold]{run}/report.html[/] and {run}/report.json; {total / 60:.1f} minutes in all")


if __name__ == "__main__":
    main(tyro.cli(Args))
