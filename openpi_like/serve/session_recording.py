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
_LEAST_MIB, _MOST_MIB = 4, 32  # in memory, of a session: some seconds of pictures


class _Episodes:
    """The recording of one session, in one thread."""

    def __init__(self, directory: Path, client: Client, buffer_mib: int) -> None:
        self._directory, self._client, self._buffer_mib = directory, client, buffer_mib
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
            buffer_mib=self._buffer_mib,
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

    def __init__(self, directory: Path, *, sessions: int = 1, memory_mib: float = 1024) -> None:
        """
        Args:
            sessions: as there may be at a time.
            memory_mib: half of it for what waits to be encoded. The sessions share the other half, for what waits to be
                written, though each has 4 MiB at least and 32 MiB at most. A request that finds no room is a failure,
                and its episode stays unfinished.
        """
        self._directory, self._most_bytes = directory, int(memory_mib * 2**19)
        self._buffer_mib = min(max(int(memory_mib / 2) // sessions, _LEAST_MIB), _MOST_MIB)
        self._episodes: dict[int, _Episodes] = {}
        self._threads = [ThreadPoolExecutor(1, thread_name_prefix="record sessions") for _ in range(_THREADS)]
        self._waiting, self._lock = 0, threading.Lock()  # bytes
        self.failures = 0

    # ---- In the event loop -------------------------------------------------------------------------------------------

    def connected(self, client: Client, about: Mapping[str, Any]) -> None:
        self._episodes[client.number] = _Episodes(self._directory, client, self._buffer_mib)

    def answered(self, client: Client, ask: Ask, answer: Answer, seconds: Mapping[str, float]) -> None:
        if isinstance(answer.reply, Exception):
            return
        episodes, time_s = self._episodes[client.number], time.monotonic()
        pictures = ask.observation["images"].values()
        size = answer.reply.actions.nbytes + sum(len(x) if isinstance(x, bytes) else x.nbytes for x in pictures)
        with self._lock:
            fits = self._waiting + size <= self._most_bytes
            self._waiting += size if fits else 0
        if not fits:
            why = f"{self._most_bytes / 2**20:.3g} MiB wait to be written; the disk is too slow"
            self._submit(client, lambda: self._fail(client, episodes, why))
            return

        def write() -> None:
            try:
                episodes.write(ask, answer.reply, time_s)
            finally:
                with self._lock:
                    self._waiting -= size

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
