"""The live page: which robots ask, what they see, what they are told, and how long it takes."""

import asyncio
import base64
import contextlib
import dataclasses
import json
import time
from collections.abc import Callable, Mapping
from importlib.resources import files
from typing import Any

import numpy as np
import simplejpeg
from websockets.asyncio.server import ServerConnection
from websockets.exceptions import ConnectionClosed

from openpi_like.robots import Robot
from openpi_like.serve.batching import Answer
from openpi_like.serve.listeners import Client, Listener
from openpi_like.serve.session import Ask

PAGE = files("openpi_like.serve").joinpath("live.html").read_bytes()
# Nothing but the page itself runs, and it talks to this server alone.
HEADERS = {
    "Content-Type": "text/html; charset=utf-8",
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "img-src data:; connect-src 'self'; frame-ancestors 'none'",
    "Cache-Control": "no-store",
}
_EVERY_S = 0.2
_KEPT_S, _KEPT = 60.0, 256  # sessions that are gone are still shown for so long, and never more than so many


@dataclasses.dataclass(frozen=True)
class _Last:
    """What is shown of a request: no more of it is kept, and nothing of its policy, which may be replaced."""

    robot: Robot
    prompt: str
    state: np.ndarray
    pictures: Mapping[str, np.ndarray]
    actions: np.ndarray | None
    names: tuple[str, ...]
    warnings: tuple[str, ...]
    batch: int
    seconds: Mapping[str, float]


class _Seen:
    """What is known of a session: its last request and answer, and counts."""

    def __init__(self, client: Client) -> None:
        self.client, self.since = client, time.monotonic()
        self.requests = self.errors = self.episodes = 0
        self.last: _Last | None = None
        self.at = self.since
        self.error = ""
        self.gone: float | None = None


class Live(Listener):
    """What the page shows. It keeps the last request of each session, and encodes pictures only while one looks."""

    def __init__(self, state: Callable[[], Mapping[str, float | bool]]) -> None:
        """state: of the server, by name."""
        self._state = state
        self._seen: dict[int, _Seen] = {}
        self._changes = 0
        self.viewers = 0

    def connected(self, client: Client, about: Mapping[str, Any]) -> None:
        now = time.monotonic()
        gone = [n for n, s in self._seen.items() if s.gone is not None and now - s.gone > _KEPT_S]
        for number in gone:
            del self._seen[number]
        if len(self._seen) >= _KEPT:  # the oldest that is gone, if any
            oldest = next((n for n, s in self._seen.items() if s.gone is not None), 0)
            self._seen.pop(oldest, None)
        self._seen[client.number] = _Seen(client)
        self._changes += 1

    def answered(self, client: Client, ask: Ask, answer: Answer, seconds: Mapping[str, float]) -> None:
        seen, request, robot = self._seen[client.number], ask.request, ask.request.robot
        actions, warnings = None, ask.warnings
        if isinstance(answer.reply, Exception):
            seen.errors, seen.error = seen.errors + 1, str(answer.reply)
        else:
            actions, warnings = answer.reply.actions, (*warnings, *answer.reply.warnings)
        prompt = ask.observation.get("prompt") or robot.default_prompt
        shown = (robot, prompt, request.state, request.pictures, actions, robot.robot_action_names, warnings)
        seen.last, seen.at = _Last(*shown, answer.batch, seconds), time.monotonic()
        seen.requests += 1
        self._changes += 1

    def refused(self, client: Client, said: str) -> None:
        seen = self._seen[client.number]
        seen.errors, seen.error, seen.at = seen.errors + 1, said, time.monotonic()
        self._changes += 1

    def began_anew(self, client: Client, success: bool | None) -> None:
        self._seen[client.number].episodes += 1
        self._changes += 1

    def disconnected(self, client: Client) -> None:
        self._seen[client.number].gone = time.monotonic()
        self._changes += 1

    # ---- What is sent to the page ------------------------------------------------------------------------------------

    def overview(self) -> dict[str, Any]:
        """Returns the server's state, and a line for each session."""
        return {"server": dict(self._state()), "sessions": [self._line(s) for s in self._seen.values()]}

    def _line(self, s: _Seen) -> dict[str, Any]:
        now = time.monotonic()
        c = s.client
        line = {"number": c.number, "peer": c.peer, "key": c.key, "policy": c.policy, "gone": s.gone is not None}
        line |= {"requests": s.requests, "errors": s.errors, "episodes": s.episodes, "age_s": now - s.at}
        if s.last is not None:
            line |= {"robot": s.last.robot.name, "batch": s.last.batch}
            line["ms"] = {phase: 1e3 * value for phase, value in s.last.seconds.items()}
        return line

    def detail(self, number: int) -> dict[str, Any] | None:
        """Returns what a session's last request showed and what it was answered, or None where there is none.

        Pictures are JPEG as data URLs. Takes milliseconds: not for the event loop.
        """
        seen = self._seen.get(number)
        if seen is None or seen.last is None:
            return None
        last, robot = seen.last, seen.last.robot
        names = [f.name if f.size == 1 else f"{f.name}[{i}]" for f in robot.state for i in range(f.size)]
        detail: dict[str, Any] = {
            "number": number,
            "requests": seen.requests,
            "prompt": last.prompt,
            "control_hz": robot.control_hz,
            "state": [[name, float(x)] for name, x in zip(names, last.state, strict=True)],
            "cameras": {name: _jpeg(picture) for name, picture in last.pictures.items()},
            "warnings": list(last.warnings),
            "error": seen.error,
        }
        if last.actions is not None:
            detail["actions"] = np.round(last.actions, 5).tolist()
            detail["action_names"] = list(last.names)
        return detail

    async def show(self, connection: ServerConnection) -> None:
        """Tells a page what happens, until it is closed. The page sends the number of the session it looks at."""
        chosen = 0

        async def listen() -> None:
            nonlocal chosen
            async for message in connection:
                with contextlib.suppress(ValueError):
                    chosen = int(message)

        self.viewers += 1
        listening = asyncio.create_task(listen())
        told: tuple[int, int] | None = None
        quiet = 0.0
        try:
            while True:
                quiet += _EVERY_S
                if told != (self._changes, chosen) or quiet > 1.0:
                    told, quiet = (self._changes, chosen), 0.0
                    said = {**self.overview(), "detail": await asyncio.to_thread(self.detail, chosen)}
                    await connection.send(json.dumps(said))
                await asyncio.sleep(_EVERY_S)
        except ConnectionClosed:
            pass
        finally:
            self.viewers -= 1
            listening.cancel()
            with contextlib.suppress(asyncio.CancelledError, ConnectionClosed):
                await listening


def _jpeg(picture: np.ndarray) -> str:
    data = simplejpeg.encode_jpeg(np.ascontiguousarray(picture), quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(data).decode()
