"""What a dataset says of itself, whatever its layout: its fields, and where the records of a split are stored."""

import dataclasses

from openpi_like.data.files import Location, Stat
from openpi_like.data.storage import Storage


class DatasetError(ValueError):
    """A dataset is missing, damaged, or not what a robot or run expects."""


@dataclasses.dataclass(frozen=True)
class Feature:
    """One field of a step or of an episode.

    key: path, e.g. "observation/state" in a step. kind: "numeric", "text", "image", or "other" where this reader cannot
    read it. shape: of one step's value; None where it may vary. encoding: "none", "zlib" or "bytes"; of texts that are
    stored as integers "code_points" (see `layouts.tfds.CODE_POINT_WORDS`).
    """

    key: str
    kind: str
    dtype: str
    shape: tuple[int | None, ...]
    encoding: str = "none"


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
    rate: steps in a second, in Hz, where the dataset says it.
    """

    name: str
    dataset: str
    version: str
    storage: Storage
    shards: tuple[Location, ...]
    lengths: tuple[int, ...]
    stats: tuple[Stat | None, ...]
    companions: str = ""
    rate: float | None = None

    def __str__(self) -> str:
        return f"{self.dataset}/{self.version} split {self.name!r}"
