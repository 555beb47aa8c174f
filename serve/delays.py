"""Success, and jumps between chunks, of a policy whose answers come late: in the simulators, which wait for nobody.

    python serve/policy_server.py runs/my_run --real-time-chunking --port-file port &
    python serve/delays.py --robot sawyer --port-file port --out delays.jsonl --delays 0 2 4 8

An answer is used so many control steps after its observation, and what the chunk before it has is executed meanwhile;
where that has ended, the robot stands still. Run again after an interruption, it skips the episodes that are done.
"""

import collections
import concurrent.futures
import dataclasses
import json
import multiprocessing
import sys
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from openpi_like.config import near_names
from openpi_like.json_lines import append_line, whole_lines
from openpi_like.robots.sims import SIMS, make_sim
from openpi_like.robots.sims.sim import HELD_OUT_SEED
from openpi_like.serve.chunks import Chunks, Ensemble, Merge, Newest, RealTime
from openpi_like.serve.client import PolicyClient
from openpi_like.serve.evaluation import wilson

METHODS: dict[str, Merge] = {"newest": Newest(), "ensemble": Ensemble(), "real-time": RealTime()}


@dataclasses.dataclass(frozen=True)
class Args:
    """Success, and jumps between chunks, of a policy whose answers come late.

    robot: which simulated robot. out: JSONL file, one line per episode. tasks: default `Sim.tasks`. delays: in control
    steps. methods: what becomes of chunks that overlap. label: of the policy, beside the method, in results. every:
    steps from one request to the next, default `execute_steps` of the server, or the delay if that is longer. episodes:
    per task.
    """

    robot: str
    out: Path
    tasks: tuple[str, ...] = ()
    delays: tuple[int, ...] = (0, 1, 2, 3, 4, 5, 6, 7, 8)
    methods: tuple[Literal["newest", "ensemble", "real-time"], ...] = ("newest", "ensemble", "real-time")
    label: str = ""
    every: int | None = None
    episodes: int = 20
    first_seed: int = HELD_OUT_SEED
    host: str = "127.0.0.1"
    port: int = 8000
    port_file: Path | None = None
    workers: int = 2


@dataclasses.dataclass(frozen=True)
class Late:
    """One episode. jumps: see `openpi_like.serve.chunks.Seams`. still: control steps without an action."""

    label: str
    method: str
    delay: int
    task: str
    seed: int
    success: bool
    steps: int
    still: int
    jumps: tuple[float, ...]


_worker: dict[str, Any] = {}  # of one worker process: its simulator and its connection


def start_worker(args: Args, port: int) -> None:
    """Makes the simulator and the connection of this process."""
    _worker.update(args=args, sim=make_sim(args.robot), client=PolicyClient(args.host, port))


def drive(method: str, delay: int, task: str, seed: int) -> Late:
    """Runs one episode in this worker process."""
    args, sim, client = _worker["args"], _worker["sim"], _worker["client"]
    every = args.every or client.metadata["robots"][args.robot]["execute_steps"]
    trained = client.metadata["max_delay"] or None
    chunks = Chunks(METHODS[method], every=max(every, delay), delay=delay, max_delay=trained)
    sim.reset(task, seed)
    client.infer({"reset": True, "seed": seed})
    coming: tuple[int, np.ndarray] | None = None
    for now in range(sim.max_steps):
        if sim.success:
            break
        if coming is None and chunks.due():
            request = {**sim.observe(), "robot": args.robot, **chunks.ask()}
            coming = (now + delay * (now > 0), client.infer(request)["actions"])
        if coming is not None and coming[0] <= now:
            chunks.arrived(coming[1])
            coming = None
        action = chunks.next()
        if action is not None:
            sim.step(action)
    seams, jumps = chunks.seams, tuple(round(jump, 5) for jump in chunks.seams.jumps)
    return Late(args.label, method, delay, task, seed, bool(sim.success), chunks.step, seams.empty, jumps)


def read(path: Path) -> list[Late]:
    """Returns the episodes of a file, none where there is none. A line that a kill cut off is taken out of it."""
    return [Late(**{**values, "jumps": tuple(values["jumps"])}) for values in map(json.loads, whole_lines(path))]


def table(episodes: list[Late]) -> Table:
    """Returns a row for each policy, method and delay."""
    groups = collections.defaultdict(list)
    for episode in episodes:
        groups[episode.label, episode.method, episode.delay].append(episode)
    shown = Table("policy", "method", "delay", "success", "95 %", "jump, median", "jump, 95 %", "still")
    for (label, method, delay), of in sorted(groups.items()):
        low, high = wilson(sum(e.success for e in of), len(of))
        jumps = np.array([jump for e in of for jump in e.jumps] or [0.0])
        still = sum(e.still for e in of) / max(1, sum(e.still + e.steps for e in of))
        success = f"{sum(e.success for e in of)}/{len(of)}"
        seen = [f"{np.median(jumps):.3f}", f"{np.quantile(jumps, 0.95):.3f}", f"{still:.0%}"]
        shown.add_row(label, method, str(delay), success, f"[{low:.2f}, {high:.2f}]", *seen)
    return shown


def main(args: Args, console: Console) -> None:
    if args.robot not in SIMS:
        sys.exit(f"no simulator of robot {args.robot!r}; {near_names(args.robot, list(SIMS))}")
    sim = make_sim(args.robot)
    if unknown := [task for task in args.tasks if task not in sim.known_tasks()]:
        sys.exit(f"robot {args.robot!r} has no task {unknown[0]!r}; {near_names(unknown[0], sim.known_tasks())}")
    port = int(args.port_file.read_text()) if args.port_file is not None else args.port
    client = PolicyClient(args.host, port)
    about = client.metadata
    client.close()
    if args.robot not in about["robots"]:
        sys.exit(f"the server does not serve {args.robot!r}; {near_names(args.robot, list(about['robots']))}")
    if about["robots"][args.robot].get("plans"):
        sys.exit(f"robot {args.robot!r} is given plans, made anew at every step: a late one is of another place")
    if "real-time" in args.methods and not about["real_time_chunking"]:
        sys.exit("the server was started without --real-time-chunking, and method real-time needs it")
    done = {(e.label, e.method, e.delay, e.task, e.seed) for e in read(args.out)}
    todo = [
        (method, delay, task, seed)
        for delay in args.delays
        for method in args.methods
        for task in args.tasks or sim.tasks
        for seed in range(args.first_seed, args.first_seed + args.episodes)
        if (args.label, method, delay, task, seed) not in done
    ]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with concurrent.futures.ProcessPoolExecutor(
        args.workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=start_worker,
        initargs=(args, port),
    ) as workers:
        for future in concurrent.futures.as_completed([workers.submit(drive, *job) for job in todo]):
            append_line(args.out, dataclasses.asdict(future.result()))
    console.print(table(read(args.out)))


if __name__ == "__main__":
    main(tyro.cli(Args), Console(highlight=False, width=120))
