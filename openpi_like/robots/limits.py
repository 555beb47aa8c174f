"""What the joints of a robot may do: positions, speeds and accelerations, and which commands ask for more."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

# Of the size of a bound: so much beyond it is rounding of float32, which differences between steps magnify.
_ROUNDING = 1e-4

Bound = float | tuple[float | None, ...] | None


@dataclasses.dataclass(frozen=True)
class Limits:
    """What each dim of a field may do, in robot space (the dataset's units; per second, and per second squared).

    Each of the four is one number for all dims, or a tuple with one per dim; None is not known, or without limit.

    lower, upper: of the numbers themselves: of positions, or of commands that are changes or rates.
    velocity: greatest speed: of an absolute command (or a state) from step to step, of a change times the rate, or of
        a commanded velocity itself. acceleration: greatest change of that speed per second.

    Raises:
        ValueError: lists every number that is not finite, or has the wrong sign, and each lower not below its upper.
    """

    lower: Bound = None
    upper: Bound = None
    velocity: Bound = None
    acceleration: Bound = None

    def __post_init__(self) -> None:
        problems = []
        for name, bound in self._bounds.items():
            known = [x for x in (bound if isinstance(bound, tuple) else (bound,)) if x is not None]
            if wrong := [x for x in known if not math.isfinite(x)]:
                problems.append(f"{name} {wrong}, expected finite numbers, or None where there is no limit")
            elif name in ("velocity", "acceleration") and any(x <= 0 for x in known):
                problems.append(f"{name} {bound}, expected numbers > 0")
        sizes = {name: len(bound) for name, bound in self._bounds.items() if isinstance(bound, tuple)}
        if len(set(sizes.values())) > 1:
            problems.append(f"numbers per bound {sizes}, expected equally many")
        elif not problems:
            lower, upper, *_ = self.arrays(max(sizes.values(), default=1))
            if (lower >= upper).any():
                problems.append(f"lower {self.lower} and upper {self.upper}, expected each lower below its upper")
        if problems:
            raise ValueError("limits: " + "; ".join(problems))

    @property
    def _bounds(self) -> dict[str, Bound]:
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}

    def size_problems(self, size: int) -> list[str]:
        """Returns which bounds do not have one number for each of so many dims."""
        return [
            f"limits.{name} has {len(bound)} numbers, expected {size}, or one number for all dims"
            for name, bound in self._bounds.items()
            if isinstance(bound, tuple) and len(bound) != size
        ]

    def arrays(self, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Returns lower, upper, velocity and acceleration of so many dims, float64; infinite where not known."""
        wide = ((b if isinstance(b, tuple) else (b,) * size) for b in self._bounds.values())
        signs = (-1, 1, 1, 1)
        lower, upper, velocity, acceleration = (
            np.array([sign * np.inf if x is None else x for x in bound], np.float64)
            for sign, bound in zip(signs, wide, strict=True)
        )
        return lower, upper, velocity, acceleration

    def excess(
        self, values: Float[np.ndarray, "*batch T D"], hz: float, command: str = "absolute"
    ) -> dict[str, Float[np.ndarray, "*batch T D"]]:
        """Returns by how much a sequence of values goes beyond each bound: 0 within it, and where none is known.

        values: consecutive commands or states, in robot space, `hz` of them per second; what was commanded last before
            them, to judge the first step's speed too. command: what they are, see `ActionField`.

        Raises:
            ValueError: values are not finite.
        """
        x = np.asarray(values, np.float64)
        if not np.isfinite(x).all():
            where = np.argwhere(~np.isfinite(x))
            raise ValueError(f"{len(where)} values are not finite, the first at {where[0].tolist()} of {x.shape}")
        lower, upper, velocity, acceleration = self.arrays(x.shape[-1])
        speed = {"absolute": _rate(x, hz), "delta": x * hz, "velocity": x}[command]
        change = _rate(speed, hz)
        if command == "absolute" and x.shape[-2] > 1:
            change[..., 1, :] = 0.0  # the first step has no speed
        known = [np.where(np.isfinite(bound), abs(bound), 0.0) for bound in (lower, upper)]
        size = np.maximum(*known)
        found = {
            "lower": _beyond(-x, -lower, size),
            "upper": _beyond(x, upper, size),
            "velocity": _beyond(abs(speed), velocity, velocity),
            "acceleration": _beyond(abs(change), acceleration, acceleration),
        }
        return {name: by.astype(np.float32) for name, by in found.items()}


def joined(parts: Sequence[tuple[Limits | None, int]]) -> Limits:
    """Returns the limits of a vector, from those of its parts and how many dims each of them has."""
    names = [f.name for f in dataclasses.fields(Limits)]
    rows: dict[str, list[float | None]] = {name: [] for name in names}
    for limits, size in parts:
        for name in names:
            bound = None if limits is None else getattr(limits, name)
            rows[name] += bound if isinstance(bound, tuple) else (bound,) * size
    return Limits(**{name: tuple(row) for name, row in rows.items()})


def excess_problems(
    excess: dict[str, Float[np.ndarray, "*batch T D"]], limits: Limits, names: Sequence[str]
) -> list[str]:
    """Returns a line per dim and bound that `excess` goes beyond: how far, where first worst, and how often.

    limits: those of all D dims. names: of the dims.
    """
    bounds = dict(zip(excess, limits.arrays(len(names)), strict=True))
    problems = []
    for d, dim in enumerate(names):
        for kind, by in excess.items():
            if not (count := int((by[..., d] > 0).sum())):
                continue
            steps = by[..., d]
            at = ", ".join(map(str, np.unravel_index(int(steps.argmax()), steps.shape)))
            got = bounds[kind][d] + steps.max() * (-1 if kind == "lower" else 1)
            problems.append(
                f"{dim}: {kind} limit {bounds[kind][d]:.4g}, got {got:.4g} at step {at} ({count} of {steps.size} steps)"
            )
    return problems


def _rate(x: np.ndarray, hz: float) -> np.ndarray:
    return np.diff(x, axis=-2, prepend=x[..., :1, :]) * hz


def _beyond(x: np.ndarray, bound: np.ndarray, size: np.ndarray) -> np.ndarray:
    by = x - bound
    return np.where(by > _ROUNDING * size, by, 0.0)
