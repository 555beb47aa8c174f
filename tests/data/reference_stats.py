"""Statistics of rows, by our accumulators and by plain numpy."""

from collections.abc import Sequence

import numpy as np

from openpi_like.data.normalize import FieldStats
from openpi_like.data.stats import Counts, Moments, field_stats


def stats_of(x: np.ndarray) -> FieldStats:
    """By plain numpy."""
    names = tuple(f"x{i}" for i in range(x.shape[1]))
    x64 = x.astype(np.float64)
    low, high = np.quantile(x64, [0.01, 0.99], axis=0)
    values = {"mean": x64.mean(0), "std": x64.std(0), "q01": low, "q99": high, "min": x.min(0), "max": x.max(0)}
    return FieldStats(names=names, count=len(x), **{k: tuple(v.tolist()) for k, v in values.items()})


def stats_of_blocks(names: tuple[str, ...], blocks: Sequence[np.ndarray]) -> FieldStats:
    """By both passes of the library, one block after the other."""
    first = Moments(len(names))
    for i, block in enumerate(blocks):
        first.add(block, (0, i))
    second = Counts(first.bins())
    for i, block in enumerate(blocks):
        second.add(block, (0, i))
    return field_stats(names, first, second)
