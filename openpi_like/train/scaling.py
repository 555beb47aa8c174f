"""What more weights, demonstrations and steps are worth: a curve through the held-out losses of some runs.

The form is that of Hoffmann et al. 2022 (arXiv 2203.15556, eq. 2) with a third term, since steps here go through the
same demonstrations again and again: L(N, D, T) = E + A N^-a + B D^-b + C T^-c.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from scipy.optimize import least_squares

PARTS = ("weights", "demonstrations", "samples")


@dataclasses.dataclass(frozen=True)
class Run:
    """One run. weights: of the policy. demonstrations: episodes that it learned from. samples: steps times batch size.
    loss: held out, of the weights that were driven. success: closed loop, of how many episodes; None where not driven.
    """

    weights: int
    demonstrations: int
    samples: int
    loss: float
    success: tuple[int, int] | None = None

    def sizes(self) -> np.ndarray:
        """(3,) of `PARTS`."""
        return np.array([self.weights, self.demonstrations, self.samples], np.float64)


@dataclasses.dataclass(frozen=True)
class Curve:
    """A fitted curve. floor: E. scale: what each part of `PARTS` adds to it at the sizes `middle`, in the middle of the
    runs that were fitted. exponent: a, b, c.
    """

    floor: float
    scale: tuple[float, float, float]
    exponent: tuple[float, float, float]
    middle: tuple[float, float, float]

    def loss(self, sizes: np.ndarray) -> float:
        """Returns the loss of a run of (3,) sizes."""
        p = np.array([self.floor, *self.scale, *self.exponent])
        return float(_losses(p, (np.asarray(sizes) / self.middle)[None])[0])


def _losses(p: np.ndarray, relative: np.ndarray) -> np.ndarray:
    return p[0] + (p[1:4] * relative ** -p[4:7]).sum(-1)


def fit(runs: Sequence[Run], start: Curve | None = None) -> Curve:
    """Returns the curve whose logarithm is nearest to that of the losses, in a sum that outliers do not rule (Huber).

    start: where to look from; None looks from several places.

    Raises:
        ValueError: fewer runs than it has numbers, seven; or they do not differ in one of the three sizes.
    """
    sizes = np.array([run.sizes() for run in runs])
    losses = np.array([run.loss for run in runs])
    problems = [f"{len(runs)} runs, expected at least 8: the curve has seven numbers"] if len(runs) < 8 else []
    problems += [f"all runs have the same {part}" for part, of in zip(PARTS, sizes.T, strict=False) if len(set(of)) < 2]
    if not (losses > 0).all() or not np.isfinite(losses).all():
        problems.append(f"losses {losses.tolist()}, expected numbers above 0")
    if problems:
        raise ValueError("no curve: " + "; ".join(problems))
    middle = np.exp(np.log(sizes).mean(0))
    relative, least = sizes / middle, losses.min()

    def off(q: np.ndarray) -> np.ndarray:
        return np.log(_losses(np.exp(q), relative)) - np.log(losses)

    def slope(q: np.ndarray) -> np.ndarray:
        p = np.exp(q)
        parts = p[1:4] * relative ** -p[4:7]
        each = np.concatenate([np.full((len(runs), 1), p[0]), parts, -parts * np.log(relative) * p[4:7]], axis=1)
        return each / _losses(p, relative)[:, None]

    starts = [
        np.log([floor * least, *[part * least] * 3, *[exponent] * 3])
        for floor in (0.2, 0.6)
        for part in (0.05, 0.2)
        for exponent in (0.2, 0.6)
    ]
    low = np.log([1e-3 * least, *[1e-4 * least] * 3, *[1e-2] * 3])
    high = np.log([least, *[10 * least] * 3, *[3.0] * 3])
    if start is not None:
        at = np.array(start.middle) / middle  # the same curve, about the middle of these runs
        scale = np.array(start.scale) * at ** np.array(start.exponent)
        starts = [np.clip(np.log([start.floor, *scale, *start.exponent]), low + 1e-6, high - 1e-6)]
    found = [least_squares(off, q, slope, bounds=(low, high), loss="huber", f_scale=0.02) for q in starts]
    p = np.exp(min(found, key=lambda f: f.cost).x)
    return Curve(float(p[0]), *(tuple(map(float, of)) for of in (p[1:4], p[4:7], middle)))  # type: ignore[arg-type]


def predict(runs: Sequence[Run], sizes: np.ndarray, draws: int = 200, seed: int = 0) -> tuple[float, float, float]:
    """Returns the loss of a run of (3,) other sizes, and an interval that holds 95 % of what curves through other draws
    of these runs say, each with the error of one of them (a bootstrap of pairs, then of residuals, which are widened by
    the seven numbers that were fitted). It knows nothing of how far the form holds beyond the runs.
    """
    curve, rng = fit(runs), np.random.default_rng(seed)
    wider = (len(runs) / (len(runs) - 7)) ** 0.5
    residuals = [wider * np.log(run.loss / curve.loss(run.sizes())) for run in runs]
    said = list[float]()
    while len(said) < draws:
        drawn = [runs[i] for i in rng.integers(0, len(runs), len(runs))]
        if len(set(drawn)) < 8 or any(len({run.sizes()[k] for run in drawn}) < 2 for k in range(3)):
            continue
        said.append(fit(drawn, curve).loss(sizes) * float(np.exp(rng.choice(residuals))))
    low, high = np.quantile(said, (0.025, 0.975))
    return curve.loss(sizes), float(low), float(high)


def success_of_loss(runs: Sequence[Run]) -> tuple[float, float]:
    """Returns (k, x) of success = 1 / (1 + exp(k (log loss - x))), the likeliest for the episodes of all runs.

    Raises:
        ValueError: none was driven.
    """
    driven = [(np.log(run.loss), *run.success) for run in runs if run.success is not None]
    if not driven:
        raise ValueError("no run was driven, so that nothing is known of success")
    x, done, of = (np.array(column, np.float64) for column in zip(*driven, strict=True))

    def misfit(q: np.ndarray) -> np.ndarray:
        rate = np.clip(1 / (1 + np.exp(np.exp(q[0]) * (x - q[1]))), 1e-6, 1 - 1e-6)
        share = np.clip(done / of, 1e-6, 1 - 1e-6)  # the deviance of a binomial is a sum of squares of these
        deviance = share * np.log(share / rate) + (1 - share) * np.log((1 - share) / (1 - rate))
        return np.sqrt(2 * of * np.maximum(deviance, 0.0)) * np.sign(share - rate)

    found = [least_squares(misfit, [np.log(k), x.mean()]) for k in (1.0, 4.0)]
    k, middle = min(found, key=lambda f: f.cost).x
    return float(np.exp(k)), float(middle)


def success(of_loss: tuple[float, float], loss: float) -> float:
    """Returns the rate of success at a loss. of_loss: see `success_of_loss`."""
    k, x = of_loss
    return float(1 / (1 + np.exp(k * (np.log(loss) - x))))
