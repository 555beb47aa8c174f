"""How a state answers a command: which lag fits best, whether it is a target or a change, and how far it goes.

A command c of step t is compared with the state s some steps later:
    as a target   c(t) with s(t + lag)
    as a change   c(t) with s(t + lag) - s(t + lag - 1)
so a controller that is done within one step has lag 1 in both. Numbers are in SI units; rotations are compared by the
entries of their matrices as targets, by rotation vectors about axes of the base as changes.
"""

import dataclasses

import numpy as np
from jaxtyping import Float, Int
from scipy.spatial.transform import Rotation

from openpi_like.data.robot_check.robot_sample import RobotSample
from openpi_like.robots.representations import UNITS
from openpi_like.robots.robot import ActionField, StateField

_LAG = 8  # steps looked at before and after; slower arms answer within that at the rates of robot datasets
_PAIRS = 30  # steps below which a correlation says nothing
_TAILS = 0.001  # of the values at each end are cut, so that single glitches do not decide a variance
_WINDOW = 5  # steps over which changes are summed to compare sizes: longer than a controller smears one command


class Series:
    """The numbers of a field over time, as targets and as changes.

    targets: (n, P), SI units, or the entries of rotation matrices. changes: (n, D), the same numbers taken as changes.
    """

    def __init__(self, field: StateField, x: Float[np.ndarray, "n size"]) -> None:
        self._rotation: Rotation | None = None
        if field.rotation is not None:
            self._rotation = field.to_rotation(x)
            self.targets = self._rotation.as_matrix().reshape(len(x), 9)
            self.changes = self._rotation.as_rotvec()
        else:
            self.targets = self.changes = x * UNITS[field.unit][1] if field.gripper is None else field.to_model(x)

    def change(self, now: Int[np.ndarray, "m"], later: Int[np.ndarray, "m"]) -> Float[np.ndarray, "m D"]:
        """Returns what leads from rows `now` to rows `later`."""
        if self._rotation is None:
            return self.targets[later] - self.targets[now]
        return (self._rotation[later] * self._rotation[now].inv()).as_rotvec()

    def change_from(self, other: "Series", row: int, rows: Int[np.ndarray, "m"]) -> Float[np.ndarray, "m D"]:
        """Returns what leads from a row of another series to rows of this one."""
        if self._rotation is None or other._rotation is None:
            return self.targets[rows] - other.targets[row]
        return (self._rotation[rows] * other._rotation[row].inv()).as_rotvec()


@dataclasses.dataclass(frozen=True)
class Response:
    """What is known of one command and its state.

    lags: (L,). target, change: (L,), part of the command's variance that the state explains at each lag, taken as a
        target and as a change; 0 where they move in opposite directions. NaN where nothing moves, or too few steps are
        there. command: as what the robot describes it.
    """

    lags: Int[np.ndarray, "L"]
    target: Float[np.ndarray, "L"]
    change: Float[np.ndarray, "L"]
    command: str

    @classmethod
    def measure(cls, sample: RobotSample, action: ActionField, state: StateField) -> "Response":
        """Measures a command and the state that it moves."""
        c = Series(action, sample.commands[action.name])
        s = Series(state, sample.states[state.name])
        most = _longest_lag(sample)
        lags = np.arange(-most, most + 1)
        target, change = np.full(len(lags), np.nan), np.full(len(lags), np.nan)
        for i, lag in enumerate(lags.tolist()):
            t = sample.rows_with(0, lag)
            if len(t) >= _PAIRS:
                target[i] = explained(c.targets[t], s.targets[t + lag])
            t = sample.rows_with(0, lag - 1, lag)
            if len(t) >= _PAIRS:
                change[i] = explained(c.changes[t], s.change(t + lag - 1, t + lag))
        return cls(lags, target, change, action.command)

    @property
    def fit(self) -> Float[np.ndarray, "L"]:
        """Part of the variance explained at each lag, as the robot describes the command."""
        return self.target if self.command == "absolute" else self.change

    @property
    def lag(self) -> int | None:
        """Steps after which the state is, or moves, as commanded; None where it cannot be told."""
        return None if np.isnan(self.fit).all() else int(self.lags[np.nanargmax(self.fit)])

    @property
    def best_target(self) -> float:
        """The best of `target`, NaN where it cannot be told."""
        return _best(self.target)

    @property
    def best_change(self) -> float:
        """The best of `change`, NaN where it cannot be told."""
        return _best(self.change)


def _best(x: np.ndarray) -> float:
    return float("nan") if np.isnan(x).all() else float(np.nanmax(x))


def size_ratio(sample: RobotSample, action: ActionField, state: StateField, lag: int, seconds: float) -> float | None:
    """Returns how many times as far as the state moves its command says, in SI units; None where it cannot be told.

    Of targets it is the ratio of spreads, of changes and rates that of their sums over some steps, which does not
    depend on how a controller smears them. lag: see `Response`. seconds: for which a rate is held.
    """
    c, s = Series(action, sample.commands[action.name]), Series(state, sample.states[state.name])
    if action.command == "absolute":
        t = sample.rows_with(0, lag)
        a, b = c.targets[t], s.targets[t + lag]
    else:
        window = int(np.clip(np.median(sample.lengths) // 2, 1, _WINDOW))
        t = sample.rows_with(0, window - 1, lag - 1, lag - 1 + window)
        a = sum((c.changes[t + k] for k in range(window)), np.zeros((len(t), c.changes.shape[1])))
        a, b = a * (seconds if action.command == "velocity" else 1.0), s.change(t + lag - 1, t + lag - 1 + window)
    if len(t) < _PAIRS:
        return None
    a, b, moving = _prepared(a, b)
    with np.errstate(invalid="ignore", divide="ignore"):
        alike = moving & ((a * b).mean(axis=0) > 0.3 * np.sqrt((a * a).mean(axis=0) * (b * b).mean(axis=0)))
    if not alike.any():
        return None
    return float(np.sqrt((a[:, alike] ** 2).sum() / (b[:, alike] ** 2).sum()))


def follows_which(sample: RobotSample, action: ActionField, state: StateField) -> Float[np.ndarray, "D D"]:
    """Returns the part of the variance of each dim of a command that each dim of the state explains, at its best lag.

    For fields that are no rotations. Rows are dims of the command; 0 where nothing moves.
    """
    c, s = Series(action, sample.commands[action.name]), Series(state, sample.states[state.name])
    best = np.zeros((action.size, state.size))
    for lag in range(1, _longest_lag(sample) + 1):
        t = sample.rows_with(0, lag - 1, lag)
        if len(t) < _PAIRS:
            continue
        a, b, _ = _prepared(
            c.targets[t], s.targets[t + lag] if action.command == "absolute" else s.change(t + lag - 1, t + lag)
        )
        size = np.sqrt(np.outer((a * a).sum(axis=0), (b * b).sum(axis=0)))
        best = np.maximum(best, np.maximum(a.T @ b / np.maximum(size, 1e-300), 0) ** 2)
    return best


def _longest_lag(sample: RobotSample) -> int:
    """Half an episode at most: of longer lags too few steps are left."""
    return int(np.clip((np.median(sample.lengths) - 1) // 2, 1, _LAG))


def explained(a: Float[np.ndarray, "m D"], b: Float[np.ndarray, "m D"]) -> float:
    """Returns the part of the variance of a that b explains, each dim with its own positive factor; NaN where none is.

    Dims count by their variance.
    """
    a, b, moving = _prepared(a, b)
    if not moving.any():
        return float("nan")
    a, b = a[:, moving], b[:, moving]
    weight = (a * a).sum(axis=0)
    r = (a * b).sum(axis=0) / np.sqrt(weight * (b * b).sum(axis=0))
    return float(np.maximum(r, 0) ** 2 @ weight / weight.sum())


def _prepared(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Both without their means and without single glitches, and the dims (D,) in which both move."""
    moving = np.ones(a.shape[1], bool)
    out = []
    for x in (a, b):
        # Values that are there, so that of few the greatest is cut too, and does not pull an interpolated quantile.
        low = np.quantile(x, _TAILS, axis=0, method="higher")
        high = np.quantile(x, 1 - _TAILS, axis=0, method="lower")
        # Differences of float32 numbers are no movement.
        moving &= high - low > 1e-5 * np.maximum(np.abs(low), np.abs(high)) + 1e-9
        x = np.clip(x, low, high)
        out.append(x - x.mean(axis=0))
    return out[0], out[1], moving
