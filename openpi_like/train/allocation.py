"""Memory of training on CPUs: what a step frees stays for the next one, and no step runs in a heap in pieces."""

import ctypes
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

# What drivers of accelerators make below /dev, by which JAX finds them too: NVIDIA's (also inside WSL and on Tegra),
# AMD's, TPUs (older and newer ones).
_ACCELERATORS = ("nvidia[0-9]*", "dxg", "nvhost-gpu", "kfd", "accel[0-9]*", "vfio/[0-9]*")
# Parameters of glibc's mallopt(3), and the value that never gives memory back.
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8
_NEVER = -1
# Seconds that reading a compiled program does not take; and steps that are worth a start, which takes some more.
_COMPILED_ANEW, _PAYS = 15.0, 500
_RESTARTED = "OPENPI_LIKE_RESTARTED"


def keep_freed_memory() -> bool:
    """Tells the C library not to give freed memory back to the operating system; returns whether it can.

    XLA takes its temporary buffers from malloc, hundreds of megabytes a step, in several threads. By default they are
    mapped anew each time, and the system zeroes each page at its first touch: a fourth of the time of a tiny policy's
    step. All threads share one heap, the only one with room for large buffers, and the process grows to about twice
    its size, as that heap has holes. Call it before JAX starts its threads. glibc only; elsewhere nothing changes.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return all(mallopt(*option) == 1 for option in ((_ARENA_MAX, 1), (_MMAP_MAX, 0), (_TRIM_THRESHOLD, _NEVER)))


@runtime_checkable
class Closable(Protocol):
    """Something that is open."""

    def close(self) -> None:
        """Closes it."""


def restart_after_compiling(
    seconds: float, steps: int, say: Callable[[str], None], *, closing: Sequence[Closable]
) -> None:
    """Starts this program anew, with the same arguments, where that pays; then it does not return.

    A compiler leaves the heap in pieces, and a tiny policy's step takes half as long again among them as in a process
    that has read the compiled program from disk. It is done once: where nothing was kept on disk, the second process
    compiles, and goes on. seconds: that compiling took. steps: to go. say: is called with the reason. closing: what is
    open.

    Raises:
        OSError: the program cannot be started.
    """
    if seconds < _COMPILED_ANEW or steps < _PAYS or os.environ.get(_RESTARTED):
        return
    say("starting anew with the compiled program: compiling leaves memory in pieces, which makes steps slow on CPUs")
    for each in closing:
        each.close()
    sys.stdout.flush()
    os.environ[_RESTARTED] = "1"
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])  # also the interpreter's own options


def runs_on_cpus(devices: Path = Path("/dev")) -> bool:
    """Returns whether JAX will compute on CPUs, without asking it: it was told to, or there is no accelerator."""
    if platforms := os.environ.get("JAX_PLATFORMS"):
        return platforms == "cpu"
    return not any(path for pattern in _ACCELERATORS for path in devices.glob(pattern))
