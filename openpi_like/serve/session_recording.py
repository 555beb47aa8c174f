"""Sessions of a server as recordings: what robots sent and were answered; `serve/record.py` makes RLDS of them."""

import logging
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from openpi_like.serve.batching import Answer
from openpi_like.serve.listeners import Client, Listener
from openpi_like.serve.recorder import Recorder
from openpi_like.serve.session import Ask
from openpi_like.serve.spool import RecordingError

log = logging.getLogger(__name__)


class SessionRecorder(Listener):
    """Writes each session's episodes to a spool: one ends where the client begins anew, leaves, or says another prompt.

    A step is a request, with the whole chunk that was its answer; what the robot did with that, only the robot knows
    (`openpi_like.serve.recorder`). Requests that had no answer are not in it. failures: requests that could not be
    written: recording never holds up a reply.
    """

    def __init__(self, directory: Path, *, most_waiting: int = 64) -> None:
        """most_waiting: requests that wait to be written; one more is a failure, and its episode stays unfinished."""
        self._directory, self._most = directory, most_waiting
        self._about: dict[int, Mapping[str, Any]] = {}
        self._recorders: dict[int, Recorder] = {}
        self._open: dict[int, tuple[str, str]] = {}  # robot and prompt of the episode
        self._spoiled: set[int] = set()  # sessions whose episode lacks a request
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="record sessions")
        self._waiting, self._lock = 0, threading.Lock()
        self.failures = 0

    # ---- In the event loop -------------------------------------------------------------------------------------------

    def connected(self, client: Client, about: Mapping[str, Any]) -> None:
        self._about[client.number] = about

    def answered(self, client: Client, ask: Ask, answer: Answer, seconds: Mapping[str, float]) -> None:
        if isinstance(answer.reply, Exception):
            return
        with self._lock:
            fits = self._waiting < self._most
            self._waiting += fits
        if fits:
            self._submit(client, self._write, ask, answer.reply)
        else:
            self._submit(client, self._fail, f"{self._most} requests wait to be written; the disk is too slow")

    def began_anew(self, client: Client, success: bool | None) -> None:
        self._submit(client, self._end, success)

    def disconnected(self, client: Client) -> None:
        self._submit(client, self._leave)

    def close(self) -> None:
        self._thread.shutdown()

    def _submit(self, client: Client, method: Callable[..., None], *args: Any) -> None:
        def run() -> None:
            try:
                method(client, *args)
            except Exception as e:  # of the disk mostly; a thread's own would be seen by nobody
                self._fail(client, repr(e))

        self._thread.submit(run)

    # ---- In the thread that writes -----------------------------------------------------------------------------------

    def _write(self, client: Client, ask: Ask, reply: Any) -> None:
        try:
            self._write_step(client, ask, reply)
        finally:
            with self._lock:
                self._waiting -= 1

    def _write_step(self, client: Client, ask: Ask, reply: Any) -> None:
        n, robot = client.number, ask.request.robot
        prompt = ask.observation.get("prompt") or robot.default_prompt
        if self._open.get(n) not in (None, (robot.name, prompt)):
            self._end(client, None)
        if n in self._spoiled:
            return
        if n not in self._open:
            recorder = self._recorder(client, robot.name)
            recorder.begin(prompt)
            self._open[n] = (robot.name, prompt)
        self._recorders[n].step(ask.observation, reply.actions[0], chunk=reply.actions)

    def _recorder(self, client: Client, robot: str) -> Recorder:
        n = client.number
        if n in self._recorders and self._recorders[n].robot != robot:
            self._recorders.pop(n).close()
        if n not in self._recorders:
            metadata: dict[str, str | int] = {
                "session": n,
                "policy_name": client.policy,
                "client": client.key or client.peer,
            }
            self._recorders[n] = Recorder(
                self._directory, robot, policy=self._about[n], metadata=metadata, encoders=1, of_requests=True
            )
        return self._recorders[n]

    def _fail(self, client: Client, why: str) -> None:
        self.failures += 1
        if client.number not in self._spoiled:
            log.error("recording of session %d stops until it begins anew: %s", client.number, why)
        self._spoiled.add(client.number)

    def _end(self, client: Client, success: bool | None) -> None:
        n = client.number
        if n in self._open:
            recorder = self._recorders[n]
            try:
                if n in self._spoiled:
                    recorder.leave()
                else:
                    recorder.end(success)
            except RecordingError as e:
                self.failures += 1
                log.error("an episode of session %d stays unfinished: %s", n, e)
                recorder.leave()
        self._open.pop(n, None)
        self._spoiled.discard(n)

    def _leave(self, client: Client) -> None:
        self._end(client, None)
        self._about.pop(client.number, None)
        recorder = self._recorders.pop(client.number, None)
        if recorder is not None:
            recorder.close()
