"""Blended statistics: moments are those of all values together, quantiles those of a mixture, found otherwise here."""

import dataclasses

import numpy as np
import pytest

from openpi_like.data.blend import blend, mixture_quantile
from openpi_like.data.normalize import FLOOR, FieldStats

LEVELS = (0.0, 0.01, 0.99, 1.0)


def stats(x: np.ndarray) -> FieldStats:
    """Of rows, (n, dims)."""
    q01, q99 = np.quantile(x, (0.01, 0.99), axis=0)
    columns = {"mean": x.mean(0), "std": x.std(0), "q01": q01, "q99": q99, "min": x.min(0), "max": x.max(0)}
    names = tuple(f"x_{i} [1]" for i in range(x.shape[1]))
    return FieldStats(names, **{k: tuple(v.tolist()) for k, v in columns.items()}, count=len(x))


def test_moments_are_those_of_all_values_together() -> None:
    rng = np.random.default_rng(0)
    few, many = rng.normal((1, -2, 0), (0.1, 3, 1), (70, 3)), rng.normal((0, 4, 0), (2, 0.5, 1), (930, 3))
    found, expected = blend(stats(few), stats(many), 0.07), stats(np.concatenate([few, many]))
    np.testing.assert_allclose(found.mean, expected.mean, atol=1e-12)
    np.testing.assert_allclose(found.std, expected.std, rtol=1e-12)
    assert (found.min, found.max, found.count) == (expected.min, expected.max, 1000)


def test_quantiles_of_even_distributions_are_those_of_all_values_together() -> None:
    """What is between the known points is taken to be even, as it is here; and own ones are never cut."""
    rng = np.random.default_rng(0)
    few, many = rng.uniform((-5, 0.4), (1, 0.6), (30_000, 2)), rng.uniform((0, 0), (2, 1), (70_000, 2))
    for weight, a, b in ((0.3, few, many), (0.7, many, few)):
        found, (low, high) = (
            blend(stats(a), stats(b), weight),
            np.quantile(np.concatenate([a, b]), (0.01, 0.99), axis=0),
        )
        np.testing.assert_allclose(found.q01, np.minimum(low, np.quantile(a, 0.01, axis=0)), atol=0.03)
        np.testing.assert_allclose(found.q99, np.maximum(high, np.quantile(a, 0.99, axis=0)), atol=0.03)


@pytest.mark.parametrize("level", [0.01, 0.3, 0.99])
def test_a_mixture_reaches_a_level_where_its_parts_say(level: float) -> None:
    """By a fine grid, of parts that jump, overlap, and are apart."""
    rng = np.random.default_rng(1)
    for _ in range(50):
        parts = []
        for weight in (0.2, 0.8):
            knots = np.sort(rng.uniform(-3, 3, 4))
            knots[1] = knots[0] if rng.random() < 0.3 else knots[1]
            knots = np.full(4, knots[0]) if rng.random() < 0.2 else knots
            parts.append((weight, knots))
        grid = np.linspace(-3.1, 3.1, 200_001)
        # Nudged, so that what jumps is a steep line.
        steep = [(w, k + 1e-9 * np.arange(4)) for w, k in parts]
        total = sum(w * np.interp(grid, k, LEVELS, left=0, right=1) for w, k in steep)
        expected = grid[np.argmax(total >= level)]
        assert mixture_quantile(level, parts) == pytest.approx(expected, abs=1e-4)


def test_what_is_trained_on_stays_in_range() -> None:
    """Between own and pretrained, but never inside of own: at every weight, and at both ends of it."""
    own, before = stats(np.linspace(-4, 9, 101)[:, None]), stats(np.linspace(0, 1, 101)[:, None])
    widths = []
    for weight in (0.0, 0.001, 0.1, 0.5, 1.0):
        found = blend(own, before, weight)
        assert found.q01 <= own.q01
        assert found.q99 >= own.q99
        widths.append(found.std[0])
    assert widths == sorted(widths)
    assert blend(own, before, 1.0) == dataclasses.replace(own, count=202)
    wide = blend(before, own, 0.5)
    assert own.q01[0] < wide.q01[0] < before.q01[0]
    assert blend(before, own, 0.0).q99 == own.q99


def test_a_dim_that_few_episodes_never_moved_has_the_range_of_pretraining() -> None:
    own, before = stats(np.full((40, 1), 0.25)), stats(np.linspace(-1, 1, 1001)[:, None])
    found = blend(own, before, 0.1)
    assert own.degenerate("quantile") == own.names
    assert found.degenerate("quantile") == found.degenerate("zscore") == ()
    assert found.q99[0] - found.q01[0] > 1.9
    constant = blend(own, own, 0.5)
    assert constant.degenerate("zscore") == own.names
    assert constant.std[0] < FLOOR


def test_what_cannot_be_blended() -> None:
    one, two = stats(np.zeros((2, 1))), stats(np.zeros((2, 2)))
    with pytest.raises(ValueError, match="expected the same ones"):
        blend(one, two, 0.5)
    with pytest.raises(ValueError, match=r"weight=1.5, expected a number in \[0, 1\]"):
        blend(one, one, 1.5)
