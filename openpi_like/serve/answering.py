"""From a message of a session to its reply, without blocking an event loop, whatever the transport."""

import asyncio
import dataclasses
import time
from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor

from openpi_like.serve.batching import Answer, Batcher, Job
from openpi_like.serve.session import Ask, Reset, Session, failure


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
    """Threads that check what clients send and make rows of it, before a batcher, which has the device."""

    def __init__(self, batcher: Batcher, threads: int = 2) -> None:
        self.batcher = batcher
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="prepare")

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
        answered: asyncio.Future[Answer] = loop.create_future()

        def set_result(answer: Answer) -> None:
            if not answered.done():  # the connection may be gone, and with it who waited
                answered.set_result(answer)

        def done(answer: Answer) -> None:
            loop.call_soon_threadsafe(set_result, answer)

        def begin() -> Ask | Reset | str:
            ask = session.receive(message, since)
            if isinstance(ask, Ask):
                try:
                    self.batcher.submit(Job(ask.policy, ask.request, owner, done, ask.due, alive, ask.request.lane))
                except Exception as e:
                    return failure(e)
            return ask

        begun = await loop.run_in_executor(self._threads, begin)
        answer, seconds = None, {}
        if isinstance(begun, Ask):
            answer = await answered
            reply = session.answer(begun, answer)
            seconds = {"prepare": begun.prepared_s, "queue": answer.waited_s, "infer": answer.sampled_s}
        else:
            reply = begun.reply if isinstance(begun, Reset) else begun
        seconds["total"] = time.monotonic() - since
        return Answered(reply, begun, answer, seconds)

    def close(self, *, wait: bool = True) -> None:
        """Ends the threads, and the batcher, which answers what waits. wait: for both, unless the device hangs."""
        self._threads.shutdown(wait=wait)
        if wait:
            self.batcher.close()
