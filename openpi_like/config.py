"""Runs as typed objects: one Python file per run, small dotted overrides, and JSON that restores the same object.

There is no registry. A config file builds frozen dataclasses; `to_json` names their classes so that a checkpoint can
restore them; `override` changes single values from the command line.
"""

import ast
import dataclasses
import difflib
import importlib
import os
import runpy
from collections.abc import Sequence
from pathlib import Path
from types import GenericAlias, NoneType
from typing import Any, TypeVar

from openpi_like.older import todays

T = TypeVar("T")
_CLASS = "__class__"
_PACKAGE = "openpi_like"
# Packages whose dataclasses a checkpoint may hold. What reads a checkpoint imports them: it may come from anyone.
_trusted = {_PACKAGE}


def trust(*packages: str) -> None:
    """Lets checkpoints hold dataclasses of your own packages (top-level names), such as the config of a policy.

    To be called wherever such a checkpoint is written or read; `OPENPI_LIKE_TRUST=one,two` does it for any program.

    Raises:
        ValueError: a name is not that of a top-level package.
    """
    wrong = [name for name in packages if not name.isidentifier()]
    if wrong:
        raise ValueError(f"packages to trust: {wrong}, expected top-level names, such as 'my_policies'")
    _trusted.update(packages)


trust(*filter(None, map(str.strip, os.environ.get("OPENPI_LIKE_TRUST", "").split(","))))


def near_names(name: str, known: Sequence[str]) -> str:
    """Returns the end of an error message: the nearest known names, or all of them when none is near."""
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f"did you mean {', '.join(map(repr, near))}?" if near else f"known: {', '.join(map(repr, known))}"


def to_json(value: Any) -> Any:
    """Returns `value` (nested frozen dataclasses, dicts, tuples, numbers, strings, None) as JSON-ready data.

    Raises:
        TypeError: a leaf cannot be written as JSON, or a dataclass lives outside this package.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        cls = type(value)
        if cls.__module__.split(".")[0] not in _trusted:
            raise TypeError(
                f"only dataclasses of {', '.join(sorted(_trusted))} can be stored in a checkpoint, got "
                f"{cls.__module__}.{cls.__qualname__}; build the config from the library's own classes, or name your "
                "package in OPENPI_LIKE_TRUST"
            )
        fields = {f.name: to_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {_CLASS: f"{cls.__module__}:{cls.__qualname__}", **fields}
    if isinstance(value, dict):
        return {str(k): to_json(v) for k, v in value.items()}
    if isinstance(value, tuple | list):
        return [to_json(v) for v in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"cannot write {type(value).__name__} as JSON, expected a dataclass, dict, tuple, number or string")


def from_json(data: Any) -> Any:
    """Inverse of `to_json`; lists come back as tuples.

    Raises:
        ValueError: a class is outside this package or does not exist, or its fields do not match those stored.
    """
    if isinstance(data, list):
        return tuple(from_json(v) for v in data)
    if not isinstance(data, dict):
        return data
    if _CLASS not in data:
        return {k: from_json(v) for k, v in data.items()}
    path, fields = todays(data[_CLASS], {k: v for k, v in data.items() if k != _CLASS})
    module, _, name = path.partition(":")
    if module.split(".")[0] not in _trusted:
        raise ValueError(
            f"class {data[_CLASS]!r} is outside {', '.join(sorted(_trusted))}; the file is not one of ours or was "
            "changed; if it is yours, name its package in OPENPI_LIKE_TRUST"
        )
    try:
        cls = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as e:
        raise ValueError(f"class {data[_CLASS]!r} does not exist in this version of {_PACKAGE}: {e}") from e
    if not (isinstance(cls, type) and dataclasses.is_dataclass(cls)):
        raise ValueError(f"{data[_CLASS]!r} is not a dataclass; the file is not one of ours or was changed")
    stored = {k: from_json(v) for k, v in fields.items()}
    known = {f.name: f for f in dataclasses.fields(cls)}
    unknown = sorted(set(stored) - set(known))
    required = (dataclasses.MISSING, dataclasses.MISSING)
    missing = sorted(k for k, f in known.items() if k not in stored and (f.default, f.default_factory) == required)
    if unknown or missing:
        raise ValueError(
            f"{data[_CLASS]}: stored fields do not match this version: unknown {unknown}, missing {missing}; "
            "load it with the version that wrote it"
        )
    return cls(**stored)


def override(config: T, assignments: Sequence[str]) -> T:
    """Returns `config` with dotted `key=value` assignments applied, e.g. `["steps=100", "data.entries.0.weight=2"]`.

    A value is a Python literal, or a plain string. It must have the type of the value it replaces (an int may replace
    a float, anything may replace None). An object is made once, with all that is assigned inside it, so fields that
    have to agree with each other can be changed together; of two values in one place the later one stays.

    Raises:
        ValueError: lists every assignment that names no field or has the wrong type, and objects that refuse theirs.
    """
    failures: list[str] = []
    root = _Assigned()
    for assignment in assignments:
        path, eq, text = assignment.partition("=")
        if not eq:
            failures.append(f"{assignment!r}: expected key=value")
            continue
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            value = text
        place = root
        for key in path.split("."):
            place = place.inside.setdefault(key, _Assigned())
        place.path, place.value, place.inside = path, value, {}
    config = _replace(config, root, failures)
    if failures:
        raise ValueError("cannot apply overrides:\n  " + "\n  ".join(failures))
    return config


@dataclasses.dataclass
class _Assigned:
    """What is assigned in one place of a config: a value, where there is a path to it, and then places inside it."""

    path: str | None = None
    value: Any = None
    inside: dict[str, "_Assigned"] = dataclasses.field(default_factory=dict)

    @property
    def first_path(self) -> str:
        """Of what is assigned here or inside, the first as it was written."""
        return self.path if self.path is not None else next(iter(self.inside.values())).first_path


def _replace(obj: Any, assigned: _Assigned, failures: list[str]) -> Any:
    """Returns `obj` with what is assigned inside it; says in `failures` what cannot be."""
    changes = {}
    for key, place in assigned.inside.items():
        try:
            old, takes_none = _field(obj, key, place)
            new = old if place.path is None else _checked(old, takes_none, place.value, place.path)
            changes[key] = _replace(new, place, failures) if place.inside else new
        except ValueError as e:
            failures.append(str(e))
    if isinstance(obj, tuple):
        at = {int(key): value for key, value in changes.items()}
        return tuple(at.get(i, x) for i, x in enumerate(obj))
    if len(changes) < len(assigned.inside):
        return obj  # built from a part of what is to be assigned, it could be refused for what the rest would mend
    try:
        return dataclasses.replace(obj, **changes) if changes else obj
    except ValueError as e:
        failures.append(str(e))
        return obj


def _field(obj: Any, key: str, place: _Assigned) -> tuple[Any, bool]:
    """Returns a field of an object, or an element of a tuple, and whether None may stand there.

    Raises:
        ValueError: there is none.
    """
    path = place.first_path
    if isinstance(obj, tuple):
        if not (key.isdigit() and int(key) < len(obj)):
            raise ValueError(f"{path!r}: {key!r} is not a position in a tuple of {len(obj)}, counted from 0")
        return obj[int(key)], True
    if not dataclasses.is_dataclass(obj) or isinstance(obj, type):
        raise ValueError(f"{path!r}: {key!r} would be a field of {obj!r}, which has none")
    annotations = {f.name: f.type for f in dataclasses.fields(obj)}
    if key not in annotations:
        near = near_names(key, list(annotations))
        raise ValueError(f"{path!r}: {type(obj).__name__} has no field {key!r}; {near}")
    return getattr(obj, key), _takes_none(annotations[key])


def _takes_none(annotation: Any) -> bool:
    """Returns whether a field so annotated can be None; True where the annotation does not say it."""
    return not isinstance(annotation, type | GenericAlias) or annotation in (Any, object, NoneType)


def _checked(old: Any, takes_none: bool, value: Any, path: str) -> Any:
    """Returns what stands in the place of `old`.

    Raises:
        ValueError: it has another type.
    """
    if value is None and not takes_none:
        raise ValueError(f"{path!r}: got None, expected {type(old).__name__}: it cannot be left out")
    new = list_to_tuple(value)
    if isinstance(old, float) and type(new) is int:
        new = float(new)
    if old is not None and new is not None and type(new) is not type(old):
        raise ValueError(
            f"{path!r}: got {new!r} of type {type(new).__name__}, expected {type(old).__name__} like {old!r}"
        )
    return new


def list_to_tuple(value: Any) -> Any:
    """Returns lists, at any depth, as tuples, which frozen dataclasses can hold and hash."""
    return tuple(map(list_to_tuple, value)) if isinstance(value, list | tuple) else value


def load_run(path: str | Path) -> Any:
    """Runs the Python file of a run and returns its `config`; of FILE.py:NAME, that one of its `configs`, a dict.

    Raises:
        FileNotFoundError: no such file; names those beside it.
        ValueError: the file defines no `config`, or none of that name.
    """
    before, several, name = str(path).partition(".py:")
    path = Path(f"{before}.py" if several else path)
    if not path.is_file():
        beside = sorted(p.name for p in path.parent.glob("*.py")) if path.parent.is_dir() else []
        raise FileNotFoundError(f"no config file {path}; in {path.parent}: {', '.join(beside) or 'no config files'}")
    variables = runpy.run_path(str(path))
    if several:
        configs = variables.get("configs", {})
        if name not in configs:
            raise ValueError(f"{path} has no run {name!r} in its `configs`; {near_names(name, list(configs))}")
        return configs[name]
    if "config" not in variables and "configs" in variables:
        raise ValueError(f"{path} has several runs; name one, {path}:NAME, of {', '.join(variables['configs'])}")
    if "config" not in variables:
        raise ValueError(f"{path} defines no variable named config; got {sorted(k for k in variables if k[0] != '_')}")
    return variables["config"]
