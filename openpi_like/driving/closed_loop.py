"""What closed-loop drives of several policies come to: success, what went wrong, comfort, and who is better."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from openpi_like.robots.sims.sim import HELD_OUT_SEED
from openpi_like.serve.evaluation import Episode, mcnemar, wilson

MEASURES = ("progress", "collided", "off_road", "seconds", "acceleration", "lateral", "jerk")
"""What the simulated car measures of a drive, see its `measures`."""
GENTLE = 3.0
"""m/s^2; drives whose largest acceleration, ahead or aside, stays below are counted."""


def problems(drives: Mapping[str, Sequence[Episode]]) -> list[str]:
    """Returns what is wrong with drives, by policy: none, one twice, a measure that is missing, or a layout that
    demonstrations may have used."""
    found = []
    for policy, episodes in drives.items():
        places = [(e.task, e.seed) for e in episodes]
        twice = sorted({p for p in places if places.count(p) > 1})
        missing = sorted({m for e in episodes for m in MEASURES if m not in e.measures})
        if not episodes:
            found.append(f"{policy}: no drives; drive with serve/rollout.py")
        if twice:
            found.append(f"{policy}: {twice[0]} was driven twice; remove one of them")
        if seeds := sorted({e.seed for e in episodes if e.seed < HELD_OUT_SEED}):
            found.append(f"{policy}: layout {seeds[0]} is one for demonstrations, expected {HELD_OUT_SEED} or more")
        if missing:
            found.append(f"{policy}: no measure {', '.join(missing)}, expected drives of the simulated car")
    return found


def reference(drives: Mapping[str, Sequence[Episode]]) -> str:
    """Returns the policy that others are compared with: the expert, or the first one."""
    experts = [policy for policy, episodes in drives.items() if all(e.policy == "expert" for e in episodes)]
    return (experts or list(drives))[0]


def policy_rows(drives: Mapping[str, Sequence[Episode]]) -> list[dict[str, Any]]:
    """Returns a row per policy, the one that others are compared with first.

    successes of episodes, with a 95 % interval; counts of collided and off_road; progress, the mean; seconds, the
    median of those that succeeded, None without one; gentle and gentle_aside, shares of drives, see `GENTLE`; largest,
    means of the largest acceleration, lateral acceleration (m/s^2) and jerk (m/s^3); tasks: task -> successes, episodes
    and interval. Of others than the first: beside, paired (episodes that both drove) and p of McNemar's exact test,
    None where there are none; better and worse: episodes that only this one, or only the other, did.

    Raises:
        ValueError: `problems` of the drives, all of them.
    """
    if wrong := problems(drives):
        raise ValueError("drives cannot be compared:\n  " + "\n  ".join(wrong))
    if not drives:
        return []
    first = reference(drives)
    rows = []
    for policy in [first, *(p for p in drives if p != first)]:
        row = {"policy": policy, **_counts(drives[policy]), **_measured(drives[policy])}
        tasks = sorted({e.task for e in drives[policy]})
        row["tasks"] = {task: _counts([e for e in drives[policy] if e.task == task]) for task in tasks}
        rows.append(row | (_paired(drives[first], drives[policy], first) if policy != first else {}))
    return rows


def _counts(episodes: Sequence[Episode]) -> dict[str, Any]:
    successes = sum(e.success for e in episodes)
    return {"successes": successes, "episodes": len(episodes), "interval": wilson(successes, len(episodes))}


def _measured(episodes: Sequence[Episode]) -> dict[str, Any]:
    of = {measure: np.array([e.measures[measure] for e in episodes]) for measure in MEASURES}
    arrived = of["seconds"][[e.success for e in episodes]]
    latency = [ms for e in episodes for ms in e.latency_ms]
    return {
        "collided": int(of["collided"].sum()),
        "off_road": int(of["off_road"].sum()),
        "progress": float(of["progress"].mean()),
        "seconds": float(np.median(arrived)) if len(arrived) else None,
        "gentle": float((of["acceleration"] < GENTLE).mean()),
        "gentle_aside": float((of["lateral"] < GENTLE).mean()),
        "largest": {measure: float(of[measure].mean()) for measure in ("acceleration", "lateral", "jerk")},
        "latency_ms": float(np.median(latency)) if latency else None,
    }


def _paired(base: Sequence[Episode], ours: Sequence[Episode], name: str) -> dict[str, Any]:
    outcomes = [{(e.task, e.seed): e.success for e in episodes} for episodes in (base, ours)]
    both = sorted(outcomes[0].keys() & outcomes[1].keys())
    theirs, own = ([outcome[place] for place in both] for outcome in outcomes)
    return {
        "beside": name,
        "paired": len(both),
        "better": sum(y and not x for x, y in zip(theirs, own, strict=True)),
        "worse": sum(x and not y for x, y in zip(theirs, own, strict=True)),
        "p": mcnemar(theirs, own) if both else None,
    }


def thoughts(drives: Mapping[str, Sequence[Episode]]) -> list[dict[str, Any]]:
    """Returns, of policies that write before they act, a drive of each task, that of the first layout."""
    first: dict[tuple[str, str], Episode] = {}
    for policy, episodes in drives.items():
        for e in sorted(episodes, key=lambda e: e.seed):
            if e.thoughts:
                first.setdefault((policy, e.task), e)
    return [
        {"policy": policy, "task": task, "success": e.success, "thoughts": [list(t) for t in e.thoughts]}
        for (policy, task), e in sorted(first.items())
    ]
