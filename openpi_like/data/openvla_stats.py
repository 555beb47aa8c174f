"""Statistics as OpenVLA publishes them: `dataset_statistics.json`, by dataset."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from openpi_like.config import near_names
from openpi_like.data.normalize import FieldStats, Normalization
from openpi_like.robots.robot import Robot

_KEYS = ("mean", "std", "q01", "q99", "min", "max")
# Of a dim that is left as it is: what maps [-1, 1] to itself.
_AS_IT_IS = {"mean": 0.0, "std": 1.0, "q01": -1.0, "q99": 1.0, "min": -1.0, "max": 1.0}


def is_openvla_stats(stored: Any) -> bool:
    """Says whether a JSON value is built like `dataset_statistics.json`."""
    datasets = stored.values() if isinstance(stored, dict) and stored else [None]
    return all(isinstance(d, dict) and isinstance(d.get("action"), dict) and "q01" in d["action"] for d in datasets)


def load_openvla_stats(path: str | Path, robot: Robot, *, dataset: str | None = None) -> Normalization:
    """Reads the statistics of one dataset for a robot.

    dataset: its name in the file ("unnorm_key" there); None where there is only one.
    Dims that the file's mask leaves out (a gripper) stay as they are, and so does a state of which it says nothing.
    OpenVLA clips what is outside of q01 to q99; here it is left outside.

    Raises:
        ValueError: not such a file, no such dataset, other numbers of dims than the robot's, or a robot that is not
            normalised by quantiles; lists everything that does not fit.
    """
    path = Path(path)
    try:
        stored = json.loads(path.read_text())
    except ValueError as e:
        raise ValueError(f"{path}: not JSON: {e}") from e
    if not is_openvla_stats(stored):
        raise ValueError(f'{path}: expected {{dataset: {{"action": {{"q01": ..., "q99": ...}}, "proprio": ...}}}}')
    if dataset is None and len(stored) > 1:
        raise ValueError(f"{path} has {len(stored)} datasets, expected one of them to be named: {sorted(stored)}")
    name = next(iter(stored)) if dataset is None else dataset
    if name not in stored:
        raise ValueError(f"{path}: no dataset {name!r}; {near_names(name, sorted(stored))}")
    problems = []
    if robot.normalization != "quantile":
        problems.append(f"robot {robot.name!r} is normalised by {robot.normalization!r}, OpenVLA by 'quantile'")
    found = stored[name]
    count = int(found.get("num_transitions", 0))
    fields = {}
    for what, names in (("action", robot.action_names), ("proprio", robot.state_names)):
        values = found.get(what)
        if what == "proprio" and not (values and any(values.get("q99", ()))):  # absent, or all zeros
            values = {key: [_AS_IT_IS[key]] * len(names) for key in _KEYS}
        assert values is not None  # is_openvla_stats has seen the actions
        problem = _size_problem(what, values, names)
        if problem is not None:
            problems.append(problem)
            continue
        mask = values.get("mask", [True] * len(names))
        rows = {
            key: tuple(float(x) if kept else _AS_IT_IS[key] for x, kept in zip(values[key], mask, strict=True))
            for key in _KEYS
        }
        fields[what] = FieldStats(names, **rows, count=count)
    if problems:
        raise ValueError(f"{path}, dataset {name!r}: " + "; ".join(problems))
    return Normalization(robot.name, "quantile", fields["proprio"], fields["action"])


def _size_problem(what: str, values: Mapping[str, Any], names: tuple[str, ...]) -> str | None:
    missing = [key for key in _KEYS if key not in values]
    if missing:
        return f"{what} lacks {', '.join(missing)}"
    wrong = {key: len(values[key]) for key in (*_KEYS, "mask") if key in values and len(values[key]) != len(names)}
    return None if not wrong else f"{what} has {wrong} dims, expected {len(names)}: {', '.join(names)}"
