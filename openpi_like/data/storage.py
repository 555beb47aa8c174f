"""Records and pictures as they are stored, whatever the storage: what a `schema.Storage` gives to an index."""

import dataclasses
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int, Int64

from openpi_like.data.files import Location
from openpi_like.data.images import Target, decode_for, encoding

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


def pack(high: Int[np.ndarray, "n"] | int, low: Int[np.ndarray, "n"]) -> Int64[np.ndarray, "n"]:
    """Returns two numbers, each below 2^31 and 2^32, as one int64: what an index holds of where a picture is."""
    return (np.asarray(high, np.int64) << 32) | low


def unpack(packed: int) -> tuple[int, int]:
    """Returns the two numbers of `pack`."""
    return packed >> 32, packed & 0xFFFFFFFF


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

    def pixels(self, place: Place, channel_order: str, target: Target | None) -> tuple[np.ndarray, tuple[int, int]]:
        """Returns a decoded picture (H, W, 3) uint8, and the size in which it is stored.

        channel_order: see `Camera`. target: what it is made into; it may be decoded at a part of its size.

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

    def pixels(self, place: Place, channel_order: str, target: Target | None) -> tuple[np.ndarray, tuple[int, int]]:
        return decode_for(self.encoded(place), channel_order, target)

    def encoding(self, place: Place) -> str:
        return encoding(self.encoded(place))
