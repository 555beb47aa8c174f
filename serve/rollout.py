"""Drives a simulated robot closed loop, against a policy server or with its own expert.

    python serve/policy_server.py runs/demo/pretrain --port 8000 &
    python serve/rollout.py --robot sawyer --policy trained --port 8000 --out sawyer_trained.jsonl

It is a robot as a user would write one: the PyPI package openpi-client, unmodified, and a control loop. Goals and
layouts have seeds that no demonstration used. Run again after an interruption, it skips the episodes that are done.

--record keeps what it did, for serve/record.py; with --policy corrected, the expert takes over now and then:

    python serve/rollout.py --robot sawyer --policy corrected --record spool --first-seed 5000 --out corrected.jsonl
"""

import concurrent.futures
import dataclasses
import math
import multiprocessing
import sys
import textwrap
import time
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro
from openpi_client.action_chunk_broker import ActionChunkBroker
from openpi_client.base_policy import BasePolicy
from openpi_client.websocket_client_policy import WebsocketClientPolicy
from PIL import Image, ImageDraw
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from websockets.exceptions import ConnectionClosed

from openpi_like.config import near_names
from openpi_like.robots.sims import SIMS, make_sim
from openpi_like.robots.sims.sim import HELD_OUT_SEED, SECONDS_AFTER_SUCCESS, Expert, Sim
from openpi_like.serve.asked import asked_for, state_places
from openpi_like.serve.evaluation import Episode, append_episode, read_episodes, success_rows
from openpi_like.serve.recorder import Recorder
from openpi_like.serve.spool import drop, open_spool
from openpi_like.serve.takeover import TakeOver

FRAMES = 60  # of a film strip, at most


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


class Camera(BasePolicy):
    """Looks only when the server is really asked: an `ActionChunkBroker` asks once per chunk, and drawing is slow.

    seen: the observation of this step, where something else has already looked. step: of the episode, as the pilot
    counts. thoughts: see `Episode`.
    """

    def __init__(self, policy: BasePolicy, sim: Sim, about: dict[str, Any]) -> None:
        """about: what the server says of the robot."""
        self._policy, self._sim, self._about = policy, sim, about
        state_places(about["state"], sim.robot)  # raises now what it would raise at the first request
        self.latency_ms: list[float] = []
        self.seen: dict[str, Any] | None = None
        self.step, self.thoughts = 0, list[tuple[int, str]]()

    def infer(self, obs: dict) -> dict:
        observation = asked_for(self.seen or self._sim.observe(), self._about, self._sim.robot)
        started = time.perf_counter()
        reply = self._policy.infer(observation)
        self.latency_ms.append(1e3 * (time.perf_counter() - started))
        if (thought := reply.get("thought")) is not None and [thought] != [text for _, text in self.thoughts[-1:]]:
            self.thoughts.append((self.step, thought))
        return reply


class Pilot:
    """Chooses the actions of one episode: the policy's, the expert's, or, corrected, now the ones, now the others."""

    def __init__(self, args: Args, sim: Sim, client: WebsocketClientPolicy | None, seed: int) -> None:
        self._args, self._sim, self._seed, self._thinks = args, sim, seed, False
        self._expert: Expert | None = None
        self.camera: Camera | None = None
        if client is not None:
            about = client.get_server_metadata()
            robot, self._thinks = about["robots"][args.robot], "think" in about["features"]
            self.camera = Camera(client, sim, robot)
            self._broker = ActionChunkBroker(self.camera, action_horizon=robot["execute_steps"])

    def act(self, step: int, seen: dict[str, Any] | None) -> tuple[np.ndarray, np.ndarray | None]:
        """Returns an action, and what the policy proposed where it acts. seen: the observation, where there is one."""
        helps = self._args.policy == "corrected" and self._args.takeover.expert_acts(
            step, self._sim.max_steps, self._seed
        )
        if self.camera is None or helps:
            if self._expert is None:  # it plans from where the robot is now
                self._expert = self._sim.expert(np.random.default_rng(self._seed), 0.0)
            return self._sim.robot.executed(self._expert.act()), None
        if self._expert is not None:
            self._expert = None
            self._broker.reset()  # what is left of its chunk was for where the robot was before
        self.camera.seen, self.camera.step = seen, step
        action = self._broker.infer({})["actions"]
        return action, action

    def shown(self, frame: np.ndarray) -> np.ndarray:
        """Returns a frame of the film: where the policy thinks, with what it acts by, if it is the one that acts."""
        if self.camera is None or not self._thinks:
            return frame
        acts = self._expert is None and self.camera.thoughts
        return _captioned(frame, self.camera.thoughts[-1][1] if acts else "")


_worker: dict[str, Any] = {}  # of one worker process: its simulator, its connection, its recorder


def start_worker(args: Args, port: int) -> None:
    """Makes the simulator of this process, and its connection when a server is driven."""
    client = None if args.policy == "expert" else WebsocketClientPolicy(args.host, port)
    policy = None if client is None else client.get_server_metadata()
    recorder = None if args.record is None else Recorder(args.record, args.robot, policy=policy)
    _worker.update(args=args, sim=make_sim(args.robot), client=client, recorder=recorder)


def drive(task: str, seed: int) -> Episode:
    """Runs one episode in this worker process."""
    args, sim, recorder = _worker["args"], _worker["sim"], _worker["recorder"]
    sim.reset(task, seed)
    pilot = Pilot(args, sim, _worker["client"], seed)
    film = args.frames_dir is not None and seed == args.first_seed
    frames, steps, helped, left = [], 0, 0, 0
    if recorder is not None:
        said = {"task": task, "seed": seed, "renderer": sim.renderer, "rollout": str(args.out)}
        recorder.begin(sim.observe()["prompt"], said)
        left = math.ceil(SECONDS_AFTER_SUCCESS * sim.robot.control_hz)
    for step in range(sim.max_steps):
        if (sim.success and left == 0) or sim.failed:
            break
        left -= sim.success
        steps += not sim.success
        seen = None if recorder is None else sim.observe()
        action, proposed = pilot.act(step, seen)
        helped += proposed is None
        if film:
            frames.append(pilot.shown(sim.frame(args.frame_size)))
        if recorder is not None:
            time_s = step / sim.robot.control_hz  # of the simulated world
            recorder.step(seen, action, proposed=proposed, intervened=proposed is None, time_s=time_s)
        sim.step(action)
    success = bool(sim.success)
    if recorder is not None:
        recorder.end(success)
    if film:
        _save_film([*frames, pilot.shown(sim.frame(args.frame_size))], args.frames_dir / f"{args.robot}_{task}.gif")
    camera = pilot.camera
    latency = () if camera is None else tuple(round(ms, 3) for ms in camera.latency_ms)
    thoughts = () if camera is None else tuple(camera.thoughts)
    about = (args.robot, task, args.policy, seed, success, steps, sim.renderer, latency, helped, thoughts)
    return Episode(*about, measures=sim.measures())


def _captioned(frame: np.ndarray, text: str) -> np.ndarray:
    """Returns a frame with a text below it, as much of it as there is room for."""
    lines = textwrap.wrap(text, frame.shape[1] // 6, max_lines=3, placeholder=" ...")
    picture = Image.new("RGB", (frame.shape[1], frame.shape[0] + 36))
    picture.paste(Image.fromarray(frame))
    ImageDraw.Draw(picture).multiline_text((3, frame.shape[0]), "\n".join(lines), spacing=1)
    return np.asarray(picture)


def _save_film(frames: list[np.ndarray], path: Path) -> None:
    chosen = np.unique(np.linspace(0, len(frames) - 1, min(len(frames), FRAMES)).round().astype(int))
    images = [Image.fromarray(frames[i]).quantize(64) for i in chosen]
    path.parent.mkdir(parents=True, exist_ok=True)
    images[0].save(path, save_all=True, append_images=images[1:], duration=60, loop=0)


def drop_repeated(args: Args, todo: list[tuple[str, int]], console: Console) -> None:
    """Sets recordings aside of episodes that are driven again: this rollout was stopped before it wrote them down."""
    if args.record is None or not args.record.is_dir():
        return
    for recording in open_spool(args.record):
        said = recording.head["metadata"]
        own = (recording.head["robot"], said.get("rollout")) == (args.robot, str(args.out))
        if own and (said["task"], said["seed"]) in todo:
            aside = drop(recording.path)
            console.print(f"{said['task']} {said['seed']} is driven again; what was recorded of it is {aside.name} now")


def check_server(args: Args, port: int, sim: Sim) -> None:
    """Exits unless the server serves this robot, with images drawn as they were for training."""
    try:
        client = WebsocketClientPolicy(args.host, port)
    except OSError as e:
        sys.exit(f"no policy server at {args.host}:{port} ({e}); start serve/policy_server.py first")
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
    unknown = [task for task in args.tasks if task not in sim.known_tasks()]
    if unknown:
        near = "; ".join(f"{task!r}: {near_names(task, sim.known_tasks())}" for task in unknown)
        sys.exit(f"robot {args.robot!r} has no tasks {near}")
    if args.record is not None and (sim.robot.plan is not None or sim.robot.entities):
        sys.exit(f"--record of robot {args.robot!r}: recordings have neither plans nor the things around a robot")
    port = int(args.port_file.read_text()) if args.port_file is not None else args.port
    if args.policy != "expert":
        check_server(args, port, sim)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    tasks = args.tasks or sim.tasks
    done = {(e.task, e.seed) for e in read_episodes(args.out)}
    seeds = range(args.first_seed, args.first_seed + args.episodes)
    wanted = [(task, seed) for task in tasks for seed in seeds]
    todo = [job for job in wanted if job not in done]
    drop_repeated(args, todo, console)
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
        left = set(futures)
        try:
            for future in concurrent.futures.as_completed(futures):
                append_episode(args.out, future.result())
                left.remove(future)
                progress.advance(bar)
        except (RuntimeError, ConnectionClosed) as e:  # the first is an error of the server, as openpi-client has it
            gone = isinstance(e, ConnectionClosed)
            workers.shutdown(cancel_futures=True)
            for future in left:  # of episodes that ended meanwhile
                if not future.cancelled() and future.exception() is None:
                    append_episode(args.out, future.result())
            why = f"the policy server at {args.host}:{port} is gone ({e}); start it and run this again" if gone else e
            sys.exit(f"stopped: {why}")
    episodes = [e for e in read_episodes(args.out) if (e.task, e.seed) in set(wanted)]
    for row in success_rows(episodes):
        interval = f"[{row['wilson_low']:.2f}, {row['wilson_high']:.2f}]"
        console.print(f"{row['robot']:17} {row['task']:22} {row['successes']:3}/{row['episodes']} {interval}")


if __name__ == "__main__":
    try:
        main(tyro.cli(Args), Console(highlight=False))
    except ValueError as e:
        sys.exit(str(e))
