"""Simulated robots: closed-loop evaluation, and a source of demonstrations; each needs an extra, see `SIMS`."""

import importlib
from typing import NamedTuple

from openpi_like.config import near_names
from openpi_like.robots.sims.sim import Sim


class _Where(NamedTuple):
    """Module of this package and its class, imported when asked for (some take a while to load); the extra it needs."""

    module: str
    name: str
    extra: str


SIMS = {
    "pusht": _Where("pusht", "PushTSim", "sim"),
    "sawyer": _Where("sawyer", "SawyerSim", "sim"),
    "metaworld_fetch": _Where("metaworld_fetch", "MetaWorldFetchSim", "sim"),
    "aloha": _Where("aloha", "AlohaSim", "sim"),
    "fetch": _Where("fetch", "FetchSim", "sim"),
    "robosuite_panda": _Where("robosuite_arms", "PandaSim", "arms"),
    "robosuite_sawyer": _Where("robosuite_arms", "SawyerSim", "arms"),
    "robosuite_ur5e": _Where("robosuite_arms", "UR5eSim", "arms"),
    "robosuite_iiwa": _Where("robosuite_arms", "IIWASim", "arms"),
    "robosuite_kinova3": _Where("robosuite_arms", "Kinova3Sim", "arms"),
    "cubes_panda": _Where("coloured_cubes", "ColouredCubesSim", "arms"),
    "ego_vehicle": _Where("ego_vehicle", "EgoVehicleSim", "driving"),
    "ego_controls": _Where("ego_vehicle", "EgoControlsSim", "driving"),
}


def make_sim(robot_name: str) -> Sim:
    """Returns the simulator of the robot called `robot_name`.

    Raises:
        ValueError: no simulator of that name.
        ModuleNotFoundError: the extra that it needs is not installed.
    """
    if robot_name not in SIMS:
        raise ValueError(f"no simulator of robot {robot_name!r}; {near_names(robot_name, list(SIMS))}")
    where = SIMS[robot_name]
    try:
        module = importlib.import_module(f"openpi_like.robots.sims.{where.module}")
        return getattr(module, where.name)()
    except ModuleNotFoundError as e:
        raise ModuleNotFoundError(
            f"{e}; the simulated robot {robot_name!r} needs the `{where.extra}` extra, see the Makefile", name=e.name
        ) from e
