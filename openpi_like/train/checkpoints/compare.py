"""In what two checkpoints differ: contracts, configs, versions, and by how much each weight."""

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from openpi_like.models.arrays import Arrays
from openpi_like.train.hosts.agreement import differences

SECTIONS = ("contract", "trainable", "config", "versions")  # of a record
_CHUNK = 1 << 22  # values that are compared at a time


def compare_records(a: dict[str, Any], b: dict[str, Any]) -> dict[str, list[tuple[str, Any, Any]]]:
    """Returns what differs in each section of two records: (dotted name, value in a, value in b)."""
    return {section: list(differences(a.get(section), b.get(section))) for section in SECTIONS}


@dataclasses.dataclass(frozen=True)
class Change:
    """From the values of one array, or of several, to others.

    squared: sums of the squares of a and of a - b. largest: of |a - b|. equal: arrays without any difference.
    """

    name: str
    squared: tuple[float, float]
    largest: float
    arrays: int
    equal: int

    @property
    def relative(self) -> float:
        """||a - b|| / ||a||."""
        of, difference = self.squared
        if of == 0:
            return 0.0 if difference == 0 else math.inf
        return math.sqrt(difference / of)


@dataclasses.dataclass(frozen=True)
class WeightChanges:
    """changes: of the weights that both have. reshaped: those of other shapes, (name, shape in a, shape in b)."""

    changes: list[Change]
    only_a: list[str]
    only_b: list[str]
    reshaped: list[tuple[str, tuple[int, ...], tuple[int, ...]]]

    @property
    def equal(self) -> bool:
        """Says whether both are the same weights."""
        return not (self.only_a or self.only_b or self.reshaped) and all(c.equal for c in self.changes)


def compare_weights(a: Arrays, b: Arrays, *, progress: Callable[[str], None] = lambda _: None) -> WeightChanges:
    """Compares two sets of weights, one weight in memory at a time. progress: is told which.

    Raises:
        Exception: as `Arrays.read`.
    """
    both = [name for name in a.shapes if name in b.shapes]
    changes = []
    for name in both:
        if a.shapes[name] == b.shapes[name]:
            progress(name)
            changes.append(compare(name, a.read(name), b.read(name)))
    return WeightChanges(
        changes=changes,
        only_a=sorted(a.shapes.keys() - b.shapes.keys()),
        only_b=sorted(b.shapes.keys() - a.shapes.keys()),
        reshaped=[(n, a.shapes[n], b.shapes[n]) for n in both if a.shapes[n] != b.shapes[n]],
    )


def compare(name: str, a: np.ndarray, b: np.ndarray) -> Change:
    """Returns the change from one array to another of its shape; values that are not finite make it so, too."""
    a, b = a.reshape(-1), b.reshape(-1)
    norm = distance = 0.0
    largest, equal = np.float64(0), True
    for i in range(0, a.size, _CHUNK):
        x, y = (part[i : i + _CHUNK].astype(np.float64) for part in (a, b))
        equal = equal and np.array_equal(x, y, equal_nan=True)
        with np.errstate(invalid="ignore"):  # inf - inf
            apart = np.abs(x - y)
        norm, distance = norm + float(x @ x), distance + float(apart @ apart)
        largest = np.maximum(largest, apart.max())
    return Change(name, (norm, distance), float(largest), 1, int(equal))


def by_module(changes: Iterable[Change]) -> list[tuple[Change, list[Change]]]:
    """Returns (change of a module, those of its weights), the largest relative change first in both.

    A module is what stands before the last part of a weight's name.
    """
    modules: dict[str, list[Change]] = {}
    for change in changes:
        modules.setdefault(change.name.rpartition("/")[0], []).append(change)

    def rank(change: Change) -> float:
        return math.inf if math.isnan(change.relative) else change.relative

    def total(name: str, of: list[Change]) -> Change:
        norm, distance = (sum(change.squared[i] for change in of) for i in range(2))
        largest = float(np.max([change.largest for change in of]))
        return Change(name, (norm, distance), largest, sum(c.arrays for c in of), sum(c.equal for c in of))

    rows = [(total(name, of), sorted(of, key=rank, reverse=True)) for name, of in modules.items()]
    return sorted(rows, key=lambda row: rank(row[0]), reverse=True)
