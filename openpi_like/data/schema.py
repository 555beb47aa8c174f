"""What a dataset says of itself, whatever its layout: its fields, and where the records of a split are stored."""

import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from openpi_like.data.files import Location, Stat
from openpi_like.data.storage import Pictures, RecordError, StoredEpisode


class DatasetError(ValueError):
    """A dataset is missing, damaged, or not what a robot or run expects."""


class MissingPackageError(DatasetError):
    """A package that reads a dataset is not installed, which says nothing about the data."""


@dataclasses.dataclass(frozen=True)
class Feature:
    """One field of a step or of an episode.

    key: path, e.g. "observation/state" in a step. kind: "numeric", "text", "image", or "other" where this reader cannot
    read it. shape: of one step's value; None where it may vary. encoding: "none", "zlib" or "bytes"; of texts that are
    stored as integers "code_points" (see `layouts.tfds.CODE_POINT_WORDS`); of pictures "raw" where they are numbers.
    names: what the values are called, where the dataset says it: motors, as a rule. labels: all that LeRobot has as
    `names`, as JSON, so that a copy says the same: they may be lists by kind, or of axes.
    """

    key: str
    kind: str
    dtype: str
    shape: tuple[int | None, ...]
    encoding: str = "none"
    names: tuple[str, ...] = ()
    labels: str = ""


def with_names(feature: Feature, names: Any) -> Feature:
    """Returns a field with LeRobot's `names`: a list, lists by kind ("motors"), or nothing."""
    found = flat_names(names)
    each = len(found) == math.prod(d or 0 for d in feature.shape) and feature.shape not in ((), (1,))
    labels = json.dumps(names, ensure_ascii=False) if names else ""
    return dataclasses.replace(feature, names=tuple(found) if each else (), labels=labels)


def flat_names(names: Any) -> list[str]:
    """Returns LeRobot's `names` as one list."""
    if isinstance(names, dict):
        return [name for value in names.values() for name in flat_names(value)]
    return [str(name) for name in names] if isinstance(names, list) else []


@dataclasses.dataclass(frozen=True)
class Schema:
    """Features of one step and of the whole episode, by key."""

    steps: dict[str, Feature]
    episode: dict[str, Feature]


@dataclasses.dataclass(frozen=True)
class Split:
    """One split: its shard files in order, how many records (episodes) each holds, and what the storage says of it.

    storage: how records are read. stats: None where the file is missing, if that is tolerated.
    companions: a digest of all other files that the records need (videos, tables of episodes), or "".
    rate: steps in a second, in Hz, where the dataset says it. robot_type: which robot, as LeRobot calls it.
    of_requests: a step is a request to a policy server, and what the robot did until the next is not in it.
    """

    name: str
    dataset: str
    version: str
    storage: "Storage"
    shards: tuple[Location, ...]
    lengths: tuple[int, ...]
    stats: tuple[Stat | None, ...]
    companions: str = ""
    rate: float | None = None
    robot_type: str | None = None
    of_requests: bool = False

    def __str__(self) -> str:
        return f"{self.dataset}/{self.version} split {self.name!r}"


@dataclasses.dataclass(frozen=True)
class Shard:
    """What a process needs to index one shard. number: of the split. part: the file that it writes."""

    split: Split
    number: int
    size: int
    schema: Schema
    part: Path

    @property
    def location(self) -> Location:
        """Its file."""
        return self.split.shards[self.number]

    @property
    def expected(self) -> int:
        """Its records."""
        return self.split.lengths[self.number]


@runtime_checkable
class Storage(Protocol):
    """How records are stored: a new way is a new class, and nothing else asks which it is.

    A frozen object, since it travels to other processes with its split.
    """

    @property
    def name(self) -> str:
        """What it is called, for instance "tfrecord"."""

    def episodes(self, shard: "Shard") -> Iterator[tuple[str, StoredEpisode | RecordError]]:
        """Yields (what to call the place, record) of every record of a shard, in order.

        Raises:
            OSError: the file cannot be read.
        """

    def complete(self, split: "Split", parts: Path, index: Path) -> None:
        """Adds to a finished index what pictures need beside its columns. parts: directory of the build."""

    def pictures(self, split: "Split", index: Path) -> Pictures:
        """Returns what reads pictures. index: the directory of the index."""

    def read_bytes(self, images: dict[str, np.ndarray], key: str) -> int:
        """Returns the most that is read at once for a picture `key`. images: key -> (N, 2) of some steps."""

    @property
    def kept(self) -> dict[str, int]:
        """What reading pictures keeps in each process, and how many bytes that takes at most."""
