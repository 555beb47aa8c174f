"""When a run has to stop, asked once per step, with the same answer on all of its processes."""

import signal
import threading
from collections.abc import Callable, Mapping
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT)
# Names in the key-value store of JAX's coordination service.
KEYS = "openpi_like"
ALL, EACH = f"{KEYS}/all", f"{KEYS}/each"  # what all processes read; what the lead reads of each
NOTICE, STOP, STEP = "notice", "stop", "step"


class Stopping:
    """Takes SIGTERM and SIGINT as the request to stop after the present step.

    Of several processes, perhaps only one is told so, and each is at a step of its own. Once any was, each says how far
    it has come and goes no further until all have; the step after the furthest is where all of them stop.

    signal: what stopped the run, once `at` has said that it stops.
    """

    def __init__(self, step: int, *, rank: int, count: int) -> None:
        """step: the last one done."""
        self.signal: signal.Signals | None = None
        self.settling = False  # the processes are finding the step
        self._step, self._rank, self._count = step, rank, count
        self._stop_at: int | None = None
        self._noted: int | None = None
        self._lock = threading.Lock()
        for signum in SIGNALS:
            signal.signal(signum, self._note)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self._noted = self._noted or signum
        if self._count == 1:
            self._stop_at, self.signal = self._step, signal.Signals(self._noted)

    def at(self, step: int) -> bool:
        """Says whether the run stops after `step`, which is done. Each process asks after each of its steps."""
        with self._lock:
            self._step = step
            return self._stop_at is not None and step >= self._stop_at

    def settle(self, everyone: Mapping[str, str], each: Mapping[str, str], put: Callable[[str, str], None]) -> None:
        """Does this process' part in finding the step; called by the watchdog each time it has read the store.

        everyone, each: what is there under `ALL` and, read by the lead alone, under `EACH`. put: writes there.
        """
        if self._stop_at is not None:
            return
        if self._noted and NOTICE not in everyone:
            put(f"{ALL}/{NOTICE}", str(int(self._noted)))
        if NOTICE in everyone and not self.settling:
            self._lock.acquire()  # `at` now waits, so that the step that is announced stays true
            self.settling = True
            put(f"{EACH}/{STEP}/{self._rank}", str(self._step))
        steps = [int(step) for name, step in each.items() if name.startswith(f"{STEP}/")]
        if len(steps) == self._count and STOP not in everyone:
            put(f"{ALL}/{STOP}", f"{max(steps) + 1} {everyone[NOTICE]}")
        if STOP in everyone and self.settling:
            stop_at, signum = map(int, everyone[STOP].split())
            self._stop_at, self.signal = stop_at, signal.Signals(signum)
            self.settling = False
            self._lock.release()
