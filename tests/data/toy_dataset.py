"""The toy dataset as its robots see it, and what tests change of it: columns, actions, damaged images."""

import dataclasses
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest

from openpi_like.data.dataset import EpisodeDataset
from openpi_like.data.index import FrameIndex
from openpi_like.data.schema import DatasetError
from openpi_like.data.selection import Selection
from openpi_like.robots import ActionField, Robot
from tests.data.toy import ARM, LENGTHS

TRAIN = LENGTHS["train"]
START = np.cumsum([0, *TRAIN])
STEPS = sum(TRAIN)


def with_columns(index: FrameIndex, **columns: np.ndarray) -> FrameIndex:
    return dataclasses.replace(index, columns={**index.columns, **columns})


def acting(*action: ActionField, **changes: Any) -> Robot:
    return dataclasses.replace(ARM, action=action, **changes)


def chunks_of(dataset: EpisodeDataset, episode: int) -> tuple[np.ndarray, np.ndarray]:
    """Chunks and masks of all frames of one episode."""
    counts = dataset.frames_per_episode()
    frames = np.arange(counts[episode]) + counts[:episode].sum()
    return dataset.actions(frames)


def kept_steps(dataset: EpisodeDataset) -> list[int]:
    return dataset.steps(np.arange(len(dataset))).tolist()


def by_step(keep: Any) -> list[int]:
    """Steps for which `keep(episode, step in it)`."""
    return [START[e] + t for e, n in enumerate(TRAIN) for t in range(n) if keep(e, t)]


def with_damage(index: FrameIndex, **damaged: Iterable[int]) -> FrameIndex:
    steps = {f"observation/{key}": np.array(sorted(at), np.int64) for key, at in damaged.items()}
    return dataclasses.replace(index, damaged=steps)


def problem(dataset: EpisodeDataset, robot: Robot = ARM, **selection: Any) -> str:
    with pytest.raises(DatasetError) as e:
        EpisodeDataset(dataset.index, robot, selection=Selection(**selection))
    return str(e.value)
