"""How the records of a split are stored: what reads them for an index, and what reads their pictures afterwards.

A new way of storing is a new `Storage`; nothing else asks which it is.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol, runtime_checkable

import numpy as np

from openpi_like.data.files import Location
from openpi_like.data.images import decode, encoding

if TYPE_CHECKING:  # a split has a storage
    from openpi_like.data.index_shard import Shard
    from openpi_like.data.schema import Split

Rows = np.ndarray | list[str]  # the values of the steps of an episode, first axis; texts as strings


class RecordError(ValueError):
    """A record that cannot be used. resumable: the records behind it can be."""

    def __init__(self, message: str, *, resumable: bool) -> None:
        super().__init__(message)
        self.resumable = resumable


@dataclasses.dataclass(frozen=True)
class StoredEpisode:
    """One record as it is stored.

    rows: column of the index (see `IndexColumn`) -> its values. Of pictures (T, 2) int64: where it is, as the storage
        understands it, and its length in bytes.
    problems: why it cannot be used. undecodable: text column -> why it is no text, which is a problem too.
    unknown: fields that the schema does not have.
    """

    rows: dict[str, Rows]
    problems: tuple[str, ...] = ()
    undecodable: dict[str, str] = dataclasses.field(default_factory=dict)
    unknown: frozenset[str] = frozenset()


class Place(NamedTuple):
    """Where a picture is: field, file, record in it, and what the index holds of it (see `StoredEpisode.rows`)."""

    key: str
    shard: Location
    record: int
    at: int
    length: int


@runtime_checkable
class Pictures(Protocol):
    """Reads the pictures of one split in any order. May be used from several threads; files stay open."""

    def encoded(self, place: Place) -> bytes:
        """Returns an encoded picture (JPEG, PNG), as it is stored.

        Raises:
            OSError, RecordError: it cannot be read; or pictures are not stored one by one.
        """

    def pixels(self, place: Place, channel_order: str) -> np.ndarray:
        """Returns a decoded picture (H, W, 3) uint8. channel_order: see `Camera`.

        Raises:
            OSError, RecordError: it cannot be read.
            ValueError: what was read is not a picture.
        """

    def encoding(self, place: Place) -> str:
        """Returns how a picture is encoded, for instance "jpeg" or "h264"; raises as `pixels`."""

    def close(self) -> None:
        """Closes the files; reading opens them again."""


class EncodedPictures:
    """The part of `Pictures` that follows from pictures that are stored one by one."""

    def stored(self, place: Place) -> bytes:
        """Returns the bytes at a place; fewer where the file ends."""
        raise NotImplementedError

    def encoded(self, place: Place) -> bytes:
        data = self.stored(place)
        if len(data) < place.length:
            raise RecordError(
                f"read {len(data)} of {place.length} bytes; the file was changed since it was indexed: copy it again",
                resumable=True,
            )
        return data

    def pixels(self, place: Place, channel_order: str) -> np.ndarray:
        return decode(self.encoded(place), channel_order)

    def encoding(self, place: Place) -> str:
        return encoding(self.encoded(place))


@runtime_checkable
class Storage(Protocol):
    """How records are stored. A frozen object: it travels to other processes with its split."""

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
