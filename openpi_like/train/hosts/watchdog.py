"""Notices that a process of the run is lost or has failed, and ends this one, which could otherwise wait for ever."""

import contextlib
import os
import re
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

import jax

from openpi_like.train.hosts.places import HostsError
from openpi_like.train.hosts.rendezvous import Member, Relay
from openpi_like.train.hosts.stopping import ALL, EACH, Stopping

BEAT, VERDICT = "beat", "verdict"
NEWEST = "its newest complete checkpoint"
# Errors of XLA and its collectives begin with one of these, whatever their class is in Python.
STATUS = re.compile(
    "(CANCELLED|UNKNOWN|INVALID_ARGUMENT|DEADLINE_EXCEEDED|NOT_FOUND|ALREADY_EXISTS|PERMISSION_DENIED|UNAUTHENTICATED|"
    "RESOURCE_EXHAUSTED|FAILED_PRECONDITION|ABORTED|OUT_OF_RANGE|UNIMPLEMENTED|INTERNAL|UNAVAILABLE|DATA_LOSS):"
)


class Watchdog:
    """Two threads on the key-value store of JAX's coordination service, whose load grows with the number of processes.

    Each process counts up a beat of its own there. The lead reads all beats, the others read the lead's. Whatever ends
    the run is written there once, for all to read and to print. Only changes count, as seen on the clock of the reader.

    resume: says where the run goes on when it is started again. release: is called before this process ends here.
    stopping: this process', which finds its step with the others through the watchdog.
    """

    def __init__(
        self, members: tuple[Member, ...], rank: int, *, client: Any, relay: Relay | None, peer_timeout_s: float
    ) -> None:
        self.resume: Callable[[], str] = lambda: NEWEST
        self.release: Callable[[], None] = lambda: None
        self.stopping: Stopping | None = None
        self._members, self._me, self._rank = members, members[rank], rank
        self._client, self._relay, self._timeout_s = client, relay, peer_timeout_s
        self._interval_s = min(1.0, peer_timeout_s / 10)
        # The lead hears all, the others only the lead.
        self._heard = {m.rank: time.monotonic() for m in members if m.rank != rank and 0 in (rank, m.rank)}
        self._beats: dict[int, str | None] = {}
        self._verdict: str | None = None
        self._failing = False
        self._closing, self._ending = threading.Event(), threading.Lock()
        self._threads = [threading.Thread(target=f, name="watchdog", daemon=True) for f in (self._beat, self._judge)]
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """Stops watching; all processes have said that they are done."""
        self._closing.set()
        for thread in self._threads:
            thread.join(self._timeout_s)

    # ---- Hearing and being heard -------------------------------------------------------------------------------------

    def _beat(self) -> None:
        count = 0
        while not self._closing.is_set():
            count += 1
            # An error of the service, or a call that does not return, is silence, which `_judge` notices.
            with contextlib.suppress(jax.errors.JaxRuntimeError):
                self._exchange(str(count))
            settling = self.stopping is not None and self.stopping.settling
            self._closing.wait(self._interval_s / 20 if settling else self._interval_s)

    def _exchange(self, beat: str) -> None:
        self._set(f"{EACH}/{BEAT}/{self._rank}", beat)
        if self._rank == 0:
            self._set(f"{ALL}/{BEAT}", beat)
        everyone, each = self._read(ALL), self._read(EACH) if self._rank == 0 else {}
        for rank in self._heard:
            now = each.get(f"{BEAT}/{rank}") if self._rank == 0 else everyone.get(BEAT)
            if now != self._beats.get(rank):
                self._beats[rank], self._heard[rank] = now, time.monotonic()
        self._verdict = everyone.get(VERDICT)
        if self._verdict is not None and not self._failing:
            self._end(self._verdict)
        if self.stopping is not None:
            self.stopping.settle(everyone, each, self._set)

    def _set(self, key: str, value: str) -> None:
        self._client.key_value_set(key, value, allow_overwrite=True)

    def _read(self, root: str) -> dict[str, str]:
        return {key.removeprefix(f"{root}/"): value for key, value in self._client.key_value_dir_get(root)}

    def _judge(self) -> None:
        before = time.monotonic()
        while not self._closing.wait(self._interval_s / 2):
            now = time.monotonic()
            if now - before > self._timeout_s / 2:  # this process itself stood still, and could not hear anyone
                self._heard = dict.fromkeys(self._heard, now)
            before = now
            if self._failing:
                continue
            if self._lead_is_gone():
                self._end(f"{self._members[0]} is gone")
            for rank, at in self._heard.items():
                if now - at > self._timeout_s:
                    problem = f"{self._members[rank]} has not been heard of for {self._timeout_s:g} s"
                    self._publish(problem)
                    self._end(problem)

    def _lead_is_gone(self) -> bool:
        return self._relay is not None and self._relay.broken.is_set() and not self._closing.is_set()

    def _publish(self, verdict: str) -> None:
        """Writes why the run ends, unless it is written already."""
        if not self._lead_is_gone():  # which holds the store
            _within(2 * self._interval_s, lambda: self._client.key_value_set(f"{ALL}/{VERDICT}", verdict))

    # ---- Ending ------------------------------------------------------------------------------------------------------

    def _end(self, problem: str) -> NoReturn:
        """Ends this process with one line. Its main thread may be in a collective that never returns."""
        resume = _within(2.0, self.resume) or NEWEST
        self._exit(
            f"{self._me}: {problem}; this run stops. Start it again with the same command, on fewer or more hosts if "
            f"you like: it goes on from {resume}"
        )

    def fail(self, error: BaseException) -> NoReturn:
        """Ends this process after an error of its own, or after one that another process has caused."""
        self._failing = True
        first = (str(error).splitlines() or [""])[0]
        cause = self._cause_elsewhere() if _of_the_runtime(error) else None
        if cause is not None:
            self._publish(cause)
            self._end(f"{cause} (here: {first})")
        plain = isinstance(error, HostsError)
        self._publish(f"{self._me} stopped: {'' if plain else f'{type(error).__name__}: '}{first}")
        trace = "".join(traceback.format_exception(error)).rstrip()
        self._exit(f"{self._me}: {error}" if plain else f"{self._me}:\n{trace}", getattr(error, "exit_code", 1))

    def _cause_elsewhere(self) -> str | None:
        """Returns what another process says or shows within three beats, as this one's connections have broken."""
        reads: list[dict[str, str] | None] = []
        for seconds in (0.1, max(1.0, 3 * self._interval_s)):
            until = time.monotonic() + seconds
            while time.monotonic() < until:
                if self._lead_is_gone():
                    return f"{self._members[0]} is gone"
                if self._verdict is not None:
                    return self._verdict
                time.sleep(self._interval_s / 20)
            reads.append(_within(2 * self._interval_s, lambda: self._read(EACH)))
        before, after = reads
        if before is None or after is None:
            return f"{self._members[0]} does not answer"
        silent = [m for m in self._members if before.get(f"{BEAT}/{m.rank}") == after.get(f"{BEAT}/{m.rank}")]
        return f"{' and '.join(map(str, silent))} {'is' if len(silent) == 1 else 'are'} gone" if silent else None

    def _exit(self, text: str, code: int = 1) -> NoReturn:
        self._ending.acquire()  # never released: one thread says why, and the others wait for the end
        shown = "\x1b[?25h" if sys.stderr.isatty() else ""  # the cursor, which a progress bar hides
        os.write(2, f"{shown}{text}\n".encode())  # the main thread may hold the locks of sys.stdout and sys.stderr
        _within(1.0, sys.stdout.flush)
        _within(2.0, self.release)
        if self._rank == 0:  # the others read in this process why they end
            time.sleep(3 * self._interval_s)
        os._exit(code)


def _within(seconds: float, call: Callable[[], Any]) -> Any:
    """Returns what `call` does; None where it takes longer, or fails."""
    result: list[Any] = []

    def run() -> None:
        with contextlib.suppress(jax.errors.JaxRuntimeError, OSError):
            result.append(call())

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    return result[0] if result else None


def _of_the_runtime(error: BaseException | None) -> bool:
    """Says whether an error comes from XLA, and so may be the consequence of another process' end."""
    while error is not None:
        if STATUS.match(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False
