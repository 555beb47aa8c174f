"""Statistics of states and encoded action chunks, from the columns of an index; no image is read.

Mean, standard deviation, minimum and maximum come from one pass, the quantiles from two: values are counted by the
upper 16 bits of their float32 pattern, then, inside the bins that hold the wanted ranks, by the lower 16. The
quantiles are therefore exact (those of `numpy.quantile`), and memory does not grow with the dataset.
"""

import dataclasses
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from openpi_like.config import from_json, to_json
from openpi_like.data.dataset import EpisodeDataset
from openpi_like.data.normalize import FLOOR, FieldStats, Normalization
from openpi_like.robots.robot import Robot

_BLOCK = 1 << 13  # frames encoded together
_LEVELS = (0.01, 0.99)

_log = logging.getLogger(__name__)


def compute_normalization(*datasets: EpisodeDataset) -> Normalization:
    """Returns statistics over all frames of one robot's datasets: of states, and of action chunks inside episodes.

    Both are in model space, so fields relative to the state have the statistics of the relative values. Dims that do
    not vary are named in a warning.
    """
    robot = datasets[0].robot
    if any(d.robot != robot for d in datasets):
        raise ValueError(f"got datasets of robots {[d.robot.name for d in datasets]}, expected one and the same robot")

    def states() -> Iterator[np.ndarray]:
        for dataset, frames in _blocks(datasets):
            yield robot.encode_state(dataset.state(frames))

    def actions() -> Iterator[np.ndarray]:
        for dataset, frames in _blocks(datasets):
            _, chunks, mask = dataset.encoded(frames)
            yield chunks[mask]

    normalization = Normalization(
        robot=robot.name,
        mode=robot.normalization,
        state=field_stats(robot.state_names, states),
        action=field_stats(robot.action_names, actions),
    )
    for what, stats in (("state", normalization.state), ("action", normalization.action)):
        names = stats.degenerate(normalization.mode)
        if names:
            _log.warning(
                "%s of robot %r: %s vary by less than %g; they are only centred, not scaled",
                what,
                robot.name,
                ", ".join(names),
                FLOOR,
            )
    return normalization


def _blocks(datasets: Sequence[EpisodeDataset]) -> Iterator[tuple[EpisodeDataset, np.ndarray]]:
    for dataset in datasets:
        for at in range(0, len(dataset), _BLOCK):
            yield dataset, np.arange(at, min(at + _BLOCK, len(dataset)))


def field_stats(names: tuple[str, ...], blocks: Callable[[], Iterator[np.ndarray]]) -> FieldStats:
    """Returns the statistics of rows in blocks of shape (n, len(names)), float32. `blocks` is called twice."""
    dims = len(names)
    count, mean, squares = 0, np.zeros(dims), np.zeros(dims)
    low, high = np.full(dims, np.inf), np.full(dims, -np.inf)
    coarse = np.zeros((dims, 1 << 16), np.int64)
    for block in blocks():
        x = block.astype(np.float64)
        # Chan, Golub and LeVeque 1979: merge mean and sum of squared deviations of two sets
        n, m = len(x), x.mean(axis=0)
        delta = m - mean
        squares += np.square(x - m).sum(axis=0) + np.square(delta) * count * n / (count + n)
        mean += delta * n / (count + n)
        count += n
        low, high = np.minimum(low, x.min(axis=0)), np.maximum(high, x.max(axis=0))
        bits = _ordered(block)
        for d in range(dims):
            coarse[d] += np.bincount(bits[:, d] >> 16, minlength=1 << 16)

    # ranks on both sides of each quantile, as numpy.quantile interpolates
    positions = [q * (count - 1) for q in _LEVELS]
    ranks = sorted({r for p in positions for r in (int(np.floor(p)), int(np.ceil(p)))})
    ends = np.cumsum(coarse, axis=1)
    bins = [{int(np.searchsorted(ends[d], r, side="right")) for r in ranks} for d in range(dims)]
    fine = [{b: np.zeros(1 << 16, np.int64) for b in bins[d]} for d in range(dims)]
    for block in blocks():
        bits = _ordered(block)
        for d in range(dims):
            upper = bits[:, d] >> 16
            for b, counts in fine[d].items():
                counts += np.bincount(bits[upper == b, d] & 0xFFFF, minlength=1 << 16)

    def value(d: int, rank: int) -> float:
        b = int(np.searchsorted(ends[d], rank, side="right"))
        below = int(ends[d, b - 1]) if b else 0
        lower = int(np.searchsorted(np.cumsum(fine[d][b]), rank - below, side="right"))
        return _from_ordered(b << 16 | lower)

    quantiles = []
    for p in positions:
        a, b = int(np.floor(p)), int(np.ceil(p))
        quantiles.append(tuple(value(d, a) + (value(d, b) - value(d, a)) * (p - a) for d in range(dims)))
    return FieldStats(
        names=names,
        mean=tuple(mean.tolist()),
        std=tuple(np.sqrt(squares / count).tolist()),
        q01=quantiles[0],
        q99=quantiles[1],
        min=tuple(low.tolist()),
        max=tuple(high.tolist()),
        count=count,
    )


def _ordered(x: np.ndarray) -> np.ndarray:
    """float32 -> integers in [0, 2^32) in the same order."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32).astype(np.int64)
    return np.where(bits >> 31, 0xFFFFFFFF - bits, bits | 0x80000000)


def _from_ordered(bits: int) -> float:
    raw = bits & 0x7FFFFFFF if bits >> 31 else 0xFFFFFFFF - bits
    return float(np.uint32(raw).view(np.float32))


def save_normalization(normalization: Normalization, path: str | Path) -> None:
    """Writes the statistics as JSON."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(to_json(normalization), indent=1) + "\n")


def load_normalization(path: str | Path, robot: Robot) -> Normalization:
    """Reads statistics written by `save_normalization`.

    Raises:
        FileNotFoundError: no such file; names those beside it.
        ValueError: the file is not one of ours, or holds the statistics of another robot.
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
    try:
        normalization.check(robot)
    except ValueError as e:
        raise ValueError(f"{path}: {e}") from e
    return normalization


def load_openpi_stats(path: str | Path, robot: Robot) -> Normalization:
    """Reads openpi's `norm_stats.json` for a robot; it may have more dims than the robot, which openpi ignores too.

    It knows no least and greatest values and no count: these become q01, q99 and 0; without quantiles (older files, for
    z-scores only) those become the mean.

    Raises:
        ValueError: not such a file, fewer dims than the robot has, or no quantiles where the robot needs them.
    """
    path = Path(path)
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
    """Writes statistics as openpi's `norm_stats.json`."""
    stored = {
        what: {k: list(getattr(stats, k)) for k in ("mean", "std", "q01", "q99")}
        for what, stats in (("state", normalization.state), ("actions", normalization.action))
    }
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"norm_stats": stored}, indent=2) + "\n")
