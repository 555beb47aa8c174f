"""Results as files of JSON lines, which a kill may cut off."""

import json
from pathlib import Path
from typing import Any


def append_line(path: Path, values: Any) -> None:
    """Adds a line. values: anything that JSON holds."""
    with path.open("a") as f:
        f.write(json.dumps(values) + "\n")


def whole_lines(path: Path) -> list[str]:
    """Returns the lines of a file, none where there is none; a last one that was cut off is removed from the file."""
    if not path.is_file():
        return []
    *lines, cut = path.read_text().split("\n")
    if cut:
        path.write_text("".join(line + "\n" for line in lines))
    return lines
