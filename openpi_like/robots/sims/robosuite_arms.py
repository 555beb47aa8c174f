"""Five arms of robosuite 1.5 (Zhu et al. 2020) at one table: the same tasks, cameras and actions for all of them."""

import functools
import importlib
import xml.etree.ElementTree as ET
from typing import Any

import numpy as np

from openpi_like.robots.robosuite_arms import IIWA, KINOVA3, PANDA, SAWYER, UR5E
from openpi_like.robots.sims.robosuite_expert import CubeExpert
from openpi_like.robots.sims.robosuite_table import Cube, Scene, TableSim, View

PROMPTS = {
    "lift": ("lift the red cube", "pick up the red cube", "grasp the red block and raise it"),
    "stack": (
        "stack the red cube on the green cube",
        "put the red cube on top of the green one",
        "place the red block onto the green block",
    ),
}

_REGION = 0.08  # m from the middle of the table, as the package has it for two cubes
_APART = 0.1  # m between two cubes, so that open fingers fit between them


@functools.cache
def _env_class(task: str) -> Any:
    """The package's class of a task, without its observables, which take a tenth of a step, and without chance."""
    base: Any = getattr(importlib.import_module(f"robosuite.environments.manipulation.{task}"), task.title())

    class Env(base):
        def edit_model_xml(self, xml_str: str) -> str:
            root, cubes = ET.fromstring(super().edit_model_xml(xml_str)), _SCENES[task].cubes
            for geom in root.iter("geom"):
                if (cube := cubes.get((geom.get("name") or "").partition("_")[0])) is not None:
                    geom.set("size", " ".join([str(cube.half_size)] * 3))
            return ET.tostring(root, encoding="unicode")

        def _setup_observables(self) -> dict[str, Any]:
            return {}

    return Env


# The package draws the size of the first at random, up to 2.2 cm, around which Sawyer's fingers just fit.
_CUBES = {"lift": {"cube": Cube(0.02, "red")}, "stack": {"cubeA": Cube(0.02, "red"), "cubeB": Cube(0.025, "green")}}
_SCENES = {task: Scene(task, functools.partial(_env_class, task), cubes) for task, cubes in _CUBES.items()}


class ArmSim(TableSim):
    """See `TableSim`. Every task has a scene of its own, the package's."""

    prompts = PROMPTS
    tasks = tuple(PROMPTS)
    # The package's own view shows the arm up to its shoulder, and cubes of four pixels.
    view = View((0.6, -0.3, 1.3), (-0.07, 0.0, 0.89), 38.0)

    def expert(self, rng: np.random.Generator, noise: float) -> CubeExpert:
        """See `Sim.expert`."""
        return CubeExpert(self, self._task, rng, noise)

    def _scene_of(self, task: str) -> Scene:
        return _SCENES[task]

    def _names_of(self, task: str) -> tuple[str, ...]:
        return tuple(_SCENES[task].cubes)

    def _places(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        count = len(self._scene.cubes)
        places = rng.uniform(-_REGION, _REGION, (count, 2))
        while count > 1 and np.linalg.norm(places[0] - places[1]) < _APART:
            places = rng.uniform(-_REGION, _REGION, (count, 2))
        return places, rng.uniform(-np.pi, np.pi, count)

    def _judge(self) -> None:
        self.success = self.success or bool(self._env._check_success())


class PandaSim(ArmSim):
    """Franka Emika Panda with its own parallel gripper."""

    robot, model_name, closed, opened = PANDA, "Panda", 0.008, 0.086


class SawyerSim(ArmSim):
    """Rethink Sawyer with its own parallel gripper."""

    robot, model_name, closed, opened = SAWYER, "Sawyer", 0.021, 0.067


class UR5eSim(ArmSim):
    """UR5e with a Robotiq 2F-85."""

    robot, model_name, closed, opened = UR5E, "UR5e", 0.015, 0.11


class IIWASim(ArmSim):
    """KUKA LBR iiwa with a Robotiq 2F-140."""

    robot, model_name, closed, opened = IIWA, "IIWA", 0.022, 0.129


class Kinova3Sim(ArmSim):
    """Kinova Gen3 with a Robotiq 2F-85."""

    robot, model_name, closed, opened = KINOVA3, "Kinova3", 0.015, 0.11
