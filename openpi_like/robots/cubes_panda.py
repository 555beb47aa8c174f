"""The Panda of `openpi_like.robots.robosuite_arms` in front of three cubes, where only the words say what to do."""

import dataclasses

from openpi_like.robots.robosuite_arms import PANDA

CUBES_PANDA = dataclasses.replace(PANDA, name="cubes_panda")
