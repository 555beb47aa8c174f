"""What answers that come late do, and what helps: success, and jumps between chunks, against the delay.

    make chunking

makes demonstrations, trains a policy on whole chunks and one with delays (configs/studies/chunking.py), and drives the
simulator with answers that are 0 to 8 control steps late (`serve/delays.py`): the newest chunk as it is, an ensemble of
chunks, and real-time chunking, which guides the first policy and which the second was trained for. It can be stopped at
any moment and goes on where it was.
"""

import dataclasses
import os
from pathlib import Path

import tyro
from rich.console import Console

from openpi_like.job import SIMULATED, Job

ROOT = Path(__file__).resolve().parents[1]
CONFIG = "configs/studies/chunking.py"
TASKS = ("button-press", "drawer-open", "window-close")
RTC = "--real-time-chunking"
POLICIES = {"whole": (), "delayed": ("model.max_delay=10",)}


@dataclasses.dataclass(frozen=True)
class Args:
    """What answers that come late do. run: directory for all that it makes. demos: of each task. set: overrides of both
    configs. delays: in control steps. episodes: of each task, method and delay. workers: simulator processes.
    """

    run: Path = Path("runs/studies/chunking")
    demos: int = 60
    set: tuple[str, ...] = ()
    delays: tuple[int, ...] = tuple(range(9))
    episodes: int = 20
    workers: int = 2


def main(args: Args, console: Console) -> None:
    run = args.run.resolve()
    os.chdir(ROOT)
    job = Job(run, "chunking", console)
    data, text, tasks = f"{run}/data/sawyer_sim/1.0.0", f"{run}/text.model", ["--tasks", *TASKS]
    count = ["--episodes-per-task", str(args.demos), "--val-episodes-per-task", "4", "--workers", str(args.workers)]
    job.step(
        "demonstrations",
        ["data/make_demos.py", "--robot", "sawyer", "--out", f"{run}/data", *count, *tasks],
        ["data/fit_text.py", "--data", data, "--out", text],
    )
    sets = [f"data.entries.0.path={data}", f"tokenizer={text}", f"stats={run}/stats", *args.set]
    job.step("statistics", ["data/stats.py", "--config", CONFIG, "--set", *sets])
    for name, more in POLICIES.items():
        job.step(f"train {name}", ["train/train.py", CONFIG, f"run_dir={run}/{name}", *sets, *more])
        port = ["--port-file", f"{run}/{name}.port"]
        drive = ["serve/delays.py", "--robot", "sawyer", "--label", name, "--out", f"{run}/delays.jsonl", *tasks]
        drive += ["--delays", *map(str, args.delays), "--episodes", str(args.episodes), *port]
        server = ["serve/policy_server.py", f"{run}/{name}", "--port", "0", *port, *SIMULATED, RTC]
        job.step(f"drive with {name}", [*drive, "--workers", str(args.workers)], server=server)


if __name__ == "__main__":
    main(tyro.cli(Args), Console(highlight=False))
