"""Steps of an index that are looked at as a whole: episodes, evenly spaced, and the numbers of their steps."""

import dataclasses

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

from openpi_like.data.blocks import blocks
from openpi_like.data.index import FrameIndex, Texts

_EPISODES = 4  # that a sample is of, at least
SAMPLE = 200_000  # steps of a sample: some 20 MB for the numbers of an arm


@dataclasses.dataclass(frozen=True)
class Sample:
    """Episodes of an index, evenly spaced, whole or their beginnings; all where they have no more steps than asked for.

    index: what they are of. steps: (n,), ascending. starts: (e + 1,), where each episode begins in `steps`.
    """

    index: FrameIndex
    steps: Int[np.ndarray, "n"]
    starts: Int[np.ndarray, "e1"]

    @classmethod
    def take(cls, index: FrameIndex, most: int = SAMPLE) -> "Sample":
        """Takes every n-th episode, for an n that gives at most `most` steps.

        Where that would leave fewer than 4, these (or all) and of each the beginning.
        """
        first = np.asarray(index.episode_start)
        lengths, largest = np.diff(first), max(index.episodes // _EPISODES, -(-index.episodes // most))
        every = min(-(-index.steps // most), largest)
        while every < largest and lengths[::every].sum() > most:
            every += 1
        chosen = np.arange(0, index.episodes, every)
        lengths = lengths[chosen]
        if lengths.sum() > most:
            lengths = np.minimum(lengths, most // len(chosen))
        steps = np.concatenate([np.arange(first[e], first[e] + n) for e, n in zip(chosen, lengths, strict=True)])
        return cls(index, steps, np.append(0, np.cumsum(lengths)))

    @property
    def whole(self) -> bool:
        """Whether nothing was left out."""
        return len(self.steps) == self.index.steps

    def __str__(self) -> str:
        """What it is, for a report."""
        if self.whole:
            return f"all {self.index.steps:,} steps"
        ends = np.append(self.steps[self.starts[1:-1] - 1], self.steps[-1]) + 1
        cut = not np.isin(ends, self.index.episode_start).all()
        return (
            f"{len(self.steps):,} of {self.index.steps:,} steps, those of {len(self.starts) - 1:,} of "
            f"{self.index.episodes:,} episodes, evenly spaced{', of some the beginnings only' if cut else ''}"
        )

    @property
    def inside(self) -> Bool[np.ndarray, "n"]:
        """Whether the step before is of the same episode."""
        inside = np.ones(len(self.steps), bool)
        inside[self.starts[:-1]] = False
        return inside

    def rows(self, key: str) -> Shaped[np.ndarray, "n D"]:
        """Returns a numeric field of its steps."""
        x = rows(self.index, key)
        return x if self.whole else x[self.steps]


def rows(index: FrameIndex, key: str) -> Shaped[np.ndarray, "N D"]:
    """Returns a numeric field of all steps, memory-mapped."""
    x = index.columns[key]
    return np.asarray(x).reshape(len(x), -1)


def bounds(x: Shaped[np.ndarray, "N D"]) -> Shaped[np.ndarray, "2 D"]:
    """Returns the least and the greatest value of each dim, without NaN, in one pass that keeps nothing."""
    return np.stack([np.fmin.reduce(x, axis=0), np.fmax.reduce(x, axis=0)])


def count_texts(texts: Texts) -> dict[str, int]:
    """Returns how many steps, or episodes, have each text."""
    counts = np.zeros(len(texts.table), np.int64)
    for block in blocks(range(len(texts.ids))):
        counts += np.bincount(texts.ids[block], minlength=len(texts.table))
    return dict(zip(texts.table, counts.tolist(), strict=True))


def time_gaps(sample: Sample) -> tuple[str, Float[np.ndarray, "m"]] | None:
    """Returns the key of a time stamp of the steps, and the times between steps; None where there is none that grows.

    In whatever unit it has, between steps of the same episode.
    """
    for key, column in sample.index.columns.items():
        if "time" not in key or column.ndim != 1:
            continue
        gaps = np.diff(sample.rows(key)[:, 0].astype(np.float64))[sample.inside[1:]]
        if len(gaps) and (gaps > 0).all():
            return key, gaps
    return None
