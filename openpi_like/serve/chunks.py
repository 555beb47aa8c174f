"""Chunks of actions on a robot that does not wait for them: when to ask, what to send, what to execute.

Steps are executed actions; time is not counted: a simulator can stand still, a robot cannot, and both use this. Needs
numpy alone.

A chunk that was asked for at step k has actions for k, k + 1, ...; when it arrives, d actions later, its first d are
past. While a robot holds, because it has no action, it makes no step: the chunk was made for where it still is.
"""

import collections
import dataclasses
from typing import Any, Protocol, runtime_checkable

import numpy as np


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Actions (A, J) from step `start` on, which could be used from step `since` on, when they arrived."""

    start: int
    since: int
    actions: np.ndarray

    def at(self, step: int) -> np.ndarray | None:
        """Returns the action of a step, None where it has none."""
        return self.actions[step - self.start] if 0 <= step - self.start < len(self.actions) else None


@runtime_checkable
class Merge(Protocol):
    """What becomes of chunks that overlap."""

    def request(self, current: Chunk | None, step: int, delay: int) -> dict[str, Any]:
        """Returns what a request carries besides the observation. current: the chunk that is being executed."""

    def action(self, chunks: "collections.deque[Chunk]", step: int) -> np.ndarray | None:
        """Returns what to execute at a step. chunks: oldest first."""


@dataclasses.dataclass(frozen=True)
class Newest:
    """The newest chunk alone, as it is."""

    def request(self, current: Chunk | None, step: int, delay: int) -> dict[str, Any]:
        return {}

    def action(self, chunks: "collections.deque[Chunk]", step: int) -> np.ndarray | None:
        return chunks[-1].at(step) if chunks else None


@dataclasses.dataclass(frozen=True)
class Ensemble:
    """The mean of all chunks that have the step: the oldest has weight 1, each other exp(-decay) of the one before it.

    Temporal ensembling (Zhao et al. 2023, ACT, section 4.2). For actions that can be averaged: not angles that wrap.
    """

    decay: float = 0.01

    def request(self, current: Chunk | None, step: int, delay: int) -> dict[str, Any]:
        return {}

    def action(self, chunks: "collections.deque[Chunk]", step: int) -> np.ndarray | None:
        every = [action for chunk in chunks if (action := chunk.at(step)) is not None]
        if not every:
            return None
        weights = np.exp(-self.decay * np.arange(len(every)))
        return (np.tensordot(weights / weights.sum(), np.stack(every), 1)).astype(every[0].dtype)


@dataclasses.dataclass(frozen=True)
class RealTime(Newest):
    """The newest chunk, which the policy is asked to make go on from the one before it (real-time chunking)."""

    def request(self, current: Chunk | None, step: int, delay: int) -> dict[str, Any]:
        left = None if current is None else current.actions[max(0, step - current.start) :]
        if left is None or not len(left):
            return {}
        return {"previous": np.ascontiguousarray(left), "delay": min(delay, len(left))}


@dataclasses.dataclass
class Seams:
    """What happened where one chunk followed another.

    jumps: how far apart what was to be executed is with and without the new chunk. delays: of answers, in steps. empty:
    how often there was no action.
    """

    jumps: list[float] = dataclasses.field(default_factory=list)
    delays: list[int] = dataclasses.field(default_factory=list)
    empty: int = 0


class Chunks:
    """The chunks of one episode. One thread at a time.

    step: of the next action. seams: what happened so far.
    """

    def __init__(self, merge: Merge, *, every: int, delay: int = 0, max_delay: int | None = None) -> None:
        """
        Args:
            every: steps from one request to the next, at least; a request waits for the answer of the one before.
            delay: expected for the first request; then the greatest of the last ten measured ones is.
            max_delay: that the policy takes at most.

        Raises:
            ValueError: every < 1 or delay < 0.
        """
        if every < 1 or delay < 0:
            raise ValueError(f"every={every}, delay={delay}, expected at least 1 and 0")
        self._merge, self._every, self._max_delay = merge, every, max_delay
        self._measured: collections.deque[int] = collections.deque([delay], maxlen=10)
        self.reset()

    def reset(self) -> None:
        """Begins an episode. What was measured of delays stays."""
        self.step, self.seams = 0, Seams()
        self._chunks: collections.deque[Chunk] = collections.deque()
        self._asked: int | None = None
        self._last_asked = -self._every

    @property
    def delay(self) -> int:
        """Steps that an answer is expected to take."""
        return max(self._measured)

    def ready(self) -> bool:
        """Returns whether there is an action for this step."""
        return self._merge.action(self._chunks, self.step) is not None

    def due(self) -> bool:
        """Returns whether it is time to ask."""
        return self._asked is None and (self.step - self._last_asked >= self._every or not self.ready())

    def ask(self) -> dict[str, Any]:
        """Notes that a request is sent at this step; returns what it carries besides the observation.

        Raises:
            RuntimeError: the answer of the one before is still to come.
        """
        if self._asked is not None:
            raise RuntimeError(f"the request of step {self._asked} has no answer yet")
        self._asked = self._last_asked = self.step
        delay = self.delay if self._max_delay is None else min(self.delay, self._max_delay)
        return self._merge.request(self._chunks[-1] if self._chunks else None, self.step, delay)

    def arrived(self, actions: np.ndarray) -> None:
        """Takes the answer to the last request, before the action of this step is executed."""
        if self._asked is None:
            raise RuntimeError("nothing was asked")
        chunk = Chunk(self._asked, self.step, np.asarray(actions))
        self._asked = None
        if self._chunks:  # the first one was waited for
            self._measured.append(self.step - chunk.start)
            self.seams.delays.append(self.step - chunk.start)
        old = self._merge.action(self._chunks, self.step)
        while self._chunks and self._chunks[0].at(self.step) is None:
            self._chunks.popleft()
        self._chunks.append(chunk)
        new = self._merge.action(self._chunks, self.step)
        if old is not None and new is not None:
            self.seams.jumps.append(float(np.linalg.norm(np.subtract(new, old, dtype=np.float64))))

    def failed(self) -> None:
        """Notes that the last request has no answer; another one is due at once."""
        self._asked, self._last_asked = None, self.step - self._every

    def next(self) -> np.ndarray | None:
        """Returns the action of this step, and goes on to the next; None, and it does not, where no chunk has one."""
        action = self._merge.action(self._chunks, self.step)
        if action is None:
            self.seams.empty += 1
        else:
            self.step += 1
        return action
