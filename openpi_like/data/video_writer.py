"""Writes MP4 files that hold episodes one behind the other, each beginning with a key frame."""

import dataclasses
import io
from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from openpi_like.data.layouts.video import av

# Every second frame is a key frame, as in LeRobot: a frame that is asked for costs the decoding of two at most. libx264
# writes no frames that are shown in another order. crf: higher is smaller and worse.
ENCODERS = {
    "libx264": {"g": "2", "bf": "0", "crf": "20"},
    "libsvtav1": {"g": "2", "crf": "30", "preset": "8"},
}
ENCODER = "libx264"  # if nothing is said
PIXELS = "yuv420p"  # colours at half the resolution; what every decoder reads


@dataclasses.dataclass(frozen=True)
class Placed:
    """Where the frames of an episode are: number of the file, and their first and end in it."""

    file: int
    first: int
    end: int


class VideoWriter:
    """The videos of one camera. An episode is encoded in memory, then added to a file that it still fits into."""

    def __init__(self, pattern: str, rate: Fraction, encoder: str, max_bytes: int) -> None:
        """pattern: path of a file, with {chunk} and {file}. rate: frames in a second. encoder: one of `ENCODERS`."""
        self._pattern, self._rate, self._encoder, self._max_bytes = pattern, rate, encoder, max_bytes
        self._file, self._frames, self._bytes = -1, 0, 0
        self._out: Any = None
        self._stream: Any = None
        self.size: tuple[int, int] | None = None
        self.codec = ""

    def add(self, frames: Iterable[UInt8[np.ndarray, "H W 3"]]) -> Placed:
        """Writes an episode, at least one frame. All frames of a camera have one size.

        Raises:
            ValueError: they have not, or the encoder refuses them.
        """
        encoded = io.BytesIO()
        try:
            count = self._encode(frames, encoded)
        except av().FFmpegError as e:
            raise ValueError(f"{self._encoder} cannot encode frames of {self.size} pixels: {e}") from e
        length = encoded.tell()
        if self._out is None or (self._bytes and self._bytes + length > self._max_bytes):
            self._next()
        encoded.seek(0)
        self._append(encoded)
        self._bytes += length
        self._frames += count
        return Placed(self._file, self._frames - count, self._frames)

    def _encode(self, frames: Iterable[np.ndarray], out: io.BytesIO) -> int:
        package, count = av(), 0
        with package.open(out, "w", format="mp4") as container:
            stream = container.add_stream(self._encoder, self._rate, options=ENCODERS[self._encoder])
            stream.pix_fmt, stream.time_base = PIXELS, 1 / self._rate
            for frame in frames:
                size = frame.shape[:2]
                if self.size is None and any(side % 2 for side in size):
                    raise ValueError(f"frames of {size} (height, width) cannot be a video, expected even numbers")
                self.size = self.size or (size[0], size[1])
                if size != self.size:
                    raise ValueError(f"a frame of {size} (height, width), those before have {self.size}")
                if not count:
                    stream.height, stream.width = size
                shown = package.VideoFrame.from_ndarray(np.ascontiguousarray(frame), "rgb24")
                shown.pts, shown.time_base = count, 1 / self._rate
                container.mux(stream.encode(shown))
                count += 1
            container.mux(stream.encode())
            self.codec = stream.codec.canonical_name
        return count

    def _append(self, encoded: io.BytesIO) -> None:
        with av().open(encoded) as container:
            source = container.streams.video[0]
            if self._stream is None:
                self._stream = self._out.add_stream_from_template(source, opaque=True)
            behind = self._frames / self._rate
            for packet in container.demux(source):
                if packet.size:
                    shift = int(behind / packet.time_base)
                    packet.pts, packet.dts = packet.pts + shift, packet.dts + shift
                    packet.stream = self._stream
                    self._out.mux(packet)

    def _next(self) -> None:
        self.close()
        self._file, self._frames, self._bytes = self._file + 1, 0, 0
        path = Path(self._pattern.format(chunk=self._file // 1000, file=self._file % 1000))
        path.parent.mkdir(parents=True, exist_ok=True)
        self._out = av().open(str(path), "w", format="mp4")

    def close(self) -> None:
        """Completes the last file."""
        if self._out is not None:
            self._out.close()
        self._out = self._stream = None
