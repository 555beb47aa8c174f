"""Simulated robots: closed-loop evaluation, and a source of demonstrations. Needs the `sim` extra."""

import importlib

from openpi_like.config import near_names
from openpi_like.robots.sims.sim import Sim

# Module of this package and its class, imported when asked for: some simulators take a while to load.
SIMS = {"pusht": "PushTSim", "sawyer": "SawyerSim", "aloha": "AlohaSim"}


def make_sim(robot_name: str) -> Sim:
    """Returns the simulator of the robot called `robot_name`.

    Raises:
        ValueError: no simulator of that name.
        ModuleNotFoundError: the `sim` extra is not installed.
    """
    if robot_name not in SIMS:
        raise ValueError(f"no simulator of robot {robot_name!r}; {near_names(robot_name, list(SIMS))}")
    try:
        module = importlib.import_module(f"openpi_like.robots.sims.{robot_name}")
        return getattr(module, SIMS[robot_name])()
    except ModuleNotFoundError as e:
        raise ModuleNotFoundError(f"{e}; simulated robots need the `sim` extra, see the Makefile", name=e.name) from e
