"""Which scenes of nuScenes are in which split: those of v1.0-mini, and lists in text files.

The lists are from nutonomy/nuscenes-devkit, python-sdk/nuscenes/utils/splits.py, where those of train (700 scenes) and
val (150) are, too.
"""

from pathlib import Path

from openpi_like.config import near_names

MINI = {
    "mini_train": (
        "scene-0061", "scene-0553", "scene-0655", "scene-0757", "scene-0796", "scene-1077", "scene-1094", "scene-1100",
    ),
    "mini_val": ("scene-0103", "scene-0916"),
}  # fmt: skip


def split_scenes(split: str) -> tuple[str, ...]:
    """Returns the scenes of a split of v1.0-mini.

    Raises:
        ValueError: it is another one; the lists of train and val are given as files.
    """
    if split not in MINI:
        raise ValueError(
            f"split {split!r} is not known here, {near_names(split, list(MINI))} Write the names of its scenes into a "
            f"file, {split}.txt, one a line (nuscenes-devkit lists them in utils/splits.py), and give that"
        )
    return MINI[split]


def read_scene_names(path: Path) -> tuple[str, ...]:
    """Returns the names in a file, one a line; empty lines and what follows a # do not count.

    Raises:
        ValueError: there are none, or the same twice.
    """
    try:
        lines = [line.partition("#")[0].strip() for line in path.read_text().splitlines()]
    except UnicodeDecodeError:
        raise ValueError(f"{path} is no text, expected names of scenes, one a line") from None
    names = [line for line in lines if line]
    problems = [] if names else ["no names"]
    problems += [f"{name!r} twice" for name in sorted({n for n in names if names.count(n) > 1})]
    problems += [f"{name!r} has spaces" for name in names if len(name.split()) > 1]
    if problems:
        raise ValueError(f"{path}: {'; '.join(problems)}, expected names of scenes such as scene-0061, one a line")
    return tuple(names)
