"""HDF5 files as ALOHA records them: an episode per file, with `observations`, `action` and pictures per camera."""

import dataclasses
from typing import Any

from openpi_like.data.layouts.hdf5_tree import Hdf5


@dataclasses.dataclass(frozen=True)
class AlohaForm:
    """See `Form`. Attributes of the file are fields of the episode, as is its name."""

    version: str = "aloha_hdf5"
    expects: str = "'observations' and 'action' (ALOHA)"
    one_episode: bool = True
    steps: str = "action"

    def claims(self, file: Hdf5) -> bool:
        return "observations" in file or "action" in file

    def problem(self, file: Hdf5) -> str | None:
        missing = [name for name in ("observations", "action") if name not in file]
        if not missing:
            return None
        return f"it has no {' and no '.join(map(repr, missing))}, which files of ALOHA have; it has {', '.join(file)}"

    def splits(self, file: Hdf5) -> dict[str, list[str]]:
        return {"train": ["/"]}

    def rate(self, file: Hdf5) -> float | None:
        return None

    def left_out(self, key: str) -> str | None:
        # Its rows are cameras in an order that the file does not say; and pictures end where the zeros begin.
        return "lengths of pictures, which are known without it," if key == "compress_len" else None

    def shows(self, key: str) -> bool:
        return key.startswith("observations/images/")

    def attributes(self, file: Hdf5, path: str) -> dict[str, Any]:
        return {"file_name": file.filename.rpartition("/")[2], **file.attrs}

    def problems(self, attributes: dict[str, Any], steps: int) -> list[str]:
        return []
