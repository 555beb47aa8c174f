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

from openpi_like.job import Job

ROOT = Path(__file__).resolve().parents[1]
# Sawyer's tasks; episodes per task and robot for training, and for validation; training steps; episodes per task to
# drive; and steps, episodes and tasks of the policies that are compared.
SCALES: dict[str, dict[str, int]] = {
    "demo": {
        "tasks": 9,
        "sawyer": 60,
        "pusht": 60,
        "aloha": 30,
        "val": 4,
        "pretrain": 6_500,
        "finetune": 900,
        "episodes": 20,
        "compare": 1_500,
        "compare_episodes": 5,
        "compare_tasks": 9,
    },
    "full": {
        "tasks": 9,
        "sawyer": 100,
        "pusht": 300,
        "aloha": 100,
        "val": 10,
        "pretrain": 30_000,
        "finetune": 8_000,
        "episodes": 50,
        "compare": 10_000,
        "compare_episodes": 20,
        "compare_tasks": 9,
    },
    "pulse": {
        "tasks": 2,
        "sawyer": 1,
        "pusht": 1,
        "aloha": 1,
        "val": 1,
        "pretrain": 2,
        "finetune": 2,
        "episodes": 1,
        "compare": 2,
        "compare_episodes": 1,
        "compare_tasks": 1,
    },
}
# Meta-World tasks of this demo; the simulated Sawyer knows a few more.
SAWYER_TASKS = (
    "button-press-topdown",
    "button-press",
    "coffee-button",
    "window-open",
    "window-close",
    "faucet-open",
    "faucet-close",
    "drawer-open",
    "door-close",
)
# Policies that are compared, each with a config of its own: configs/demo_compare_NAME.py.
COMPARED = ("flow", "fast", "insulated")
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
    robots = ("sawyer", "pusht", "aloha")
    data, stats, workers = f"{run}/data", f"{run}/stats", ["--workers", str(args.workers)]
    tasks = {"sawyer": ["--tasks", *SAWYER_TASKS[: n["tasks"]]], "pusht": [], "aloha": []}
    sets = {robot: f"{data}/{robot}_sim/1.0.0" for robot in robots}

    # ---- 1. Demonstrations, 2. statistics ----------------------------------------------------------------------------
    for robot in robots:
        count = ["--episodes-per-task", str(n[robot]), "--val-episodes-per-task", str(n["val"])]
        make = ["data/make_demos.py", "--robot", robot, "--out", data, *count, *workers, *tasks[robot]]
        demo.step(f"demonstrations of {robot}", make)
    demo.step(
        "statistics and text tokeniser",
        *(["data/stats.py", "--robot", r, "--data", sets[r], "--out", f"{stats}/{r}.json"] for r in robots),
        ["data/fit_text.py", "--data", *sets.values(), "--out", f"{run}/text.model"],
    )

    # ---- 3. Pretraining, 4. fine-tuning ------------------------------------------------------------------------------
    def train(config: str, name: str, steps: int, entries: tuple[str, ...], *more: str) -> list[str]:
        paths = [f"data.entries.{i}.path={sets[robot]}" for i, robot in enumerate(entries)]
        length = [f"steps={steps}", f"optimizer.decay_steps={max(steps, 100)}"]
        return ["train/train.py", config, f"run_dir={run}/{name}", f"stats={stats}", *paths, *length, *more]

    tokenizer = f"tokenizer={run}/text.model"
    pretrain = ("configs/demo_pretrain.py", ("sawyer", "pusht"))
    finetune = ("configs/demo_finetune_aloha.py", ("aloha",))
    demo.step("pretrain on sawyer and pusht", train(pretrain[0], "pretrain", n["pretrain"], pretrain[1], tokenizer))
    start = f"warm_start.checkpoint={run}/pretrain"
    demo.step("fine-tune to aloha", train(finetune[0], "finetune", n["finetune"], finetune[1], start))
    demo.step(
        "untrained policies to compare with",
        train(pretrain[0], "untrained", 0, pretrain[1], tokenizer),
        train(finetune[0], "untrained_aloha", 0, finetune[1], tokenizer, "warm_start=None"),
    )

    # ---- 5. Serving, and driving the simulators from another process -------------------------------------------------
    def rollout(robot: str, policy: str, *more: str) -> list[str]:
        out = ["--out", f"{run}/rollouts/{robot}_{policy}.jsonl"]
        episodes = ["--episodes", str(n["episodes"]), *workers, *tasks[robot]]
        return ["serve/rollout.py", "--robot", robot, "--policy", policy, *episodes, *out, *more]

    for policy, checkpoint, driven in (
        ("trained", "pretrain", ("sawyer", "pusht")),
        ("trained", "finetune", ("aloha",)),
        ("untrained", "untrained", ("sawyer", "pusht")),
        ("untrained", "untrained_aloha", ("aloha",)),
    ):
        port = ["--port-file", f"{run}/{checkpoint}/port"]
        frames = ["--frames-dir", f"{run}/frames"] if policy == "trained" else []
        demo.step(
            f"drive {' and '.join(driven)} with the {policy} policy",
            *(rollout(robot, policy, *port, *frames) for robot in driven),
            server=["serve/policy_server.py", f"{run}/{checkpoint}", "--port", "0", *port],
        )
    demo.step("experts on the same goals", *(rollout(robot, "expert") for robot in robots))

    # ---- 6. Flow, FAST tokens and knowledge insulation on the same data for the same steps ---------------------------
    text = f"tokenizer={run}/text_fast.model"
    mixed = [f"data.entries.{i}.path={sets[robot]}" for i, robot in enumerate(pretrain[1])]
    demo.step(
        "action tokens, and a text tokeniser for prompts with a state",
        [
            *("data/fit_text.py", "--data", sets["sawyer"], sets["pusht"], "--out", f"{run}/text_fast.model"),
            *("--state-in-prompt", "--vocab-size", "1024"),
        ],
        [
            *("data/fit_fast.py", "configs/demo_compare_fast.py", "--out", f"{run}/fast", "--vocab-size", "512"),
            *("--set", f"stats={stats}", text, *mixed),
        ],
    )
    few = ["--robot", "sawyer", "--policy", "trained", "--episodes", str(n["compare_episodes"]), *workers]
    few += ["--tasks", *SAWYER_TASKS[: n["compare_tasks"]]]
    for kind in COMPARED:
        name = f"compare_{kind}"
        own = [] if kind == "flow" else [f"action_tokenizer={run}/fast"]
        often = [f"validate_every={max(n['compare'] // 2, 1)}", text, *own]
        demo.step(f"train {kind} to compare", train(f"configs/demo_{name}.py", name, n["compare"], pretrain[1], *often))
        port = ["--port-file", f"{run}/{name}/port"]
        demo.step(
            f"drive sawyer with {kind}",
            ["serve/rollout.py", *few, "--out", f"{run}/compared/{kind}.jsonl", *port],
            server=["serve/policy_server.py", f"{run}/{name}", "--port", "0", *port],
        )

    # ---- 7. Report ---------------------------------------------------------------------------------------------------
    demo.step("report", ["serve/report.py", run])
    total = sum(demo.record["seconds"].values())
    CONSOLE.print(f"\n[bold]{run}/report.html[/] and {run}/report.json; {total / 60:.1f} minutes in all")


if __name__ == "__main__":
    main(tyro.cli(Args))
