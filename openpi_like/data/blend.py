"""One set of statistics of two: those of a few episodes, and those that a policy was pretrained with.

A few episodes say little of where a robot can be: a joint that hardly moved in them has a range of nearly nothing, and
its first real move would reach the policy many times as large. The statistics of pretraining know more, of other data.
"""

from collections.abc import Sequence

import numpy as np

from openpi_like.data.normalize import FieldStats

_LEVELS = np.array([0.0, 0.01, 0.99, 1.0])  # of min, q01, q99 and max


def blend(own: FieldStats, before: FieldStats, weight: float) -> FieldStats:
    """Returns the statistics of a mixture: values are those of `own` with probability w = `weight`, else of `before`.

    With m, s of own, and m0, s0 of before:
        mean = w m + (1 - w) m0
        std^2 = w (s^2 + (m - mean)^2) + (1 - w) (s0^2 + (m0 - mean)^2)
        q01, q99: those of the mixture, each of the two taken to be spread evenly between its min, q01, q99 and max
            (quantiles cannot be averaged); and never inside of own's, so that what is trained on stays in range
        min, max: of both
    Mean and std are exact.

    Raises:
        ValueError: the dims are not the same, or the weight is not in [0, 1].
    """
    if own.names != before.names:
        raise ValueError(f"dims {own.names} and {before.names}, expected the same ones")
    if not 0 <= weight <= 1:
        raise ValueError(f"weight={weight}, expected a number in [0, 1]")
    m, s, m0, s0 = (np.array(x) for x in (own.mean, own.std, before.mean, before.std))
    mean = weight * m + (1 - weight) * m0
    variance = weight * (s**2 + (m - mean) ** 2) + (1 - weight) * (s0**2 + (m0 - mean) ** 2)
    ours, theirs = _knots(own), _knots(before)
    quantiles = [
        [mixture_quantile(level, ((weight, a), (1 - weight, b))) for a, b in zip(ours, theirs, strict=True)]
        for level in _LEVELS[1:3]
    ]
    return FieldStats(
        names=own.names,
        mean=tuple(mean.tolist()),
        std=tuple(np.sqrt(variance).tolist()),
        q01=tuple(np.minimum(quantiles[0], own.q01).tolist()),
        q99=tuple(np.maximum(quantiles[1], own.q99).tolist()),
        min=tuple(np.minimum(own.min, before.min).tolist()),
        max=tuple(np.maximum(own.max, before.max).tolist()),
        count=own.count + before.count,
    )


def _knots(stats: FieldStats) -> np.ndarray:
    """Returns where the distribution function of each dim reaches `_LEVELS`, (dims, 4)."""
    # Rounding can put a quantile a hair outside of what it is between.
    return np.maximum.accumulate(np.stack([stats.min, stats.q01, stats.q99, stats.max], axis=-1), axis=-1)


def mixture_quantile(level: float, parts: Sequence[tuple[float, np.ndarray]]) -> float:
    """Returns the least x at which the distribution function of a mixture reaches `level`.

    parts: of each its probability, and where its own function reaches `_LEVELS`; it is linear between, and jumps where
        two of them are one.
    """
    xs = np.unique(np.concatenate([knots for weight, knots in parts if weight > 0]))
    before, at = (
        np.sum([w * _distribution(knots, xs, side) for w, knots in parts if w > 0], axis=0)
        for side in ("left", "right")
    )
    i = int(np.argmax(at >= level - 1e-12))
    if i == 0 or before[i] <= level:
        return float(xs[i])
    part = (level - at[i - 1]) / (before[i] - at[i - 1])
    return float(xs[i - 1] + part * (xs[i] - xs[i - 1]))


def _distribution(knots: np.ndarray, xs: np.ndarray, side: str) -> np.ndarray:
    """Returns the limits from the left or the right, at `xs`, of a function that reaches `_LEVELS` at `knots`."""
    # The last knot below x (from the left), or not above it; from there it is linear to the next one.
    i = np.searchsorted(knots, xs, side="left" if side == "left" else "right") - 1
    inside = (i >= 0) & (i < len(knots) - 1)
    a, b = np.clip(i, 0, len(knots) - 1), np.clip(i + 1, 0, len(knots) - 1)
    width = knots[b] - knots[a]
    part = np.where(inside & (width > 0), (xs - knots[a]) / np.where(width > 0, width, 1), 0.0)
    value = _LEVELS[a] + part * (_LEVELS[b] - _LEVELS[a])
    return np.where(i < 0, 0.0, value)
