"""What a TFDS directory says about itself: `dataset_info.json` and `features.json`, read without TFDS."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from openpi_like.config import near_names


class DatasetError(ValueError):
    """A dataset is missing, damaged, or not what a robot or run expects."""


@dataclasses.dataclass(frozen=True)
class Feature:
    """One leaf of `features.json`.

    key: path, e.g. "observation/state" in a step. kind: "numeric", "text", "image", or "other" where this reader cannot
    read it. shape: of one step's value; None where it may vary. encoding: "none", "zlib" or "bytes".
    """

    key: str
    kind: str
    dtype: str
    shape: tuple[int | None, ...]
    encoding: str = "none"


@dataclasses.dataclass(frozen=True)
class Schema:
    """Features of one step and of the whole episode, by key."""

    steps: dict[str, Feature]
    episode: dict[str, Feature]


@dataclasses.dataclass(frozen=True)
class Split:
    """One split: its shard files in order, and how many records (episodes) each holds."""

    name: str
    dataset: str
    version: str
    shards: tuple[Path, ...]
    lengths: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.dataset}/{self.version} split {self.name!r}"


_NUMERIC = {"bool", "float16", "float32", "float64"} | {f"{s}int{b}" for s in ("", "u") for b in (8, 16, 32, 64)}


def _shape(node: dict[str, Any]) -> tuple[int | None, ...]:
    # A dimension that may vary is written as -1 (or as null).
    dims = [None if d is None else int(d) for d in node.get("shape", {}).get("dimensions", [])]
    return tuple(None if d is not None and d < 0 else d for d in dims)


def _leaves(node: dict[str, Any], path: str) -> list[Feature]:
    if "featuresDict" in node:
        children = node["featuresDict"].get("features", {})
        return [leaf for name, child in children.items() for leaf in _leaves(child, f"{path}/{name}" if path else name)]
    if "tensor" in node:
        tensor = node["tensor"]
        dtype, shape = tensor["dtype"], _shape(tensor)
        if dtype in ("string", "object") and shape == ():
            return [Feature(path, "text", "string", ())]
        numeric = dtype in _NUMERIC and None not in shape
        return [Feature(path, "numeric" if numeric else "other", dtype, shape, tensor.get("encoding") or "none")]
    if "text" in node:
        return [Feature(path, "text", "string", ())]
    if "classLabel" in node:
        return [Feature(path, "numeric", "int64", ())]
    if "image" in node:
        image = node["image"]
        return [Feature(path, "image", image.get("dtype", "uint8"), _shape(image))]
    return [Feature(path, "other", node.get("pythonClassName", "unknown").rpartition(".")[2], ())]


def read_schema(directory: Path) -> Schema:
    """Reads `features.json`. Keys are joined with "/"; names may contain "/" themselves.

    Raises:
        DatasetError: there is no such file, or no `steps` in it.
    """
    root = _read_json(directory / "features.json")
    features = root.get("featuresDict", {}).get("features", {})
    steps = features.get("steps")
    if steps is None or "sequence" not in steps:
        raise DatasetError(
            f"{directory}/features.json: no sequence 'steps', so this is not RLDS; it has "
            f"{sorted(features) or 'nothing'}"
        )
    episode = [leaf for name, node in features.items() if name != "steps" for leaf in _leaves(node, name)]
    return Schema(
        steps={f.key: f for f in sorted(_leaves(steps["sequence"]["feature"], ""), key=lambda f: f.key)},
        episode={f.key: f for f in sorted(episode, key=lambda f: f.key)},
    )


def read_split(directory: Path, split: str) -> Split:
    """Reads `dataset_info.json` and finds the shards of a split.

    Raises:
        DatasetError: the directory, the split or shards are missing, or the format is not TFRecord.
    """
    if not directory.is_dir():
        parent = directory.parent
        while not parent.is_dir():
            parent = parent.parent
        there = sorted(p.name for p in parent.iterdir() if p.is_dir())
        raise DatasetError(f"no dataset directory {directory}; in {parent} there is: {', '.join(there) or 'nothing'}")
    if not (directory / "dataset_info.json").is_file():
        versions = sorted(str(p.parent.relative_to(directory)) for p in directory.glob("*/dataset_info.json"))
        versions += sorted(str(p.parent.relative_to(directory)) for p in directory.glob("*/*/dataset_info.json"))
        hint = f"did you mean one of its subdirectories {versions}?" if versions else "expected a TFDS directory"
        raise DatasetError(f"{directory} has no dataset_info.json; {hint}")
    info = _read_json(directory / "dataset_info.json")
    splits = {s["name"]: s for s in info.get("splits", [])}
    if split not in splits:
        raise DatasetError(f"{directory}: no split {split!r}; {near_names(split, list(splits))}")
    file_format = info.get("fileFormat", "tfrecord")
    if file_format != "tfrecord":
        raise DatasetError(f"{directory}: file format {file_format!r}, expected 'tfrecord'; write it again as TFRecord")
    lengths = tuple(int(n) for n in splits[split].get("shardLengths", []))
    if not lengths or not sum(lengths):
        raise DatasetError(f"{directory}: split {split!r} has no records, says dataset_info.json")
    template = splits[split].get("filepathTemplate") or "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
    count = len(lengths)
    shards = []
    for i in range(count):
        name = template
        for key, value in (
            ("DATASET", info["name"]),
            ("SPLIT", split),
            ("FILEFORMAT", file_format),
            ("SHARD_INDEX", f"{i:05d}"),
            ("NUM_SHARDS", f"{count:05d}"),
            ("SHARD_X_OF_Y", f"{i:05d}-of-{count:05d}"),
        ):
            name = name.replace("{" + key + "}", value)
        shards.append(directory / name)
    missing = [s.name for s in shards if not s.is_file()]
    if missing:
        there = sorted(p.name for p in directory.iterdir() if p.is_file() and split in p.name)
        raise DatasetError(
            f"{directory}: dataset_info.json expects {count} shards of split {split!r} (numbered 0 to {count - 1}), "
            f"missing: {', '.join(missing)}; there: {', '.join(there) or 'none'}; copy the dataset again"
        )
    return Split(split, info["name"], str(info.get("version", directory.name)), tuple(shards), lengths)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        there = sorted(p.name for p in path.parent.iterdir())
        raise DatasetError(f"no {path}; expected a TFDS directory, which has {path.name}; there: {there}") from None
    except ValueError as e:
        raise DatasetError(f"{path} is not JSON: {e}; copy the dataset again") from None
