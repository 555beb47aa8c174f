"""Drives a simulated robot closed loop, against a policy server or with its own expert.

    python serve/policy_server.py runs/demo/pretrain --port 8000 &
    python serve/rollout.py --robot sawyer --policy trained --port 8000 --out sawyer_trained.jsonl

It is a robot as a user would write one: the PyPI package openpi-client, unmodified, and a control loop. Goals and
layouts have seeds that no demonstration used. Run again after an interruption, it skips the episodes that are done.

--record keeps what it did, for serve/record.py; with --policy corrected, the expert takes over now and then:

    python serve/rollout.py --robot sawyer --policy corrected --record spool --first-seed 5000 --out corrected.jsonl
"""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import tyro
from rich.console import Console

from openpi_like.config import near_names
from openpi_like.robots.sims import SIMS, make_sim
from openpi_like.robots.sims.sim import HELD_OUT_SEED
from openpi_like.serve.closed_loop import Driving, Films, Layout, StoppedError, drive_all
from openpi_like.serve.evaluation import read_episodes, success_rows
from openpi_like.serve.pilot import Who
from openpi_like.serve.spool import drop, open_spool
from openpi_like.serve.takeover import TakeOver


@dataclasses.dataclass(frozen=True)
class Args:
    """Drives a simulated robot closed loop, against a policy server or with its own expert.

    robot: which simulated robot. policy: "expert" needs no server; "corrected" is the server's, from which the expert
    takes over as `takeover` says; the others only name the results. out: JSONL file, one line per episode. tasks:
    default `Sim.tasks`. episodes: per task. first_seed: of the layouts. port_file: read the port from this file, as the
    server writes it. frames_dir: a GIF of each task's first episode goes there. workers: processes, each with a
    simulator and a connection. frame_size: pixels of a side of the film. record: spool that keeps what the robot did,
    see serve/record.py; only of layouts that evaluation does not use.
    """

    robot: str
    policy: Literal["trained", "scratch", "untrained", "expert", "corrected"]
    out: Path
    tasks: tuple[str, ...] = ()
    episodes: int = 20
    first_seed: int = HELD_OUT_SEED
    host: str = "127.0.0.1"
    port: int = 8000
    port_file: Path | None = None
    frames_dir: Path | None = None
    workers: int = 2
    frame_size: int = 128
    record: Path | None = None
    takeover: TakeOver = TakeOver()

    def __post_init__(self) -> None:
        if self.record is not None and self.first_seed + self.episodes > HELD_OUT_SEED:
            raise ValueError(
                f"--record of layouts {self.first_seed} to {self.first_seed + self.episodes - 1}: what is recorded is "
                f"trained on, and those from {HELD_OUT_SEED} on are for evaluation; set --first-seed"
            )


def driving(args: Args, port: int) -> Driving:
    """Returns how episodes are driven."""
    who: Who = "expert" if args.policy == "expert" else "corrected" if args.policy == "corrected" else "server"
    return Driving(
        args.policy,
        who,
        args.host,
        port,
        films=None if args.frames_dir is None else Films(args.frames_dir, args.frame_size, args.first_seed),
        takeover=args.takeover,
        record=args.record,
        rollout=str(args.out),
    )


def drop_repeated(args: Args, wanted: Sequence[Layout], console: Console) -> None:
    """Sets recordings aside of episodes that are driven again: this rollout was stopped before it wrote them down."""
    if args.record is None or not args.record.is_dir():
        return
    todo = set(wanted) - {Layout(e.robot, e.task, e.seed) for e in read_episodes(args.out)}
    for recording in open_spool(args.record):
        said = recording.head["metadata"]
        own = said.get("rollout") == str(args.out)
        if own and Layout(recording.head["robot"], said["task"], said["seed"]) in todo:
            aside = drop(recording.path)
            console.print(f"{said['task']} {said['seed']} is driven again; what was recorded of it is {aside.name} now")


def main(args: Args, console: Console) -> None:
    if args.robot not in SIMS:
        sys.exit(f"no simulator of robot {args.robot!r}; {near_names(args.robot, list(SIMS))}")
    sim = make_sim(args.robot)
    unknown = [task for task in args.tasks if task not in sim.known_tasks()]
    if unknown:
        near = "; ".join(f"{task!r}: {near_names(task, sim.known_tasks())}" for task in unknown)
        sys.exit(f"robot {args.robot!r} has no tasks {near}")
    if args.record is not None and (sim.robot.plan is not None or sim.robot.entities):
        sys.exit(f"--record of robot {args.robot!r}: recordings have neither plans nor the things around a robot")
    port = int(args.port_file.read_text()) if args.port_file is not None else args.port
    how = driving(args, port)
    how.check([(sim.robot, sim.renderer)])
    tasks, seeds = args.tasks or sim.tasks, range(args.first_seed, args.first_seed + args.episodes)
    wanted = [Layout(args.robot, task, seed) for task in tasks for seed in seeds]
    drop_repeated(args, wanted, console)
    episodes = drive_all(how, wanted, args.out, args.workers, console, f"{args.robot} {args.policy}")
    for row in success_rows(episodes):
        interval = f"[{row['wilson_low']:.2f}, {row['wilson_high']:.2f}]"
        console.print(f"{row['robot']:17} {row['task']:22} {row['successes']:3}/{row['episodes']} {interval}")


if __name__ == "__main__":
    try:
        main(tyro.cli(Args), Console(highlight=False))
    except StoppedError as e:
        sys.exit(f"stopped: {e}")
    except ValueError as e:
        sys.exit(str(e))
