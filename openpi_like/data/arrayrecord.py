"""ArrayRecord files, read with the `array_record` package.

Records are compressed one by one, so that one image costs its whole episode: the last episodes read are kept, up to
`CACHE_BYTES` in a process, which saves the other cameras of a frame and frames that are near in the order. The package
reads files on disk; those of a store are copied to the cache directory first (`files.local_copy`).
"""

import itertools
import os
import threading
from collections.abc import Iterator
from typing import Any

from openpi_like.data import files
from openpi_like.data.byte_cache import ByteCache
from openpi_like.data.files import Location
from openpi_like.data.storage import RecordError

CACHE_BYTES = 64 << 20


def _open(location: Location) -> Any:
    from array_record.python.array_record_module import ArrayRecordReader  # not there on every system

    path = files.local_copy(location)
    if not path.is_file():
        raise FileNotFoundError(f"no {path}")
    # As grain opens them: without what speeds up reading in order, which costs a megabyte per open file.
    options = "readahead_buffer_size:0,max_parallelism:0"
    return ArrayRecordReader(os.fspath(path), options=options, file_reader_buffer_size=1 << 15)


def _read(reader: Any, record: int) -> bytes:
    try:
        return reader.read([record])[0]
    except (IndexError, RuntimeError, ValueError) as e:
        raise RecordError(str(e), resumable=True) from e


def read_records(location: Location) -> Iterator[bytes | RecordError]:
    """Yields the payload of every record in order, with the file's hashes verified.

    A damaged record is yielded as a `RecordError`. If the file as a whole is damaged, that is the only thing yielded.

    Raises:
        OSError: it is not there or cannot be read.
    """
    reader = _open(location)
    if not reader.ok():
        try:
            _read(reader, 0)
        except RecordError as e:
            yield RecordError(f"the file is cut or not an ArrayRecord: {e}", resumable=False)
        return
    for record in range(reader.num_records()):
        try:
            payload: bytes | RecordError = _read(reader, record)
        except RecordError as e:
            payload = e
        yield payload


_cache = ByteCache(CACHE_BYTES)
_owners = itertools.count()


class Records:
    """Reads single records of many files, in any order, from several threads. Files stay open."""

    def __init__(self) -> None:
        self._owner = next(_owners)
        self._readers: dict[Location, Any] = {}
        self._lock = threading.Lock()

    def read(self, location: Location, record: int) -> bytes:
        """Returns the payload of one record.

        Raises:
            OSError: the file is not there or cannot be read.
            RecordError: the record is damaged.
        """
        return _cache.get((self._owner, (location, record)), lambda: _read(self._reader(location), record))

    def _reader(self, location: Location) -> Any:
        with self._lock:
            reader = self._readers.get(location)
            if reader is None:
                reader = _open(location)
                if len(self._readers) < files.OPEN_FILES:
                    self._readers[location] = reader
            return reader

    def close(self) -> None:
        """Closes the files and forgets their records; reading opens them again."""
        with self._lock:
            self._readers = {}  # a reader closes its file when nobody holds it; its `close` raises after damage
        _cache.forget(self._owner)
