"""Requests of many robots, answered together, one batch at a time; no sockets, no threads of its own, no jax.

Whoever has brought a request answers what waits, his own and those of others, unless somebody is at it already: a
request that comes alone is handed to no other thread. One of each session in turn, as many as fit: nobody waits for a
batch to fill up unless `wait_s` says so, and a session that asks often does not push others aside.
"""

import collections
import dataclasses
import itertools
import logging
import threading
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

log = logging.getLogger(__name__)


class LateError(Exception):
    """A request was not begun before its deadline."""


class BusyError(Exception):
    """More requests wait than may."""


class StuckError(Exception):
    """The device has been at one batch for too long, or the batcher is closed."""


@runtime_checkable
class Sampler(Protocol):
    """What answers a batch: `openpi_like.serve.policy.Policy`. most: requests of one."""

    most: int

    def sample(self, requests: Sequence[Any]) -> Sequence[Any | Exception]:
        """Returns an answer, or an error, for each request."""


@dataclasses.dataclass(frozen=True)
class Answer:
    """reply: of the sampler, or the error that came instead. waited_s, sampled_s: in the queue, and at work.

    batch: how many requests were answered together.
    """

    reply: Any
    waited_s: float
    sampled_s: float
    batch: int


@dataclasses.dataclass
class Job:
    """One request. session: whose turn it is. due, since: on `time.monotonic`; due None is never late.

    alive: whether somebody still waits for it. lane: jobs of different lanes are not answered together.
    """

    sampler: Sampler
    request: Any
    session: Hashable
    done: Callable[[Answer], None]
    due: float | None = None
    alive: Callable[[], bool] = lambda: True
    lane: Hashable = None
    since: float = dataclasses.field(default_factory=time.monotonic)


class _Lane:
    """Jobs of one sampler that may be answered together, by session."""

    def __init__(self) -> None:
        self.sessions: collections.OrderedDict[Hashable, collections.deque[Job]] = collections.OrderedDict()

    def __len__(self) -> int:
        return sum(map(len, self.sessions.values()))

    def __iter__(self) -> Iterator[Job]:
        return itertools.chain.from_iterable(self.sessions.values())

    def add(self, job: Job) -> None:
        self.sessions.setdefault(job.session, collections.deque()).append(job)

    def oldest(self) -> float:
        return min(jobs[0].since for jobs in self.sessions.values())

    def take(self) -> Job:
        """Returns a job of the session whose turn it is; its next turn comes after all others."""
        session, jobs = self.sessions.popitem(last=False)
        job = jobs.popleft()
        if jobs:
            self.sessions[session] = jobs
        return job


class Batcher:
    """Answers jobs; `submit` and then `work` may be called from any thread.

    waiting: how many jobs wait. busy_since: when the batch at work was begun, on `time.monotonic`, or None.
    """

    def __init__(
        self, *, wait_s: float = 0.0, max_waiting: int = 256, watch: Callable[[list[Answer]], None] = lambda batch: None
    ) -> None:
        """
        Args:
            wait_s: how long a job waits for others, where fewer wait than fit into a batch.
            max_waiting: one more is refused.
            watch: is called after every batch, for metrics.
        """
        self._wait_s, self._max_waiting, self._watch = wait_s, max_waiting, watch
        self._lanes: collections.OrderedDict[Hashable, tuple[Sampler, _Lane]] = collections.OrderedDict()
        self.waiting = 0
        self.busy_since: float | None = None
        self._changed, self._closing = threading.Condition(), False
        self._at_work: list[Job] = []
        self._led = False  # whether a thread is in `work`

    def submit(self, job: Job) -> None:
        """Adds a job; its `done` is called once, from a thread that works.

        Raises:
            BusyError: too many wait.
            StuckError: it is closed, or gave up.
        """
        with self._changed:
            if self._closing:
                raise StuckError("the server is closing; connect again later")
            if self.waiting >= self._max_waiting:
                waiting = f"{self.waiting} requests are waiting, expected at most {self._max_waiting}"
                raise BusyError(f"{waiting}; ask again later")
            self._lanes.setdefault((id(job.sampler), job.lane), (job.sampler, _Lane()))[1].add(job)
            self.waiting += 1
            self._changed.notify()

    def close(self) -> None:
        """Takes no more jobs. What waits is answered by who is at work."""
        with self._changed:
            self._closing = True
            self._changed.notify()

    def give_up(self, why: str) -> None:
        """Answers all that waits or is at work with an error, without waiting for who is at work; takes no more."""
        with self._changed:
            self._closing = True
            jobs = self._at_work + [job for _, lane in self._lanes.values() for job in lane]
            self._lanes.clear()
            self._at_work, self.waiting = [], 0
            self._changed.notify()
        now = time.monotonic()
        for job in jobs:
            job.done(Answer(StuckError(why), now - job.since, 0.0, 0))

    # ---- Who is at work ----------------------------------------------------------------------------------------------

    def work(self) -> None:
        """Answers what waits until nothing does, unless another thread is at it."""
        with self._changed:
            if self._led:
                return
            self._led = True
        try:
            while self._work():
                pass
        except BaseException:
            self._led = False
            raise

    def _work(self) -> bool:
        """Answers a batch. Returns False where nothing waits, and the next to come is to be at work."""
        with self._changed:
            if self.waiting:
                self._fill_up()
            if not self.waiting:  # or given up meanwhile
                self._led = False
                return False
            sampler, jobs, dropped = self._take()
            self._at_work = jobs
            self.busy_since = time.monotonic() if jobs else None
        self._drop(dropped)
        if jobs:
            self._answer(sampler, jobs)
        return True

    def _fill_up(self) -> None:
        """Waits for more jobs where `wait_s` allows it. With the lock held, which it gives away meanwhile."""
        sampler, lane = next(iter(self._lanes.values()))
        until = lane.oldest() + self._wait_s
        while not self._closing and len(lane) < sampler.most:
            left = until - time.monotonic()
            if left <= 0 or not self._changed.wait(left):
                return

    def _take(self) -> tuple[Sampler, list[Job], list[Job]]:
        """Returns a batch of the sampler whose turn it is, and jobs that are late or of clients that are gone."""
        now, jobs, dropped = time.monotonic(), list[Job](), list[Job]()
        key, (sampler, lane) = self._lanes.popitem(last=False)
        while lane.sessions and len(jobs) < sampler.most:
            job = lane.take()
            late = job.due is not None and now > job.due
            (dropped if late or not job.alive() else jobs).append(job)
        if lane.sessions:
            self._lanes[key] = (sampler, lane)
        self.waiting -= len(jobs) + len(dropped)
        return sampler, jobs, dropped

    def _drop(self, jobs: list[Job]) -> None:
        for job in jobs:
            waited = time.monotonic() - job.since
            job.done(Answer(LateError(f"waited {1e3 * waited:.0f} ms, longer than the request allows"), waited, 0.0, 0))

    def _answer(self, sampler: Sampler, jobs: list[Job]) -> None:
        started = time.monotonic()
        results = self._sample(sampler, [job.request for job in jobs])
        took = time.monotonic() - started
        with self._changed:
            jobs, self._at_work = self._at_work, []  # none, where `give_up` has answered them
            self.busy_since = None
        answers = [Answer(r, started - j.since, took, len(jobs)) for j, r in zip(jobs, results, strict=False)]
        for job, answer in zip(jobs, answers, strict=True):
            job.done(answer)
        self._watch(answers)

    def _sample(self, sampler: Sampler, requests: list[Any]) -> Sequence[Any | Exception]:
        try:
            return sampler.sample(requests)
        except Exception as e:
            log.exception("a batch of %d requests failed", len(requests))
            if len(requests) == 1:
                return [e]
        return [self._sample(sampler, [request])[0] for request in requests]  # lest one spoils it for all
