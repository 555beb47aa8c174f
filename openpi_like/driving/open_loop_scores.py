"""Results of open-loop evaluation: one line per frame, and the two tables of the field with intervals.

Intervals are at 95 %. Means, and shares that are means of several steps, are bootstrapped: episodes, not frames, are
drawn, as frames of an episode are alike. A share at one step has Wilson's, which takes frames for independent; so has
any share of which nothing, or everything, was seen, where a bootstrap would say that it is certain.
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from openpi_like.driving.open_loop import SIM_RULES, Judged
from openpi_like.driving.planning_metrics import SECONDS, STEPS_PER_S, PlanningRules, distances
from openpi_like.json_lines import append_line, whole_lines
from openpi_like.serve.evaluation import wilson

CONVENTIONS = {"uniad": "UniAD: at 1, 2 and 3 s", "stp3": "ST-P3: means up to 1, 2 and 3 s"}
METRICS = ("l2", "collision", "exact_collision")
"""Metres; shares on the grid as published, and of boxes with headings."""
CONSTANT_VELOCITY, STANDING_STILL, DRIVERS_PLAN = "constant velocity", "standing still", "driver's plan"
BASELINES = (CONSTANT_VELOCITY, STANDING_STILL, DRIVERS_PLAN)
"""What needs no policy. The last one is what policies are trained on: the truth is a disturbed drive, which even it
misses by some."""
_DRAWS, _SEED = 2000, 20_11

Table = dict[str, dict[str, dict[str, list[float | None]]]]
"""Convention -> metric -> "1s", "2s", "3s", "avg" -> value, and the ends of its interval, None where there is none."""


@dataclasses.dataclass(frozen=True)
class FrameResult:
    """One frame.

    data: digest of the dataset's frames. label: of the policy, "" where none was asked. source: contract and step of
    its weights, None where none was asked. episode, step: of the split, and in the episode. against: see
    `openpi_like.driving.open_loop`. valid: which waypoints of the truth are known. truth: as if it were a plan.
    answers: of the baselines, and of the policy under its label. latency_ms: of the request, None without one. thought:
    what the policy wrote before.
    """

    data: str
    label: str
    episode: int
    step: int
    task: str
    against: str
    valid: tuple[bool, ...]
    truth: Judged
    answers: dict[str, Judged]
    latency_ms: float | None = None
    source: str | None = None
    thought: str | None = None


def append_frame(path: Path, result: FrameResult) -> None:
    """Adds one line to a JSONL file."""
    append_line(path, dataclasses.asdict(result))


def read_frames(path: Path) -> list[FrameResult]:
    """Returns the frames of a JSONL file, none where there is none; a last line that a kill cut short is removed from
    the file.

    Raises:
        ValueError: a complete line is not a frame; names file and line.
    """
    results = []
    for i, line in enumerate(whole_lines(path)):
        try:
            values = dict(json.loads(line))
            answers = {name: _judged(answer) for name, answer in values["answers"].items()}
            changed = {"valid": tuple(values["valid"]), "truth": _judged(values["truth"]), "answers": answers}
            results.append(FrameResult(**{**values, **changed}))
        except (AttributeError, KeyError, TypeError, ValueError) as e:
            raise ValueError(f"{path}, line {i + 1}: not a frame: {e!r}; remove the file to ask again") from e
    return results


def _judged(values: dict[str, Any]) -> Judged:
    plan = tuple((float(x), float(y)) for x, y in values["plan"])
    return Judged(plan, tuple(values["collided"]), tuple(values["overlapped"]))


class Scored:
    """The numbers of one name, the policy's or a baseline's, of some frames.

    F frames, A waypoints. away: metres to the truth, 0 where it is not valid. collided: on the grid, overlapped: of
    boxes with headings.
    """

    def __init__(self, results: Sequence[FrameResult], name: str, rules: PlanningRules = SIM_RULES) -> None:
        """
        Raises:
            ValueError: no frames, or the name has no answer in some of them.
        """
        lacking = [f"episode {r.episode} step {r.step}" for r in results if name not in r.answers]
        if lacking or not results:
            known = sorted({answer for r in results for answer in r.answers})
            raise ValueError(
                f"no answer of {name!r} at {', '.join(lacking[:3]) or 'any frame'}, expected one at each of "
                f"{len(results)} frames; there are answers of {known}"
            )
        answers, truths = [r.answers[name] for r in results], [r.truth for r in results]
        valid = np.array([r.valid for r in results])
        self.away: Float[np.ndarray, "F A"] = distances(
            np.array([a.plan for a in answers]), np.array([t.plan for t in truths]), valid
        )
        self.collided: Bool[np.ndarray, "F A"] = np.array([a.collided for a in answers])
        if rules.skip_truth_collisions:
            self.collided = self.collided & ~np.array([t.collided for t in truths])
        self.overlapped: Bool[np.ndarray, "F A"] = np.array([a.overlapped for a in answers])
        self._counted = np.ones(valid.shape) if rules.invalid_as_zero else valid.astype(float)
        self._episodes = np.unique([r.episode for r in results], return_inverse=True)[1]

    def table(self) -> Table:
        """Returns the numbers in both conventions; collisions in percent of the frames."""
        every = np.ones(self.away.shape)
        values = {
            "l2": (self.away, self._counted),
            "collision": (self.collided.astype(float), every),
            "exact_collision": (self.overlapped.astype(float), every),
        }
        return {
            convention: {
                metric: {time: self._number(metric, *values[metric], of) for time, of in _times(convention).items()}
                for metric in METRICS
            }
            for convention in CONVENTIONS
        }

    def horizon(self) -> list[list[float | None]]:
        """Returns the mean distance to the truth at each waypoint, and the ends of its interval."""
        at = [functools.partial(np.take, indices=a, axis=-1) for a in range(self.away.shape[1])]
        return [self._number("l2", self.away, self._counted, of) for of in at]

    def _number(
        self, metric: str, values: np.ndarray, counted: np.ndarray, of: Callable[[np.ndarray], np.ndarray]
    ) -> list[float | None]:
        by_episode = [np.zeros((self._episodes.max() + 1, values.shape[1])) for _ in range(2)]
        for sums, x in zip(by_episode, (values, counted), strict=True):
            np.add.at(sums, self._episodes, x)
        with np.errstate(invalid="ignore"):  # a waypoint that is never valid has no mean
            value = float(of(by_episode[0].sum(0) / by_episode[1].sum(0)))
        if np.isnan(value):
            return [None, None, None]
        E, (low, high) = len(by_episode[0]), (np.nan, np.nan)
        if E > 1:
            drawn = np.random.default_rng(_SEED).multinomial(E, np.full(E, 1 / E), _DRAWS)
            with np.errstate(invalid="ignore"):
                low, high = np.nanquantile(of(drawn @ by_episode[0] / (drawn @ by_episode[1])), (0.025, 0.975))
        if metric == "l2":
            return [_or_none(value), _or_none(low), _or_none(high)]
        happened = of(values)  # by frame
        if np.isin(happened, (0.0, 1.0)).all():
            low, high = wilson(round(float(happened.sum())), len(happened))
        return [_or_none(100 * x) for x in (value, low, high)]


def _or_none(x: float) -> float | None:
    return None if np.isnan(x) else float(x)


def _times(convention: str) -> dict[str, Callable[[np.ndarray], np.ndarray]]:
    """Returns what to read off values by waypoint, (..., A), for each column of a convention."""

    def at(s: int) -> Callable[[np.ndarray], np.ndarray]:
        steps = s * STEPS_PER_S
        return (lambda x: x[..., steps - 1]) if convention == "uniad" else (lambda x: x[..., :steps].mean(-1))

    times = {f"{s}s": at(s) for s in SECONDS}
    return {**times, "avg": lambda x: np.mean([of(x) for of in map(at, SECONDS)], axis=0)}


def shown(number: Sequence[float | None], digits: int = 2) -> str:
    """Returns a number with its interval as it is printed."""
    value, low, high = ("?" if x is None else f"{x:.{digits}f}" for x in number)
    return value if low == "?" else f"{value} [{low}, {high}]"


def rows(results: Sequence[FrameResult], label: str = "", rules: PlanningRules = SIM_RULES) -> list[dict[str, Any]]:
    """Returns the scores of the policy, if a label is given, and of the baselines at the same frames."""
    found = []
    for name in ([label] if label else []) + list(BASELINES):
        scored = Scored(results, name, rules)
        found.append({"name": name, "table": scored.table(), "horizon": scored.horizon()})
    return found
