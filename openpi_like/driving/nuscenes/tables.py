"""The JSON tables of nuScenes: read, and everything that is wrong with them said at once.

Only tables and fields that are used are read and checked. Of 2.6 million rows of sample_data, and as many poses, those
of keyframes are kept, so that the tables of v1.0-trainval fit in a few GB.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from openpi_like.config import near_names
from openpi_like.data.schema import DatasetError

Row = dict[str, Any]
_SHOWN = 20  # problems in one message

FIELDS = {
    "category": {"token": "text", "name": "text"},
    "sensor": {"token": "text", "channel": "text"},
    "log": {"token": "text", "location": "text", "vehicle": "text", "date_captured": "text"},
    "scene": {
        "token": "text", "name": "text", "description": "text", "log_token": "text", "nbr_samples": "int",
        "first_sample_token": "text", "last_sample_token": "text",
    },
    "sample": {"token": "text", "timestamp": "int", "scene_token": "text", "next": "text", "prev": "text"},
    "calibrated_sensor": {"token": "text", "sensor_token": "text", "translation": "vector", "rotation": "quaternion"},
    "sample_data": {
        "token": "text", "sample_token": "text", "ego_pose_token": "text", "calibrated_sensor_token": "text",
        "filename": "text", "is_key_frame": "bool",
    },
    "ego_pose": {"token": "text", "translation": "vector", "rotation": "quaternion"},
    "instance": {"token": "text", "category_token": "text"},
    "sample_annotation": {
        "token": "text", "sample_token": "text", "instance_token": "text", "translation": "vector", "size": "size",
        "rotation": "quaternion",
    },
}  # fmt: skip
"""Tables in the order in which they are read, and the kinds of the fields that are used."""

LINKS = {
    "scene": {"log_token": "log", "first_sample_token": "sample", "last_sample_token": "sample"},
    "sample": {"scene_token": "scene", "next": "sample", "prev": "sample"},
    "calibrated_sensor": {"sensor_token": "sensor"},
    "sample_data": {
        "sample_token": "sample", "ego_pose_token": "ego_pose", "calibrated_sensor_token": "calibrated_sensor",
    },
    "instance": {"category_token": "category"},
    "sample_annotation": {"sample_token": "sample", "instance_token": "instance"},
}  # fmt: skip
"""Fields that hold a token of another table; `next` and `prev` may be empty."""


class NuScenesError(DatasetError):
    """A copy of nuScenes is incomplete or damaged; the message lists all that was found."""


def raise_all(where: str, problems: list[str]) -> None:
    """Raises `NuScenesError` where there are problems.

    Raises:
        NuScenesError: a line for each problem, of very many the first ones and their number.
    """
    if problems:
        more = [f"... and {len(problems) - _SHOWN} more"] if len(problems) > _SHOWN else []
        raise NuScenesError("\n  ".join([f"{where}: {len(problems)} problems", *problems[:_SHOWN], *more]))


@dataclasses.dataclass(frozen=True)
class Tables:
    """Rows by table and token. sample_data: of keyframes alone; ego_pose: those that these refer to."""

    root: Path
    version: str
    rows: Mapping[str, Mapping[str, Row]]

    def __getitem__(self, table: str) -> Mapping[str, Row]:
        return self.rows[table]


def read_tables(root: Path, version: str) -> Tables:
    """Reads `root/version/*.json`.

    Args:
        root: the folder that holds "samples" and, e.g., "v1.0-mini". version: name of the folder of tables.

    Raises:
        NuScenesError: tables are missing or cut off, fields are missing or of another kind, tokens lead nowhere or are
            used twice.
    """
    folder = root / version
    if not folder.is_dir():
        near = sorted(p.name for p in root.glob("v*") if p.is_dir()) if root.is_dir() else []
        known = near_names(version, near) if near else "it has no folder v1.0-...; give the one it is in"
        raise NuScenesError(f"{root} has no folder {version} with tables, {known}")
    problems, rows, whole = list[str](), dict[str, dict[str, Row]](), set[str]()
    for table in FIELDS:
        before = len(problems)
        found = _read(folder, table, _keep(table, rows), problems)
        if found is not None:
            rows[table] = _by_token(table, found, problems)
        if len(problems) == before:
            whole.add(table)
    for table, links in LINKS.items():
        for field, to in links.items():
            if table in rows and to in whole:  # else tokens are missing for a reason that has been said
                problems += _dangling(table, field, rows[table], to, rows[to])
    raise_all(str(folder), problems)
    return Tables(root, version, rows)


def _keep(table: str, rows: Mapping[str, Mapping[str, Row]]) -> Callable[[Row], Row | None] | None:
    """Returns what is called with every row while a table is read, and drops those that nobody asks for."""
    if table == "sample_data":
        return lambda row: row if row.get("is_key_frame", True) else None
    if table == "ego_pose" and "sample_data" in rows:
        wanted = {row.get("ego_pose_token") for row in rows["sample_data"].values()}
        return lambda row: row if row.get("token") in wanted else None
    return None


def _read(folder: Path, table: str, keep: Callable[[Row], Row | None] | None, problems: list[str]) -> list[Any] | None:
    path = folder / f"{table}.json"
    if not path.is_file():
        here = sorted(p.name for p in folder.glob("*.json"))
        near = near_names(path.name, here) if here else "there is no .json at all"
        problems.append(f"no {path.name}, {near} Unpack the archive of metadata again")
        return None
    try:
        found = json.loads(path.read_bytes(), object_hook=keep)
    except (ValueError, RecursionError) as e:  # a text that is not UTF-8, too
        problems.append(f"{path.name} is not JSON ({e}), expected a list of rows; unpack or download it again")
        return None
    if not isinstance(found, list):
        problems.append(f"{path.name} holds a {type(found).__name__}, expected a list of rows")
        return None
    return [row for row in found if row is not None]


def _by_token(table: str, found: list[Any], problems: list[str]) -> dict[str, Row]:
    """Returns the rows that are as they should be, and says of each field what is wrong with the others."""
    wrong, rows = dict[str, tuple[int, str]](), dict[str, Row]()

    def say(what: str, example: str) -> None:
        wrong[what] = (wrong.get(what, (0, example))[0] + 1, wrong.get(what, (0, example))[1])

    for i, row in enumerate(found):
        if not isinstance(row, dict):
            say("rows that are no objects", f"row {i} is a {type(row).__name__}")
            continue
        good = True
        for field, kind in FIELDS[table].items():
            if field not in row:
                say(f"rows without {field!r}", f"row {i}; {near_names(field, list(row))}")
            elif not _KINDS[kind](row[field]):
                say(f"rows whose {field!r} is not {_EXPECTED[kind]}", f"row {i} has {str(row[field])[:60]!r}")
            else:
                continue
            good = False
        if good and row["token"] in rows:
            say("rows with a token that another has", f"row {i}, {row['token']}")
        elif good:
            rows[row["token"]] = row
    problems += [f"{table}.json: {count} {what}, the first: {example}" for what, (count, example) in wrong.items()]
    return rows


def _dangling(table: str, field: str, rows: Mapping[str, Row], to: str, known: Mapping[str, Row]) -> list[str]:
    """Returns a line where tokens of a field are not in the table that they should be in."""
    may_be_empty = field in ("next", "prev")
    lost = [r for r in rows.values() if r[field] not in known and not (may_be_empty and r[field] == "")]
    if not lost:
        return []
    return [
        f"{table}.json: {len(lost)} rows whose {field} {to}.json does not have, the first: {table} {lost[0]['token']} "
        f"-> {lost[0][field] or 'an empty text'}; take both tables from one download"
    ]


def _is_number(x: Any) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x)


def _is_vector(x: Any, size: int) -> bool:
    return isinstance(x, list) and len(x) == size and all(map(_is_number, x))


_KINDS: dict[str, Callable[[Any], bool]] = {
    "text": lambda x: isinstance(x, str),
    "int": lambda x: isinstance(x, int) and not isinstance(x, bool),
    "bool": lambda x: isinstance(x, bool),
    "vector": lambda x: _is_vector(x, 3),
    "size": lambda x: _is_vector(x, 3) and min(x) > 0,
    "quaternion": lambda x: _is_vector(x, 4) and abs(math.hypot(*x) - 1) < 1e-2,
}
_EXPECTED = {
    "text": "a text",
    "int": "a whole number",
    "bool": "true or false",
    "vector": "3 finite numbers",
    "size": "3 numbers above 0 (width, length, height)",
    "quaternion": "4 numbers of length 1 (w, x, y, z)",
}
