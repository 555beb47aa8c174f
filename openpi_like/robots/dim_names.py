"""What the names of the dims of a vector say: which of them are a position, a rotation, a gripper."""

import dataclasses
import re
from collections.abc import Sequence

_TURNED = {"theta", "rot", "rotation", "angle", "angular", "orientation", "euler", "rpy", "axisangle", "rotvec", "w"}
_QUATERNION = {"q", "quat", "quaternion"}
_LETTERS = {"roll": "rx", "pitch": "ry", "yaw": "rz", "wx": "rx", "wy": "ry", "wz": "rz"}
# Of these, roll and pitch are joints, each with an axis of its own
_BODY = {"base", "shoulder", "elbow", "forearm", "wrist", "hip", "knee", "ankle", "waist", "neck", "head", "joint"}
_SUFFIXES = {"pos", "position", "cmd", "vel", "target"}

# letters of consecutive dims -> what they are
_KINDS = {
    ("x", "y", "z"): "position",
    ("rx", "ry", "rz"): "rotation",
    ("qx", "qy", "qz", "qw"): "quaternion_xyzw",
    ("qw", "qx", "qy", "qz"): "quaternion_wxyz",
}


@dataclasses.dataclass(frozen=True)
class Group:
    """Consecutive dims that belong together, from `start` on.

    kind: "position"; "rotation" of three numbers, whose meaning their names do not tell; "quaternion_xyzw" or
    "quaternion_wxyz"; "gripper"; or "" for what is none of these, such as joints.
    """

    start: int
    size: int
    kind: str


def groups(names: Sequence[str]) -> list[Group]:
    """Returns the groups of a vector's dims, in order and without gaps; each dim of a gripper is one of its own."""
    letters, found, at = [_letter(name) for name in names], list[Group](), 0
    while at < len(names):
        known = (k for k in _KINDS if tuple(letters[at : at + len(k)]) == k)
        if "grip" in names[at].lower():
            found.append(Group(at, 1, "gripper"))
        elif (several := next(known, None)) is not None:
            found.append(Group(at, len(several), _KINDS[several]))
        elif found and not found[-1].kind:
            found[-1] = dataclasses.replace(found[-1], size=found[-1].size + 1)
        else:
            found.append(Group(at, 1, ""))
        at = found[-1].start + found[-1].size
    return found


def _letter(name: str) -> str:
    """Returns "x" of a position, "rx" of a rotation, "qx" of a quaternion, or "" where the name says none of them."""
    # Of handRotX as of hand_rot_x
    words = re.findall(r"[a-z]+", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower())
    if len(words) > 1 and words[-1] in _SUFFIXES:
        words.pop()
    if not words or _BODY.intersection(words):
        return ""
    *before, last = words
    last = _LETTERS.get(last, last)
    if last in ("x", "y", "z") and _TURNED.intersection(before):
        return f"r{last}"
    if last in ("x", "y", "z", "w") and _QUATERNION.intersection(before):
        return f"q{last}"
    return last if last in {letter for kind in _KINDS for letter in kind} else ""
