"""The table of robosuite 1.5 (Zhu et al. 2020) with an arm and cubes: what our tasks at it have in common.

The package's own arms, grippers and operational space controller at 20 Hz; layouts, cameras and frames are ours.
"""

import contextlib
import functools
import importlib
import logging
import os
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, UInt8
from scipy.spatial.transform import Rotation

from openpi_like.robots.robot import Robot
from openpi_like.robots.sims.render import Renderer, aim, import_mujoco, make_renderer, renderer_name
from openpi_like.robots.sims.sim import Expert, Sim, check_action, prompt_of

TABLE = 0.8
"""Height of the table's surface, in metres."""

_MODEL_CAMERAS = {"base": "agentview", "wrist": "robot0_eye_in_hand"}
# Meshes of Sawyer's head that are too thin to have a volume, which MuJoCo refuses from 3.3 on. They are only seen: no
# mass depends on them.
_FLAT_MESHES = ("robot0_head_1", "robot0_head_4")
# Sawyer's shoulder rubs against its base, whose shapes overlap, and hardly turns.
_OVERLAPPING = (("robot0_right_arm_base_link", "robot0_right_l0"),)


class Cube(NamedTuple):
    """half_size: in metres. colour: as instructions call it."""

    half_size: float
    colour: str


class View(NamedTuple):
    """Where the base camera is and what it looks at, in metres; its vertical field of view in degrees."""

    position: tuple[float, float, float]
    target: tuple[float, float, float]
    fovy: float


class Scene(NamedTuple):
    """What stands on the table.

    name: of the scene. env_class: returns the package's class of it, or one that is like those. cubes: by their names
    in the model.
    """

    name: str
    env_class: Callable[[], Any]
    cubes: Mapping[str, Cube]


class TableSim(Sim):
    """See `Sim`. A seed is the positions and the turns of the cubes.

    model_name: of the arm in the package. closed, opened: metres between the middles of its gripper's pads. prompts:
    task -> wordings. view: of the base camera. Subclasses say which scene a task has, which cubes it is about, where
    cubes lie, and when it is done.
    """

    robot: Robot
    model_name: str
    closed: float
    opened: float
    prompts: Mapping[str, tuple[str, ...]]
    view: View
    max_steps = 200
    noises: tuple[float, ...] = (0.0, 0.2, 0.4)

    def __init__(self) -> None:
        import_mujoco()  # before the package does
        with _undisturbed():
            importlib.import_module("robosuite")  # missing packages are to be named here, not at the first reset
        self.renderer = renderer_name()
        self.success = False
        self._envs: dict[str, Any] = {}  # by scene; building one takes up to three seconds
        self._renderers: dict[tuple[str, str, int], Renderer] = {}
        self._task, self._prompt = "", ""
        self._scene = Scene("", object, {})

    def reset(self, task: str, seed: int) -> None:
        """See `Sim.reset`."""
        self._prompt = prompt_of(self.prompts, task, seed, self.robot)
        self._task, self._scene = task, self._scene_of(task)
        if self._scene.name not in self._envs:
            with _undisturbed():
                self._envs[self._scene.name] = _make_env(self._scene.env_class(), self.model_name, self.view)
        self._env.reset()
        self._place_cubes(np.random.default_rng(seed))
        self.success = False

    @property
    def hand(self) -> Float[np.ndarray, "3"]:
        """Position between the fingers, in metres."""
        return self._data.site_xpos[self._hand_site].copy()

    @property
    def hand_rotation(self) -> Rotation:
        """Orientation of the hand: z along the fingers, which close along y."""
        return Rotation.from_matrix(self._data.site_xmat[self._hand_site].reshape(3, 3))

    @property
    def cubes(self) -> list[tuple[np.ndarray, Rotation]]:
        """Positions in metres and orientations of the cubes, the one to move first; privileged."""
        return [self._pose(name) for name in self._names_of(self._task)]

    @property
    def kinds(self) -> list[Cube]:
        """Sizes and colours of the cubes, in the order of `cubes`."""
        return [self._scene.cubes[name] for name in self._names_of(self._task)]

    @property
    def holds_cube(self) -> bool:
        """Whether both fingers touch the cube to move; privileged."""
        return self._holds(self._names_of(self._task)[0])

    @property
    def opening(self) -> float:
        """Share of the full distance between the fingers."""
        geoms = self._env.robots[0].gripper["right"].important_geoms
        left, right = (self._data.geom(geoms[f"{side}_fingerpad"][0]).xpos for side in ("left", "right"))
        share = (np.linalg.norm(left - right) - self.closed) / (self.opened - self.closed)
        return float(np.clip(share, 0.0, 1.0))

    def observe(self) -> dict[str, Any]:
        """See `Sim.observe`."""
        state = [*self.hand, *self.hand_rotation.as_quat(), self.opening]
        return {
            "images": {c.name: self._draw(_MODEL_CAMERAS[c.name], c.height or 0) for c in self.robot.cameras},
            "state": np.array(state, np.float32),
            "prompt": self._prompt,
        }

    def step(self, action: Float[np.ndarray, "7"]) -> None:
        """See `Sim.step`."""
        self._env.step(np.clip(check_action(action, self.robot), -1.0, 1.0))
        self._judge()

    def frame(self, size: int) -> UInt8[np.ndarray, "size size 3"]:
        """See `Sim.frame`."""
        return self._draw(_MODEL_CAMERAS["base"], size)

    def expert(self, rng: np.random.Generator, noise: float) -> Expert:
        """See `Sim.expert`."""
        raise NotImplementedError

    def _scene_of(self, task: str) -> Scene:
        raise NotImplementedError

    def _names_of(self, task: str) -> tuple[str, ...]:
        """Returns the names of the cubes in the model, the one to move first, then the one to put it on."""
        raise NotImplementedError

    def _places(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Returns where the scene's cubes lie: (n, 2) metres from the middle of the table, and (n,) radians."""
        raise NotImplementedError

    def _judge(self) -> None:
        """Says whether the task is done, or cannot be done any more."""
        raise NotImplementedError

    @property
    def _env(self) -> Any:
        return self._envs[self._scene.name]

    @property
    def _data(self) -> Any:
        return self._env.sim.data._data

    @property
    def _hand_site(self) -> int:
        return self._env.robots[0].eef_site_id["right"]

    def _pose(self, name: str) -> tuple[np.ndarray, Rotation]:
        body = self._data.body(f"{name}_main")
        return body.xpos.copy(), Rotation.from_matrix(body.xmat.reshape(3, 3))

    def _holds(self, name: str) -> bool:
        env = self._env
        return bool(env._check_grasp(gripper=env.robots[0].gripper, object_geoms=getattr(env, name)))

    def _place_cubes(self, rng: np.random.Generator) -> None:
        """Puts the cubes on the table, over what the package drew from NumPy's global generator."""
        places, angles = self._places(rng)
        for (name, cube), place, angle in zip(self._scene.cubes.items(), places, angles, strict=True):
            turn = [np.cos(angle / 2), 0.0, 0.0, np.sin(angle / 2)]
            self._data.joint(f"{name}_joint0").qpos[:] = [*place, TABLE + cube.half_size, *turn]
        self._env.sim.forward()

    def _draw(self, camera: str, size: int) -> np.ndarray:
        key = self._scene.name, camera, size
        if key not in self._renderers:
            self._renderers[key] = make_renderer(self._env.sim.model._model, size, size, camera)
        return self._renderers[key].render(self._data)


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Around the package's own code, which logs what is of no use here, and changes where MuJoCo is to draw."""
    logger, before = logging.getLogger("robosuite_logs"), os.environ.get("MUJOCO_GL")

    def is_error(record: logging.LogRecord) -> bool:
        return record.levelno > logging.WARNING

    logger.addFilter(is_error)
    try:
        yield
    finally:
        logger.removeFilter(is_error)
        if before is None:
            os.environ.pop("MUJOCO_GL", None)
        else:
            os.environ["MUJOCO_GL"] = before


@functools.cache
def _robot_model(name: str) -> str:
    """Registers a model of the arm that loads with a current MuJoCo; returns its name."""
    from robosuite.models.robots import manipulators
    from robosuite.robots import register_robot_class

    base = getattr(manipulators, name)

    def init(self: Any, idn: int = 0) -> None:
        base.__init__(self, idn)
        for mesh in self.asset.iter("mesh"):
            if mesh.get("name") in _FLAT_MESHES:
                mesh.set("inertia", "shell")
        for body1, body2 in _OVERLAPPING:
            if self.worldbody.find(f".//body[@name='{body2}']") is not None:
                ET.SubElement(self.contact, "exclude", body1=body1, body2=body2)

    model = type(base)(f"Loadable{name}", (base,), {"__init__": init})  # its metaclass registers it by this name
    return register_robot_class("FixedBaseRobot")(model).__name__


def _make_env(env_class: Any, model_name: str, view: View) -> Any:
    from robosuite.controllers import load_composite_controller_config

    env = env_class(
        robots=_robot_model(model_name),
        controller_configs=load_composite_controller_config(robot=model_name),
        initialization_noise=None,
        use_camera_obs=False,
        has_offscreen_renderer=False,
        renderer="mujoco",  # the other one would open a window
        control_freq=20,
        ignore_done=True,
        hard_reset=False,  # which would build the scene anew
    )
    model = env.sim.model._model
    # Drawn is what belongs to the first three groups: not the shapes that collide, nor the marks on the hand.
    model.geom_group[model.geom_group == 0] = 3
    model.site_group[:] = 3
    aim(model, _MODEL_CAMERAS["base"], *view)
    return env
