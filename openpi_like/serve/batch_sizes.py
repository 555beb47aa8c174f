"""How large batches are worth making on this machine."""

import time
from collections.abc import Callable, Mapping

HARDLY = 0.1  # a part of the time that a request takes


def largest_that_pays(seconds: Mapping[int, float]) -> int:
    """Returns the least size of a batch whose requests take hardly more time than those of the best one.

    Two batches of that size keep the device as busy as a larger one, half of the clients are answered earlier, and
    while the device is at one of them, the other's are checked and sent. seconds: of a batch, by its size.
    """
    best = min(took / size for size, took in seconds.items())
    return min(size for size, took in seconds.items() if took / size <= (1 + HARDLY) * best)


def least_seconds(call: Callable[[], object], runs: int = 3) -> float:
    """Returns the least time that a call takes, of some runs; it has to wait for its result."""
    times = []
    for _ in range(runs):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return min(times)
