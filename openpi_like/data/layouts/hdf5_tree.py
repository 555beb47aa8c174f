"""What an episode in an HDF5 file holds: its datasets and attributes as fields."""

import dataclasses
from collections.abc import Iterator
from typing import Any, Protocol, runtime_checkable

import numpy as np

from openpi_like.data import files
from openpi_like.data.files import Location, Url
from openpi_like.data.images import ENCODINGS, encoding
from openpi_like.data.schema import DatasetError, Feature, MissingPackageError, Schema
from openpi_like.data.storage import RecordError

Hdf5 = Any  # an h5py.File, Group or Dataset: h5py is an extra, imported where a file is opened

MAX_TEXT = 4096  # attributes that are longer are models or programs, and as a rule others in every episode
_MAX_DEPTH = 16  # groups in groups; more says that a link leads back
# What h5py raises where an object of a file that it could open is damaged.
DAMAGE = (OSError, KeyError, RuntimeError, ValueError, TypeError)


@runtime_checkable
class Form(Protocol):
    """How HDF5 files of one kind are arranged. A frozen object; paths are those of h5py.

    version: stands for the version of such datasets. expects: what its files hold, for messages. one_episode: a file
    is one episode, so that it is not opened to count them. steps: the dataset of an episode that has a row per step.
    """

    @property
    def version(self) -> str: ...

    @property
    def expects(self) -> str: ...

    @property
    def one_episode(self) -> bool: ...

    @property
    def steps(self) -> str: ...

    def claims(self, file: Hdf5) -> bool:
        """Returns whether a file is of this kind, be it complete or not."""

    def problem(self, file: Hdf5) -> str | None:
        """Returns why a file of this kind cannot be used, and what to do, or None."""

    def splits(self, file: Hdf5) -> dict[str, list[str]]:
        """Returns split -> paths of its episodes in order. Raises RecordError."""

    def rate(self, file: Hdf5) -> float | None:
        """Returns steps in a second, where the file says it."""

    def left_out(self, key: str) -> str | None:
        """Returns what a dataset is, if it is not to be read."""

    def shows(self, key: str) -> bool:
        """Returns whether a dataset has to be pictures, by its name."""

    def attributes(self, file: Hdf5, path: str) -> dict[str, Any]:
        """Returns what is known of an episode beside its datasets: numbers and texts. Raises RecordError."""

    def problems(self, attributes: dict[str, Any], steps: int) -> list[str]:
        """Returns what in the attributes of an episode of so many steps is wrong."""


@dataclasses.dataclass(frozen=True)
class Tree:
    """One episode. datasets: of steps and of the whole episode, by key. attributes: see `Form`. steps: how many."""

    schema: Schema
    datasets: dict[str, Hdf5]
    attributes: dict[str, Any]
    steps: int


def open_file(location: Location) -> Hdf5:
    """Opens an HDF5 file to read it.

    Raises:
        DatasetError: h5py is not installed, or the file is in a store.
        RecordError: it is not an HDF5 file, or is cut.
        OSError: it is not there or cannot be read.
    """
    if isinstance(location, Url):
        raise DatasetError(f"{location}: HDF5 files are read from disk; copy the whole directory to one, and give that")
    try:
        import h5py
    except ImportError as e:
        raise MissingPackageError(f"{location}: reading HDF5 needs h5py: pip install -e '.[formats]'") from e
    try:
        return h5py.File(location, "r")
    except OSError as e:
        if e.errno is not None:  # of the system; what h5py itself finds has no number
            raise
        why = f"it is no HDF5 file, or only a part of one: {e}" if files.size(location) else "the file is empty"
        raise RecordError(why, resumable=False) from e


def describe(file: Hdf5, path: str, form: Form) -> Tree:
    """Returns what an episode holds, without reading its steps.

    Raises:
        RecordError: it is damaged, or not there.
    """
    try:
        if path not in file:
            raise RecordError(f"there is no {path!r} in the file", resumable=True)
        datasets = dict(_datasets(file[path], ""))
        if form.steps not in datasets or not datasets[form.steps].shape:
            raise RecordError(f"no dataset {form.steps!r} with a row per step; {_holds(datasets)}", resumable=True)
        steps = len(datasets[form.steps])
        attributes = form.attributes(file, path)
        levels: dict[str, dict[str, Feature]] = {"step": {}, "episode": {}}
        for key in sorted(datasets):
            level, feature = _dataset(key, datasets[key], steps, form)
            levels[level][key] = feature
        for key in sorted(attributes):
            levels["episode"].setdefault(key, _attribute(key, attributes[key]))
    except DAMAGE as e:
        raise damaged(e) from e
    return Tree(Schema(levels["step"], levels["episode"]), datasets, attributes, steps)


def as_of_episode(tree: Tree, schema: Schema) -> Tree:
    """Returns an episode of one step with those values as of the whole episode that are so in other episodes."""
    moved = [
        key
        for key in tree.schema.steps
        if tree.steps == 1 and key in schema.episode and key not in schema.steps and tree.datasets[key].shape == (1,)
    ]
    if not moved:
        return tree
    steps = {key: feature for key, feature in tree.schema.steps.items() if key not in moved}
    episode = {**tree.schema.episode, **{key: tree.schema.steps[key] for key in moved}}
    return dataclasses.replace(tree, schema=Schema(steps, dict(sorted(episode.items()))))


def damaged(error: Exception, *, resumable: bool = True) -> RecordError:
    """Returns what h5py raised as a damaged record, or what is one already; raises it again if it is of the system."""
    if isinstance(error, RecordError):
        return error
    if isinstance(error, OSError) and error.errno is not None:
        raise error
    text = str(error).strip("\"'")
    return RecordError(f"HDF5 cannot read it: {text}", resumable=resumable)


def _holds(names: Any) -> str:
    return f"there is: {', '.join(sorted(names)) or 'nothing'}"


def _datasets(group: Hdf5, prefix: str, depth: int = 0) -> Iterator[tuple[str, Hdf5]]:
    """Yields (path in the episode, dataset) of all datasets."""
    if depth > _MAX_DEPTH:
        raise RecordError(
            f"{prefix}: groups nested more than {_MAX_DEPTH} deep; does a link lead back?", resumable=True
        )
    for name in group:
        item = group[name]
        if hasattr(item, "keys"):
            yield from _datasets(item, f"{prefix}{name}/", depth + 1)
        elif hasattr(item, "shape"):
            yield f"{prefix}{name}", item


def _dataset(key: str, data: Hdf5, steps: int, form: Form) -> tuple[str, Feature]:
    """Returns the level and the feature of a dataset."""
    import h5py

    dtype, shape = data.dtype, data.shape
    if (what := form.left_out(key)) is not None:
        return "step", Feature(key, "other", what, (shape or ())[1:])
    if shape is None:
        return "step", Feature(key, "other", "empty", ())
    if dtype == np.uint8 and len(shape) == 4 and shape[3] == 3:
        return "step", Feature(key, "image", "uint8", shape[1:], "raw")
    if shape and shape[0] and encoding(_first_bytes(data)) in ENCODINGS:
        return "step", Feature(key, "image", "uint8", (None, None, 3))
    if form.shows(key):
        what = f"pictures of type {dtype} (expected rows of JPEG or PNG, or uint8 of shape (T, H, W, 3))"
        return "step", Feature(key, "other", what, shape[1:])
    # One value in an episode of more steps is of the whole episode: whether it succeeded, what was said.
    level = "episode" if shape == () or (shape == (1,) and steps != 1) else "step"
    if h5py.check_string_dtype(dtype) is not None:
        return level, Feature(key, "text" if len(shape) < 2 else "other", "string", shape[1:])
    return level, Feature(key, "numeric" if dtype.kind in "biuf" else "other", dtype.name, shape[1:])


def _first_bytes(data: Hdf5) -> bytes:
    """Returns the first row of what may be encoded pictures, or nothing."""
    import h5py

    rows = data.dtype == np.uint8 and len(data.shape) == 2
    texts = data.dtype.kind == "S" and len(data.shape) == 1
    lists = h5py.check_vlen_dtype(data.dtype) == np.uint8 and len(data.shape) == 1
    return bytes(data[0]) if rows or texts or lists else b""


def _attribute(key: str, value: Any) -> Feature:
    """Returns the feature of an attribute. A list of one value is that value."""
    if isinstance(value, np.ndarray) and value.shape == (1,):
        value = value[0]
    if isinstance(value, str | bytes):
        kind, what = ("text", "string") if len(value) <= MAX_TEXT else ("other", f"text of {len(value)} characters")
        return Feature(key, kind, what, ())
    array = np.asarray(value) if isinstance(value, bool | int | float | np.generic | np.ndarray) else None
    if array is None or array.shape or array.dtype.kind not in "biuf":
        # Lists are initial states, weights and the like: as a rule of another length in every task.
        return Feature(key, "other", f"attribute {type(value).__name__}", () if array is None else array.shape)
    return Feature(key, "numeric", array.dtype.name, ())
