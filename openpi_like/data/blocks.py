"""Going through many steps in blocks, so that what is made of them stays small."""

from collections.abc import Iterator

import numpy as np

BLOCK = 1 << 16  # steps looked at together


def blocks(steps: range) -> Iterator[slice]:
    """Yields blocks of at most BLOCK steps, one behind the other."""
    for at in range(steps.start, steps.stop, BLOCK):
        yield slice(at, min(at + BLOCK, steps.stop))


def episode_blocks(start: np.ndarray, steps: range) -> Iterator[tuple[int, int]]:
    """Yields first and last step (exclusive) of blocks of whole episodes, of about BLOCK steps.

    start: (E + 1,), first step of each episode.
    """
    lo = steps.start
    while lo < steps.stop:
        e = int(np.searchsorted(start, lo + BLOCK, side="right")) - 1
        hi = min(int(start[max(e, int(np.searchsorted(start, lo, side="right")))]), steps.stop)
        yield lo, hi
        lo = hi
