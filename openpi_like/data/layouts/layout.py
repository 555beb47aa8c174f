"""What a layout of datasets has to do."""

from typing import Protocol, runtime_checkable

from openpi_like.data import files
from openpi_like.data.files import Location
from openpi_like.data.schema import Schema, Split


@runtime_checkable
class Layout(Protocol):
    """How datasets of one kind describe themselves. marker: a pattern of files that only they have."""

    @property
    def marker(self) -> str: ...

    def is_at(self, directory: Location) -> bool:
        """Returns whether a directory holds such a dataset. There may be no such directory."""

    def schema(self, directory: Location) -> Schema:
        """Returns the fields of a dataset, whether or not its records are there. Raises DatasetError."""

    def split_names(self, directory: Location) -> list[str]:
        """Returns the splits. Raises DatasetError."""

    def read(self, directory: Location, split: str, *, allow_missing: bool) -> tuple[Split, Schema]:
        """Returns what is known of a split and of its fields, without reading records; see `read_dataset`."""


def is_file(location: Location) -> bool:
    """Returns whether there is such a file; False where its directory cannot be read."""
    try:
        return location.name in files.list_files(location.parent)
    except OSError:
        return False
