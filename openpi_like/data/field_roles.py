"""Which fields of a step are what a robot observes of itself, and which its actions: by their keys, in every layout.

RLDS     observation/state, observation/joints, action, action/world_vector
LeRobot  observation.state, action; or plainly state, joint_position, actions
HDF5     observations/qpos, action; obs/robot0_eef_pos, actions
"""

import re

# Last parts of keys of vectors that are all of the state, or of the action: the other fields repeat their numbers.
WHOLE = ("state", "proprio", "qpos", "action", "actions")
# Words of a plain name, one that is in no group, that make it a state.
_STATE_WORDS = {
    *("state", "states", "proprio", "qpos", "qvel", "joint", "joints", "gripper", "eef", "ee", "tcp", "pose"),
    *("position", "velocity", "effort", "torque", "cartesian"),
}
_NO_STATE_WORDS = {"action", "actions", "command", "target", "next", "is", "mask", "embedding"}


def last(key: str) -> str:
    """Returns the last part of a key: "state" of observation/state and of observation.state."""
    return re.split(r"[/.]", key)[-1]


def is_action(key: str) -> bool:
    return re.match(r"actions?(_dict)?\b", key) is not None


def in_observation(key: str) -> bool:
    """Returns whether a field is in the group of what is observed."""
    return re.match(r"(observations?|obs)[/.]", key) is not None


def is_state(key: str) -> bool:
    """Returns whether a numeric field is observed: it is in that group, or has a plain name that says so."""
    words = set(re.split(r"[^a-z]+", key.lower()))
    plain = re.search(r"[/.]", key) is None and words & _STATE_WORDS and not words & _NO_STATE_WORDS
    return in_observation(key) or bool(plain)


def is_instruction(key: str) -> bool:
    """Returns whether a text says what to do, by its key."""
    return "language" in key or "instruction" in key or last(key) in ("task", "subtask")
