"""What a frozen backbone makes of every frame, on disk: computed once, read in the place of images.

A directory holds `states.bin`, the frames of one split as rows of numbers, and `image_states.json`, what they are of:
written last, so that a directory without it is one that was not finished, and goes on where it was.

Letters: B batch, L layers, T tokens up to the last of the images, D width.
"""

import dataclasses
import fcntl
import json
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from jaxtyping import Int, Shaped

from openpi_like.config import to_json
from openpi_like.data.config import PolicyShape
from openpi_like.data.dataset import EpisodeDataset
from openpi_like.data.schema import DatasetError

_RECORD, _ROWS = "image_states.json", "states.bin"
_DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


@dataclasses.dataclass(frozen=True)
class StatesOf:
    """What rows are of; other rows cannot stand for them.

    data: dataset, its version, and the split. frames: digest of which steps they are, see
        `EpisodeDataset.frames_digest`. robot, cameras: how it has them.
    policy: what of a policy's config says how images are seen. weights: of its backbone, name -> sum of bits.
    begins_with: ids of the text before the images. shape: (L + 1, T, D) of a frame.
    """

    data: str
    frames: str
    count: int
    robot: str
    cameras: Any
    policy: Any
    weights: dict[str, int]
    begins_with: tuple[int, ...]
    shape: tuple[int, int, int]
    dtype: str

    @property
    def row_bytes(self) -> int:
        """Bytes of a frame."""
        return math.prod(self.shape) * _DTYPES[self.dtype].itemsize

    @classmethod
    def make(cls, dataset: EpisodeDataset, policy: PolicyShape, **others: Any) -> "StatesOf":
        """Returns what rows of a dataset for a policy are of. others: the fields that neither of them says."""
        seen = ("cameras", "image_size", "image_slots", "resize", "backbone", "dtype")
        cameras = [camera for camera in dataset.robot.cameras if camera.name in policy.cameras]
        split = dataset.index.split
        return cls(
            data=f"{split.dataset}/{split.version} {split.name}",
            frames=dataset.frames_digest(),
            count=len(dataset),
            robot=dataset.robot.name,
            cameras=to_json(tuple(cameras)),
            policy={name: to_json(getattr(policy, name)) for name in seen},
            **others,
        )


class ImageStates:
    """Rows of a directory, by frame; memory-mapped. May be read from several threads, and pickled.

    of: what they are of.
    """

    def __init__(self, directory: str | Path) -> None:
        """
        Raises:
            DatasetError: there are none, they are not finished, or not of the length that they should have.
        """
        self.directory = Path(directory)
        again = "make them with train/image_states.py"
        try:
            read = json.loads((self.directory / _RECORD).read_text())
        except FileNotFoundError:
            why = "not finished" if (self.directory / _ROWS).exists() else "not there"
            raise DatasetError(f"image_states {self.directory}: {why}; {again}") from None
        except ValueError as e:
            raise DatasetError(f"{self.directory / _RECORD}: {e}; {again}") from e
        try:
            tuples = {name: tuple(read[name]) for name in ("begins_with", "shape")}
            self.of = StatesOf(**{**read, **tuples})
        except (KeyError, TypeError) as e:
            raise DatasetError(f"{self.directory / _RECORD}: of another version ({e}); {again}") from e
        path, expected = self.directory / _ROWS, self.of.count * self.of.row_bytes
        size = path.stat().st_size if path.exists() else 0
        if size != expected:
            raise DatasetError(f"{path}: {size} bytes, expected {expected}; {again}")
        self._rows = np.memmap(path, _DTYPES[self.of.dtype], "r", shape=(self.of.count, *self.of.shape))

    def __reduce__(self) -> tuple[Any, ...]:
        return ImageStates, (self.directory,)

    def empty(self, size: int) -> Shaped[np.ndarray, "B L1 T D"]:
        """Returns room for so many rows."""
        return np.empty((size, *self.of.shape), self._rows.dtype)

    def read_into(self, frames: Int[np.ndarray, "B"], out: Sequence[Shaped[np.ndarray, "L1 T D"]]) -> None:
        """Writes the rows of frames into `out`."""
        for frame, row in zip(frames.tolist(), out, strict=True):
            row[:] = self._rows[frame]

    def check(self, dataset: EpisodeDataset, policy: PolicyShape) -> None:
        """Compares what the rows are of with a dataset and the policy that would read them.

        Raises:
            DatasetError: lists everything that differs.
        """
        unsaid = ("weights", "begins_with", "shape", "dtype")
        expected = StatesOf.make(dataset, policy, **{name: getattr(self.of, name) for name in unsaid})
        got, wanted = (dataclasses.asdict(x) | x.policy for x in (self.of, expected))
        wrong = [name for name in wanted if name != "policy" and got.get(name) != wanted[name]]
        if wrong:
            differ = "\n  ".join(f"{name}: {_short(got.get(name))}, expected {_short(wanted[name])}" for name in wrong)
            raise DatasetError(
                f"image_states {self.directory} are not of {dataset.index.split} as the policy sees it:\n  {differ}\n"
                "make them again with train/image_states.py"
            )


class Writer:
    """Writes a directory of `ImageStates`, frame after frame, in a `with` block; goes on where one stopped.

    done: frames that are written.
    """

    def __init__(self, directory: str | Path, of: StatesOf) -> None:
        """
        Raises:
            DatasetError: the directory has rows of something else.
        """
        self.directory, self.of = Path(directory), of
        self.directory.mkdir(parents=True, exist_ok=True)
        begun, record = self.directory / "begun.json", json.dumps(dataclasses.asdict(of), indent=1)
        said = next((p.read_text() for p in (self.directory / _RECORD, begun) if p.exists()), None)
        if said is not None and said != record:
            raise DatasetError(
                f"image_states {self.directory} are of other data, another policy, or other weights; remove them, or "
                "write into another directory"
            )
        rows = self.directory / _ROWS
        self._file = rows.open("ab")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            self._file.close()
            raise DatasetError(f"image_states {self.directory}: another program writes them") from e
        # What nothing says anything of is of nothing that is known; and the last row may have been cut off.
        self.done = 0 if said is None else rows.stat().st_size // of.row_bytes
        self._file.truncate(self.done * of.row_bytes)
        begun.write_text(record)

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def batches(self, size: int) -> Iterator[Int[np.ndarray, "B"]]:
        """Yields the frames that are left, `size` at a time, the last of them repeated in the last batch."""
        for first in range(self.done, self.of.count, size):
            yield np.minimum(np.arange(first, first + size), self.of.count - 1)

    def write(self, states_BLTD: Shaped[np.ndarray, "B L1 T D"]) -> None:
        """Writes the next frames; of those beyond the last, nothing.

        Raises:
            ValueError: they have another shape or dtype, or numbers that are not finite.
        """
        rows = states_BLTD[: self.of.count - self.done]
        if rows.shape[1:] != self.of.shape or rows.dtype != _DTYPES[self.of.dtype]:
            got = f"{rows.dtype} {rows.shape[1:]}"
            raise ValueError(f"image_states: got {got}, expected {self.of.dtype} {self.of.shape}")
        bad = np.flatnonzero(~np.isfinite(rows.astype(np.float32)).all(axis=(1, 2, 3)))
        if len(bad):
            raise ValueError(f"image_states of frame {self.done + bad[0]} are not finite; nothing of it was written")
        self._file.write(np.ascontiguousarray(rows).tobytes())
        self._file.flush()
        self.done += len(rows)

    def finish(self) -> None:
        """Says that all are there.

        Raises:
            ValueError: they are not.
        """
        if self.done != self.of.count:
            raise ValueError(f"image_states {self.directory}: {self.done} frames, expected {self.of.count}")
        os.replace(self.directory / "begun.json", self.directory / _RECORD)


def _short(value: Any) -> str:
    said = str(value)
    return said if len(said) < 120 else said[:117] + "..."
