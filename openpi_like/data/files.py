"""Where the files of a dataset lie: on disk, or behind a URL of any store that fsspec knows (gs://, s3://, memory://).

A store is reached with its driver's own defaults (credentials of the machine, `FSSPEC_*` variables). Whatever a driver
raises arrives here as an `OSError`.
"""

import contextlib
import dataclasses
import errno
import hashlib
import itertools
import logging
import os
import resource
import shutil
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec

CACHE_VARIABLE = "OPENPI_LIKE_CACHE"
BLOCK = 16 << 20  # bytes asked of a store at once where a file is read from its beginning to its end
MOST_FILES = 1 << 16  # no more files are asked of the system; some systems have no limit
# What stores call the thing that changes with a file's content, the surest first.
_STAMPS = ("etag", "ETag", "md5Hash", "mtime", "updated", "LastModified", "last_modified", "created")

_log = logging.getLogger(__name__)


def _raise_limit() -> int:
    """Allows this process as many open files as it may allow itself; returns their number.

    A mixture of datasets has thousands of shards, and every column of an index that is mapped holds a file open too.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, MOST_FILES)
    if soft != resource.RLIM_INFINITY and soft < most:
        with contextlib.suppress(OSError, ValueError):  # systems have other limits besides
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return most if soft == resource.RLIM_INFINITY else soft


# Shards that all datasets of a process keep open together, those read last; the other half is for columns and the rest.
OPEN_FILES = min(_raise_limit() // 2, 4096)


def advice(error: Exception) -> str:
    """Returns what to do about an error that says that too many files are open; nothing for any other error."""
    if os.strerror(errno.EMFILE) not in str(error):
        return ""
    limit, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return (
        f"; this process may have {limit} files open, and each column of each dataset takes one: "
        f"allow more with `ulimit -n` (now at most {hard}) before the start"
    )


@dataclasses.dataclass(frozen=True)
class Url:
    """A file or directory of a store, with the part of `pathlib.Path` that the readers need."""

    text: str

    def __str__(self) -> str:
        return self.text

    def __truediv__(self, name: str) -> "Url":
        return Url(f"{self.text.rstrip('/')}/{name}")

    @property
    def name(self) -> str:
        """The last part."""
        return self.text.rstrip("/").rpartition("/")[2]

    @property
    def parent(self) -> "Url":
        """One level up; the root's parent is the root."""
        protocol, _, path = self.text.partition("://")
        return Url(f"{protocol}://{path.rstrip('/').rpartition('/')[0]}")


Location = Path | Url


@dataclasses.dataclass(frozen=True)
class Stat:
    """size: bytes. stamp: changes when the file does: time in ns on disk, else what the store has (etag or time)."""

    size: int
    stamp: int | str


def locate(place: str | Path | Url) -> Location:
    """Returns the location that a path or URL names. `file://` is the disk; a URL that became a path is put right."""
    if isinstance(place, Url):
        return place
    if isinstance(place, Path):
        first, *rest = place.parts or ("",)  # `pathlib` has made one slash of two
        if not first.endswith(":"):
            return place
        place = f"{first}//{'/' if first == 'file:' else ''}{'/'.join(rest)}"
    if place.startswith("file://"):
        return Path(place.removeprefix("file://"))
    return Url(place) if "://" in place else Path(place)


def absolute(location: Location) -> str:
    """Returns the name by which a location is known whatever the working directory."""
    return str(location.resolve()) if isinstance(location, Path) else str(location)


def cache_directory() -> Path:
    """Returns `$OPENPI_LIKE_CACHE`, or `~/.cache/openpi_like`."""
    return Path(os.environ.get(CACHE_VARIABLE) or Path.home() / ".cache" / "openpi_like")


@contextlib.contextmanager
def _store(url: Url) -> Iterator[tuple[Any, str]]:
    """Yields (file system, path in it)."""
    try:
        yield fsspec.core.url_to_fs(url.text)
    except OSError:
        raise
    except Exception as e:  # each driver has errors of its own, for a wrong protocol, credentials, network
        raise OSError(f"{url}: {type(e).__name__}: {e}") from e


def _listing(directory: Location) -> dict[str, tuple[bool, Stat]]:
    """Returns name -> (is it a directory, stat) of what is in a directory."""
    if isinstance(directory, Path):
        found = {}
        with os.scandir(directory) as entries:
            for e in entries:
                with contextlib.suppress(FileNotFoundError):  # a link to nothing is no file
                    found[e.name] = (e.is_dir(), Stat(e.stat().st_size, e.stat().st_mtime_ns))
        return found
    with _store(directory) as (fs, path):
        fs.invalidate_cache()  # a listing may have been kept from before the files changed
        found = {}
        for entry in fs.ls(path, detail=True):
            stamp = next((str(entry[k]) for k in _STAMPS if entry.get(k) is not None), "")
            name = entry["name"].rstrip("/").rpartition("/")[2]
            found[name] = (entry["type"] == "directory", Stat(entry.get("size") or 0, stamp))
        if not found:  # stores do not know empty directories
            raise FileNotFoundError(f"{directory}: nothing there")
        return found


def list_files(directory: Location) -> dict[str, Stat]:
    """Returns the files of a directory.

    Raises:
        OSError: there is no such directory, or it cannot be read.
    """
    return {name: stat for name, (is_dir, stat) in sorted(_listing(directory).items()) if not is_dir}


def list_directories(directory: Location) -> list[str]:
    """Returns the names of the directories in a directory; raises as `list_files`."""
    return sorted(name for name, (is_dir, _) in _listing(directory).items() if is_dir)


def glob(directory: Location, pattern: str) -> list[str]:
    """Returns the names, relative to `directory`, of what matches below it."""
    if isinstance(directory, Path):
        return sorted(str(p.relative_to(directory)) for p in directory.glob(pattern))
    with _store(directory) as (fs, path):
        root = path.rstrip("/") + "/"
        return sorted(name.removeprefix(root) for name in fs.glob(root + pattern))


def read_text(location: Location) -> str:
    """Returns the content of a small file of text, in UTF-8.

    Raises:
        OSError: it is not there or cannot be read.
        UnicodeDecodeError: it is no text.
    """
    if isinstance(location, Path):
        return location.read_text(encoding="utf-8")
    with _store(location) as (fs, path):
        return fs.cat_file(path).decode()


@contextlib.contextmanager
def open_binary(location: Location) -> Iterator[Any]:
    """Opens a file for reading in any order; raises as `read_text`."""
    if isinstance(location, Path):
        with location.open("rb") as file:
            yield file
        return
    with _store(location) as (fs, path), fs.open(path, "rb", block_size=BLOCK) as file:
        yield file


def size(location: Location) -> int:
    """Returns a file's length in bytes; raises as `read_text`."""
    if isinstance(location, Path):
        return location.stat().st_size
    with _store(location) as (fs, path):
        return int(fs.size(path))


def _read_store(url: Url, start: int, length: int) -> bytes:
    with _store(url) as (fs, path):
        return fs.cat_file(path, start=start, end=start + length) if length else b""


def _read_disk(fd: int, start: int, length: int) -> bytes:
    data = os.pread(fd, length, start)
    while len(data) < length:  # one read returns at most 2 GiB
        more = os.pread(fd, length - len(data), start + len(data))
        if not more:
            break
        data += more
    return data


@dataclasses.dataclass(eq=False)
class _File:
    """A file that is open. users: threads that are reading it."""

    fd: int
    users: int = 0


class _OpenFiles:
    """Files that are kept open, those used last, up to `OPEN_FILES`. May be used from several threads."""

    def __init__(self) -> None:
        self._kept: OrderedDict[tuple[int, Path], _File] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._kept)

    @contextlib.contextmanager
    def open(self, owner: int, path: Path) -> Iterator[int]:
        """Yields a descriptor, which nobody closes meanwhile."""
        key = owner, path
        with self._lock:
            file = self._kept.get(key)
            if file is not None:
                file.users += 1
                self._kept.move_to_end(key)
        if file is None:
            file = _File(os.open(path, os.O_RDONLY), users=1)  # another thread may do the same: one of them is kept
            with self._lock:
                self._kept.setdefault(key, file)
                while len(self._kept) > OPEN_FILES:
                    self._drop(next(iter(self._kept)))
        try:
            yield file.fd
        finally:
            with self._lock:
                file.users -= 1
                if not file.users and self._kept.get(key) is not file:
                    os.close(file.fd)

    def _drop(self, key: tuple[int, Path]) -> None:
        file = self._kept.pop(key)
        if not file.users:  # else the last of them closes it
            os.close(file.fd)

    def close(self, owner: int) -> None:
        with self._lock:
            for key in [k for k in self._kept if k[0] == owner]:
                self._drop(key)


_open_files = _OpenFiles()
_owners = itertools.count()


class Ranges:
    """Reads ranges of many files, in any order. Keeps files on disk open; may be used from several threads."""

    def __init__(self) -> None:
        self._owner = next(_owners)  # each opens a file itself: it may have been replaced since another did

    def read(self, location: Location, start: int, length: int) -> bytes:
        """Returns `length` bytes from byte `start` on; fewer where the file ends.

        Raises:
            OSError: it is not there or cannot be read.
        """
        if isinstance(location, Url):
            return _read_store(location, start, length)
        with _open_files.open(self._owner, location) as fd:
            return _read_disk(fd, start, length)

    def close(self) -> None:
        """Closes the files; reading opens them again."""
        _open_files.close(self._owner)


class Forward:
    """Reads ranges of one file whose starts only grow: from a store in blocks, so that requests are few and large."""

    def __init__(self, location: Location) -> None:
        """
        Raises:
            OSError: it is not there or cannot be read.
        """
        self._location = location
        self.size = size(location)
        self._ranges = Ranges()
        self._start, self._data = 0, b""

    def __enter__(self) -> "Forward":
        return self

    def __exit__(self, *_: object) -> None:
        self._ranges.close()

    def read(self, start: int, length: int) -> bytes:
        """Returns `length` bytes from byte `start` on; fewer where the file ends."""
        if isinstance(self._location, Path):
            return self._ranges.read(self._location, start, length)
        end = min(start + length, self.size)
        if end > self._start + len(self._data):
            kept = self._data[start - self._start :]
            at = start + len(kept)
            more = min(max(end, at + BLOCK), self.size) - at
            self._start, self._data = start, kept + self._ranges.read(self._location, at, more)
        return self._data[start - self._start : end - self._start]


def local_copy(location: Location) -> Path:
    """Returns a file on disk with the content of `location`: itself, or a copy that is kept in the cache directory.

    Raises:
        OSError: it is not there or cannot be read.
    """
    if isinstance(location, Path):
        return location
    stat = list_files(location.parent).get(location.name)
    if stat is None:
        raise FileNotFoundError(f"no {location}")
    key = hashlib.sha256(f"{location} {stat.size} {stat.stamp}".encode()).hexdigest()[:16]
    kept = cache_directory() / "files" / f"{key}-{location.name}"
    if not kept.is_file():
        kept.parent.mkdir(parents=True, exist_ok=True)
        _log.info("copying %s (%.0f MB) to %s", location, stat.size / 1e6, kept)
        with tempfile.NamedTemporaryFile(dir=kept.parent, prefix=".part-", delete=False) as part:
            try:
                with _store(location) as (fs, path), fs.open(path, "rb", block_size=BLOCK) as file:
                    shutil.copyfileobj(file, part, BLOCK)
                part.flush()
                copied, expected = os.path.getsize(part.name), stat.size or size(location)  # not all listings have it
                if copied != expected:
                    raise OSError(f"{location}: got {copied} of {expected} bytes, the file changes or the store fails")
                os.replace(part.name, kept)
            finally:
                Path(part.name).unlink(missing_ok=True)
    return kept
