"""stub"""

from openpi_like.robots.robot import Robot

ROBOTS: dict[str, Robot] = {}
