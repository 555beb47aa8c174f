"""Which images of an index do not decode although the checksum of their record is right: found once, and kept with it.

Whatever a decoder complains about is damage: libjpeg's warnings too ("premature end of JPEG", extraneous bytes), at
which it would go on and fill the rest with grey. A JPEG has no checksum of its own: a bit that was flipped before the
record was written may give another picture without a complaint, and nobody can tell. PNG has one, and is all or
nothing.

The result is a directory `damaged` in that of the index, so it goes when the index becomes stale. While images are
checked, a line per finished block is added to `checking.jsonl` there; a check that was stopped goes on from these. The
result does not depend on the number of threads.
"""

import contextlib
import json
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from openpi_like.data.images import decode_depth
from openpi_like.data.index import DAMAGED, FrameIndex, load_index
from openpi_like.data.index_build import Progress
from openpi_like.data.index_columns import file_name
from openpi_like.data.schema import DatasetError

BLOCK = 256  # steps whose images one thread decodes at a time
_NOTES = "checking.jsonl"


def image_problem(index: FrameIndex, step: int, key: str) -> str | None:
    """Decodes one image; returns what is wrong with it, with its place, or None.

    Raises:
        DatasetError: it cannot be read at all, which says nothing about the image.
    """
    dtype = index.schema.steps[key].dtype
    try:
        if dtype == "uint8":
            index.read_pixels(step, key)
        else:
            decode_depth(index.read_image(step, key), dtype)
    except DatasetError:
        raise
    except ValueError as e:
        return f"{index.where(step)}: cannot decode {key}: {e}"
    return None


def check_images(index: FrameIndex, *, workers: int = 1, progress: Progress | None = None) -> FrameIndex:
    """Decodes every image of an index that was not checked yet, records which are damaged, and returns it with them.

    Args:
        workers: threads that decode; decoders let others run meanwhile.
        progress: called with the bytes that are done and those of all images.

    Raises:
        DatasetError: an image cannot be read, or the result cannot be written; what was checked is kept, so another
            call goes on from there.
    """
    if index.checked:
        return index
    try:
        _check(index, workers, progress or (lambda done, total: None))
    except OSError as e:
        raise DatasetError(
            f"cannot record the damaged images of {index.split}: {e}; give another index_dir, which can be written"
        ) from e
    finally:
        index.close()
    return load_index(index.path, index.split, index.schema)


def _check(index: FrameIndex, workers: int, progress: Progress) -> None:
    notes = index.path / _NOTES
    found = _read_notes(notes)
    starts = range(0, index.steps, BLOCK)

    def stop(start: int) -> int:
        return min(start + BLOCK, index.steps)

    def size(start: int) -> int:
        return sum(int(spans[start : stop(start), 1].sum()) for spans in index.images.values())

    def check(start: int) -> tuple[int, dict[str, list[int]]]:
        steps = range(start, stop(start))
        return start, {k: [s for s in steps if image_problem(index, s, k) is not None] for k in index.images}

    todo = [start for start in starts if (start, stop(start)) not in found]
    total = sum(int(spans[:, 1].sum()) for spans in index.images.values())
    done = total - sum(map(size, todo))
    progress(done, total)
    with notes.open("a") as file:
        file.write("\n")  # ends a line that a killed check left unfinished
        pool = ThreadPoolExecutor(workers)
        try:
            for start, damaged in pool.map(check, todo):
                found[start, stop(start)] = damaged
                file.write(json.dumps([start, stop(start), damaged]) + "\n")
                file.flush()
                done += size(start)
                progress(done, total)
        finally:
            pool.shutdown(cancel_futures=True)  # who interrupts it does not wait for the rest
    with tempfile.TemporaryDirectory(dir=index.path) as scratch:
        draft = Path(scratch) / DAMAGED
        draft.mkdir()
        for key in index.images:
            blocks = [np.array(found[start, stop(start)][key], np.int64) for start in starts]
            np.save(draft / file_name(key), np.concatenate(blocks))
        try:
            draft.rename(index.path / DAMAGED)
        except OSError:
            if not (index.path / DAMAGED).is_dir():  # another process may have been faster
                raise
    notes.unlink(missing_ok=True)


def _read_notes(path: Path) -> dict[tuple[int, int], dict[str, list[int]]]:
    """Returns (start, stop) -> key -> damaged steps of the blocks that an earlier check finished."""
    found: dict[tuple[int, int], dict[str, list[int]]] = {}
    with contextlib.suppress(FileNotFoundError):
        for line in path.read_text().split("\n"):
            with contextlib.suppress(ValueError):  # the line at which it was killed
                start, stop, damaged = json.loads(line)
                found[start, stop] = damaged
    return found
