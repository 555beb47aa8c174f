"""Statistics of states and encoded action chunks, from the columns of an index; no image is read.

Mean, standard deviation, minimum and maximum come from one pass, the quantiles from two: values are counted by the
upper 16 bits of their float32 pattern, then, inside the bins that hold the wanted ranks, by the lower 16. The
quantiles are therefore exact (those of `numpy.quantile`), and memory does not grow with the values.

Each pass is an accumulator that can be merged with another: frames are cut into the same blocks whoever reads them, so
any number of processes, in any order, gives the same statistics bit for bit (`beam` spreads them over machines).
"""

import contextlib
import dataclasses
import functools
import itertools
import json
import logging
import multiprocessing
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np
from jaxtyping import Float

from openpi_like.config import from_json, to_json
from openpi_like.data.dataset import EpisodeDataset
from openpi_like.data.normalize import FLOOR, FieldStats, Normalization, fields_of
from openpi_like.robots.robot import Robot

_BLOCK = 1 << 13  # frames encoded together
_TASKS = 64  # parts that blocks are handed out in
_LEVELS = (0.01, 0.99)

# Number of a dataset and of its first frame: which rows these are, whoever reads them.
Block = tuple[int, int]

_log = logging.getLogger(__name__)


@runtime_checkable
class Accumulator(Protocol):
    """What is known of the rows seen so far."""

    def add(self, rows: Float[np.ndarray, "n dims"], block: Block) -> None:
        """Adds float32 rows; every block is added once, to one accumulator."""

    def merge(self, other: Any) -> None:
        """Adds what `other`, of the same kind, has seen."""


class Moments:
    """First pass: number, mean, deviations, extremes, and counts by the upper 16 bits of float32."""

    def __init__(self, dims: int) -> None:
        # Per block (n, mean, sum of squared deviations): sums of floats depend on their order, so blocks are summed in
        # their own order at the end, whatever order they came in.
        self._parts: dict[Block, tuple[int, np.ndarray, np.ndarray]] = {}
        self.low, self.high = np.full(dims, np.inf), np.full(dims, -np.inf)
        self.counts = np.zeros((dims, 1 << 16), np.int64)

    def add(self, rows: Float[np.ndarray, "n dims"], block: Block) -> None:
        """See `Accumulator`."""
        columns = np.ascontiguousarray(rows.T, np.float32)
        x = columns.astype(np.float64)
        mean = x.mean(axis=1)
        self._parts[block] = (len(rows), mean, np.square(x - mean[:, None]).sum(axis=1))
        self.low = np.minimum(self.low, columns.min(axis=1))
        self.high = np.maximum(self.high, columns.max(axis=1))
        for counts, bits in zip(self.counts, _ordered(columns), strict=True):
            counts += np.bincount(bits >> 16, minlength=1 << 16)

    def merge(self, other: "Moments") -> None:
        """See `Accumulator`."""
        self._parts |= other._parts
        self.low, self.high = np.minimum(self.low, other.low), np.maximum(self.high, other.high)
        self.counts += other.counts

    def total(self) -> tuple[int, np.ndarray, np.ndarray]:
        """Returns the number of rows, and their mean and standard deviation, float64."""
        count, mean, squares = 0, np.zeros(len(self.low)), np.zeros(len(self.low))
        for _, (n, m, s) in sorted(self._parts.items(), key=lambda part: part[0]):
            # Chan, Golub and LeVeque 1979: merge mean and sum of squared deviations of two sets
            delta = m - mean
            squares += s + np.square(delta) * count * n / (count + n)
            mean += delta * n / (count + n)
            count += n
        return count, mean, np.sqrt(squares / count)

    def bins(self) -> list[list[int]]:
        """Returns per dim the bins that the ranks wanted for the quantiles lie in.

        Raises:
            ValueError: there were no rows.
        """
        if not self._parts and len(self.low):
            raise ValueError(
                "no plan is known as a whole, which statistics of each of its entries are of; take Plan(scale='pooled')"
            )
        ends = np.cumsum(self.counts, axis=1)
        return [sorted({int(np.searchsorted(e, r, side="right")) for r in _ranks(int(e[-1]))}) for e in ends]


class Counts:
    """Second pass: counts by the lower 16 bits, inside bins of the first pass; see `Moments.bins`."""

    def __init__(self, bins: Sequence[Sequence[int]]) -> None:
        self.counts = [{b: np.zeros(1 << 16, np.int64) for b in of_dim} for of_dim in bins]

    def add(self, rows: Float[np.ndarray, "n dims"], block: Block) -> None:
        """See `Accumulator`."""
        for fine, bits in zip(self.counts, _ordered(np.ascontiguousarray(rows.T, np.float32)), strict=True):
            upper = bits >> 16
            for b, counts in fine.items():
                counts += np.bincount(bits[upper == b] & 0xFFFF, minlength=1 << 16)

    def merge(self, other: "Counts") -> None:
        """See `Accumulator`."""
        for ours, theirs in zip(self.counts, other.counts, strict=True):
            for b, counts in ours.items():
                counts += theirs[b]


class Coverage:
    """How statistics suit rows they need not come from: values outside q01 .. q99, and how far normalised ones reach.

    outside: (dims,) number of values outside. largest: (dims,) largest absolute normalised value. count: rows.
    """

    def __init__(self, stats: FieldStats, mode: str) -> None:
        self._low, self._high = np.array(stats.q01)[:, None], np.array(stats.q99)[:, None]
        offset, scale, _ = stats.affine(mode)
        self._offset, self._scale = offset[:, None], scale[:, None]
        self.count, self.outside, self.largest = 0, np.zeros(len(offset), np.int64), np.zeros(len(offset))

    def add(self, rows: Float[np.ndarray, "n dims"], block: Block) -> None:
        """See `Accumulator`."""
        x = rows.T.astype(np.float64)
        self.count += len(rows)
        self.outside += ((x < self._low) | (x > self._high)).sum(axis=1)
        self.largest = np.maximum(self.largest, np.abs((x - self._offset) / self._scale).max(axis=1))

    def merge(self, other: "Coverage") -> None:
        """See `Accumulator`."""
        self.count += other.count
        self.outside += other.outside
        self.largest = np.maximum(self.largest, other.largest)


def _ranks(count: int) -> list[int]:
    """Ranks on both sides of each quantile, as numpy.quantile interpolates."""
    return sorted({r for q in _LEVELS for r in (int(np.floor(q * (count - 1))), int(np.ceil(q * (count - 1))))})


def field_stats(names: tuple[str, ...], first: Moments, second: Counts) -> FieldStats:
    """Returns the statistics of all rows that both passes have seen."""
    count, mean, std = first.total()
    ends = np.cumsum(first.counts, axis=1)

    def value(d: int, rank: int) -> float:
        b = int(np.searchsorted(ends[d], rank, side="right"))
        below = int(ends[d, b - 1]) if b else 0
        lower = int(np.searchsorted(np.cumsum(second.counts[d][b]), rank - below, side="right"))
        return _from_ordered(b << 16 | lower)

    quantiles = []
    for q in _LEVELS:
        p = q * (count - 1)
        a, b = int(np.floor(p)), int(np.ceil(p))
        quantiles.append(tuple(value(d, a) + (value(d, b) - value(d, a)) * (p - a) for d in range(len(names))))
    return FieldStats(
        names=names,
        mean=tuple(mean.tolist()),
        std=tuple(std.tolist()),
        q01=quantiles[0],
        q99=quantiles[1],
        min=tuple(first.low.tolist()),
        max=tuple(first.high.tolist()),
        count=count,
    )


def _ordered(x: np.ndarray) -> np.ndarray:
    """float32 -> uint32 in the same order."""
    bits = x.view(np.uint32)
    return bits ^ ((x.view(np.int32) >> 31).view(np.uint32) | np.uint32(1 << 31))


def _from_ordered(bits: int) -> float:
    raw = bits & 0x7FFFFFFF if bits >> 31 else 0xFFFFFFFF - bits
    return float(np.uint32(raw).view(np.float32))


# ---- Passes over datasets --------------------------------------------------------------------------------------------

T = TypeVar("T")
A = TypeVar("A", bound=Accumulator)
# Makes the empty accumulators of one pass: of states, and of action chunks.
Start = tuple[Callable[[], A], Callable[[], A]]
# Called with the parts that are done, and all of them.
Progress = Callable[[int, int], None]


def compute_normalization(
    *datasets: EpisodeDataset, workers: int = 1, progress: Progress | None = None
) -> Normalization:
    """Returns statistics over all frames of one robot's datasets: of states, and of action chunks inside episodes.

    Both are in model space, so fields relative to the state have the statistics of the relative values. Dims that do
    not vary are named in a warning. The result does not depend on `workers`, the number of processes.

    Raises:
        ValueError: the datasets are not all of one robot.
    """
    robot = check_robot(datasets)
    blocks = blocks_of(datasets)
    with _reading(datasets, workers) as read:
        first = merge(_counted(read(blocks, moments(robot)), progress, 0, 2 * len(blocks)))
        second = merge(_counted(read(blocks, counts(first)), progress, len(blocks), 2 * len(blocks)))
    normalization = normalization_of(first, second, robot, counted(datasets))
    warn_degenerate(normalization)
    return normalization


def compute_coverage(
    normalization: Normalization,
    *datasets: EpisodeDataset,
    workers: int = 1,
    progress: Progress | None = None,
) -> tuple[Coverage, Coverage]:
    """Returns how statistics, of these datasets or of others, suit the states and the action chunks of datasets.

    Raises:
        ValueError: the statistics are not of the datasets' robot.
    """
    normalization.check(check_robot(datasets))
    blocks = blocks_of(datasets)
    with _reading(datasets, workers) as read:
        return merge(_counted(read(blocks, coverage(normalization)), progress, 0, len(blocks)))


def check_robot(datasets: Sequence[EpisodeDataset]) -> Robot:
    """Returns the robot of all datasets; raises ValueError if they differ."""
    robot = datasets[0].robot
    if any(d.robot != robot for d in datasets):
        raise ValueError(f"got datasets of robots {[d.robot.name for d in datasets]}, expected one and the same robot")
    return robot


def blocks_of(datasets: Sequence[EpisodeDataset]) -> list[list[Block]]:
    """Returns all blocks of the datasets, in parts that may be read by different processes."""
    blocks = [(i, at) for i, dataset in enumerate(datasets) for at in range(0, len(dataset), _BLOCK)]
    ends = np.linspace(0, len(blocks), min(len(blocks), _TASKS) + 1).astype(int)
    return [blocks[a:b] for a, b in itertools.pairwise(ends)]


def moments(robot: Robot) -> Start[Moments]:
    """Starts the first pass."""
    return functools.partial(Moments, robot.state_size), functools.partial(Moments, len(robot.statistics_names))


def counts(first: tuple[Moments, Moments]) -> Start[Counts]:
    """Starts the second pass."""
    state, action = first
    return functools.partial(Counts, state.bins()), functools.partial(Counts, action.bins())


def coverage(normalization: Normalization) -> Start[Coverage]:
    """Starts the pass that measures statistics on rows."""
    state, action, mode = normalization.state, normalization.action, normalization.mode
    return functools.partial(Coverage, state, mode), functools.partial(Coverage, action, mode)


def accumulate(blocks: Iterable[Block], datasets: Sequence[EpisodeDataset], start: Start[A]) -> tuple[A, A]:
    """Returns accumulators of the states and of the action chunks inside episodes, both in model space."""
    state, action = (make() for make in start)
    for i, at in blocks:
        x, chunks, mask = datasets[i].encoded(np.arange(at, min(at + _BLOCK, len(datasets[i]))))
        state.add(x, (i, at))
        rows = datasets[i].robot.statistics_rows(chunks, mask)
        if len(rows):  # of plans that are known in part, a block may have no whole one
            action.add(rows, (i, at))
    return state, action


def merge(parts: Iterable[tuple[A, A]]) -> tuple[A, A]:
    """Merges what `accumulate` returned; the first part is changed."""
    parts = iter(parts)
    total = next(parts)
    for part in parts:
        for ours, theirs in zip(total, part, strict=True):
            ours.merge(theirs)
    return total


def counted(datasets: Sequence[EpisodeDataset]) -> tuple[str, ...]:
    """Returns what `Normalization.data` says of datasets."""
    return tuple(f"{d.index.split}: {len(d):,} frames of {d.episodes:,} episodes" for d in datasets)


def normalization_of(
    first: tuple[Moments, Moments], second: tuple[Counts, Counts], robot: Robot, data: tuple[str, ...]
) -> Normalization:
    """Returns the statistics of both passes. data: see `counted`."""
    state = field_stats(robot.state_names, first[0], second[0])
    action = field_stats(robot.statistics_names, first[1], second[1])
    return Normalization(
        robot.name,
        robot.normalization,
        state,
        action,
        action_horizon=robot.action_horizon,
        fields=fields_of(robot),
        data=data,
        plan=robot.plan,
    )


def warn_degenerate(normalization: Normalization) -> None:
    """Names dims that do not vary in a warning."""
    for what, stats in (("state", normalization.state), ("action", normalization.action)):
        names = stats.degenerate(normalization.mode)
        if names:
            _log.warning(
                "%s of robot %r: %s vary by less than %g; they are only centred, not scaled",
                what,
                normalization.robot,
                ", ".join(names),
                FLOOR,
            )


_opened: Sequence[EpisodeDataset] = ()  # of a worker process


def _open(datasets: Sequence[EpisodeDataset]) -> None:
    global _opened
    _opened = datasets


def _work(blocks: list[Block], start: Start[A]) -> tuple[A, A]:
    return accumulate(blocks, _opened, start)


@runtime_checkable
class _Reader(Protocol):
    def __call__(self, parts: list[list[Block]], start: Start[A]) -> Iterator[tuple[A, A]]: ...


@contextlib.contextmanager
def _reading(datasets: Sequence[EpisodeDataset], workers: int) -> Iterator[_Reader]:
    """Gives a function that reads parts in any order, in this process or in several."""
    if workers < 1:
        raise ValueError(f"workers={workers}, expected at least 1")

    def here(parts: list[list[Block]], start: Start[A]) -> Iterator[tuple[A, A]]:
        return (accumulate(blocks, datasets, start) for blocks in parts)

    if workers == 1:
        yield here
        return
    # Not forked: the parent may have threads, of which a fork would be a broken copy.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, initializer=_open, initargs=(datasets,)) as pool:

        def there(parts: list[list[Block]], start: Start[A]) -> Iterator[tuple[A, A]]:
            return (f.result() for f in as_completed([pool.submit(_work, blocks, start) for blocks in parts]))

        yield there


def _counted(parts: Iterable[T], progress: Progress | None, before: int, total: int) -> Iterator[T]:
    for i, part in enumerate(parts):
        if progress is not None:
            progress(before + i + 1, total)
        yield part


def save_normalization(normalization: Normalization, path: str | Path) -> None:
    """Writes the statistics as JSON."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(normalization_json(normalization))


def normalization_json(normalization: Normalization) -> str:
    """Returns what `save_normalization` writes."""
    return json.dumps(to_json(normalization), indent=1) + "\n"


AGAIN = "compute them again (data/stats.py; with --config, add --again), or keep both in directories of their own"


def load_normalization(path: str | Path, robot: Robot) -> Normalization:
    """Reads statistics written by `save_normalization`.

    Raises:
        FileNotFoundError: no such file; names those beside it.
        ValueError: the file is not one of ours, or holds the statistics of another robot, or of this one described
            otherwise, or of chunks of another length where actions are relative to the state before them.
    """
    path = Path(path)
    if not path.is_file():
        beside = sorted(p.name for p in path.parent.glob("*.json")) if path.parent.is_dir() else []
        raise FileNotFoundError(
            f"no statistics {path}; in {path.parent}: {', '.join(beside) or 'none'}; make them with data/stats.py"
        )
    try:
        normalization = from_json(json.loads(path.read_text()))
    except (ValueError, TypeError) as e:
        raise ValueError(f"{path}: {e}; make it again with data/stats.py") from e
    if not isinstance(normalization, Normalization):
        raise ValueError(f"{path} holds no normalisation; make it again with data/stats.py")
    # The file has the numbers of both modes; which one is used is the robot's choice.
    normalization = dataclasses.replace(normalization, mode=robot.normalization)
    if robot.plan is not None and normalization.plan is not None:
        normalization = dataclasses.replace(normalization, plan=robot.plan)  # whose dims are checked with the others
    try:
        normalization.check(robot)
    except ValueError as e:
        raise ValueError(f"{path}: {e}") from e
    now = fields_of(robot)
    if normalization.fields and normalization.fields != now:
        before, after = (
            "\n".join(f"  {line}" for line in a if line not in b)
            for a, b in ((normalization.fields, now), (now, normalization.fields))
        )
        raise ValueError(
            f"{path}: statistics of robot {robot.name!r} as it was described before:\n{before}\nit is now:\n{after}\n"
            f"{AGAIN}"
        )
    relative = ", ".join(repr(f.name) for f in robot.action if f.relative_to is not None)
    if relative and normalization.action_horizon not in (None, robot.action_horizon):
        raise ValueError(
            f"{path}: statistics of chunks of {normalization.action_horizon} actions, expected {robot.action_horizon} "
            f"(action_horizon of robot {robot.name!r}): {relative} is relative to the state before the chunk, "
            "and spreads more in longer ones; make them again with data/stats.py, into a directory of the run's own"
        )
    return normalization


def load_openpi_stats(path: str | Path, robot: Robot) -> Normalization:
    """Reads openpi's `norm_stats.json` for a robot; it may have more dims than the robot, which openpi ignores too.

    It knows no least and greatest values and no count: these become q01, q99 and 0; without quantiles (older files, for
    z-scores only) those become the mean.

    Raises:
        ValueError: not such a file, fewer dims than the robot has, or no quantiles where the robot needs them.
    """
    path = Path(path)
    if robot.plan is not None:
        raise ValueError(f"{path}: robot {robot.name!r} plans, and openpi's statistics are of actions; make own ones")
    try:
        stored = json.loads(path.read_text())["norm_stats"]
        rows = {"state": (stored["state"], robot.state_names), "actions": (stored["actions"], robot.action_names)}
    except (ValueError, KeyError, TypeError) as e:
        raise ValueError(f'{path}: {e}; expected {{"norm_stats": {{"state": ..., "actions": ...}}}}') from e
    problems, fields = [], {}
    for what, (values, names) in rows.items():
        quantiles = values.get("q01") is not None and values.get("q99") is not None
        if not quantiles and robot.normalization == "quantile":
            problems.append(f"{what} has no q01 and q99, which robot {robot.name!r} is normalised by")
            continue
        values = {k: values["mean"] if values.get(k) is None else values[k] for k in ("mean", "std", "q01", "q99")}
        short = {k: len(v) for k, v in values.items() if len(v) < len(names)}
        if short:
            problems.append(f"{what} has {short} dims, expected at least {len(names)}: {', '.join(names)}")
            continue
        cut = {k: tuple(map(float, v[: len(names)])) for k, v in values.items()}
        fields[what] = FieldStats(names, **cut, min=cut["q01"], max=cut["q99"], count=0)
    if problems:
        raise ValueError(f"{path}: " + "; ".join(problems))
    return Normalization(robot.name, robot.normalization, fields["state"], fields["actions"])


def save_openpi_stats(normalization: Normalization, path: str | Path) -> None:
    """Writes statistics as openpi's `norm_stats.json`.

    Raises:
        ValueError: they are of plans, which openpi does not have.
    """
    if normalization.plan is not None:
        raise ValueError(f"statistics of robot {normalization.robot!r} are of plans, which openpi cannot be told")
    stored = {
        what: {k: list(getattr(stats, k)) for k in ("mean", "std", "q01", "q99")}
        for what, stats in (("state", normalization.state), ("actions", normalization.action))
    }
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"norm_stats": stored}, indent=2) + "\n")
