"""Which frame a sample is: a pure function of (seed, global sample index), and what that order depends on."""

import sys
from collections.abc import Sequence
from typing import Any

import grain
import numpy as np
from jaxtyping import Int
from scipy.special import gammaln

from openpi_like.data.config import DataConfig
from openpi_like.data.dataset import EpisodeDataset


class GroupedOrder:
    """The frames of one dataset, pass after pass, with frames shuffled in groups of episodes; a source for grain.

    Element k is computed from k. The permutations of the passes and groups that were used last are kept.
    """

    def __init__(self, episodes: np.ndarray, group: int, seed: Sequence[int]) -> None:
        """episodes: (E,) frames of each. group: how many episodes are shuffled together."""
        self._episodes, self._group, self._seed = np.asarray(episodes, np.int64), group, tuple(seed)
        self._start = np.cumsum(self._episodes) - self._episodes
        self._frames = int(self._episodes.sum())
        # Replaced whole, so that threads need no lock; at the border of two passes or groups they use both.
        self._passes: tuple[tuple[int, np.ndarray, np.ndarray], ...] = ()
        self._groups: tuple[tuple[tuple[int, int], np.ndarray], ...] = ()

    @staticmethod
    def most_bytes(episodes: np.ndarray, group: int, num_threads: int) -> int:
        """Returns what such an order takes at most while so many threads ask it."""
        frames = int(np.sort(episodes)[-group:].sum())  # of a group
        # Sorting random words holds these, their order, and as much again; then the order is kept.
        return 8 * (2 + 2 * 2) * (len(episodes) + 1) + 8 * 4 * frames + 3 * 8 * num_threads * max(len(episodes), frames)

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, k: int) -> int:
        number, at = divmod(int(k), self._frames)
        order, ends = self._pass(number)
        group = (int(np.searchsorted(ends, at, side="right")) - 1) // self._group
        first, last = group * self._group, min((group + 1) * self._group, len(order))
        start, stop = int(ends[first]), int(ends[last])
        at = start + int(self._shuffled(number, group, stop - start)[at - start])
        slot = first + int(np.searchsorted(ends[first : last + 1], at, side="right")) - 1
        return int(self._start[order[slot]] + at - ends[slot])

    def _pass(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the order of the episodes in a pass, and where each of them begins in it, (E + 1,)."""
        for known, order, ends in self._passes:
            if known == number:
                return order, ends
        order = self._permutation(len(self._episodes), number, 0)
        ends = np.concatenate([[0], np.cumsum(self._episodes[order])])
        self._passes = (*self._passes[-1:], (number, order, ends))
        return order, ends

    def _shuffled(self, number: int, group: int, size: int) -> np.ndarray:
        """Returns the order of the frames in a group."""
        for known, order in self._groups:
            if known == (number, group):
                return order
        order = self._permutation(size, number, group + 1)  # 0 is the pass
        self._groups = (*self._groups[-3:], ((number, group), order))
        return order

    def _permutation(self, size: int, *key: int) -> np.ndarray:
        words = np.random.SeedSequence([*self._seed, *key]).generate_state(2, np.uint64)
        return np.argsort(np.random.Philox(key=words).random_raw(size), kind="stable")


def sample_order(
    lengths: Sequence[int],
    weights: Sequence[float],
    seed: int,
    *,
    episodes: Sequence[Int[np.ndarray, "_"]] | None = None,
    group_episodes: int | None = None,
) -> grain.MapDataset:
    """Returns the endless order of a mixture: element p is (p, dataset, frame), computed from p.

    Every dataset is shuffled anew in each of its passes, and each frame comes once in a pass.

    Args:
        lengths: frames of each dataset.
        weights: relative parts of the samples, which grain rounds down to hundredths of the smallest.
        episodes: the same by episode; needed for `group_episodes`, see `DataConfig`.
    """
    orders = []
    for i, length in enumerate(lengths):
        if group_episodes is None:
            shuffle_seed = int(np.random.SeedSequence([seed, i]).generate_state(1)[0])
            order = grain.MapDataset.range(length).shuffle(seed=shuffle_seed).repeat()
        else:
            assert episodes is not None
            order = grain.MapDataset.source(GroupedOrder(episodes[i], group_episodes, (seed, i)))
        orders.append(order.map(lambda frame, i=i: (i, int(frame))))
    mixed = grain.MapDataset.mix(orders, weights=[w / sum(weights) for w in weights])
    return mixed.map_with_index(lambda p, element: (p, *element))


def order_record(config: DataConfig, datasets: Sequence[EpisodeDataset]) -> dict[str, Any]:
    """Returns, as JSON, all that decides which step a position stands for: where two are equal, so are the orders.

    Where the data lies and what is drawn for a sample are no part of it.
    """
    entries = [
        {
            "robot": entry.robot.name,
            "data": f"{dataset.index.split.dataset}/{dataset.index.split.version}",
            "split": entry.split,
            "weight": entry.weight,
            "frames": len(dataset),
            "episodes": dataset.episodes,
            "steps": dataset.frames_digest(),
        }
        for entry, dataset in zip(config.entries, datasets, strict=True)
    ]
    return {"seed": config.seed, "group_episodes": config.group_episodes, "entries": entries}


def order_changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Returns in what two orders differ, see `order_record`."""
    changes = [f"{k}: {before[k]} -> {now[k]}" for k in ("seed", "group_episodes") if before[k] != now[k]]
    if len(before["entries"]) != len(now["entries"]):
        changes.append(f"datasets: {len(before['entries'])} -> {len(now['entries'])}")
    for i, (old, new) in enumerate(zip(before["entries"], now["entries"], strict=False)):
        differ = [f"{k} {old[k]} -> {new[k]}" for k in new if old[k] != new[k]]
        if differ:
            changes.append(f"dataset {i} ({new['robot']}): {', '.join(differ)}")
    return changes


def distinct_episodes(
    episodes: Int[np.ndarray, "E"], batch_size: int, *, group_episodes: int | None = None, seed: int = 0
) -> float:
    """Returns how many distinct episodes a batch of one dataset has on average, which measures its shuffle.

    Without groups it is what a shuffle of all frames gives, the most there is. With groups it is the mean over the
    batches of one pass. A shuffle buffer of N frames that is filled episode by episode is about as good as groups of
    N frames.

    Args:
        episodes: frames of each episode, see `EpisodeDataset.frames_per_episode`.
    """
    order = np.argsort(np.random.default_rng(seed).random(len(episodes)), kind="stable")
    group = len(episodes) if group_episodes is None else group_episodes
    frames = int(np.sum(episodes))
    size = min(batch_size, frames)
    batches = frames // size  # whole ones
    total, start = 0.0, 0
    for at in range(0, len(episodes), group):
        of = np.asarray(episodes, np.float64)[order[at : at + group]]
        n = of.sum()
        stop = start + int(n)
        # The parts of this group that are in each batch, m frames of n: of its first batch, of whole ones, of its last.
        end = min(stop, batches * size)
        first = min(-start % size, max(end - start, 0))
        whole, last = divmod(max(end - start, 0) - first, size)
        for m, count in ((first, 1), (size, whole), (last, 1)):
            if not m * count:
                continue
            # An episode of f frames is not among them with probability C(n - f, m) / C(n, m).
            rest = n - of[of > 0]
            log_missing = gammaln(rest + 1) - gammaln(np.maximum(rest - m, 0) + 1) - gammaln(n + 1) + gammaln(n - m + 1)
            total += count * float(np.where(rest >= m, -np.expm1(log_missing), 1.0).sum())
        start = stop
    return total / batches
