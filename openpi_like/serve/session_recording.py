"""Sessions of a server as recordings: what robots sent and were answered; `serve/record.py` makes RLDS of them."""

import logging
import threading
import time
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

_THREADS = 4  # each has its own sessions
_BUFFER_MIB = 32  # of each session


class _Episodes:
    """The recording of one session, in one thread."""

    def __init__(self, directory: Path, client: Client) -> None:
        self._directory, self._client = directory, client
        self._recorder: Recorder | None = None
        self._of: tuple[Any, ...] | None = None  # robot, prompt, contract and step of the episode that is open
        self.spoiled = False  # the episode lacks a request

    def write(self, ask: Ask, reply: Any, time_s: float) -> None:
        robot, policy = ask.request.robot, ask.policy.metadata()
        prompt = ask.observation.get("prompt") or robot.default_prompt
        of = (robot.name, prompt, policy.get("contract"), policy.get("step"))
        if self._of not in (None, of):
            self.end(None)
        if self.spoiled:
            return
        if self._of is None:
            self._begin(of)
        assert self._recorder is not None
        # Pictures of the past are in the steps before, and the first steps lack them.
        past = {c.name for c in robot.cameras if c.steps_back}
        images = {name: image for name, image in ask.observation["images"].items() if name not in past}
        observation = {**ask.observation, "images": images}
        self._recorder.step(observation, reply.actions[0], chunk=reply.actions, time_s=time_s)

    def _begin(self, of: tuple[Any, ...]) -> None:
        robot, prompt, contract, step = of
        self.leave()
        metadata: dict[str, str | int] = {"session": self._client.number, "policy_name": self._client.policy}
        metadata["client"] = self._client.key or self._client.peer
        policy = None if contract is None else {"contract": contract, "step": step, "robots": None}
        self._recorder = Recorder(
            self._directory,
            robot,
            policy=policy,
            metadata=metadata,
            encoders=1,
            buffer_mib=_BUFFER_MIB,
            longest_wait_s=0.0,
            of_requests=True,
        )
        self._recorder.begin(prompt)
        self._of = of

    def end(self, success: bool | None) -> None:
        """Ends the episode, if one is open; one that lacks a request stays unfinished."""
        try:
            if self._of is not None and self._recorder is not None and not self.spoiled:
                self._recorder.end(success)
        finally:
            self.leave()

    def leave(self) -> None:
        """Closes all as it is."""
        recorder, self._recorder, self._of, self.spoiled = self._recorder, None, None, False
        if recorder is not None:
            recorder.close()


class SessionRecorder(Listener):
    """Writes each session's episodes to a spool: one ends where the client begins anew, leaves, says another prompt, or
    another policy answers.

    A step is a request, with the whole chunk that was its answer; what the robot did with that, only the robot knows
    (`openpi_like.serve.recorder`). Requests that had no answer are not in it. failures: requests that could not be
    written: recording never holds up a reply.
    """

    def __init__(self, directory: Path, *, most_waiting: int = 64) -> None:
        """most_waiting: requests of one thread's sessions that wait to be written; one more is a failure, and its
        episode stays unfinished."""
        self._directory, self._most = directory, most_waiting
        self._episodes: dict[int, _Episodes] = {}
        self._threads = [ThreadPoolExecutor(1, thread_name_prefix="record sessions") for _ in range(_THREADS)]
        self._waiting, self._lock = [0] * _THREADS, threading.Lock()
        self.failures = 0

    # ---- In the event loop -------------------------------------------------------------------------------------------

    def connected(self, client: Client, about: Mapping[str, Any]) -> None:
        self._episodes[client.number] = _Episodes(self._directory, client)

    def answered(self, client: Client, ask: Ask, answer: Answer, seconds: Mapping[str, float]) -> None:
        if isinstance(answer.reply, Exception):
            return
        episodes, thread, time_s = self._episodes[client.number], client.number % _THREADS, time.monotonic()
        with self._lock:
            fits = self._waiting[thread] < self._most
            self._waiting[thread] += fits
        if not fits:
            why = f"{self._most} requests wait to be written; the disk is too slow"
            self._submit(client, lambda: self._fail(client, episodes, why))
            return

        def write() -> None:
            try:
                episodes.write(ask, answer.reply, time_s)
            finally:
                with self._lock:
                    self._waiting[thread] -= 1

        self._submit(client, write)

    def began_anew(self, client: Client, success: bool | None) -> None:
        episodes = self._episodes[client.number]
        self._submit(client, lambda: episodes.end(success))

    def disconnected(self, client: Client) -> None:
        episodes = self._episodes[client.number]
        self._submit(client, lambda: episodes.end(None))
        del self._episodes[client.number]

    def close(self) -> None:
        for thread in self._threads:
            thread.shutdown()

    # ---- In the threads that write -----------------------------------------------------------------------------------

    def _submit(self, client: Client, work: Callable[[], None]) -> None:
        episodes = self._episodes[client.number]

        def run() -> None:
            try:
                work()
            except (ValueError, OSError, RecordingError) as e:
                self._fail(client, episodes, str(e))
            except Exception as e:  # a thread's own would be seen by nobody
                self._fail(client, episodes, repr(e))

        self._threads[client.number % _THREADS].submit(run)

    def _fail(self, client: Client, episodes: _Episodes, why: str) -> None:
        with self._lock:
            self.failures += 1
        if not episodes.spoiled:
            log.error("an episode of session %d stays unfinished, until it begins anew: %s", client.number, why)
        episodes.spoiled = True
