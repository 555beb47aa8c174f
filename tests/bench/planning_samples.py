"""Plans, truths and occupancies that are hard to judge alike: for bench_planning_metrics.py and the suite."""

from typing import NamedTuple

import numpy as np

STEPS, CELLS = 6, 200


class Samples(NamedTuple):
    """plans, truth: (B, A, 2) metres. valid: (B, A). occupancy: bool (B, A, R, C), as files of the shared code."""

    plans: np.ndarray
    truth: np.ndarray
    valid: np.ndarray
    occupancy: np.ndarray


def draw(seed: int, count: int, dtype: str = "float32") -> Samples:
    """Draws samples: a third of the plans lies on borders of cells, a third goes off the grid, steps lack a truth."""
    rng = np.random.default_rng(seed)
    speed = rng.uniform(-2, 14, (count, 1, 1))
    truth = np.cumsum(speed / 2 * [0.0, 1.0] + rng.normal(0, 0.4, (count, STEPS, 2)), axis=1)
    plans = truth + rng.normal(0, 2.5, truth.shape)
    plans[::3] = np.round(4 * plans[::3]) / 4  # on borders and in the middle of cells, and at zero
    plans[1::3] += rng.uniform(-60, 60, (len(plans[1::3]), 1, 2))
    valid = rng.random((count, STEPS)) > 0.15
    occupancy = np.zeros((count, STEPS, CELLS, CELLS), bool)
    for sample in occupancy:
        for _ in range(rng.integers(1, 30)):
            at, size, moves = rng.integers(20, 180, 2), rng.integers(2, 12, 2), rng.integers(-3, 4, 2)
            for step, grid in enumerate(sample):
                r, c = at + step * moves
                grid[max(r, 0) : max(r + size[0], 0), max(c, 0) : max(c + size[1], 0)] = True
    occupancy[:, :, [0, -1]] |= rng.random((count, 1, 2, CELLS)) < 0.3  # where plans off the grid are looked up
    return Samples(plans.astype(dtype), truth.astype(dtype), valid, occupancy)
