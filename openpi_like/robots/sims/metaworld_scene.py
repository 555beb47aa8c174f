"""Meta-World's scenes with another arm: Fetch's, of gymnasium-robotics, where Sawyer's was.

Both packages move an arm the same way: a body without mass is put where the hand should be, and a weld drags the arm
along. So the arm can be exchanged while hand, fingers and objects, whose names and places the package's code relies on,
stay. Joints of objects follow nine of the robot there, as they do here: seven of the arm, and two fingers.
"""

import importlib.util
import math
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np

# Joints of the arm in rad that hold the hand over the near side of the table, where the zero of each is put: a scene
# begins at zero, and a stretched arm would swing through what stands on the table.
_START = {
    "shoulder_pan": 0.69,
    "shoulder_lift": -1.22,
    "upperarm_roll": -1.1,
    "elbow_flex": 1.96,
    "forearm_roll": 0.36,
    "wrist_flex": 1.04,
    "wrist_roll": 1.0,
}
_FETCH = "robot0:"
_FIXED = ("slide0", "slide1", "slide2", "torso_lift_joint", "head_pan_joint", "head_tilt_joint")
_LEFT_OUT = ("gripper_camera_link", "r_gripper_finger_link", "l_gripper_finger_link")
# Facing along y as Sawyer does; as far from its table, and as high, as in gymnasium-robotics.
_BASE = (0.0, 0.05, -0.4)  # m
_TURN = "0.70710678 0 0 0.70710678"


def fetch_scene(path: Path) -> str:
    """Returns the MJCF of a Meta-World scene with Fetch's arm, as one document without relative paths.

    Raises:
        ModuleNotFoundError: gymnasium-robotics is not installed.
        ValueError: the scene has no arm to exchange.
    """
    fetch = _fetch_assets()
    root = _inlined(path, path.parent)
    base = root.find(".//body[@name='base']")
    hand = root.find(".//body[@name='hand']")
    if base is None or hand is None:
        raise ValueError(f"{path}: expected a body 'base' with a body 'hand' in it, as in Meta-World 3")
    for child in list(base):
        if child.tag == "body":
            base.remove(child)
    base.set("pos", " ".join(map(str, _BASE)))
    base.set("quat", _TURN)
    base.append(_arm(fetch, hand))
    for section in ET.parse(fetch / "shared.xml").getroot():
        if section.tag in ("asset", "default"):
            root.append(_only_fetch(section))
    return ET.tostring(root, encoding="unicode")


def _fetch_assets() -> Path:
    spec = importlib.util.find_spec("gymnasium_robotics")  # finds without importing
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(
            "No module named 'gymnasium_robotics', whose Fetch this needs", name="gymnasium_robotics"
        )
    return Path(spec.submodule_search_locations[0]) / "envs" / "assets" / "fetch"


def _inlined(path: Path, directory: Path) -> ET.Element:
    """Parses a file with everything that it includes; files are named relative to `directory`, that of the scene."""
    root = ET.parse(path).getroot()
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag == "include":
                at = list(parent).index(child)
                parent.remove(child)
                for k, element in enumerate(_inlined(directory / child.attrib["file"], directory)):
                    parent.insert(at + k, element)
            elif "file" in child.attrib and not Path(child.attrib["file"]).is_absolute():
                child.set("file", str((directory / child.attrib["file"]).resolve()))
    return root


def _arm(fetch: Path, hand: ET.Element) -> ET.Element:
    """Returns Fetch, rigid but for the joints of its arm, which touches nothing, with `hand` at its end."""
    arm = ET.parse(fetch / "robot.xml").getroot().find(f"body[@name='{_FETCH}base_link']")
    assert arm is not None
    arm.set("pos", "0 0 0")
    for parent in list(arm.iter()):
        for child in list(parent):
            name = child.get("name", "").removeprefix(_FETCH)
            if child.tag in ("camera", "site") or name in (*_FIXED, *_LEFT_OUT):
                parent.remove(child)
            elif child.tag == "geom":
                child.attrib.update({"contype": "0", "conaffinity": "0", "group": "1"})
    for name, angle in _START.items():
        link = arm.find(f".//body[@name='{_FETCH}{name}_link']")
        joint = arm.find(f".//joint[@name='{_FETCH}{name}_joint']")
        assert link is not None
        assert joint is not None
        turn = math.sin(angle / 2) * np.array(joint.attrib["axis"].split(), float)
        link.set("quat", " ".join(map(str, (math.cos(angle / 2), *turn))))
        if "range" in joint.attrib:
            joint.set("range", " ".join(str(float(bound) - angle) for bound in joint.attrib["range"].split()))
    end = arm.find(f".//body[@name='{_FETCH}gripper_link']")
    assert end is not None
    hand.set("pos", "0 0 0")
    hand.set("quat", "1 0 0 0")
    end.append(hand)
    return arm


def _only_fetch(section: ET.Element) -> ET.Element:
    """Returns what of a section of assets or defaults is Fetch's own, with the files of its meshes."""
    own = ET.Element(section.tag)
    for child in section:
        if child.get("name", child.get("class", "")).startswith(_FETCH):
            if child.tag == "mesh":
                child.set("file", str(_fetch_assets().parent / "stls" / "fetch" / child.attrib["file"]))
            own.append(child)
    return own
