"""Single frames of MP4 files that are never opened: packets are read by their place and given to a decoder.

An index of packets is made once. Reading a frame then costs the bytes and the decoding from its key frame on; files of
a store are read by ranges, and no file is parsed again.
"""

import contextlib
import dataclasses
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Float64, Int, Int64, UInt8

from openpi_like.data import files
from openpi_like.data.files import Location, Ranges
from openpi_like.data.schema import MissingPackageError
from openpi_like.data.storage import RecordError, unpack

DECODERS = 4  # decoders that are kept when no thread uses them; each holds a few frames
DECODER_BYTES = 24 << 20
READ_BYTES = 1 << 18  # read at a time, if a frame is not larger
_PREFERRED = {"av1": "libdav1d"}  # FFmpeg's own decoder of AV1 needs a GPU


def av() -> Any:
    """Returns the package `av`.

    Raises:
        MissingPackageError: it is not installed.
    """
    try:
        import av as package
    except ImportError as e:
        raise MissingPackageError(f"videos are read with PyAV: {e}; pip install 'openpi-like[formats]'") from e
    return package


@dataclasses.dataclass(frozen=True)
class Codec:
    """What a decoder has to know. setup: hexadecimal, what FFmpeg calls extradata."""

    name: str
    setup: str


@dataclasses.dataclass(frozen=True)
class Packets:
    """The packets of one video in the order in which they are decoded, each with one frame.

    rows: (M, 4) int64: byte in the file, length, time stamp in units of the video, and the packet from which decoding
        must begin, itself for a key frame. seconds: (M,), when each frame is shown; NaN for one that the file's edit
        list hides, as where a video was trimmed without encoding it again.
    size: height and width of the pictures, in pixels, as the file says it.
    """

    rows: Int64[np.ndarray, "M 4"]
    seconds: Float64[np.ndarray, "M"]
    codec: Codec
    size: tuple[int, int]

    def at(self, seconds: Float[np.ndarray, "n"]) -> tuple[Int[np.ndarray, "n"], Float[np.ndarray, "n"]]:
        """Returns for each time (n,) the packet whose frame is nearest, and how far away that is, in seconds."""
        order = np.argsort(self.seconds, kind="stable")[: np.isfinite(self.seconds).sum()]  # NaN comes last
        shown = self.seconds[order]
        after = np.clip(np.searchsorted(shown, seconds), 1, max(len(shown) - 1, 1)) if len(shown) > 1 else None
        if after is None:
            nearest = np.zeros(len(seconds), np.int64)
        else:
            nearest = after - (np.abs(shown[after - 1] - seconds) <= np.abs(shown[after] - seconds))
        return order[nearest], np.abs(shown[nearest] - seconds)


def read_packets(location: Location) -> Packets:
    """Returns the packets of an MP4 file.

    Raises:
        OSError: it is not there or cannot be read.
        RecordError: it is not such a file, or it is cut.
    """
    package = av()
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(files.open_binary(location))
        size = file.seek(0, 2)
        file.seek(0)
        try:
            container = stack.enter_context(package.open(file, metadata_errors="ignore"))
            if "mp4" not in container.format.name:
                raise RecordError(f"it is {container.format.name}, expected mp4", resumable=True)
            if not container.streams.video:
                raise RecordError("it is no video, cut or damaged: it has no frames; copy it again", resumable=True)
            stream = container.streams.video[0]
            codec = _codec(package, stream)
            shown = stream.codec_context.height, stream.codec_context.width
            found = [(p.pos, p.size, p.pts, p.is_keyframe, p.is_discard) for p in container.demux(stream) if p.size]
            base = float(stream.time_base)
            announced = stream.frames
            whole = announced <= len(found) or announced <= _count_all(package, file)
        except package.FFmpegError as e:
            raise RecordError(f"it is no video, cut or damaged: {e}; copy it again", resumable=True) from e
    if not whole or any(pos + length > size for pos, length, *_ in found):
        raise RecordError(
            f"it is cut: {len(found)} of {announced} frames are there, the file ends at byte {size}; copy it again",
            resumable=True,
        )
    if not found or any(pos is None or pts is None for pos, _, pts, *_ in found):
        raise RecordError("its frames have no place or time; write it again as MP4", resumable=True)
    if not found[0][3]:
        raise RecordError("it does not begin with a key frame", resumable=True)
    hidden = np.array([discard for *_, discard in found])
    if hidden.all():
        raise RecordError(f"its edit list hides all of its {len(found)} frames; write it again", resumable=True)
    rows = np.array([row[:4] for row in found], np.int64)
    key = np.flatnonzero(rows[:, 3])
    first = key[np.searchsorted(key, np.arange(len(rows)), side="right") - 1]
    # A frame that is shown before the key frame it follows needs the key frame before that (open GOP).
    while (early := (rows[:, 2] < rows[first, 2]) & (first > 0)).any():
        first[early] = key[np.searchsorted(key, first[early]) - 1]
    rows[:, 3] = first
    return Packets(rows, np.where(hidden, np.nan, rows[:, 2] * base), codec, shown)


def _codec(package: Any, stream: Any) -> Codec:
    """Returns the codec of a stream; raises RecordError if it cannot be decoded here."""
    context = stream.codec_context
    name = None if context is None else context.codec.name
    try:
        if name is not None:
            package.Codec(_PREFERRED.get(name, name), "r")
            return Codec(name, bytes(context.extradata or b"").hex())
    except package.codec.codec.UnknownCodecError:
        pass
    raise RecordError(
        f"its codec{'' if name is None else f' {name}'} is not one that PyAV decodes here; write it again as H.264, "
        "HEVC or AV1",
        resumable=True,
    )


def _count_all(package: Any, file: Any) -> int:
    """Returns how many frames an MP4 file holds, those too that its edit list leaves out."""
    file.seek(0)
    with package.open(file, metadata_errors="ignore", options={"ignore_editlist": "1"}) as container:
        return sum(1 for packet in container.demux(container.streams.video[0]) if packet.size)


class VideoTable:
    """The packets of many videos, as an index holds them: files mapped into memory.

    A frame's address is which video, and which of its packets (see `pack`).
    """

    NAMES = ("packets.npy", "start.npy", "videos.json")

    def __init__(self, directory: Path, root: Location) -> None:
        """directory: where `write` has written. root: what names of videos are relative to."""
        self.packets = np.asarray(np.load(directory / self.NAMES[0], mmap_mode="r"))
        self.start = np.asarray(np.load(directory / self.NAMES[1], mmap_mode="r"))
        meta = json.loads((directory / self.NAMES[2]).read_text())
        self.codecs = [Codec(*codec) for codec in meta["codecs"]]
        self._names, self._codec, self._root = meta["videos"], meta["codec"], root

    @staticmethod
    def write(directory: Path, names: list[str], videos: Iterator[Packets | None]) -> None:
        """Writes the packets of videos, None for one that is not needed."""
        directory.mkdir()
        codecs: dict[Codec, int] = {}
        rows, start, codec = [np.zeros((0, 4), np.int64)], [0], []
        for video in videos:
            codec.append(0 if video is None else codecs.setdefault(video.codec, len(codecs)))
            if video is not None:
                rows.append(video.rows)
            start.append(start[-1] + (0 if video is None else len(video.rows)))
        np.save(directory / VideoTable.NAMES[0], np.concatenate(rows))
        np.save(directory / VideoTable.NAMES[1], np.array(start, np.int64))
        told = {"videos": names, "codec": codec, "codecs": [dataclasses.astuple(c) for c in codecs]}
        (directory / VideoTable.NAMES[2]).write_text(json.dumps(told))

    def find(self, address: int) -> tuple[int, int, Location, Codec]:
        """Returns which video, which packet of it, the file, and its codec."""
        video, packet = unpack(address)
        location = self._root
        for part in self._names[video].split("/"):
            location = location / part
        return video, packet, location, self.codecs[self._codec[video]]

    def rows(self, video: int, first: int, last: int) -> np.ndarray:
        """Returns packets `first` to `last`, inclusive, of a video."""
        at = int(self.start[video])
        return self.packets[at + first : at + last + 1]


class _Decoder:
    """One decoder and where it is: it can go on with packet `next` of a video, unless it was drained."""

    def __init__(self, codec: Codec) -> None:
        package = av()
        self.codec = codec
        self._context = package.CodecContext.create(_PREFERRED.get(codec.name, codec.name), "r")
        self._context.extradata = bytes.fromhex(codec.setup) or None
        self._context.thread_count = 1  # whole batches are decoded beside each other
        self._convert = package.video.reformatter.VideoReformatter()
        self._error: Any = package.FFmpegError
        self._packet = package.Packet
        self.video, self.next = -1, 0

    def frame(self, ranges: Ranges, table: VideoTable, address: int, form: str) -> np.ndarray:
        video, wanted, location, _ = table.find(address)
        row = table.rows(video, wanted, wanted)[0]
        first, stamp = int(row[3]), int(row[2])
        begins = self.next
        if self.video != video or not first <= begins <= wanted:
            self._context.flush_buffers()
            begins = first
        self.video = -1  # until it is where it should be: reading and decoding may fail half way
        found, data, begin = None, b"", 0
        for offset, length, pts, _ in table.rows(video, begins, wanted).tolist():
            if not begin <= offset <= offset + length <= begin + len(data):
                begin, data = offset, ranges.read(location, offset, max(length, READ_BYTES))
            packet = self._packet(data[offset - begin : offset - begin + length])
            if packet.size < length:
                raise RecordError(
                    f"{location.name}: read {packet.size} of {length} bytes; the file was changed since it was "
                    "indexed: copy it again",
                    resumable=True,
                )
            packet.pts = pts
            found = self._decode(packet, stamp) or found
        if found is None:  # frames are shown in another order: let go of what is held back
            found = self._decode(None, stamp)
        else:
            self.video, self.next = video, wanted + 1
        if found is None:
            raise ValueError(f"{location.name}, frame {wanted}: the decoder gives no picture; the file is damaged")
        return self._convert.reformat(found, format=form).to_ndarray()

    def _decode(self, packet: Any, stamp: int) -> Any:
        try:
            frames = self._context.decode(packet)
        except self._error as e:
            raise ValueError(f"a frame cannot be decoded: {e}") from e
        return next((frame for frame in frames if frame.pts == stamp), None)


class VideoFrames:
    """Decodes single frames, in any order and from several threads. A few decoders are kept."""

    def __init__(self, table: VideoTable) -> None:
        self._table, self._ranges = table, Ranges()
        self._idle: list[_Decoder] = []
        self._lock = threading.Lock()

    def pixels(self, address: int, channel_order: str) -> UInt8[np.ndarray, "H W 3"]:
        """Returns a frame, (H, W, 3) uint8; see `Pictures.pixels`."""
        video, wanted, _, codec = self._table.find(address)
        decoder = self._take(video, wanted, codec)
        try:
            return decoder.frame(self._ranges, self._table, address, {"rgb": "rgb24", "bgr": "bgr24"}[channel_order])
        finally:
            with self._lock:
                self._idle.append(decoder)
                del self._idle[:-DECODERS]

    def codec(self, address: int) -> str:
        """Returns the name of a frame's codec."""
        return self._table.find(address)[3].name

    def _take(self, video: int, wanted: int, codec: Codec) -> _Decoder:
        with self._lock:
            same = [d for d in self._idle if d.codec == codec]
            going_on = [d for d in same if d.video == video and d.next <= wanted]
            decoder = max(going_on, key=lambda d: d.next, default=same[0] if same else None)
            if decoder is not None:
                self._idle.remove(decoder)
        return _Decoder(codec) if decoder is None else decoder

    def close(self) -> None:
        """Closes files and decoders."""
        with self._lock:
            self._idle.clear()
        self._ranges.close()
