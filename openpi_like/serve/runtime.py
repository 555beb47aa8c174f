"""Runs a remote policy on a robot at its control rate, whatever the network does. Needs what the client needs.

    client = PolicyClient("gpu-machine")
    runtime = Runtime(client, "my_robot", merge=RealTime())
    report = runtime.run(observe=robot.observe, act=robot.command, hold=robot.hold, steps=2000)

One thread keeps the rate; another one asks, ahead of time. When there is no action any more, because the server is slow
or gone, the robot holds, and after `stop_s` the run ends; what happened is in the report, in numbers.
"""

import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np

from openpi_like.serve.chunks import Chunks, Merge, Newest
from openpi_like.serve.client import ServerError

log = logging.getLogger(__name__)


@runtime_checkable
class Client(Protocol):
    """What the runtime asks: `openpi_like.serve.client.PolicyClient`."""

    metadata: dict[str, Any]

    def infer(self, observation: dict[str, Any]) -> dict[str, Any]:
        """Returns the server's reply."""


class SpeedLimiter:
    """Keeps commands within a robot's limits: bounds, speed, and change of speed; what it changes it counts.

    The limits are those of the server's handshake, per dim; infinite where there is none. command: per dim, "absolute"
    (a target), "delta" (a change per step) or "velocity". Targets brake in time to stop at a bound.
    """

    def __init__(self, about: Mapping[str, Any], hz: float) -> None:
        limits = about["limits"]
        signs = {"lower": -np.inf, "upper": np.inf, "velocity": np.inf, "acceleration": np.inf}
        self._bounds = {
            name: np.array([none if x is None else x for x in limits[name]], np.float64) for name, none in signs.items()
        }
        commands = np.array(limits["command"])
        self._absolute, self._delta, self._hz = commands == "absolute", commands == "delta", hz
        self.limited = dict.fromkeys(signs, 0)
        self.reset()

    def reset(self, start: np.ndarray | None = None) -> None:
        """Forgets what was commanded last. start: where the robot stands, as a command; without it, the first command
        is kept within the bounds alone."""
        self._last = None if start is None else np.asarray(start, np.float64)
        self.stand()

    def stand(self) -> None:
        """Notes that the robot stands still where it was commanded last."""
        self._speed = None if self._last is None else np.zeros_like(self._last)

    def __call__(self, action: np.ndarray) -> np.ndarray:
        """Returns the nearest command within the limits."""
        wanted = np.asarray(action, np.float64)
        command = self._clip("lower", wanted, np.maximum(wanted, self._bounds["lower"]))
        command = self._clip("upper", command, np.minimum(command, self._bounds["upper"]))
        if self._last is not None:
            assert self._speed is not None
            speed = self._speed_of(command)
            most, change = self._bounds["velocity"], self._bounds["acceleration"] / self._hz
            slower = self._clip("velocity", speed, np.clip(speed, -most, most))
            down, up = (self._braking(abs(self._bounds[side] - self._last)) for side in ("lower", "upper"))
            steady = np.where(self._absolute, np.clip(slower, -down, up), slower)
            steady = np.clip(steady, self._speed - change, self._speed + change)
            slower = self._clip("acceleration", slower, steady)
            command = np.where(slower != speed, self._command_of(slower), command)
            # A start beyond them, or rounding.
            command = np.clip(command, self._bounds["lower"], self._bounds["upper"])
            self._speed = self._speed_of(command)
        elif self._speed is None:
            self._speed = np.zeros_like(command)
        self._last = command
        return command.astype(action.dtype)

    def _braking(self, distance: np.ndarray) -> np.ndarray:
        """Returns the greatest speed from which a target stops within a distance, losing no more a step than it may.

        From k steps' worth of change, it moves k (k + 1) / 2 of them, and up to 1/8 more between whole numbers.
        """
        with np.errstate(divide="ignore", invalid="ignore"):
            change = self._bounds["acceleration"] / self._hz
            steps = np.maximum(np.sqrt(2 * distance * self._hz / change) - 0.5, 0.0)
            at_once = np.minimum(distance * self._hz, change)  # to the bound, and there it stands
            speed = np.maximum(steps * change, at_once)
        return np.where(np.isfinite(speed), speed, np.inf)

    def _clip(self, name: str, before: np.ndarray, after: np.ndarray) -> np.ndarray:
        self.limited[name] += int(np.sum(np.abs(after - before) > 1e-6 * (1 + np.abs(before))))
        return after

    def _speed_of(self, command: np.ndarray) -> np.ndarray:
        assert self._last is not None
        by_step = np.where(self._absolute, (command - self._last) * self._hz, command)
        return np.where(self._delta, command * self._hz, by_step)

    def _command_of(self, speed: np.ndarray) -> np.ndarray:
        assert self._last is not None
        by_step = np.where(self._absolute, self._last + speed / self._hz, speed)
        return np.where(self._delta, speed / self._hz, by_step)


@dataclasses.dataclass(frozen=True)
class Report:
    """What happened in a run.

    steps: executed. held: of them without an action. asked, refused, lost: requests, those that the server refused, and
    those without an answer. delay_steps: greatest delay of an answer. jitter_ms: standard deviation of the time from
    one step to the next; late: steps that began more than half a period after their time. jump_mean, jump_max: between
    chunks, see `Seams`. limited: commands that were changed, by limit. stopped: why it ended, or "" at its end.
    """

    steps: int
    held: int
    asked: int
    refused: int
    lost: int
    delay_steps: int
    jitter_ms: float
    late: int
    jump_mean: float
    jump_max: float
    limited: dict[str, int]
    stopped: str


class Runtime:
    """Runs one robot; see above."""

    def __init__(
        self,
        client: Client,
        robot: str,
        *,
        merge: Merge | None = None,
        every: int | None = None,
        hz: float | None = None,
        stop_s: float = 2.0,
        limit: bool = True,
    ) -> None:
        """
        Args:
            robot: of the server's robots.
            merge: what becomes of chunks that overlap, `Newest` by default.
            every: steps from one request to the next, default the server's `execute_steps`.
            hz: control rate, default that of the training data.
            stop_s: without an action for so long, the run ends.
            limit: keep commands within the limits of the handshake.

        Raises:
            ValueError: the server has no such robot.
        """
        robots = client.metadata["robots"]
        if robot not in robots:
            raise ValueError(f"the server has no robot {robot!r}, it has {', '.join(robots)}")
        about = robots[robot]
        if about.get("plans"):
            raise ValueError(
                f"robot {robot!r} is given plans, seen from where they were asked for, which do not follow each other "
                "as the actions of chunks do; ask at every step, with `PolicyClient`, and drive by the newest"
            )
        self._client, self._robot, self._stop_s = client, robot, stop_s
        self._hz = float(hz or about["control_hz"])
        trained = client.metadata.get("max_delay") or None
        self._chunks = Chunks(merge or Newest(), every=every or about["execute_steps"], max_delay=trained)
        self._limiter = SpeedLimiter(about, self._hz) if limit and "limits" in about else None
        self._lock = threading.Lock()
        self._asking: threading.Thread | None = None
        self._counts = dict.fromkeys(("asked", "refused", "lost"), 0)
        self._fault: Exception | None = None

    def run(
        self,
        *,
        observe: Callable[[], dict[str, Any]],
        act: Callable[[np.ndarray], None],
        hold: Callable[[], None],
        steps: int,
        done: Callable[[], bool] = lambda: False,
        start: np.ndarray | None = None,
    ) -> Report:
        """Runs until `done`, for `steps` control steps at most. The first action is waited for, for `stop_s` too.

        observe: returns an observation of the wire, without "robot"; is called from this thread. act: executes an
        action. hold: is called instead of it where there is none, and at the end, however it comes. start: where the
        robot stands, as a command, so that the first action is within its limits of speed too.

        Raises:
            ServerError: the server refused an observation; the robot was told to hold before.
        """
        self._chunks.reset()
        self._counts = dict.fromkeys(self._counts, 0)
        self._fault = None
        if self._limiter is not None:
            self._limiter.reset(start)
        try:
            begins, held, stopped = self._loop(observe, act, hold, steps, done)
        finally:
            try:
                hold()
            finally:
                if (asking := self._asking) is not None:
                    asking.join()  # no longer than the client waits; then nobody uses it any more
        if self._fault is not None:
            raise self._fault
        return self._report(begins, held, stopped)

    def _loop(
        self,
        observe: Callable[[], dict[str, Any]],
        act: Callable[[np.ndarray], None],
        hold: Callable[[], None],
        steps: int,
        done: Callable[[], bool],
    ) -> tuple[list[float], int, str]:
        """Returns when the steps began, how many had no action, and why it ended before its time, if it did."""
        self._ask(observe())
        begun, held, stopped, begins = time.monotonic(), 0, "", list[float]()
        while not self._ready() and self._fault is None:
            if time.monotonic() - begun > self._stop_s:
                stopped = f"no first action within {self._stop_s} s"
                break
            hold()
            time.sleep(1 / self._hz)
            if self._asking is None:
                self._ask(observe())
        start = last_action = time.monotonic()
        for step in range(0 if stopped else steps):
            time.sleep(max(0.0, start + step / self._hz - time.monotonic()))
            begins.append(time.monotonic() - start)
            if self._fault is not None or done():
                break
            with self._lock:
                due = self._chunks.due() and self._asking is None
            if due:
                self._ask(observe())
            with self._lock:
                action = self._chunks.next()
            if action is not None:
                act(action if self._limiter is None else self._limiter(action))
                last_action = time.monotonic()
                continue
            hold()
            held += 1
            if self._limiter is not None:
                self._limiter.stand()
            if time.monotonic() - last_action > self._stop_s:
                stopped = f"no action for {self._stop_s} s"
                break
        return begins, held, stopped

    # ---- Asking ------------------------------------------------------------------------------------------------------

    def _ready(self) -> bool:
        with self._lock:
            return self._chunks.ready()

    def _ask(self, observation: dict[str, Any]) -> None:
        with self._lock:
            more = self._chunks.ask()
            self._counts["asked"] += 1
        request = {**observation, "robot": self._robot, **more}
        self._asking = threading.Thread(target=self._wait_for, args=(request,), daemon=True)
        self._asking.start()

    def _wait_for(self, request: dict[str, Any]) -> None:
        try:
            actions = self._client.infer(request)["actions"]
        except ServerError as e:
            refused = str(e).partition(":")[0] in ("late", "busy", "limit", "closing", "internal")
            with self._lock:
                self._chunks.failed()
                self._counts["refused"] += 1
                if not refused:  # the observation is wrong, and the next one will be, too
                    self._fault = e
        except (ConnectionError, TimeoutError, OSError) as e:
            log.warning("no answer: %s", e)
            with self._lock:
                self._chunks.failed()
                self._counts["lost"] += 1
        except Exception as e:  # of a client that is broken: a thread's own would be seen by nobody
            self._fault = e
        else:
            with self._lock:
                self._chunks.arrived(actions)
        self._asking = None

    def _report(self, begins: list[float], held: int, stopped: str) -> Report:
        periods = 1e3 * np.diff(begins) if len(begins) > 2 else np.zeros(1)
        ideal = np.arange(len(begins)) / self._hz
        seams = self._chunks.seams
        return Report(
            steps=len(begins),
            held=held,
            **self._counts,
            delay_steps=max(seams.delays, default=0),
            jitter_ms=float(np.std(periods)),
            late=int(np.sum(np.array(begins) - ideal > 0.5 / self._hz)),
            jump_mean=float(np.mean(seams.jumps)) if seams.jumps else 0.0,
            jump_max=max(seams.jumps, default=0.0),
            limited={} if self._limiter is None else dict(self._limiter.limited),
            stopped=stopped,
        )
