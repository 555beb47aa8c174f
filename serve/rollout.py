"""Drives a simulated robot closed loop, against a policy server or with its own expert.

    python serve/policy_server.py runs/demo/pretrain --port 8000 &
    python serve/rollout.py --robot sawyer --policy trained --port 8000 --out sawyer_trained.jsonl

It is a robot as a user would write one: the PyPI package openpi-client, unmodified, and a control loop. Goals and
layouts have seeds that no demonstration used. Run again after an interruption, it skips the episodes that are done.
"""

import concurrent.futures
import dataclasses
import multiprocessing
import sys
import time
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro
from openpi_client.action_chunk_broker import ActionChunkBroker
from openpi_client.base_policy import BasePolicy
from openpi_client.websocket_client_policy import WebsocketClientPolicy
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from openpi_like.config import near_names
from openpi_like.robots.sims import SIMS, make_sim
from openpi_like.robots.sims.sim import HELD_OUT_SEED, Sim
from openpi_like.serve.evaluation import Episode, append_episode, read_episodes, success_rows

FRAMES = 60  # of a film strip, at most
FRAME_SIZE = 128


@dataclasses.dataclass(frozen=True)
class Args:
    """Drives a simulated robot closed loop, against a policy server or with its own expert.

    robot: which simulated robot. policy: "expert" needs no server; the other two only name the results. out: JSONL
    file, one line per episode. tasks: default all. episodes: per task. first_seed: of the layouts. port_file: read the
    port from this file, as the server writes it. frames_dir: a GIF of each task's first episode goes there. workers:
    processes, each with a simulator and a connection.
    """

    robot: str
    policy: Literal["trained", "untrained", "expert"]
    out: Path
    tasks: tuple[str, ...] = ()
    episodes: int = 20
    first_seed: int = HELD_OUT_SEED
    host: str = "127.0.0.1"
    port: int = 8000
    port_file: Path | None = None
    frames_dir: Path | None = None
    workers: int = 2


class Camera(BasePolicy):
    """Looks only when the server is really asked: an `ActionChunkBroker` asks once per chunk, and drawing is slow."""

    def __init__(self, policy: BasePolicy, sim: Sim) -> None:
        self._policy, self._sim = policy, sim
        self.latency_ms: list[float] = []

    def infer(self, obs: dict) -> dict:
        observation = {**self._sim.observe(), "robot": self._sim.robot.name}
        started = time.perf_counter()
        reply = self._policy.infer(observation)
        self.latency_ms.append(1e3 * (time.perf_counter() - started))
        return reply


_worker: dict[str, Any] = {}  # of one worker process: its simulator and its connection


def start_worker(args: Args, port: int) -> None:
    """Makes the simulator of this process, and its connection when a server is driven."""
    _worker["args"], _worker["sim"] = args, make_sim(args.robot)
    if args.policy != "expert":
        _worker["client"] = WebsocketClientPolicy(args.host, port)


def drive(task: str, seed: int) -> Episode:
    """Runs one episode in this worker process."""
    args, sim = _worker["args"], _worker["sim"]
    sim.reset(task, seed)
    film = args.frames_dir is not None and seed == args.first_seed
    frames, steps = [], 0
    camera = None
    if args.policy == "expert":
        expert = sim.expert(np.random.default_rng(seed), 0.0)
    else:
        camera = Camera(_worker["client"], sim)
        steps_per_chunk = _worker["client"].get_server_metadata()["robots"][args.robot]["execute_steps"]
        broker = ActionChunkBroker(camera, action_horizon=steps_per_chunk)
    while not sim.success and steps < sim.max_steps:
        if film:
            frames.append(sim.frame(FRAME_SIZE))
        sim.step(expert.act() if camera is None else broker.infer({})["actions"])
        steps += 1
    if film:
        _save_film([*frames, sim.frame(FRAME_SIZE)], args.frames_dir / f"{args.robot}_{task}.gif")
    latency = () if camera is None else tuple(round(ms, 3) for ms in camera.latency_ms)
    return Episode(args.robot, task, args.policy, seed, bool(sim.success), steps, sim.renderer, latency)


def _save_film(frames: list[np.ndarray], path: Path) -> None:
    chosen = np.unique(np.linspace(0, len(frames) - 1, min(len(frames), FRAMES)).round().astype(int))
    images = [Image.fromarray(frames[i]).quantize(64) for i in chosen]
    path.parent.mkdir(parents=True, exist_ok=True)
    images[0].save(path, save_all=True, append_images=images[1:], duration=60, loop=0)


def check_server(args: Args, port: int, sim: Sim) -> None:
    """Exits unless the server serves this robot, with images drawn as they were for training."""
    client = WebsocketClientPolicy(args.host, port)
    robots = client.get_server_metadata()["robots"]
    client._ws.close()
    if args.robot not in robots:
        sys.exit(f"the server does not serve robot {args.robot!r}; {near_names(args.robot, list(robots))}")
    trained_on = robots[args.robot]["renderer"]
    if trained_on not in (None, sim.renderer):
        sys.exit(
            f"the policy was trained on images drawn by {trained_on!r}, this machine would draw them with "
            f"{sim.renderer!r}, which look different; set OPENPI_LIKE_RENDERER={trained_on}, or train on those"
        )


def main(args: Args, console: Console) -> None:
    if args.robot not in SIMS:
        sys.exit(f"no simulator of robot {args.robot!r}; {near_names(args.robot, list(SIMS))}")
    sim = make_sim(args.robot)
    unknown = [task for task in args.tasks if task not in sim.tasks]
    if unknown:
        near = "; ".join(f"{task!r}: {near_names(task, sim.tasks)}" for task in unknown)
        sys.exit(f"robot {args.robot!r} has no tasks {near}")
    port = int(args.port_file.read_text()) if args.port_file is not None else args.port
    if args.policy != "expert":
        check_server(args, port, sim)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    tasks = args.tasks or sim.tasks
    done = {(e.task, e.seed) for e in read_episodes(args.out)}
    seeds = range(args.first_seed, args.first_seed + args.episodes)
    wanted = [(task, seed) for task in tasks for seed in seeds]
    todo = [job for job in wanted if job not in done]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    times = (TimeElapsedColumn(), TextColumn("ETA"), TimeRemainingColumn())
    workers = concurrent.futures.ProcessPoolExecutor(
        max(1, min(args.workers, len(todo))),
        mp_context=multiprocessing.get_context("spawn"),
        initializer=start_worker,
        initargs=(args, port),
    )
    with workers, Progress(*columns, *times, console=console, refresh_per_second=2) as progress:
        bar = progress.add_task(f"{args.robot} {args.policy}", total=len(wanted), completed=len(wanted) - len(todo))
        futures = [workers.submit(drive, task, seed) for task, seed in todo]
        try:
            for future in concurrent.futures.as_completed(futures):
                append_episode(args.out, future.result())
                progress.advance(bar)
        except RuntimeError as e:  # an error of the server, as openpi-client raises it
            workers.shutdown(cancel_futures=True)
            sys.exit(f"stopped: {e}")
    episodes = [e for e in read_episodes(args.out) if (e.task, e.seed) in set(wanted)]
    for row in success_rows(episodes):
        interval = f"[{row['wilson_low']:.2f}, {row['wilson_high']:.2f}]"
        console.print(f"{row['robot']:17} {row['task']:22} {row['successes']:3}/{row['episodes']} {interval}")


if __name__ == "__main__":
    main(tyro.cli(Args), Console(highlight=False))
