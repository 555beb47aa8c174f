"""The robot for a copy of its dataset that stores pictures in another way than the published one."""

import dataclasses
from collections.abc import Collection

from openpi_like.config import near_names
from openpi_like.robots.robot import Robot


def with_channel_order(robot: Robot, order: str) -> Robot:
    """Returns the robot for a copy of its dataset whose images all have this channel order, "rgb" or "bgr".

    Some published datasets hold images with swapped channels, and copies of them that have been corrected go around
    under the same name; which one a directory is can only be seen in its pixels.
    """
    return dataclasses.replace(robot, cameras=tuple(dataclasses.replace(c, channel_order=order) for c in robot.cameras))


def with_upside_down(robot: Robot, names: Collection[str]) -> Robot:
    """Returns the robot for a copy of its dataset that stores the pictures of these cameras upside down, and no others.

    Raises:
        ValueError: it has no such camera.
    """
    cameras = [c.name for c in robot.cameras]
    problems = [f"no camera {name!r}; {near_names(name, cameras)}" for name in names if name not in cameras]
    if problems:
        raise ValueError(f"Robot {robot.name!r}: " + "; ".join(problems))
    turned = (dataclasses.replace(c, upside_down=c.name in names) for c in robot.cameras)
    return dataclasses.replace(robot, cameras=tuple(turned))
