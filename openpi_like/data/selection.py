"""Which steps of a split may begin a chunk."""

import dataclasses
import json
import re
from pathlib import Path

import numpy as np

from openpi_like.data.index import FrameIndex
from openpi_like.data.schema import DatasetError

SUCCESS, INTERVENED = "episode_metadata/success", "intervened"
"""Where `serve/record.py` writes how an episode ended (1, 0, or -1 for unknown), and whether an expert acted."""

_SHOWN = 5  # names in one message


@dataclasses.dataclass(frozen=True)
class Selection:
    """Which steps of a split may begin a chunk. What is left out is counted in `EpisodeDataset.removed` and logged.

    success: a number or bool of the step or episode that must be above 0; or a text that `success_pattern`, a regular
        expression, must be found in.
    intervened: a number or bool of the step that is above 0 where an expert acted instead of a policy ("intervened" in
        what `serve/record.py` writes): only these steps, and chunks end where the expert hands back.
    labelled: only steps with an instruction.
    min_length: only episodes of at least so many RLDS steps. skip_first: not the first steps of an episode.
    skip_last: not the last steps of an episode, such as a terminal one with an action of zeros; chunks end before them.
    keep_ranges: a JSON file of {episode: [[start, end), ...]}, the steps to keep; an episode that is not in it is left
        out. Its name there is that of the texts `keep_ranges_key`, joined with "--". Defaults fit the ranges that were
        published for DROID.
    idle_below: leave out steps at which nothing is commanded: no delta, velocity or relative target of at least this
        size (model units, over one control step; of the largest dim, or the angle of a quaternion or 6-D rotation), and
        no gripper command other than at the step before.
    skip_not_finite: leave out, and name in a warning, steps whose state or chunk has NaN, infinity, or a quaternion or
        6-D rotation that is none (all 0), which otherwise are an error.
    """

    success: str | None = None
    success_pattern: str | None = None
    intervened: str | None = None
    labelled: bool = False
    min_length: int = 1
    skip_first: int = 0
    skip_last: int = 0
    keep_ranges: str | None = None
    keep_ranges_key: tuple[str, ...] = ("episode_metadata/recording_folderpath", "episode_metadata/file_path")
    idle_below: float | None = None
    skip_not_finite: bool = False

    def __post_init__(self) -> None:
        problems = []
        if self.success_pattern is not None:
            try:
                re.compile(self.success_pattern)
            except re.error as e:
                problems.append(f"success_pattern {self.success_pattern!r} is no regular expression: {e}")
            if self.success is None:
                problems.append("success_pattern without success, expected the text to look in")
        if self.min_length < 1:
            problems.append(f"min_length={self.min_length}, expected >= 1")
        if self.skip_first < 0 or self.skip_last < 0:
            problems.append(f"skip_first={self.skip_first}, skip_last={self.skip_last}, expected both >= 0")
        if self.idle_below is not None and not self.idle_below > 0:
            problems.append(f"idle_below={self.idle_below}, expected a number above 0")
        if not self.keep_ranges_key:
            problems.append("keep_ranges_key is empty, expected the names of texts")
        if problems:
            raise ValueError("Selection: " + "; ".join(problems))


def read_ranges(selection: Selection, index: FrameIndex, part: range) -> tuple[np.ndarray, np.ndarray]:
    """Returns the steps [start, end) of all ranges, (R, 2), and per episode whether it has any entry.

    part: the episodes.

    Raises:
        DatasetError: the file cannot be read, or has none of the episodes.
    """
    path, start = Path(selection.keep_ranges or ""), index.episode_start
    try:
        stored = json.loads(path.read_text())
        entries = {k: np.array(v, np.int64).reshape(-1, 2) for k, v in stored.items()}
    except (OSError, ValueError, AttributeError, TypeError) as wrong:
        raise DatasetError(
            f"keep_ranges {path}: {wrong}; expected JSON like {{episode: [[start, end], ...]}}"
        ) from wrong
    bad = [k for k, v in entries.items() if (v[:, 0] < 0).any() or (v[:, 1] < v[:, 0]).any()]
    if bad:
        raise DatasetError(f"keep_ranges {path}: ranges that are not 0 <= start <= end in {bad[:_SHOWN]}")
    texts = [index.episode_texts[key] for key in selection.keep_ranges_key]
    found, known, name = [], np.zeros(len(part), bool), ""
    for i, e in enumerate(part):
        name = "--".join(t.table[t.ids[e]] for t in texts)
        if name in entries:
            known[i] = True
            found.append(np.sort(np.minimum(entries[name] + start[e], start[e + 1]), axis=0))
    if not known.any():
        raise DatasetError(
            f"keep_ranges {path} has none of the episodes of {index.split}: it has names like "
            f"{next(iter(entries), None)!r}, the episodes have names like {name!r}; correct keep_ranges_key"
        )
    return np.concatenate(found), known
