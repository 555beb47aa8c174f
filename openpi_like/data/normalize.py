"""Normalisation of states and actions in model space (see `openpi_like.robots.robot`), and back."""

import dataclasses
import functools

import numpy as np
from jaxtyping import Float

from openpi_like.robots.plan import Plan
from openpi_like.robots.robot import Robot, StateField

EPSILON = 1e-6  # as in openpi, so that its statistics give its numbers
# A dimension that varies less than this in the data (in its own unit) carries no scale. It is only centred, so a value
# off the constant comes out at its own size instead of a thousand times larger; and what a policy predicts for it is
# scaled by how little it varies, so that noise in a constant command never reaches the robot.
FLOOR = 1e-4


@dataclasses.dataclass(frozen=True)
class FieldStats:
    """Statistics of the dims of a state or an action, one value per dim. count: values they were computed from."""

    names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    q01: tuple[float, ...]
    q99: tuple[float, ...]
    min: tuple[float, ...]
    max: tuple[float, ...]
    count: int

    def __post_init__(self) -> None:
        problems = []
        for name in ("mean", "std", "q01", "q99", "min", "max"):
            values = getattr(self, name)
            if len(values) != len(self.names):
                problems.append(f"{name} has {len(values)} values, expected {len(self.names)}")
            elif not np.all(np.isfinite(values)):
                problems.append(f"{name} has values that are not finite: {values}")
        if problems:
            raise ValueError(f"FieldStats of {self.names}: " + "; ".join(problems))

    def affine(self, mode: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns (offset, scale, width), float64: normalised = (x - offset) / scale, and x = offset + width * it.

        Scale and width differ in constant dims only, see `FLOOR`.
        """
        constant = np.isin(self.names, self.degenerate(mode))
        if mode == "zscore":
            offset, width = np.array(self.mean), np.array(self.std) + EPSILON
        else:  # (x - q01) / (q99 - q01) * 2 - 1: half the width is the scale
            q01, q99 = np.array(self.q01), np.array(self.q99)
            width = (q99 - q01 + EPSILON) / 2
            offset = np.where(constant, (q01 + q99) / 2, q01 + width)
        return offset, np.where(constant, 1.0, width), width

    def degenerate(self, mode: str) -> tuple[str, ...]:
        """Returns the names of dims that are constant for this mode (below `FLOOR`) and are only centred."""
        widths = self.std if mode == "zscore" else np.array(self.q99) - np.array(self.q01)
        return tuple(name for name, width in zip(self.names, widths, strict=True) if width < FLOOR)


def fields_of(robot: Robot) -> tuple[str, ...]:
    """Returns what the numbers of a robot in model space are made of and how, one line a field."""

    def line(what: str, field: StateField) -> str:
        said = [(f.name, getattr(field, f.name), f.default) for f in dataclasses.fields(field)]
        differs = [f"{k}={v!r}" for k, v, default in said if v != default and k not in ("limits", "names")]
        return f"{what} {', '.join(differs)}"

    lines = [line("state", f) for f in robot.state] + [line("action", f) for f in robot.action]
    timed = any(f.command == "delta" or (robot.plan is not None and f.relative_to is not None) for f in robot.action)
    rate = [f"{robot.control_hz:g} control steps a second"] if timed else []
    return (*lines, *rate, f"stride={robot.stride}")


@dataclasses.dataclass(frozen=True)
class Normalization:
    """How the numbers of one robot are normalised.

    mode: "zscore", (x - mean) / (std + 1e-6); or "quantile", (x - q01) / (q99 - q01 + 1e-6) * 2 - 1, not clipped.
    robot: its name. Stored in checkpoints, as JSON through `openpi_like.config.to_json`.
    action_horizon: length of the chunks that were counted, or None where the source does not say: actions that are
        relative to the state before the chunk spread more in longer ones.
    fields, data: what was counted, of `fields_of` and of datasets, in words; () where the source does not say.
    plan: of a robot whose chunks are plans, how these are normalised; there may be statistics for each entry.
    """

    robot: str
    mode: str
    state: FieldStats
    action: FieldStats
    action_horizon: int | None = None
    fields: tuple[str, ...] = ()
    data: tuple[str, ...] = ()
    plan: Plan | None = None

    def __post_init__(self) -> None:
        if self.mode not in ("zscore", "quantile"):
            raise ValueError(f"Normalization of {self.robot!r}: mode {self.mode!r}, expected 'zscore' or 'quantile'")

    @functools.cached_property
    def _state_affine(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return self.state.affine(self.mode)

    @functools.cached_property
    def _action_affine(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        if self.plan is not None and self.plan.scale == "none":
            one = np.ones(len(self.action.names))
            return 0 * one, one, one
        return self.action.affine(self.mode)

    def statistics_rows(self, x: Float[np.ndarray, "*batch J"]) -> Float[np.ndarray, "..."]:
        """Returns actions (..., A, J); in a row (..., A * J) where entries of a plan have statistics of their own."""
        if self.plan is None or self.plan.scale != "per_step":
            return x
        return x.reshape(*x.shape[:-2], -1)

    def apply_state(self, x: Float[np.ndarray, "*batch De"]) -> Float[np.ndarray, "*batch De"]:
        """Model space -> normalised, float32."""
        return _apply(x, self.state, self._state_affine)

    def apply_actions(self, x: Float[np.ndarray, "*batch J"]) -> Float[np.ndarray, "*batch J"]:
        """Model space -> normalised, float32. Of a robot that plans: whole plans, (..., A, J)."""
        return _apply(self.statistics_rows(x), self.action, self._action_affine).reshape(x.shape)

    def invert_state(self, x: Float[np.ndarray, "*batch De"]) -> Float[np.ndarray, "*batch De"]:
        """Normalised -> model space, float32; constant dims are scaled by how little they vary, see `FLOOR`."""
        return _invert(x, self.state, self._state_affine)

    def invert_actions(self, x: Float[np.ndarray, "*batch J"]) -> Float[np.ndarray, "*batch J"]:
        """Normalised -> model space, float32; constant dims are scaled by how little they vary, see `FLOOR`."""
        return _invert(self.statistics_rows(x), self.action, self._action_affine).reshape(x.shape)

    def check(self, robot: Robot) -> None:
        """Raises ValueError, naming every difference, unless these are statistics of this robot."""
        problems = []
        for what, got, expected in (
            ("robot", self.robot, robot.name),
            ("mode", self.mode, robot.normalization),
            ("state dims", self.state.names, robot.state_names),
            ("action dims", self.action.names, robot.statistics_names),
            ("plan", self.plan, robot.plan),
        ):
            if got != expected:
                problems.append(f"{what} {got}, expected {expected}")
        if problems:
            raise ValueError(
                f"normalisation does not fit robot {robot.name!r}: {'; '.join(problems)}; "
                "compute the statistics again (data/stats.py)"
            )


def _check_size(x: np.ndarray, stats: FieldStats) -> None:
    if x.shape[-1] != len(stats.names):
        raise ValueError(f"got shape {x.shape}, expected last axis {len(stats.names)}: {', '.join(stats.names)}")


def _apply(x: np.ndarray, stats: FieldStats, affine: tuple[np.ndarray, np.ndarray, np.ndarray]) -> np.ndarray:
    _check_size(x, stats)
    offset, scale, _ = affine
    return ((x - offset) / scale).astype(np.float32)


def _invert(x: np.ndarray, stats: FieldStats, affine: tuple[np.ndarray, np.ndarray, np.ndarray]) -> np.ndarray:
    _check_size(x, stats)
    offset, _, width = affine
    return (x * width + offset).astype(np.float32)
