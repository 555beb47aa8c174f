"""Recordings on disk: one file per episode, to which every step is appended. Needs numpy and msgpack alone.

A file is a line that names the format, then records: the length of a message, its CRC-32, and the message itself, as
`openpi_like.serve.protocol` packs it. The first one is the head (robot, instruction, policy, what the user adds), then
comes one per step, and last of all, when the episode has ended, its conclusion (success, notes). A file with a
conclusion is whole. One without is of an episode that goes on, or of a robot's program that was killed: all steps
before the kill are there, and the one being written, if any, is cut off and known to be.
"""

import contextlib
import dataclasses
import os
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from openpi_like.serve.protocol import MAX_MESSAGE_BYTES, ProtocolError, pack, unpack

try:
    import fcntl
except ImportError:  # Windows, where a file that is open cannot be renamed, which protects it as well
    fcntl = None  # type: ignore[assignment]

SUFFIX, DROPPED = ".episode", ".dropped"
RESERVED = ("file_path", "success", "started", "policy", "notes")
"""What is known of every episode; metadata that a user adds have other names."""
_MAGIC = b"openpi_like recording 1\n"
_RECORD = struct.Struct("<II")  # length and CRC-32 of the message that follows
_SUCCESS = {True: 1, False: 0, None: -1}


class RecordingError(ValueError):
    """A recording is missing, damaged, in use, or not what is expected."""


class EpisodeWriter:
    """Appends to the file of one episode, which no other process can conclude or drop meanwhile. One thread at a time.

    name: of the episode, and its file without `SUFFIX`.
    """

    def __init__(self, path: Path, head: dict[str, Any]) -> None:
        """Creates the file, with its head.

        Raises:
            OSError: it cannot be written, or is there already.
        """
        self.path, self.name, self.steps = path, path.name.removesuffix(SUFFIX), 0
        self._file: BinaryIO = path.open("xb", buffering=0)  # what is written is the system's, and outlives the program
        _lock(self._file)
        self._write(_MAGIC + _record(pack({"head": head})))

    def append(self, message: bytes) -> None:
        """Appends one step, as `pack_step` returns it."""
        self._write(_record(message))
        self.steps += 1

    def conclude(self, success: bool | None, notes: str) -> None:
        """Ends the episode and closes its file; when this returns, the disk has it."""
        self._write(_record(_conclusion(success, notes, self.steps)))
        os.fsync(self._file.fileno())
        self.close()

    def sync(self) -> None:
        """Waits until the disk has what was appended."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the file; without a conclusion, the episode stays unfinished."""
        self._file.close()

    def _write(self, data: bytes) -> None:
        left = memoryview(data)
        while left:  # an unbuffered file may take a part
            left = left[self._file.write(left) or 0 :]


def pack_step(
    images: dict[str, bytes], numbers: dict[str, Any], *, intervened: bool, prompt: str, time_s: float, wall_s: float
) -> bytes:
    """Returns one step as the message that `EpisodeWriter.append` takes.

    images: encoded, by camera. numbers: arrays "state", "action", and where a policy was asked, "proposed", "chunk".
    """
    times = {"time_s": time_s, "wall_s": wall_s}
    message = pack({"step": {"images": images, **numbers, "intervened": intervened, "prompt": prompt, **times}})
    if len(message) > MAX_MESSAGE_BYTES:
        raise ProtocolError(f"a step of {len(message)} bytes, expected at most {MAX_MESSAGE_BYTES}; use smaller images")
    return message


@dataclasses.dataclass(frozen=True)
class Recording:
    """One file of a spool.

    head: robot, prompt, started, policy, metadata. steps: how many it holds. success: None where nobody said, or it is
    unfinished. finished: it has a conclusion. cut_bytes: of a step that was being written when the program was killed.
    end: where the last whole record ends, in bytes.
    """

    path: Path
    head: dict[str, Any]
    steps: int
    finished: bool
    success: bool | None
    notes: str
    cut_bytes: int
    end: int

    @property
    def name(self) -> str:
        return self.path.name.removesuffix(SUFFIX)

    @property
    def of_requests(self) -> bool:
        """Whether a step is a request to a server, and not a control step."""
        return bool(self.head.get("of_requests", False))

    def read(self) -> Iterator[dict[str, Any]]:
        """Yields the steps: images (encoded, by camera), state, action, intervened, prompt, times; proposed and chunk
        where there are any.

        Raises:
            RecordingError: a record is damaged; says which.
        """
        with self.path.open("rb") as f:
            f.seek(len(_MAGIC))
            for i in range(1 + self.steps):
                length, crc = _RECORD.unpack(f.read(_RECORD.size))
                message = f.read(length)
                if zlib.crc32(message) != crc:
                    where = f"step {i - 1}" if i else "its head"
                    raise RecordingError(f"{self.path}: {where} is damaged (wrong CRC-32); copy the file again")
                if i:
                    yield unpack(message)["step"]


def open_recording(path: Path) -> Recording:
    """Looks at one file: its head, how many steps it has, and its conclusion. Steps are not read.

    Raises:
        RecordingError: it is no recording, or a finished one of which bytes are missing.
    """
    with path.open("rb") as f:
        size = os.fstat(f.fileno()).st_size
        if f.read(len(_MAGIC)) != _MAGIC:
            raise RecordingError(f"{path} does not begin as a recording does, with {_MAGIC!r}")
        at, spans = len(_MAGIC), []  # (where a message begins, its length)
        while at + _RECORD.size <= size:
            f.seek(at)
            length, _ = _RECORD.unpack(f.read(_RECORD.size))
            if not length or at + _RECORD.size + length > size:  # zeros are what a loss of power leaves
                break
            spans.append((at + _RECORD.size, length))
            at += _RECORD.size + length
        if not spans:
            raise RecordingError(f"{path} has no head; it was cut off when it began, and holds no step")

        head, end = _message(f, spans[0]), None
        if head is None or "head" not in head:
            raise RecordingError(f"{path}: its head is damaged; copy the file again")
        if len(spans) > 1:
            last = _message(f, spans[-1])
            if last is None:
                at -= _RECORD.size + spans.pop()[1]
            else:
                end = last.get("end")
    steps = len(spans) - 1 - (end is not None)
    if end is not None and end["steps"] != steps:
        raise RecordingError(f"{path} says that it has {end['steps']} steps, there are {steps}; copy the file again")
    success = None if end is None or end["success"] < 0 else end["success"] > 0
    return Recording(path, head["head"], steps, end is not None, success, end["notes"] if end else "", size - at, at)


def _message(file: BinaryIO, span: tuple[int, int]) -> dict[str, Any] | None:
    """Returns the message that begins at a byte and has a length, None where it is damaged."""
    at, length = span
    file.seek(at - _RECORD.size)
    _, crc = _RECORD.unpack(file.read(_RECORD.size))
    data = file.read(length)
    with contextlib.suppress(ProtocolError):
        return unpack(data) if zlib.crc32(data) == crc else None
    return None


def open_spool(directory: Path) -> list[Recording]:
    """Returns the recordings of a directory, in the order in which they began; dropped ones are not among them.

    Raises:
        RecordingError: there is no such directory, or nothing in it, or files are no recordings; lists them all.
    """
    if not directory.is_dir():
        raise RecordingError(f"no directory {directory}, expected that of an openpi_like.serve.recorder.Recorder")
    found, problems = [], []
    for path in sorted(directory.glob(f"*{SUFFIX}")):
        try:
            found.append(open_recording(path))
        except RecordingError as e:
            problems.append(str(e))
    if problems:
        raise RecordingError("\n".join([*problems, "move these files away to go on without them"]))
    if not found:
        raise RecordingError(f"{directory} has no recordings (*{SUFFIX})")
    return found


def conclude(recording: Recording, success: bool | None, notes: str) -> Recording:
    """Ends an unfinished recording with the steps it has; a step that was cut off is removed from the file.

    Raises:
        RecordingError: it is finished, has no step, or its recorder still runs.
    """
    if recording.finished or not recording.steps:
        raise RecordingError(f"{recording.path} {'is finished' if recording.finished else 'has no step; drop it'}")
    with _unused(recording.path) as f:
        f.truncate(recording.end)
        f.seek(recording.end)
        f.write(_record(_conclusion(success, notes, recording.steps)))
        f.flush()
        os.fsync(f.fileno())
    return open_recording(recording.path)


def drop(path: Path) -> Path:
    """Sets a recording aside, under another name, which is returned; it is not deleted.

    Raises:
        RecordingError: its recorder still runs.
    """
    with _unused(path):
        pass
    return path.rename(path.with_name(path.name.removesuffix(SUFFIX) + DROPPED))


@contextlib.contextmanager
def _unused(path: Path) -> Iterator[BinaryIO]:
    with path.open("r+b") as f:
        try:
            _lock(f)
        except OSError as e:
            raise RecordingError(f"{path} is being recorded right now; end the episode in the robot's program") from e
        yield f


def _lock(file: BinaryIO) -> None:
    """Raises OSError where another process, or another object of this one, has it."""
    if fcntl is not None:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _record(message: bytes) -> bytes:
    return _RECORD.pack(len(message), zlib.crc32(message)) + message


def _conclusion(success: bool | None, notes: str, steps: int) -> bytes:
    return pack({"end": {"success": _SUCCESS[success], "notes": notes, "steps": steps}})
