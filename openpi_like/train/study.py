"""Studies: several configs, trained on the same data for the same steps, and driven in the same episodes."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from openpi_like.config import near_names, to_json
from openpi_like.serve.evaluation import wilson
from openpi_like.train.config import TrainConfig

SAME = ("data", "batch_size", "steps", "seed")  # kept equal between the arms that are driven


@dataclasses.dataclass(frozen=True)
class Arm:
    """One row of a study.

    config: file of its run. set: dotted overrides of it. start: name of an arm above whose weights it begins with,
    besides those that `reinitialize` names. driven: False where it only prepares another one. own_statistics: it is
    normalised by what it is trained on, computed before it is.
    """

    config: str
    set: tuple[str, ...] = ()
    start: str | None = None
    reinitialize: tuple[str, ...] = ()
    driven: bool = True
    own_statistics: bool = False


def slug(name: str) -> str:
    """Returns the name of an arm as one of a file."""
    return name.replace(", ", "_").replace(" ", "_")


@dataclasses.dataclass(frozen=True)
class Study:
    """A table of runs, by name, in order. The first that is driven is what others are compared with.

    robot, tasks, episodes: what they are driven with, and how many episodes of each task. varies: of what is otherwise
    kept equal (`SAME`), that which the study is about. best: drive the step of
    each run with the best score, not the last.
    """

    arms: Mapping[str, Arm]
    robot: str
    tasks: tuple[str, ...]
    episodes: int
    varies: tuple[str, ...] = ()
    best: bool = False

    def __post_init__(self) -> None:
        problems, above, files = [], set[str](), dict[str, str]()
        problems += [f"varies={v!r}; {near_names(v, SAME)}" for v in self.varies if v not in SAME]
        for name, arm in self.arms.items():
            if "/" in name or files.setdefault(slug(name), name) != name:
                other = "" if "/" in name else f", as arm {files[slug(name)]!r}"
                problems.append(f"arm {name!r}: its files would be {slug(name)!r}{other}; give it another name")
            if arm.start is not None and arm.start not in above:
                problems.append(f"arm {name!r}: start={arm.start!r}, expected one of the arms above: {sorted(above)}")
            if arm.start is None and arm.reinitialize:
                problems.append(f"arm {name!r}: reinitialize={arm.reinitialize} without a start")
            above.add(name)
        if not any(arm.driven for arm in self.arms.values()):
            problems.append("no arm is driven, expected one at least")
        if self.episodes < 1 or not self.tasks:
            problems.append(f"episodes={self.episodes}, tasks={self.tasks}, expected at least one of each")
        if problems:
            raise ValueError("Study: " + "; ".join(problems))


def learning_curve(
    config: str,
    episodes: Sequence[int] = (5, 10, 25, 50),
    *,
    name: str = "{} episodes",
    start: str | None = None,
    reinitialize: tuple[str, ...] = (),
    set: tuple[str, ...] = (),
) -> dict[str, Arm]:
    """Returns an arm for each number of episodes: the first so many of the first dataset of a run, and no more.

    Their statistics are of these episodes alone, as they would be if there were no others; the held-out ones of the
    config are the same for all. Give them to a `Study` whose `varies` is ("data",).
    config, start, reinitialize, set: see `Arm`. name: of an arm, for its number of episodes.

    Raises:
        ValueError: a number of episodes is not above the one before it.
    """
    if not episodes or list(episodes) != sorted({*episodes}) or episodes[0] < 1:
        raise ValueError(f"episodes={tuple(episodes)}, expected numbers from 1 on, each greater than the one before")
    return {
        name.format(n): Arm(
            config, (*set, f"data.entries.0.split=train[:{n}]"), start, reinitialize, own_statistics=True
        )
        for n in episodes
    }


def unequal(configs: Mapping[str, TrainConfig], varies: Sequence[str] = ()) -> list[str]:
    """Returns in what the runs of driven arms differ that a study keeps equal: `SAME` without what it varies."""
    first = next(iter(configs), "")
    return [
        f"arm {name!r}: {field} is not that of {first!r}"
        for name, config in configs.items()
        for field in SAME
        if field not in varies and to_json(getattr(config, field)) != to_json(getattr(configs[first], field))
    ]


def newcombe(a: Sequence[bool], b: Sequence[bool]) -> tuple[float, float]:
    """Returns a 95 % interval of the difference of two success rates, b - a (Newcombe 1998, method 10)."""
    (p, n), (q, m) = ((sum(x) / len(x), len(x)) for x in (a, b))
    (lower_a, upper_a), (lower_b, upper_b) = wilson(sum(a), n), wilson(sum(b), m)
    d = q - p
    return d - math.hypot(q - lower_b, upper_a - p), d + math.hypot(upper_b - q, p - lower_a)


def mcnemar(a: Sequence[bool], b: Sequence[bool]) -> float:
    """Returns the exact two-sided p-value that two policies do as well on the same episodes (McNemar 1947).

    Raises:
        ValueError: they are not as many.
    """
    if len(a) != len(b):
        raise ValueError(f"got {len(a)} and {len(b)} episodes, expected the same ones of both")
    only_a, only_b = (sum(x and not y for x, y in zip(u, v, strict=True)) for u, v in ((a, b), (b, a)))
    n = only_a + only_b
    tail = sum(math.comb(n, k) for k in range(min(only_a, only_b) + 1)) / 2**n
    return min(1.0, 2 * tail)


def study_rows(outcomes: Mapping[str, Mapping[tuple[str, int], bool]]) -> list[dict[str, Any]]:
    """Returns a row per arm: success per task and in all, with intervals, and beside the first arm.

    outcomes: arm -> (task, seed) -> success.

    Raises:
        ValueError: the arms were not driven in the same episodes.
    """
    (base_name, base), *_ = outcomes.items()
    rows = []
    for name, found in outcomes.items():
        if found.keys() != base.keys():
            raise ValueError(f"arm {name!r}: its episodes are not those of {base_name!r}; drive both again")
        episodes = sorted(found)
        ours, theirs = [found[e] for e in episodes], [base[e] for e in episodes]
        low, high = wilson(sum(ours), len(ours))
        tasks = {}
        for task in sorted({t for t, _ in episodes}):
            of = [found[e] for e in episodes if e[0] == task]
            tasks[task] = {"successes": sum(of), "episodes": len(of), "interval": wilson(sum(of), len(of))}
        row = {"arm": name, "successes": sum(ours), "episodes": len(ours), "interval": (low, high), "tasks": tasks}
        if name != base_name:
            row |= {"difference": newcombe(theirs, ours), "p": mcnemar(theirs, ours)}
        rows.append(row)
    return rows
