"""Writes any fields as RLDS: a TFDS directory. `rlds_writer` does it for what a robot declares.

TensorFlow Datasets does the writing, so this needs the `rlds` extra.
"""

import dataclasses
import os
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

MAX_RECORD_BYTES = 2**31 - 2**24  # a protocol buffer holds less than 2 GiB; the rest of a record is numbers
_NOT_EXACT = ("float64", "uint64")  # stored as float32 or int64 in a record, unless as bytes


@dataclasses.dataclass(frozen=True)
class RldsFormat:
    """file_format: "tfrecord", or "array_record" for readers that need random access. episodes_per_shard: at most."""

    file_format: str = "tfrecord"
    episodes_per_shard: int = 32

    def __post_init__(self) -> None:
        problems = []
        if self.file_format not in ("tfrecord", "array_record"):
            problems.append(f"file_format {self.file_format!r}, expected 'tfrecord' or 'array_record'")
        if self.episodes_per_shard < 1:
            problems.append(f"episodes_per_shard={self.episodes_per_shard}, expected at least 1")
        if problems:
            raise ValueError("RldsFormat: " + "; ".join(problems))


@dataclasses.dataclass(frozen=True)
class TableField:
    """A field. key: names joined with "/". kind, dtype, shape: as in `schema.Feature`. encoding: of pictures."""

    key: str
    kind: str
    dtype: str
    shape: tuple[int | None, ...]
    encoding: str | None = None
    of_episode: bool = False


@dataclasses.dataclass(frozen=True)
class EpisodeTable:
    """One episode. where: what errors call it. steps: key -> T values. episode: key -> the value."""

    where: str
    length: int
    steps: dict[str, np.ndarray | Sequence[str] | Sequence[bytes]]
    episode: dict[str, Any]


def write_tables(
    out: Path,
    fields: Sequence[TableField],
    splits: Sequence[str],
    episodes: Iterable[tuple[str, EpisodeTable]],
    metadata: Mapping[str, Any],
    form: RldsFormat,
) -> None:
    """Writes a dataset to `out`, where it appears when it is complete.

    out: `name/version`, or another directory, whose name is then that of the dataset. episodes: (split, episode).

    Raises:
        FileExistsError: there is something at `out`.
        ValueError: an episode is larger than a record can be.
    """
    if out.exists():
        raise FileExistsError(f"{out} exists; delete it to write the dataset again, or write to another directory")
    import tensorflow_datasets as tfds  # seconds to import, and only this function needs it

    versioned = re.fullmatch(r"\d+\.\d+\.\d+", out.name)
    name, version = (out.absolute().parent.name, out.name) if versioned else (out.name, "1.0.0")
    part = out.with_name(f"{out.name}.incomplete")
    shutil.rmtree(part, ignore_errors=True)  # left by a run that was killed
    part.mkdir(parents=True)
    identity = tfds.core.DatasetIdentity(
        name=re.sub(r"\W", "_", name), version=tfds.core.Version(version), data_dir=os.fspath(part),
        module_name=__name__,
    )  # fmt: skip
    info = tfds.core.DatasetInfo(
        builder=identity, features=_features(tfds, fields), metadata=tfds.core.MetadataDict(dict(metadata))
    )
    writer = tfds.core.SequentialWriter(info, form.episodes_per_shard, file_format=form.file_format)
    writer.initialize_splits(list(splits))
    for split, episode in episodes:
        size = sum(len(data) for x in episode.steps.values() if not isinstance(x, np.ndarray) for data in x)
        if size > MAX_RECORD_BYTES:
            raise ValueError(
                f"{episode.where}: pictures of {size / 2**30:.1f} GiB, and one record, an episode, holds less than 2; "
                "store them as JPEG, or of lower quality"
            )
        writer.add_examples({split: [_example(episode)]})
    writer.close_all()
    part.rename(out)


def _features(tfds: Any, fields: Sequence[TableField]) -> Any:
    steps: dict[str, Any] = {}
    episode: dict[str, Any] = {}
    for field in fields:
        _put(episode if field.of_episode else steps, field.key, _feature(tfds, field))
    return tfds.features.FeaturesDict({"steps": tfds.features.Dataset(steps)} | episode)


def _feature(tfds: Any, field: TableField) -> Any:
    if field.kind == "text":
        return tfds.features.Text()
    dtype = np.dtype(field.dtype)
    if field.kind == "image":
        form = field.encoding if field.encoding in ("png", "jpeg") else None
        return tfds.features.Image(shape=field.shape or (None, None, 3), dtype=dtype.type, encoding_format=form)
    encoding = "bytes" if field.dtype in _NOT_EXACT else "none"
    return tfds.features.Tensor(shape=field.shape, dtype=dtype.type, encoding=encoding)


def _example(table: EpisodeTable) -> dict[str, Any]:
    steps: list[dict[str, Any]] = [{} for _ in range(table.length)]
    for key, values in table.steps.items():
        for step, value in zip(steps, values, strict=True):
            _put(step, key, value)
    out: dict[str, Any] = {"steps": steps}
    for key, value in table.episode.items():
        _put(out, key, value)
    return out


def _put(tree: dict[str, Any], path: str, value: Any) -> None:
    *parents, last = path.split("/")
    for parent in parents:
        tree = tree.setdefault(parent, {})
    tree[last] = value
