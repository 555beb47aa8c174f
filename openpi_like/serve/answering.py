"""From a message of a session to its reply, without blocking an event loop, whatever the transport."""

import asyncio
import contextlib
import dataclasses
import functools
import logging
import queue
import threading
import time
from collections.abc import Callable, Hashable

from openpi_like.serve.batching import Answer, Batcher, Job, StuckError
from openpi_like.serve.session import Ask, Reset, Session, failure

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Answered:
    """What became of a message.

    reply: to be sent. begun: what the message was, see `Session.receive`. answer: of a request. seconds: by phase.
    """

    reply: str | bytes
    begun: Ask | Reset | str
    answer: Answer | None
    seconds: dict[str, float]

    @property
    def code(self) -> str:
        """ "ok", or the code of the error."""
        return self.reply.partition(":")[0] if isinstance(self.reply, str) else "ok"


class Answering:
    """Threads that check what clients send, make rows of it, and are in turn at a batcher's device.

    They do not keep the process alive, as one of them may hang with the device.
    """

    def __init__(self, batcher: Batcher, threads: int = 3) -> None:
        """threads: of which one may be at the device, while the others prepare what comes next."""
        self.batcher = batcher
        self._tasks = queue.SimpleQueue[Callable[[], None] | None]()
        self._closed, self._lock = False, threading.Lock()  # nothing is put behind what ends the threads
        self._threads = [threading.Thread(target=self._run, name=f"policy {i}", daemon=True) for i in range(threads)]
        for thread in self._threads:
            thread.start()

    async def answer(
        self,
        session: Session,
        message: str | bytes,
        *,
        owner: Hashable,
        arrived: float | None = None,
        alive: Callable[[], bool] = lambda: True,
    ) -> Answered:
        """Answers one message; never raises.

        owner: whose turn it is in the batcher. arrived: on `time.monotonic`, now by default. alive: whether somebody
        still waits for the reply.
        """
        since = time.monotonic() if arrived is None else arrived
        loop = asyncio.get_running_loop()
        ended: asyncio.Future[tuple[Ask | Reset | str, Answer | None]] = loop.create_future()

        def set_result(begun: Ask | Reset | str, answer: Answer | None) -> None:
            if not ended.done():  # the connection may be gone, and with it who waited
                ended.set_result((begun, answer))

        def done(begun: Ask | Reset | str, answer: Answer | None = None) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed, and with it who waited
                loop.call_soon_threadsafe(set_result, begun, answer)

        def begin() -> None:
            begun = session.receive(message, since)
            if not isinstance(begun, Ask):
                return done(begun)
            told = functools.partial(done, begun)
            try:
                self.batcher.submit(Job(begun.policy, begun.request, owner, told, begun.due, alive, begun.request.lane))
            except Exception as e:
                done(failure(e))

        with self._lock:
            closed = self._closed
            if not closed:
                self._tasks.put(begin)
        if closed:  # nobody would take it
            done(failure(StuckError("the server is closing; connect again later")))
        begun, answer = await ended
        seconds = {}
        if isinstance(begun, Ask):
            assert answer is not None
            reply = session.answer(begun, answer)
            seconds = {"prepare": begun.prepared_s, "queue": answer.waited_s, "infer": answer.sampled_s}
        else:
            reply = begun.reply if isinstance(begun, Reset) else begun
        seconds["total"] = time.monotonic() - since
        return Answered(reply, begun, answer, seconds)

    def _run(self) -> None:
        while (task := self._tasks.get()) is not None:
            try:
                task()
                del task  # and with it a policy, which may be replaced while nobody asks
                self.batcher.work()
            except Exception:
                log.exception("a thread of the server met what nobody foresaw; it goes on")

    def close(self, *, wait: bool = True) -> None:
        """Takes no more, and ends the threads once what came is answered. wait: for that, unless the device hangs."""
        with self._lock:
            self._closed = True
            for _ in self._threads:
                self._tasks.put(None)
        if wait:
            for thread in self._threads:
                thread.join()
        self.batcher.close()
