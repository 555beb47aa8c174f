"""Statistics as LeRobot stores them: of numbers exactly, of pictures from a sample of their pixels."""

from pathlib import Path

import numpy as np
from jaxtyping import UInt8

QUANTILES = {"q01": 0.01, "q10": 0.10, "q50": 0.50, "q90": 0.90, "q99": 0.99}
SAMPLED = 20  # pictures of an episode and camera

Stats = dict[str, np.ndarray]  # "min", "max", "mean", "std", "count" and those of `QUANTILES`


def _column(values: np.ndarray) -> dict[str, float]:
    """Returns the statistics of numbers (n,); those that are not finite are left out."""
    x = values.astype(np.float64)
    x = x[np.isfinite(x)]
    if not len(x):
        return dict.fromkeys(("min", "max", "mean", "std", *QUANTILES), np.nan)
    quantiles = np.quantile(x, list(QUANTILES.values()))
    plain = {"min": x.min(), "max": x.max(), "mean": x.mean(), "std": x.std()}
    return plain | dict(zip(QUANTILES, quantiles, strict=True))


def number_stats(values: np.ndarray) -> Stats:
    """Returns the statistics of each number of a field. values: (T, *shape). Each result is (*shape), of scalars (1,).

    It takes the memory of one of the numbers at a time, so `values` may be a mapped file.
    """
    shape = values.shape[1:] or (1,)
    flat = values.reshape(len(values), -1)
    columns = [_column(flat[:, i]) for i in range(flat.shape[1])]
    found = {name: np.array([column[name] for column in columns]).reshape(shape) for name in columns[0]}
    return found | {"count": np.array([len(values)])}


class NumberFile:
    """All values of a field, kept in a file until their statistics are known."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._dtype, self._shape, self._count = np.dtype(np.float32), tuple[int, ...](), 0

    def add(self, values: np.ndarray) -> None:
        """Adds the values of an episode, (T, *shape)."""
        self._dtype, self._shape = values.dtype, values.shape[1:]
        self._count += len(values)
        with self._path.open("ab") as file:
            file.write(np.ascontiguousarray(values).tobytes())

    def stats(self) -> Stats:
        """Returns the statistics of all values, and removes the file."""
        shape = (self._count, *self._shape)
        found = number_stats(np.asarray(np.memmap(self._path, self._dtype, "r", shape=shape)))
        self._path.unlink()
        return found


class PixelCounts:
    """How often each level of each channel was seen."""

    def __init__(self) -> None:
        self._counts = np.zeros((3, 256), np.int64)
        self._pictures = 0

    def add(self, image: UInt8[np.ndarray, "H W 3"]) -> None:
        for channel in range(3):
            self._counts[channel] += np.bincount(image[..., channel].reshape(-1), minlength=256)
        self._pictures += 1

    def merge(self, other: "PixelCounts") -> None:
        self._counts += other._counts
        self._pictures += other._pictures

    def stats(self) -> Stats:
        """Returns the statistics of the levels on [0, 1], each (3, 1, 1); "count" is of pictures."""
        level = np.arange(256) / 255
        end = np.cumsum(self._counts, axis=1)
        n = int(end[0, -1])
        mean = self._counts @ level / n

        def ranked(rank: int) -> np.ndarray:
            return level[[int(np.searchsorted(ends, rank, side="right")) for ends in end]]

        found = {"min": ranked(0), "max": ranked(n - 1), "mean": mean}
        found["std"] = np.sqrt(np.sum(self._counts * (level - mean[:, None]) ** 2, axis=1) / n)
        for name, q in QUANTILES.items():  # between two levels as numpy has it: linear
            at = q * (n - 1)
            low, high = ranked(int(np.floor(at))), ranked(int(np.ceil(at)))
            found[name] = low + (high - low) * (at - np.floor(at))
        return {name: x.reshape(3, 1, 1) for name, x in found.items()} | {"count": np.array([self._pictures])}


def sampled_steps(length: int) -> set[int]:
    """Returns which steps of an episode are looked at for the statistics of its pictures."""
    return set(np.round(np.linspace(0, length - 1, min(length, SAMPLED))).astype(int).tolist())
