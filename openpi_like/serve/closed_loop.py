"""Episodes in simulators, driven by a server's policy or by the simulator's expert, in several processes."""

import concurrent.futures
import dataclasses
import math
import multiprocessing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from openpi_client.websocket_client_policy import WebsocketClientPolicy
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from websockets.exceptions import ConnectionClosed, WebSocketException

from openpi_like.robots.robot import Robot
from openpi_like.robots.sims import make_sim
from openpi_like.robots.sims.sim import SECONDS_AFTER_SUCCESS, Sim
from openpi_like.serve.dialects import DIALECTS
from openpi_like.serve.evaluation import Episode, append_episode, read_episodes
from openpi_like.serve.pilot import Camera, Pilot, Senses, Who
from openpi_like.serve.recorder import Recorder
from openpi_like.serve.takeover import TakeOver

FRAMES = 60  # of a film strip, at most


class StoppedError(RuntimeError):
    """The server refused, or is gone; the text says why. What had ended is kept."""


class Layout(NamedTuple):
    """Where an episode begins, see `Sim.reset`."""

    robot: str
    task: str
    seed: int


@dataclasses.dataclass(frozen=True)
class Films:
    """Which episodes are filmed: of each task that with `seed`, or, if that is None, failures, at most `most`.

    folder: where GIFs go. size: pixels of a side.
    """

    folder: Path
    size: int = 128
    seed: int | None = None
    most: int = 1

    def path(self, layout: Layout, success: bool) -> Path | None:
        """Returns where the film of an episode goes, None where it is not kept."""
        name = f"{layout.robot}_{layout.task}"
        if self.seed is not None:
            return self.folder / f"{name}.gif" if layout.seed == self.seed else None
        path = self.folder / f"{name}_{layout.seed}.gif"
        enough = len(set(self.folder.glob(f"{name}_*.gif")) - {path}) >= self.most
        return None if success or enough else path


@dataclasses.dataclass(frozen=True)
class Driving:
    """How episodes are driven.

    policy: its name in results. who: acts. host, port: of the server. dialect, execute_steps: see
    `openpi_like.serve.dialects`. record: spool that keeps what the robot did, under the name `rollout`.
    """

    policy: str
    who: Who
    host: str = "127.0.0.1"
    port: int = 8000
    dialect: str = "own"
    execute_steps: int | None = None
    senses: Senses = dataclasses.field(default_factory=Senses)
    films: Films | None = None
    takeover: TakeOver = TakeOver()
    record: Path | None = None
    rollout: str = ""

    def connect(self) -> WebsocketClientPolicy | None:
        """Returns a connection to the server, None where the expert acts alone.

        Raises:
            StoppedError: there is no server.
        """
        if self.who == "expert":
            return None
        try:
            return WebsocketClientPolicy(self.host, self.port)
        except (OSError, WebSocketException) as e:
            raise StoppedError(
                f"no policy server at {self.host}:{self.port} ({e}); start serve/policy_server.py first"
            ) from e

    def check(self, robots: Sequence[tuple[Robot, str]]) -> dict[str, Any]:
        """Returns the server's handshake, {} where there is none to ask. robots: each with what draws its images here.

        Raises:
            StoppedError: there is no server, it does not serve one of these robots, or its policy was trained on images
                that something else draws.
        """
        client = self.connect()
        if client is None:
            return {}
        metadata, problems = dict(client.get_server_metadata()), []
        client._ws.close()
        for robot, renderer in robots:
            try:
                served = DIALECTS[self.dialect].served(metadata, robot, self.execute_steps)
            except ValueError as e:
                problems.append(str(e))
                continue
            if served.renderer not in (None, renderer):
                problems.append(
                    f"the policy was trained on images of {robot.name!r} drawn by {served.renderer!r}, this machine "
                    f"would draw them with {renderer!r}, which look different; set "
                    f"OPENPI_LIKE_RENDERER={served.renderer}, or train on those"
                )
        if problems:
            raise StoppedError("; ".join(dict.fromkeys(problems)))
        return metadata


class Worker:
    """One simulator at a time, and one connection."""

    def __init__(self, driving: Driving) -> None:
        self._driving, self._name = driving, ""
        self._sim: Sim | None = None
        self._recorder: Recorder | None = None
        self.client: WebsocketClientPolicy | None = None

    def _made(self, robot: str) -> Sim:
        if self._sim is None or self._name != robot:
            self._sim, self._name = make_sim(robot), robot
            if self._driving.record is not None:
                policy = None if self.client is None else self.client.get_server_metadata()
                self._recorder = Recorder(self._driving.record, robot, policy=policy)
        return self._sim

    def drive(self, layout: Layout) -> Episode:
        """Runs one episode."""
        driving = self._driving
        if self.client is None:  # here, not when the process starts, where it would be lost why there is no server
            self.client = driving.connect()
        sim = self._made(layout.robot)
        recorder = self._recorder
        sim.reset(layout.task, layout.seed)
        camera = None
        if self.client is not None:
            dialect = DIALECTS[driving.dialect]
            served = dialect.served(self.client.get_server_metadata(), sim.robot, driving.execute_steps)
            if served.begins_anew:  # lest noise, and what is remembered, depend on which episodes were driven before
                self.client.infer({"reset": True, "seed": layout.seed})
            camera = Camera(self.client, sim, served, driving.senses, layout.task, layout.seed)
        pilot = Pilot(driving.who, sim, layout.seed, camera, driving.takeover)
        films = driving.films if driving.films is not None and driving.films.path(layout, False) else None
        frames, steps, helped, left = [], 0, 0, 0
        if recorder is not None:
            said: dict[str, str | int] = {
                "task": layout.task,
                "seed": layout.seed,
                "renderer": sim.renderer,
                "rollout": driving.rollout,
            }
            recorder.begin(sim.observe()["prompt"], said)
            left = math.ceil(SECONDS_AFTER_SUCCESS * sim.robot.control_hz)
        for step in range(sim.max_steps):
            if (sim.success and left == 0) or sim.failed:
                break
            left -= sim.success
            steps += not sim.success
            seen = sim.observe() if recorder is not None else None
            action, proposed = pilot.act(step, seen)
            helped += proposed is None
            if films is not None:
                frames.append(pilot.shown(sim.frame(films.size)))
            if recorder is not None and seen is not None:
                time_s = step / sim.robot.control_hz  # of the simulated world
                recorder.step(seen, action, proposed=proposed, intervened=proposed is None, time_s=time_s)
            sim.step(action)
        success = bool(sim.success)
        if recorder is not None:
            recorder.end(success)
        if films is not None and (path := films.path(layout, success)) is not None:
            _save_film([*frames, pilot.shown(sim.frame(films.size))], path)
        latency = () if camera is None else tuple(round(ms, 3) for ms in camera.latency_ms)
        thoughts = () if camera is None else tuple(camera.thoughts)
        about = (layout.robot, layout.task, driving.policy, layout.seed, success, steps, sim.renderer, latency)
        return Episode(*about, helped, thoughts, measures=sim.measures())


def _save_film(frames: list[np.ndarray], path: Path) -> None:
    chosen = np.unique(np.linspace(0, len(frames) - 1, min(len(frames), FRAMES)).round().astype(int))
    images = [Image.fromarray(frames[i]).quantize(64) for i in chosen]
    path.parent.mkdir(parents=True, exist_ok=True)
    images[0].save(path, save_all=True, append_images=images[1:], duration=60, loop=0)


_workers: list[Worker] = []  # of this process: one


def _start(driving: Driving) -> None:
    _workers.append(Worker(driving))


def _drive(layout: Layout) -> Episode:
    return _workers[0].drive(layout)


def still_to_drive(wanted: Sequence[Layout], out: Path) -> list[Layout]:
    """Returns the layouts whose episodes are not in a JSONL file."""
    done = {Layout(e.robot, e.task, e.seed) for e in read_episodes(out)}
    return [layout for layout in wanted if layout not in done]


def drive_all(
    driving: Driving, wanted: Sequence[Layout], out: Path, workers: int, console: Console, title: str
) -> list[Episode]:
    """Returns the episodes of all layouts: those of a JSONL file, and others that are driven now and added to it.

    workers: processes, each with a simulator and a connection.

    Raises:
        StoppedError: the server refused, is gone, or answered what does not fit. What ended meanwhile is in the file.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    todo = still_to_drive(wanted, out)
    pool = concurrent.futures.ProcessPoolExecutor(
        max(1, min(workers, len(todo))),
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start,
        initargs=(driving,),
    )
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    times = (TimeElapsedColumn(), TextColumn("ETA"), TimeRemainingColumn())
    with pool, Progress(*columns, *times, console=console, refresh_per_second=2) as progress:
        bar = progress.add_task(title, total=len(wanted), completed=len(wanted) - len(todo))
        left = {pool.submit(_drive, layout) for layout in todo}
        try:
            for future in concurrent.futures.as_completed(list(left)):
                append_episode(out, future.result())
                left.remove(future)
                progress.advance(bar)
        except BaseException as e:
            pool.shutdown(cancel_futures=True)
            for future in left:  # of episodes that ended meanwhile
                if not future.cancelled() and future.exception() is None:
                    append_episode(out, future.result())
            if not isinstance(e, RuntimeError | ValueError | ConnectionClosed):
                raise
            if isinstance(e, StoppedError):
                raise
            # A RuntimeError is one of the server, as openpi-client has it.
            gone = isinstance(e, ConnectionClosed)
            why = f"the policy server at {driving.host}:{driving.port} is gone ({e}); start it and run this again"
            raise StoppedError(why if gone else str(e)) from e
    chosen = set(wanted)
    return [e for e in read_episodes(out) if Layout(e.robot, e.task, e.seed) in chosen]
