"""The index of one split: where every image lies, and everything else as columns.

One pass over the records builds it, shard by shard; afterwards it is memory-mapped, so opening it costs nothing and
processes share it. It is kept in a directory whose name carries a fingerprint of the files it was built from:

    index.json                  name, shards, schema, tables of texts, what was left out or skipped
    step/<column>.npy           numeric fields (N, *shape), texts as ids (N,), N = steps of all episodes
    image/<column>.npy          (N, 2) int64: offset and length in bytes of the encoded image; the offset counts from
                                the beginning of the shard file, for ArrayRecord of the record; see `Storage` for others
    episode/<column>.npy        fields of whole episodes (E, *shape)
    place/<column>.npy          start (E + 1,), shard (E,) and record (E,) of the episodes
    damaged/<column>.npy        steps whose image does not decode, ascending; only where that was checked, see `damage`

How it is built, and which files there are meanwhile, is in `index_build`.
"""

import contextlib
import dataclasses
import json
import logging
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from openpi_like.data import files
from openpi_like.data.files import Location, Url
from openpi_like.data.images import Target
from openpi_like.data.index_build import (
    INDEX_VERSION,
    Progress,
    build_index,
    corrupt_message,
    digest,
    schema_digest,
    some_of,
)
from openpi_like.data.index_columns import file_name, large_tables
from openpi_like.data.layouts import read_dataset
from openpi_like.data.schema import DatasetError, Feature, Schema, Split
from openpi_like.data.storage import Pictures, Place, RecordError

DAMAGED = "damaged"  # the directory of an index that says which images do not decode

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Texts:
    """A text field: `table[ids[i]]` is the text of step (or episode) i."""

    ids: np.ndarray
    table: tuple[str, ...]


@dataclasses.dataclass(frozen=True, repr=False)
class FrameIndex:
    """The index of one split. N steps in E episodes; all arrays are read-only and memory-mapped.

    columns: key -> (N, *shape). images: key -> (N, 2) offset and length in the shard. texts: key -> ids (N,).
    episode_columns, episode_texts: the same for fields of whole episodes, first axis E.
    episode_start: (E + 1,), first step of each episode. episode_shard, episode_record: (E,), where it is stored.
    left_out: key -> why a field is not in the index. skipped: damaged records, when some are tolerated.
    checked: whether every image was decoded once, see `openpi_like.data.damage`. damaged: key -> ascending steps whose
    image cannot be; without keys that have none, and empty while nothing was checked. `where` says file and record.
    path: the directory it is memory-mapped from; pickling takes only this, so other processes share the memory.
    """

    split: Split
    schema: Schema
    columns: dict[str, np.ndarray]
    images: dict[str, np.ndarray]
    texts: dict[str, Texts]
    episode_columns: dict[str, np.ndarray]
    episode_texts: dict[str, Texts]
    episode_start: np.ndarray
    episode_shard: np.ndarray
    episode_record: np.ndarray
    left_out: dict[str, str]
    skipped: tuple[str, ...]
    checked: bool
    damaged: dict[str, np.ndarray]
    path: Path
    _pictures: Pictures = dataclasses.field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_pictures", self.split.storage.pictures(self.split, self.path))

    def __repr__(self) -> str:
        return f"FrameIndex({self.split}, {self.steps} steps of {self.episodes} episodes, {self.path})"

    def __reduce__(self) -> tuple[Any, ...]:
        return load_index, (self.path, self.split, self.schema)

    @property
    def steps(self) -> int:
        """N, steps of all episodes."""
        return int(self.episode_start[-1])

    @property
    def episodes(self) -> int:
        """E."""
        return len(self.episode_shard)

    def where(self, step: int) -> str:
        """Returns a description of one step for error messages: dataset, episode, step, file and record."""
        e = self._episode(step)
        shard = self.split.shards[self.episode_shard[e]].name
        at = step - int(self.episode_start[e])
        return f"{self.split}, episode {e}, step {at} ({shard}, record {self.episode_record[e]})"

    def _episode(self, step: int) -> int:
        return int(self.episode_start.searchsorted(step, side="right")) - 1

    def text_table(self, key: str) -> tuple[str, ...]:
        """Returns all texts of a field, of steps or of episodes."""
        return (self.texts[key] if key in self.texts else self.episode_texts[key]).table

    def text_ids(self, key: str, episode: np.ndarray, step: np.ndarray) -> np.ndarray:
        """Returns where in `text_table` the texts of steps (n,) are, or those of their episodes (n,)."""
        return self.texts[key].ids[step] if key in self.texts else self.episode_texts[key].ids[episode]

    def read_image(self, step: int, key: str) -> bytes:
        """Returns the encoded image of one step. May be called from several threads.

        Raises:
            DatasetError: it cannot be read; or images are not stored one by one, see `read_pixels`.
        """
        try:
            return self._pictures.encoded(self._place(step, key))
        except (OSError, RecordError) as error:
            raise self._unreadable(step, key, error) from error

    def read_pixels(self, step: int, key: str) -> np.ndarray:
        """Returns the decoded image of one step, (H, W, 3) uint8, RGB; raises as `read_for`."""
        return self.read_for(step, key)[0]

    def read_for(
        self, step: int, key: str, channel_order: str = "rgb", target: Target | None = None
    ) -> tuple[np.ndarray, tuple[int, int]]:
        """Returns the decoded image of one step, (H, W, 3) uint8, and the size in which it is stored.

        May be called from several threads.

        channel_order: "bgr" where the stored image has its channels swapped.
        target: what it is made into, so that it may be decoded at a part of its size, see `decode_for`.

        Raises:
            DatasetError: it cannot be read.
            ValueError: what was read is not an image.
        """
        try:
            return self._pictures.pixels(self._place(step, key), channel_order, target)
        except (OSError, RecordError) as error:
            raise self._unreadable(step, key, error) from error

    def image_encoding(self, step: int, key: str) -> str:
        """Returns how the image of one step is encoded, for instance "jpeg" or "h264"; raises as `read_pixels`."""
        try:
            return self._pictures.encoding(self._place(step, key))
        except (OSError, RecordError) as error:
            raise self._unreadable(step, key, error) from error

    def _place(self, step: int, key: str) -> Place:
        e = self._episode(step)
        return Place(
            key, self.split.shards[self.episode_shard[e]], int(self.episode_record[e]), *self.images[key][step].tolist()
        )

    def _unreadable(self, step: int, key: str, error: Exception) -> DatasetError:
        return DatasetError(f"{self.where(step)}: cannot read {key}: {error}{files.advice(error)}")

    def close(self) -> None:
        """Closes the shard files; reading opens them again."""
        self._pictures.close()


def open_index(
    directory: str | Path | Url,
    split: str,
    *,
    index_dir: str | Path | None = None,
    max_corrupt_fraction: float = 0.0,
    workers: int = 1,
    progress: Progress | None = None,
) -> FrameIndex:
    """Opens the index of a split, building it first where there is none or the files have changed since.

    Args:
        directory: of a dataset in one of `layouts`, as a TFDS directory, which holds dataset_info.json, or an HDF5
            file; a path or any URL (see `files`).
        index_dir: where indexes are kept; default `.openpi_like_index` in `directory` (beside a file), or the cache
            directory (see `files.cache_directory`) where `directory` is a URL or cannot be written.
        max_corrupt_fraction: part of the records that may be damaged or missing; these are skipped, counted and
            reported.
        workers: processes that build. With more than one a program needs its `if __name__ == "__main__"`.
        progress: called while building with the bytes that are done and those of all shards.

    Raises:
        DatasetError: files are missing or damaged, or do not match the dataset's own description; lists all of it.
    """
    directory = files.locate(directory)
    if isinstance(directory, Path):
        directory = directory.absolute()  # the index may be used in a process with another working directory
    try:
        return _open(directory, split, index_dir, max_corrupt_fraction, workers, progress)
    except (OSError, DatasetError) as e:
        if not (advice := files.advice(e)):
            raise
        raise DatasetError(f"{directory}: {e}{advice}") from e


def _open(
    directory: Location,
    split: str,
    index_dir: str | Path | None,
    max_corrupt_fraction: float,
    workers: int,
    progress: Progress | None,
) -> FrameIndex:
    found, schema = read_dataset(directory, split, allow_missing=max_corrupt_fraction > 0)
    fingerprint = _fingerprint(found, schema)
    roots = [Path(index_dir).absolute()] if index_dir is not None else _default_roots(directory)
    name = f"{found.dataset}-{found.version}-{split}-{digest(fingerprint)}"
    paths = [root / name for root in roots]
    path = next((p for p in paths if (p / "index.json").is_file()), None)
    if path is None:
        root = _writable(roots, found)
        path = root / name
        stale = [(p, old) for p, old in _stale(root, directory, split) if p != path]  # not what another process built
        for _, old in stale:
            changed = sorted(k for k in fingerprint if fingerprint[k] != old["fingerprint"].get(k))
            _log.warning("index of %s is stale (changed: %s), building it again", found, ", ".join(changed))
        build_index(path, directory, found, schema, fingerprint, max_corrupt_fraction, workers, progress)
        for other, _ in stale:
            shutil.rmtree(other, ignore_errors=True)
    index = load_index(path, found, schema)
    total = sum(found.lengths)
    if len(index.skipped) > max_corrupt_fraction * total:
        raise DatasetError(corrupt_message(found, index.skipped, max_corrupt_fraction))
    if index.skipped:
        listed = some_of(index.skipped)
        _log.warning("%s: %d of %d records are damaged and skipped:\n  %s", found, len(index.skipped), total, listed)
    return index


def _fingerprint(split: Split, schema: Schema) -> dict[str, Any]:
    known = {
        "index_version": INDEX_VERSION,
        "features.json": schema_digest(schema),
        "shard lengths": list(split.lengths),
        "shard names": [s.name for s in split.shards],
        "shard sizes": [s and s.size for s in split.stats],
        "shard times": [s and s.stamp for s in split.stats],
    }
    more = {"tables": large_tables(schema), "files beside the shards": split.companions}
    return known | {name: value for name, value in more.items() if value}


def _default_roots(directory: Location) -> list[Path]:
    beside = []
    if isinstance(directory, Path):  # some datasets are one file
        beside = [(directory.parent if directory.is_file() else directory) / ".openpi_like_index"]
    return [*beside, files.cache_directory().absolute() / "index"]


def _writable(roots: Sequence[Path], split: Split) -> Path:
    problems = []
    for root in roots:
        try:
            root.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=root):
                pass
        except OSError as e:
            problems.append(f"cannot write the index of {split} in {root}: {e}")
            continue
        if problems:
            _log.warning("%s; it is kept in %s", "; ".join(problems), root)
        return root
    raise DatasetError("; ".join(problems) + "; give another index_dir")


def _stale(root: Path, directory: Location, split: str) -> list[tuple[Path, dict[str, Any]]]:
    """Indexes in `root` of the same directory and split, built from other files."""
    found = []
    for path in sorted(root.glob("*/index.json")):
        with contextlib.suppress(FileNotFoundError):  # another builder has just removed it
            meta = json.loads(path.read_text())
            if meta["directory"] == files.absolute(directory) and meta["split"] == split:
                found.append((path.parent, meta))
    return found


def load_index(path: Path, split: Split, schema: Schema) -> FrameIndex:
    """Returns the index in a directory that `open_index` made for these files."""
    meta = json.loads((path / "index.json").read_text())

    def array(folder: str, key: str) -> np.ndarray:
        # As a plain array: `np.memmap` itself costs microseconds at every access.
        return np.asarray(np.load(path / folder / file_name(key), mmap_mode="r"))

    def numeric(level: str, features: dict[str, Feature]) -> dict[str, np.ndarray]:
        keys = [k for k, f in features.items() if f.kind == "numeric" and k not in meta["left_out"]]
        return {k: array(level, k) for k in keys}

    def damaged() -> dict[str, np.ndarray]:
        found = {k: array(DAMAGED, k) for k, f in schema.steps.items() if (path / DAMAGED / file_name(k)).is_file()}
        return {k: steps for k, steps in found.items() if len(steps)}

    def texts(level: str) -> dict[str, Texts]:
        return {k: Texts(array(level, k), tuple(table)) for k, table in meta["texts"][level].items()}

    return FrameIndex(
        split=split,
        schema=schema,
        columns=numeric("step", schema.steps),
        images={k: array("image", k) for k, f in schema.steps.items() if f.kind == "image"},
        texts=texts("step"),
        episode_columns=numeric("episode", schema.episode),
        episode_texts=texts("episode"),
        episode_start=array("place", "start"),
        episode_shard=array("place", "shard"),
        episode_record=array("place", "record"),
        left_out=meta["left_out"],
        skipped=tuple(meta["skipped"]),
        checked=(path / DAMAGED).is_dir(),
        damaged=damaged(),
        path=path,
    )
