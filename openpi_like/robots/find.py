"""Robots by name: those that we know, and those that users have written."""

import importlib
import re
import runpy
import traceback
from pathlib import Path

from openpi_like.config import near_names
from openpi_like.robots.ego_vehicle import EGO_CONTROLS
from openpi_like.robots.oxe import ROBOTS as OXE
from openpi_like.robots.representations import ROTATIONS, UNITS
from openpi_like.robots.robosuite_arms import ARMS
from openpi_like.robots.robot import Robot

# Those that do not have a file each
ROBOTS = {**OXE, **ARMS, EGO_CONTROLS.name: EGO_CONTROLS}

# What may stand in the blanks of a draft, by the name of the argument
_BLANKS = {
    "unit": f"one of {', '.join(UNITS)}",
    "rotation": f"one of {', '.join(ROTATIONS)}, or None without quotes",
    "command": "absolute (a target), delta (a change) or velocity",
    "open": "the number of an open gripper",
    "closed": "that of a closed one",
}
_BLANK = re.compile(r'\b(\w+)="\?"')

# Files of this folder that define no robot
_NO_ROBOTS = (
    "robot",
    "entities",
    "plan",
    "representations",
    "limits",
    "lerobot_fields",
    "gripper",
    "dataset_copies",
    "dim_names",
    "policy_fit",
    "find",
    "oxe_disputed",
    "oxe_fields",
)


def find_robot(name: str) -> Robot:
    """Returns a robot by its name.

    name: "sawyer" (a file of this folder that defines SAWYER), "fractal20220817_data" (a dataset of `oxe.ROBOTS`),
        "robosuite_panda" (one of `robosuite_arms.ARMS`), "oxe:FRACTAL" (an object of a file of this folder),
        "package.module:OBJECT", "robots/my_robot.py" (a file with one robot in it) or "robots/my_robot.py:OBJECT". A
        run stores the robot itself, so it needs the file no more.

    Raises:
        ValueError: there is none, or a file has several; says what there is.
    """
    if name in ROBOTS:
        return ROBOTS[name]
    if file := re.fullmatch(r"(.*\.py|[^:]*/[^:]*)(?::(\w*))?", name):
        return _robot_of_file(Path(file[1]), file[2] or "")
    files = sorted(p.stem for p in Path(__file__).parent.glob("[!_]*.py") if p.stem not in _NO_ROBOTS)
    module, _, attribute = name.partition(":") if ":" in name else (name, "", name.upper())
    if "." not in module and (":" not in name or module in files):
        module = f"openpi_like.robots.{module}"
    try:
        found = vars(importlib.import_module(module))
    except ImportError as e:
        known = [*(f for f in files if not f.startswith(("oxe", "robosuite_arms"))), *ROBOTS]
        raise ValueError(
            f"no robot {name!r} ({e}); {near_names(name, known)}; or give module:OBJECT, or a file like my_robot.py"
        ) from e
    if not isinstance(found.get(attribute), Robot):
        near = near_names(attribute, [k for k, v in found.items() if isinstance(v, Robot)])
        raise ValueError(f"{module} has no robot {attribute!r}; {near}")
    return found[attribute]


def blanks_of(text: str) -> dict[int, list[str]]:
    """Returns the arguments of a drafted robot that are still "?", by line of the file."""
    lines = {i: _BLANK.findall(line.partition("#")[0]) for i, line in enumerate(text.splitlines(), 1)}
    return {i: names for i, names in lines.items() if names}


def _robot_of_file(path: Path, attribute: str) -> Robot:
    if not path.is_file():
        beside = sorted(p.name for p in path.parent.glob("*.py")) if path.parent.is_dir() else []
        near = near_names(path.name, beside) if beside else "no Python files"
        raise ValueError(f"no robot file {path}; in {path.parent}: {near}")
    if blanks := blanks_of(path.read_text()):
        left = "\n  ".join(f"line {line}: {', '.join(names)}" for line, names in blanks.items())
        asked = {name for names in blanks.values() for name in names}
        said = "\n  ".join(f"{name}: {what}" for name, what in _BLANKS.items() if name in asked)
        raise ValueError(f'{path}: fill in every "?":\n  {left}\nexpected\n  {said}')
    try:
        found = runpy.run_path(str(path))
    except ValueError as e:  # a Robot that is not complete
        lines = [frame.lineno for frame in traceback.extract_tb(e.__traceback__) if frame.filename == str(path)]
        raise ValueError(f"{path}{f', line {lines[-1]}' if lines else ''}: {e}") from e
    robots = {k: v for k, v in found.items() if isinstance(v, Robot)}
    if not robots:
        raise ValueError(f"{path} has no robot, expected an object like MY_ROBOT = Robot(...); see data/draft_robot.py")
    if attribute and attribute not in robots:
        raise ValueError(f"{path} has no robot {attribute!r}; {near_names(attribute, list(robots))}")
    if not attribute and len(robots) > 1:
        raise ValueError(f"{path} has several robots; give one of {', '.join(f'{path}:{k}' for k in robots)}")
    return robots[attribute or next(iter(robots))]
