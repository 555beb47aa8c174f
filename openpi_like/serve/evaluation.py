"""Closed-loop results: one line per episode, success rates with Wilson intervals."""

import dataclasses
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from openpi_like.json_lines import append_line, whole_lines


@dataclasses.dataclass(frozen=True)
class Episode:
    """One closed-loop episode.

    policy: its name: "expert", or as who drove it calls it; of serve/rollout.py "trained", "scratch" (trained as long,
    from nothing), "untrained", or "corrected", a trained one from which the expert takes over. seed: of the layout.
    steps: control steps until success or the limit. latency_ms: time of each request as the robot saw it. renderer:
    what drew the frames. expert_steps: at which the expert acted.
    measures: what the simulator measured beside success, see `Sim.measures`.
    thoughts: of a policy that writes before it acts: the control step from which on it acted by each text, and that.
    """

    robot: str
    task: str
    policy: str
    seed: int
    success: bool
    steps: int
    renderer: str
    latency_ms: tuple[float, ...] = ()
    expert_steps: int = 0
    thoughts: tuple[tuple[int, str], ...] = ()
    measures: dict[str, float] = dataclasses.field(default_factory=dict)


def append_episode(path: Path, episode: Episode) -> None:
    """Adds one line to a JSONL file."""
    append_line(path, dataclasses.asdict(episode))


def read_episodes(path: Path) -> list[Episode]:
    """Returns the episodes of a JSONL file; a last line that a kill cut short is removed from the file.

    Raises:
        ValueError: a complete line is not an episode; names file and line.
    """
    episodes = []
    for i, line in enumerate(whole_lines(path)):
        try:
            values = dict(json.loads(line))
            thoughts = tuple((int(step), str(text)) for step, text in values.get("thoughts", ()))
            episodes.append(Episode(**{**values, "latency_ms": tuple(values["latency_ms"]), "thoughts": thoughts}))
        except (ValueError, TypeError, KeyError) as e:
            raise ValueError(f"{path}, line {i + 1}: not an episode: {e}; remove the file to drive again") from e
    return episodes


def that_thought(episodes: Iterable[Episode]) -> list[Episode]:
    """Returns an episode of each robot and task, that of the first layout, in which a policy wrote what it acted by."""
    first: dict[tuple[str, str], Episode] = {}
    for e in sorted(episodes, key=lambda e: e.seed):
        if e.thoughts:
            first.setdefault((e.robot, e.task), e)
    return list(first.values())


def thoughts_text(episode: Episode) -> str:
    """Returns what was written, each text after the control step from which on it was acted by."""
    return "; ".join(f"{step}: {text}" for step, text in episode.thoughts)


def wilson(successes: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """Returns the Wilson score interval of a success rate (z = 1.959964: 95 %).

    Raises:
        ValueError: not 0 <= successes <= n, or no trial.
    """
    if not 0 <= successes <= n or n < 1:
        raise ValueError(f"got {successes} successes of {n} episodes, expected 0 <= successes <= n and n >= 1")
    p, z2 = successes / n, z * z
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = z * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    return max(0.0, centre - half), min(1.0, centre + half)


def paired_difference(a: Sequence[bool], b: Sequence[bool]) -> tuple[float, float]:
    """Returns a 95 % interval of the difference of two success rates, b - a, in the same episodes (Newcombe 1998,
    "Improved confidence intervals for the difference between binomial proportions based on paired data", method 10).

    Raises:
        ValueError: they are not as many.
    """
    _check_same(a, b)
    n = len(a)
    both = sum(x and y for x, y in zip(a, b, strict=True))
    only_a, only_b = sum(a) - both, sum(b) - both
    neither = n - both - only_a - only_b
    (p, q), (lower_p, upper_p), (lower_q, upper_q) = (sum(a) / n, sum(b) / n), wilson(sum(a), n), wilson(sum(b), n)
    spread = sum(a) * (n - sum(a)) * sum(b) * (n - sum(b))
    together = float(both * neither - only_a * only_b)
    together = max(together - n / 2, 0.0) if together > 0 else together  # a correction for continuity
    phi = together / math.sqrt(spread) if spread else 0.0

    def away(x: float, y: float) -> float:
        return math.sqrt(max(x * x - 2 * phi * x * y + y * y, 0.0))

    d = q - p
    return d - away(q - lower_q, upper_p - p), d + away(upper_q - q, p - lower_p)


def _check_same(a: Sequence[bool], b: Sequence[bool]) -> None:
    if len(a) != len(b) or not a:
        raise ValueError(f"got {len(a)} and {len(b)} episodes, expected the same ones of both, and at least one")


def mcnemar(a: Sequence[bool], b: Sequence[bool]) -> float:
    """Returns the exact two-sided p-value that two policies do as well on the same episodes (McNemar 1947).

    Raises:
        ValueError: they are not as many.
    """
    _check_same(a, b)
    only_a, only_b = (sum(x and not y for x, y in zip(u, v, strict=True)) for u, v in ((a, b), (b, a)))
    n = only_a + only_b
    tail = sum(math.comb(n, k) for k in range(min(only_a, only_b) + 1)) / 2**n
    return min(1.0, 2 * tail)


def success_rows(episodes: Iterable[Episode]) -> list[dict[str, Any]]:
    """Returns one row per robot, task and policy, in that order, with its success rate's 95 % interval."""
    groups: dict[tuple[str, str, str], list[bool]] = {}
    for e in episodes:
        groups.setdefault((e.robot, e.task, e.policy), []).append(e.success)
    rows = []
    for (robot, task, policy), outcomes in sorted(groups.items()):
        low, high = wilson(sum(outcomes), len(outcomes))
        counts = {"successes": sum(outcomes), "episodes": len(outcomes)}
        rows.append({"robot": robot, "task": task, "policy": policy, **counts, "wilson_low": low, "wilson_high": high})
    return rows
