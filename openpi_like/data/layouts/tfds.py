"""TFDS directories: `dataset_info.json` and `features.json`, read without TFDS."""

import json
import logging
import math
from typing import Any

from openpi_like.config import near_names
from openpi_like.data import files
from openpi_like.data.files import Location, Stat
from openpi_like.data.layouts.layout import is_file
from openpi_like.data.layouts.records import ArrayRecords, TfRecords
from openpi_like.data.schema import DatasetError, Feature, Schema, Split, Storage, with_names

# A list of more integers than this under a name with one of these words is text, a Unicode code point per integer,
# padded with zeros (language_table: observation/instruction is int32[512]).
CODE_POINT_WORDS = ("instruction", "language")
CODE_POINT_LENGTH = 64
# What the writer of a dataset wants to say, see `to_rlds`: "fps" is the rate of its steps, "robot_type" and "names" (by
# field of a step) are those of LeRobot, "of_requests" is that of `Split`.
METADATA = "metadata.json"

STORAGES: dict[str, Storage] = {storage.name: storage for storage in (TfRecords(), ArrayRecords())}

_log = logging.getLogger(__name__)


class TfdsLayout:
    """A directory with `dataset_info.json` and `features.json`."""

    marker = "dataset_info.json"

    def is_at(self, directory: Location) -> bool:
        return is_file(directory / self.marker)

    def schema(self, directory: Location) -> Schema:
        return read_schema(directory)

    def split_names(self, directory: Location) -> list[str]:
        return split_names(directory)

    def read(self, directory: Location, split: str, *, allow_missing: bool) -> tuple[Split, Schema]:
        return read_split(directory, split, allow_missing=allow_missing), read_schema(directory)


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
        encoding = tensor.get("encoding") or "none"
        if numeric and encoding == "none" and _is_code_points(path, dtype, shape):
            return [Feature(path, "text", dtype, shape, "code_points")]
        return [Feature(path, "numeric" if numeric else "other", dtype, shape, encoding)]
    if "text" in node:
        return [Feature(path, "text", "string", ())]
    if "classLabel" in node:
        return [Feature(path, "numeric", "int64", ())]
    if "image" in node:
        image = node["image"]
        return [Feature(path, "image", image.get("dtype", "uint8"), _shape(image))]
    return [Feature(path, "other", node.get("pythonClassName", "unknown").rpartition(".")[2], ())]


def _is_code_points(path: str, dtype: str, shape: tuple[int | None, ...]) -> bool:
    named = any(word in path.rpartition("/")[2] for word in CODE_POINT_WORDS)
    return named and "int" in dtype and len(shape) == 1 and (shape[0] or 0) > CODE_POINT_LENGTH


def read_schema(directory: Location) -> Schema:
    """Reads `features.json`. Keys are joined with "/"; names may contain "/" themselves.

    What values are called is in metadata.json, where somebody wrote it.

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
    names = _metadata(directory).get("names")
    names = names if isinstance(names, dict) else {}
    leaves = [with_names(f, names.get(f.key)) for f in _leaves(steps["sequence"]["feature"], "")]
    return Schema(
        steps={f.key: f for f in sorted(leaves, key=lambda f: f.key)},
        episode={f.key: f for f in sorted(episode, key=lambda f: f.key)},
    )


def split_names(directory: Location) -> list[str]:
    """Returns the splits that `dataset_info.json` lists and that have records; raises as `read_split`."""
    _list_files(directory)
    splits = _read_json(directory / "dataset_info.json").get("splits", [])
    return [s["name"] for s in splits if sum(map(int, s.get("shardLengths", [])))]


def read_split(directory: Location, split: str, *, allow_missing: bool = False) -> Split:
    """Reads `dataset_info.json` and finds the shards of a split.

    allow_missing: shards may be absent as long as one is there.

    Raises:
        DatasetError: the directory, the split or shards are missing, or the format is not TFRecord or ArrayRecord.
    """
    there = _list_files(directory)
    info = _read_json(directory / "dataset_info.json")
    splits = {s["name"]: s for s in info.get("splits", [])}
    if split not in splits:
        raise DatasetError(f"{directory}: no split {split!r}; {near_names(split, list(splits))}")
    file_format = info.get("fileFormat", "tfrecord")
    if file_format not in STORAGES:
        raise DatasetError(
            f"{directory}: file format {file_format!r}, expected 'tfrecord' or 'array_record'; write it again in one"
        )
    lengths = tuple(int(n) for n in splits[split].get("shardLengths", []))
    if not lengths or not sum(lengths):
        raise DatasetError(f"{directory}: split {split!r} has no records, says dataset_info.json")
    template = splits[split].get("filepathTemplate") or "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
    count = len(lengths)
    names = []
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
        names.append(name)
    missing = [name for name in names if name not in there]
    # The same name with other numbers: of another generation of the dataset, or of another count of shards.
    stem = f"{info['name']}-{split}.{file_format}-"
    unknown = [name for name in there if name.startswith(stem) and name not in names]
    if len(missing) == count or (missing and not allow_missing):
        others = [name for name in there if split in name]
        raise DatasetError(
            f"{directory}: dataset_info.json expects {count} shards of split {split!r} (numbered 0 to {count - 1}), "
            f"missing: {', '.join(missing)}; there: {', '.join(others) or 'none'}; copy the dataset again"
        )
    if unknown:
        _log.warning(
            "%s: dataset_info.json knows %d shards of split %r; these files are not among them and are not read: %s",
            directory, count, split, ", ".join(unknown),
        )  # fmt: skip
    told = _metadata(directory) if METADATA in there else {}
    rate, robot = told.get("fps"), told.get("robot_type")
    return Split(
        name=split,
        dataset=info["name"],
        version=str(info.get("version", directory.name)),
        storage=STORAGES[file_format],
        shards=tuple(directory / name for name in names),
        lengths=lengths,
        stats=tuple(there.get(name) for name in names),
        rate=float(rate) if isinstance(rate, int | float) and 0 < rate < math.inf else None,
        robot_type=robot if isinstance(robot, str) else None,
        of_requests=told.get("of_requests") is True,
    )


def _metadata(directory: Location) -> dict[str, Any]:
    """Returns what the writer said, where it did: TFDS has no place for it."""
    if not is_file(directory / METADATA):
        return {}
    found = _read_json(directory / METADATA)
    return found if isinstance(found, dict) else {}


def _list_files(directory: Location) -> dict[str, Stat]:
    """Returns the files of a TFDS directory, dataset_info.json among them."""
    try:
        there = files.list_files(directory)
    except (FileNotFoundError, NotADirectoryError):
        raise DatasetError(f"no dataset directory {directory}; {_nearest(directory.parent)}") from None
    except OSError as e:
        raise DatasetError(f"cannot read {directory}: {e}") from e
    if "dataset_info.json" not in there:
        below = [name for pattern in ("*", "*/*") for name in files.glob(directory, f"{pattern}/dataset_info.json")]
        versions = [name.removesuffix("/dataset_info.json") for name in below]
        hint = f"did you mean one of its subdirectories {versions}?" if versions else "expected a TFDS directory"
        raise DatasetError(f"{directory} has no dataset_info.json; {hint}")
    return there


def _nearest(directory: Location) -> str:
    """Says what is in the nearest directory that exists."""
    while True:
        try:
            return f"in {directory} there is: {', '.join(files.list_directories(directory)) or 'nothing'}"
        except OSError:
            if directory == directory.parent:
                return f"there is nothing in {directory} either"
            directory = directory.parent


def _read_json(path: Location) -> dict[str, Any]:
    try:
        return json.loads(files.read_text(path))
    except FileNotFoundError:
        there = sorted(files.list_files(path.parent))
        raise DatasetError(f"no {path}; expected a TFDS directory, which has {path.name}; there: {there}") from None
    except OSError as e:
        raise DatasetError(f"cannot read {path}: {e}") from e
    except ValueError as e:
        raise DatasetError(f"{path} is not JSON: {e}; copy the dataset again") from None
