"""Directories of HDF5 files, or one such file: episodes as ALOHA, robomimic and LIBERO record them, read in place.

A new kind of HDF5 file is a new `Form` and a name here.
"""

import functools
from collections.abc import Callable
from typing import TypeVar

from openpi_like.config import near_names
from openpi_like.data import files
from openpi_like.data.files import Location, Stat
from openpi_like.data.index_build import some_of
from openpi_like.data.layouts.aloha_hdf5 import AlohaForm
from openpi_like.data.layouts.hdf5_records import Hdf5Records, stored_images
from openpi_like.data.layouts.hdf5_tree import DAMAGE, Form, Hdf5, damaged, describe, open_file
from openpi_like.data.layouts.layout import is_file
from openpi_like.data.layouts.robomimic_hdf5 import RobomimicForm, natural
from openpi_like.data.schema import DatasetError, Schema, Split
from openpi_like.data.storage import RecordError

FORMS: tuple[Form, ...] = (RobomimicForm(), AlohaForm())
_SUFFIXES = (".hdf5", ".h5")

_T = TypeVar("_T")


class Hdf5Layout:
    """HDF5 files of one `Form`, in one directory."""

    marker = "*.h*5"

    def is_at(self, directory: Location) -> bool:
        return bool(_list_files(directory))

    def schema(self, directory: Location) -> Schema:
        form, splits, _ = _look(directory, _list_files(directory))
        paths = {file: [path for episodes in of.values() for path in episodes] for file, of in splits.items()}
        return _first_episode(directory, form, paths)[1]

    def split_names(self, directory: Location) -> list[str]:
        form, splits, damage = _look(directory, _list_files(directory))
        _refuse(directory, form, damage)
        return sorted({split for of in splits.values() for split, episodes in of.items() if episodes})

    def read(self, directory: Location, split: str, *, allow_missing: bool) -> tuple[Split, Schema]:
        there = _list_files(directory)
        form, splits, damage = _look(directory, there)
        if not allow_missing:
            _refuse(directory, form, damage)
        known = list(dict.fromkeys(name for of in splits.values() for name in of))
        if split not in known:
            raise DatasetError(f"{directory}: no split {split!r}; {near_names(split, known)}")
        without = [f"{location.name} has {', '.join(of)}" for location, of in splits.items() if split not in of]
        if without:
            raise DatasetError(
                f"{directory}: {len(without)} of {len(splits)} files have no split {split!r}; write the mask in all, "
                f"or keep files with other masks in directories of their own:\n  {some_of(without)}"
            )
        counts = {location: len(of[split]) for location, of in splits.items()}
        if not any(counts.values()):
            raise DatasetError(f"{directory}: split {split!r} has no episodes")
        storage, schema, rate = _first_episode(directory, form, {file: of[split] for file, of in splits.items()})
        most = max(counts.values())  # how many episodes a damaged file had, nobody knows
        return Split(
            name=split,
            dataset=files.locate(files.absolute(directory)).name,
            version=form.version,
            storage=storage,
            shards=tuple(there),
            lengths=tuple(counts.get(location, most) for location in there),
            stats=tuple(there.values()),
            rate=rate,
        ), schema


def _list_files(directory: Location) -> dict[Location, Stat]:
    """Returns the HDF5 files of a directory, or the one that it is, by the numbers in their names."""
    try:
        if directory.name.endswith(_SUFFIXES) and is_file(directory):
            return {directory: files.list_files(directory.parent)[directory.name]}
        there = files.list_files(directory)
    except OSError:
        return {}
    names = [name for name in there if name.endswith(_SUFFIXES) and not name.startswith(".")]
    return {directory / name: there[name] for name in sorted(names, key=natural)}


def _look(
    directory: Location, there: dict[Location, Stat]
) -> tuple[Form, dict[Location, dict[str, list[str]]], dict[Location, str]]:
    """Returns the form of files, the splits of those that can be read, and what is wrong with the others.

    Of files with one episode each only those up to the first good one are opened.
    """
    form: Form | None = None
    splits: dict[Location, dict[str, list[str]]] = {}
    damage: dict[Location, str] = {}
    for location in there:
        if form is not None and form.one_episode:
            splits[location] = next(iter(splits.values()))
            continue
        found = _try(location, functools.partial(_form_and_splits, form))
        if isinstance(found, RecordError):
            damage[location] = str(found)
        else:
            form, splits[location] = found
    if form is None:
        raise DatasetError(
            f"{directory}: none of its HDF5 files can be read; copy or write them again:\n  {_listed(damage)}"
        )
    return form, splits, damage


def _form_and_splits(form: Form | None, file: Hdf5) -> tuple[Form, dict[str, list[str]]]:
    """Returns the form of a file and its splits. form: that it has to have."""
    form = form or next((f for f in FORMS if f.claims(file)), None)
    if form is None:
        raise RecordError(
            f"it has {', '.join(file) or 'nothing'}; expected {' or '.join(f.expects for f in FORMS)}", resumable=False
        )
    if problem := form.problem(file):
        raise RecordError(problem, resumable=False)
    return form, form.splits(file)


def _refuse(directory: Location, form: Form, damage: dict[Location, str]) -> None:
    """Raises DatasetError for files that cannot be read, unless these are counted when they are indexed."""
    if damage and not form.one_episode:
        raise DatasetError(
            f"{directory}: {len(damage)} of its HDF5 files cannot be read; copy them again, take them away, or "
            f"tolerate them (max_corrupt_fraction):\n  {_listed(damage)}"
        )


def _listed(damage: dict[Location, str]) -> str:
    return some_of([f"{location.name}: {why}" for location, why in damage.items()])


def _first_episode(
    directory: Location, form: Form, paths: dict[Location, list[str]]
) -> tuple[Hdf5Records, Schema, float | None]:
    """Returns what the first episode that can be read says of all: how they are stored, their fields and rate.

    One of a single step says it only if there are no others: there, a value of the episode is like one of the step.
    """
    Found = tuple[Hdf5Records, Schema, float | None]

    def look(path: str, file: Hdf5) -> tuple[Found, int]:
        tree = describe(file, path, form)
        storage = Hdf5Records(form, file.filename.rpartition("/")[2], stored_images(tree, file))
        return (storage, tree.schema, form.rate(file)), tree.steps

    problems = []
    short: Found | None = None
    for location, of in paths.items():
        for path in of:
            found = _try(location, functools.partial(look, path))
            if isinstance(found, RecordError):
                problems.append(f"{location.name}, {path}: {found}")
            elif found[1] != 1:
                return found[0]
            else:
                short = short or found[0]
    if short is not None:
        return short
    raise DatasetError(f"{directory}: no episode can be read; copy the files again:\n  {some_of(problems)}")


def _try(location: Location, look: Callable[[Hdf5], _T]) -> _T | RecordError:
    """Returns what is seen in a file, or why it cannot be.

    Raises:
        DatasetError: the file is there, but the system does not let it be read.
    """
    try:
        with open_file(location) as file:
            return look(file)
    except DatasetError:
        raise
    except DAMAGE as e:
        try:
            return damaged(e)
        except OSError as of_system:
            raise DatasetError(f"cannot read {location}: {of_system}{files.advice(of_system)}") from e
