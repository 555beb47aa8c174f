"""What of an observation a server asks for: it may see fewer cameras and less of a state than a robot has."""

import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Int64

from openpi_like.robots.robot import Robot


def state_places(asked: list[Any], robot: Robot) -> Int64[np.ndarray, "n"]:
    """Returns which numbers of a robot's state a server asks for. asked: name, size, unit of fields, of its handshake.

    Raises:
        ValueError: it asks for a field that the robot does not have.
    """
    ends = dict(zip((f.name for f in robot.state), itertools.accumulate(f.size for f in robot.state), strict=True))
    sizes = {f.name: f.size for f in robot.state}
    if sum(size for _, size, _ in asked) == robot.robot_state_size:  # all of it, whatever its fields were called
        return np.arange(robot.robot_state_size)
    if unknown := [f"{name}:{size}" for name, size, _ in asked if sizes.get(name) != size]:
        raise ValueError(
            f"the server asks for the state {', '.join(unknown)} of {robot.name!r}, which has "
            f"{', '.join(f'{name}:{size}' for name, size in sizes.items())}; serve a policy of this robot"
        )
    places = [np.arange(ends[name] - size, ends[name]) for name, size, _ in asked]
    return np.concatenate([np.zeros(0, np.int64), *places])


def asked_for(observation: Mapping[str, Any], about: Mapping[str, Any], robot: Robot) -> dict[str, Any]:
    """Returns what of an observation of a robot its server takes, with the robot's name.

    about: what the handshake says of the robot.
    """
    taken = {
        "robot": robot.name,
        "images": {name: image for name, image in observation["images"].items() if name in about["cameras"]},
        "state": observation["state"][state_places(about["state"], robot)],
        "prompt": observation["prompt"],
    }
    slots = about.get("entities") or {}
    return taken | ({"entities": {name: observation["entities"][name] for name in slots}} if slots else {})
