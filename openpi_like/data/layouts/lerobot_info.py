"""What `meta/info.json` of a LeRobot dataset says: version, rate, splits, where its files are, and its fields."""

import json
import math
import re
from collections.abc import Iterable, Iterator
from typing import Any

from openpi_like.data import files
from openpi_like.data.files import Location, Stat
from openpi_like.data.schema import DatasetError, Feature, flat_names, with_names

INFO = "meta/info.json"
_NUMERIC = {"bool", "float16", "float32", "float64"} | {f"{s}int{b}" for s in ("", "u") for b in (8, 16, 32, 64)}
# What the path of a file is made of, by the first number of the version.
_PLACES = {2: ("episode_chunk", "episode_index"), 3: ("chunk_index", "file_index")}


def join(directory: Location, name: str) -> Location:
    """Returns the file of a name with slashes."""
    for part in name.split("/"):
        directory = directory / part
    return directory


def folders(directory: Location, names: Iterable[str]) -> dict[str, dict[str, Stat]]:
    """Returns folder -> name -> stat of all files that are in the folders of files. Both may be absent."""
    found: dict[str, dict[str, Stat]] = {}
    for folder in dict.fromkeys(name.rpartition("/")[0] for name in names):
        try:
            found[folder] = files.list_files(join(directory, folder))
        except OSError:
            found[folder] = {}
    return found


def file_stats(directory: Location, names: list[str]) -> Iterator[tuple[str, Stat]]:
    """Yields (name, stat) of the files that are there."""
    there = folders(directory, names)
    for name in names:
        folder, _, file = name.rpartition("/")
        if file in there[folder]:
            yield name, there[folder][file]


def read_json(path: Location) -> dict[str, Any]:
    """Returns a file that is one object of JSON.

    Raises:
        DatasetError: it is not there, or something else.
    """
    try:
        info = json.loads(files.read_text(path))
    except OSError as e:
        raise DatasetError(f"cannot read {path}: {e}") from e
    except ValueError as e:
        raise DatasetError(f"{path} is not JSON: {e}; copy the dataset again") from None
    if not isinstance(info, dict):
        raise DatasetError(f"{path} is JSON, but {type(info).__name__}, expected an object; copy the dataset again")
    return info


def generation(info: dict[str, Any]) -> int | None:
    """Returns the first number of the version, or None where there is none."""
    major = re.match(r"v?(\d+)", str(info.get("codebase_version", "")))
    return int(major[1]) if major else None


def read_info(directory: Location) -> dict[str, Any]:
    """Returns `meta/info.json`.

    Raises:
        DatasetError: it is not there, lacks something or has it wrong, or is of a version that cannot be read.
    """
    path = join(directory, INFO)
    info = read_json(path)
    if generation(info) not in _PLACES:
        raise DatasetError(
            f"{path}: codebase_version is {info.get('codebase_version') or 'missing'!r}, expected v2.0, v2.1 or v3.x; "
            "write older datasets again with the conversion scripts of lerobot (v1.6 to v2.0, v2.0 to v2.1)"
        )
    if problems := list(_problems(info)):
        raise DatasetError(f"{path}: " + "; ".join(problems))
    return info


def _problems(info: dict[str, Any]) -> Iterator[str]:
    """Yields what is missing in the info of a version that can be read, or is not what it should be."""
    yield from (f"{name!r} is missing" for name in ("fps", "features", "data_path") if name not in info)
    rate = info.get("fps", 1)
    if not isinstance(rate, int | float) or not 0 < rate < math.inf:
        yield f"fps is {rate!r}, expected a number above 0"
    for name, least in (("total_episodes", 0), ("chunks_size", 1)):
        value = info.get(name)
        if value is not None and not (_is_count(value) and value >= least):
            yield f"{name} is {value!r}, expected an integer, at least {least}"
    if info.get("total_episodes") is None and not info.get("splits"):
        yield "'total_episodes' and 'splits' are missing, so how many episodes there are is not known"
    if not isinstance(info.get("splits") or {}, dict):
        yield f"splits is {info['splits']!r}, expected an object like {{'train': '0:50'}}"
    for name in ("data_path", "video_path"):
        if info.get(name) is not None and (why := _path_problem(info, name)):
            yield why
    features = info.get("features", {})
    if not isinstance(features, dict):
        yield f"features is {type(features).__name__}, expected an object"
        return
    for key, of in features.items():
        shape = of.get("shape") if isinstance(of, dict) else None
        if not isinstance(of, dict) or not isinstance(of.get("dtype"), str):
            yield f"feature {key!r} is {of!r}, expected an object with 'dtype' and 'shape'"
        elif shape is not None and not (isinstance(shape, list) and all(map(_is_count, shape))):
            yield f"feature {key!r}: shape is {shape!r}, expected a list of integers"


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _path_problem(info: dict[str, Any], name: str) -> str | None:
    """Returns why the files of a dataset cannot be named by a template, or None."""
    major = generation(info)
    needed = [*_PLACES[major or 2], *(["video_key"] if name == "video_path" else [])]
    fields = ", ".join(f"{{{field}}}" for field in needed)
    try:
        file_name(info, name, **dict.fromkeys(_PLACES[major or 2], 0), video_key="")
    except (KeyError, IndexError, ValueError, AttributeError, TypeError):
        why = f"{name} is {info[name]!r}, which is not made of {fields}, as in {info['codebase_version']}"
        other = next(m for m in _PLACES if m != major)
        if any(f"{{{field}" in str(info[name]) for field in _PLACES[other]):
            why += f"; it is a path of version {other}: are files of two versions mixed? Copy the dataset again"
        return why
    return None


def file_name(info: dict[str, Any], name: str, **of: int | str) -> str:
    """Returns the name of a file. name: of the template, "data_path" or "video_path". of: what it is made of."""
    return info[name].format(**of)


def read_splits(directory: Location, info: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """Returns split -> first episode and the one behind its last.

    Raises:
        DatasetError: it is written otherwise.
    """
    found, problems = {}, []
    for name, text in (info.get("splits") or {"train": f"0:{info['total_episodes']}"}).items():
        match = re.fullmatch(r"(\d+):(\d+)", str(text))
        if match is None:
            problems.append(f"split {name!r} is {text!r}, expected episodes like '0:50'")
        else:
            found[name] = int(match[1]), int(match[2])
    if problems:
        raise DatasetError(f"{directory}/{INFO}: {'; '.join(problems)}")
    return found


def feature(key: str, of: dict[str, Any]) -> Feature:
    """Returns a field of steps. of: what `features` has of it."""
    dtype, shape = str(of.get("dtype")), tuple(int(d) for d in of.get("shape") or ())
    if dtype in ("video", "image"):
        names = flat_names(of.get("names"))
        if len(shape) == 3 and (names[:1] in (["channel"], ["channels"]) or (shape[0] in (1, 3) and shape[2] > 4)):
            shape = (*shape[1:], shape[0])
        elif len(shape) == 3 and names[:2] == ["width", "height"]:
            shape = (shape[1], shape[0], shape[2])
        told = [of, *(of[name] for name in ("info", "video_info") if isinstance(of.get(name), dict))]  # v2.0: the last
        depth = any(t.get("video.is_depth_map") or t.get("is_depth_map") for t in told)
        return Feature(key, "other" if depth else "image", "depth map" if depth else "uint8", shape, dtype)
    if dtype == "string":
        return with_names(Feature(key, "text", "string", ()), of.get("names"))
    kind = "numeric" if dtype in _NUMERIC else "other"
    return with_names(Feature(key, kind, dtype, () if shape == (1,) else shape), of.get("names"))
