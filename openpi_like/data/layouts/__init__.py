"""How datasets are laid out on disk; a new layout is a new file and a name here."""

from openpi_like.data import files
from openpi_like.data.files import Location
from openpi_like.data.layouts.hdf5 import Hdf5Layout
from openpi_like.data.layouts.layout import Layout
from openpi_like.data.layouts.lerobot import LeRobotLayout, OldLeRobotLayout
from openpi_like.data.layouts.tfds import TfdsLayout
from openpi_like.data.schema import DatasetError, Schema, Split

_TFDS = TfdsLayout()
LAYOUTS: tuple[Layout, ...] = (_TFDS, LeRobotLayout(), OldLeRobotLayout(), Hdf5Layout())


def find_layout(directory: Location) -> Layout:
    """Returns the layout of a directory: the first that knows it, else TFDS, which says what is missing."""
    return next((layout for layout in LAYOUTS if layout.is_at(directory)), _TFDS)


def read_dataset(directory: Location, split: str, *, allow_missing: bool = False) -> tuple[Split, Schema]:
    """Returns what a dataset says of a split.

    allow_missing: shards may be absent as long as one is there.

    Raises:
        DatasetError: the directory, the split or files are missing, or the layout is not one of `LAYOUTS`.
    """
    return find_layout(directory).read(directory, split, allow_missing=allow_missing)


def read_schema(directory: Location) -> Schema:
    """Returns the fields of a dataset; raises as `read_dataset`."""
    return find_layout(directory).schema(directory)


def split_names(directory: Location) -> list[str]:
    """Returns the splits of a dataset; raises as `read_dataset`."""
    return find_layout(directory).split_names(directory)


def find_datasets(directory: Location) -> list[Location]:
    """Returns the datasets that `directory` is or holds: itself, or directories up to three levels below.

    Raises:
        DatasetError: there is none.
    """
    if any(layout.is_at(directory) for layout in LAYOUTS):
        return [directory]
    found: dict[str, Location] = {}
    for layout in LAYOUTS:
        for name in (n for depth in (1, 2, 3) for n in files.glob(directory, f"{'*/' * depth}{layout.marker}")):
            inner = name.rsplit("/", 1 + layout.marker.count("/"))[0]
            if not any(part.startswith(".") for part in inner.split("/")):  # indexes lie in hidden directories
                found[inner] = directory / inner
    if not found:
        split_names(directory)  # says what is missing
        raise DatasetError(f"{directory} holds no dataset")
    return [found[name] for name in sorted(found)]
