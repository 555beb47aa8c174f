"""The curve through runs of many sizes: it finds the law that made them, and says what it cannot."""

import runpy
from typing import Any

import numpy as np
import pytest

from openpi_like.train.scaling import Run, fit, predict, success, success_of_loss
from tests.conftest import REPOSITORY

STUDY = runpy.run_path(str(REPOSITORY / "configs" / "studies" / "scaling.py"))
PROGRAM = runpy.run_path(str(REPOSITORY / "train" / "scaling.py"), run_name="scaling")


def law(weights: float, demonstrations: float, samples: float) -> float:
    return 0.1 + 0.06 * (weights / 1e6) ** -0.4 + 0.1 * (demonstrations / 100) ** -0.5 + 0.2 * (samples / 5e4) ** -0.9


def runs(noise: float = 0.0) -> list[Run]:
    """Of the sizes of the study, with losses by the law, and success that follows from them."""
    rng, found = np.random.default_rng(0), []
    for width, demonstrations, steps in STUDY["RUNS"]:
        sizes = (width**2 * 100, demonstrations, steps * 32)
        loss = law(*sizes) * float(np.exp(noise * rng.standard_normal()))
        rate = 1 / (1 + np.exp(5 * (np.log(loss) - np.log(0.45))))
        found.append(Run(*sizes, loss, (round(60 * rate), 60)))
    return found


LARGER = np.array([192**2 * 100, 360, 6_000 * 32], float)


def test_the_law_is_found_again_beyond_the_runs() -> None:
    curve = fit(runs())
    assert curve.loss(LARGER) == pytest.approx(law(*LARGER), rel=0.02)
    assert curve.exponent[2] == pytest.approx(0.9, abs=0.1)
    for run in runs():
        assert curve.loss(run.sizes()) == pytest.approx(run.loss, rel=5e-3)


def test_noise_widens_the_interval_which_holds_the_outcome() -> None:
    clean, noisy = predict(runs(), LARGER, draws=10), predict(runs(0.03), LARGER, draws=20)
    assert clean[2] - clean[1] < noisy[2] - noisy[1]
    for _, low, high in (clean, noisy):
        assert low * 0.99 <= law(*LARGER) <= high * 1.01
    assert predict(runs(0.03), LARGER, draws=3) == predict(runs(0.03), LARGER, draws=3)


def test_success_follows_loss() -> None:
    k, middle = of = success_of_loss(runs())
    assert (k, np.exp(middle)) == (pytest.approx(5, rel=0.15), pytest.approx(0.45, rel=0.03))
    assert success(of, float(np.exp(middle))) == pytest.approx(0.5)
    assert success(of, 0.2) > 0.9 > 0.1 > success(of, 1.0)
    with pytest.raises(ValueError, match="no run was driven"):
        success_of_loss([Run(1, 1, 1, 0.5)])


def test_runs_that_no_curve_goes_through_are_refused() -> None:
    same = [Run(1, d, t, 0.5) for d, t in ((1, 2), (2, 1), (3, 3))]
    with pytest.raises(ValueError, match=r"3 runs, expected at least 8: .*; all runs have the same weights"):
        fit(same)
    with pytest.raises(ValueError, match=r"losses \[.*nan.*\], expected numbers above 0"):
        fit([*runs()[:9], Run(1, 2, 3, float("nan"))])


def test_runs_of_the_study_are_what_they_are_called() -> None:
    names = list(STUDY["configs"])
    assert len(names) == len(set(names)) == 15
    larger: Any = names[-1]
    for name, config in STUDY["configs"].items():
        width, demonstrations, steps = PROGRAM["sizes_of"](name)
        assert config.model.backbone.vlm.width == config.model.backbone.vision.width == width
        assert config.data.entries[0].split == f"train[:{demonstrations}]"
        assert (config.steps, config.optimizer.decay_steps) == (steps, max(100, steps))
        assert all(a <= b for a, b in zip((width, demonstrations, steps), PROGRAM["sizes_of"](larger), strict=True))
