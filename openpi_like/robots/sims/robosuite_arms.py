"""Five arms of robosuite 1.5 (Zhu et al. 2020) at one table: the same tasks, cameras and actions for all of them.

The package's own scenes, grippers and operational space controller at 20 Hz; layouts, cameras and frames are ours.
"""

import contextlib
import functools
import importlib
import logging
import os
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8
from scipy.spatial.transform import Rotation

from openpi_like.robots.robosuite_arms import IIWA, KINOVA3, PANDA, SAWYER, UR5E
from openpi_like.robots.robot import Robot
from openpi_like.robots.sims.render import Renderer, aim, import_mujoco, make_renderer, renderer_name
from openpi_like.robots.sims.sim import Sim, check_action, prompt_of

PROMPTS = {
    "lift": ("lift the red cube", "pick up the red cube", "grasp the red block and raise it"),
    "stack": (
        "stack the red cube on the green cube",
        "put the red cube on top of the green one",
        "place the red block onto the green block",
    ),
}
# Module and class of the package, and the cubes that the task has: the first is the one that is moved.
_ENVS = {"lift": ("lift", "Lift", ("cube",)), "stack": ("stack", "Stack", ("cubeA", "cubeB"))}

_TABLE = 0.8  # m, height of its surface
# m. The package draws the first at random, up to 2.2 cm, around which Sawyer's fingers just fit.
_HALF_SIZES = {"cube": 0.02, "cubeA": 0.02, "cubeB": 0.025}
_REGION = 0.08  # m from the middle of the table, as the package has it for two cubes
_APART = 0.1  # m between two cubes, so that open fingers fit between them

_MODEL_CAMERAS = {"base": "agentview", "wrist": "robot0_eye_in_hand"}
# The package's own view shows the arm up to its shoulder, and cubes of four pixels.
_BASE_POSITION, _BASE_TARGET, _BASE_FOVY = (0.6, -0.3, 1.3), (-0.07, 0.0, 0.89), 38.0
# Meshes of Sawyer's head that are too thin to have a volume, which MuJoCo refuses from 3.3 on. They are only seen: no
# mass depends on them.
_FLAT_MESHES = ("robot0_head_1", "robot0_head_4")
# Sawyer's shoulder rubs against its base, whose shapes overlap, and hardly turns.
_OVERLAPPING = (("robot0_right_arm_base_link", "robot0_right_l0"),)


class ArmSim(Sim):
    """See `Sim`. A seed is the positions and the turns of the cubes.

    model_name: of the arm in the package. closed, opened: metres between the middles of its gripper's pads.
    """

    robot: Robot
    model_name: str
    closed: float
    opened: float
    tasks = tuple(PROMPTS)
    max_steps = 200
    noises: tuple[float, ...] = (0.0, 0.2, 0.4)

    def __init__(self) -> None:
        import_mujoco()  # before the package does
        with _undisturbed():
            importlib.import_module("robosuite")  # missing packages are to be named here, not at the first reset
        self.renderer = renderer_name()
        self.success = False
        self._envs: dict[str, Any] = {}  # building one takes up to three seconds
        self._renderers: dict[tuple[str, str, int], Renderer] = {}
        self._task, self._prompt = "", ""

    def reset(self, task: str, seed: int) -> None:
        """See `Sim.reset`."""
        self._prompt = prompt_of(PROMPTS, task, seed, self.robot)
        if task not in self._envs:
            with _undisturbed():
                self._envs[task] = _make_env(task, self.model_name)
        self._task = task
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
        bodies = [self._data.body(f"{name}_main") for name in _ENVS[self._task][2]]
        return [(b.xpos.copy(), Rotation.from_matrix(b.xmat.reshape(3, 3))) for b in bodies]

    @property
    def holds_cube(self) -> bool:
        """Whether both fingers touch the cube to move; privileged."""
        env = self._env
        cube = getattr(env, _ENVS[self._task][2][0])
        return bool(env._check_grasp(gripper=env.robots[0].gripper, object_geoms=cube))

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
        self.success = self.success or bool(self._env._check_success())

    def frame(self, size: int) -> UInt8[np.ndarray, "size size 3"]:
        """See `Sim.frame`."""
        return self._draw(_MODEL_CAMERAS["base"], size)

    def expert(self, rng: np.random.Generator, noise: float) -> "ArmExpert":
        """See `Sim.expert`."""
        return ArmExpert(self, self._task, rng, noise)

    @property
    def _env(self) -> Any:
        return self._envs[self._task]

    @property
    def _data(self) -> Any:
        return self._env.sim.data._data

    @property
    def _hand_site(self) -> int:
        return self._env.robots[0].eef_site_id["right"]

    def _place_cubes(self, rng: np.random.Generator) -> None:
        """Puts the cubes on the table, over what the package drew from NumPy's global generator."""
        names = _ENVS[self._task][2]
        places = rng.uniform(-_REGION, _REGION, (len(names), 2))
        while len(names) > 1 and np.linalg.norm(places[0] - places[1]) < _APART:
            places = rng.uniform(-_REGION, _REGION, (len(names), 2))
        for name, place, angle in zip(names, places, rng.uniform(-np.pi, np.pi, len(names)), strict=True):
            turn = [np.cos(angle / 2), 0.0, 0.0, np.sin(angle / 2)]
            self._data.joint(f"{name}_joint0").qpos[:] = [*place, _TABLE + _HALF_SIZES[name], *turn]
        self._env.sim.forward()

    def _draw(self, camera: str, size: int) -> np.ndarray:
        key = self._task, camera, size
        if key not in self._renderers:
            self._renderers[key] = make_renderer(self._env.sim.model._model, size, size, camera)
        return self._renderers[key].render(self._data)


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


_GAIN = 40.0  # of the longest step per metre
_LEAD = 2.0  # control steps: where the hand will be by itself, since it stops late
_TURN_GAIN = 4.0  # of the longest turn per radian
_OPEN, _CLOSE = -1.0, 1.0
_UP = np.array([0.0, 0.0, 1.0])
_ABOVE = 0.1 * _UP  # m, from where the hand goes down
_FINGERTIPS = 0.05  # m between the hand and the cube where the fingers begin to be beside it
_ALIGNED = (0.006, 0.02)  # m, at least and at most: how near the hand has to be before it goes down there
_CALM = 0.2  # share of the noise where fingers go around a cube, or put it down
_GRASP_STEPS = 15  # at most
_RELEASE_STEPS = 8
_CLEARANCE = 0.03  # m between the two cubes on the way


class ArmExpert:
    """Goes through waypoints around the cubes, correcting at every step; starts again if it loses the cube."""

    def __init__(self, sim: ArmSim, task: str, rng: np.random.Generator, noise: float) -> None:
        self._sim, self._rng, self._noise = sim, rng, noise
        self._rotation = sim.hand_rotation
        self._hand, self._calm, self.doing = sim.hand, False, ""
        self._actions = {"lift": self._lift, "stack": self._stack}[task]()

    def act(self) -> Float[np.ndarray, "7"]:
        """See `Expert.act`."""
        return np.clip(next(self._actions), -1.0, 1.0).astype(np.float32)

    def disturb(self, action: Float[np.ndarray, "7"]) -> Float[np.ndarray, "7"]:
        """Gaussian noise on the hand's position and orientation, less where it must fit; see `Expert.disturb`."""
        sigma = self._noise * (_CALM if self._calm else 1.0)
        noise = sigma * self._rng.standard_normal(7) * [1, 1, 1, 1, 1, 1, 0]
        return np.clip(action + noise, -1.0, 1.0).astype(np.float32)

    def _to(self, target: np.ndarray, gripper: float) -> np.ndarray:
        turn = (self._rotation * self._sim.hand_rotation.inv()).as_rotvec()
        hand = self._sim.hand
        coming = hand + _LEAD * (hand - self._hand)
        self._hand = hand
        return np.array([*_GAIN * (target - coming), *_TURN_GAIN * turn, gripper])

    def _off(self, target: np.ndarray) -> float:
        """Distance from the hand to `target`, seen from above."""
        return float(np.linalg.norm((target - self._sim.hand)[:2]))

    @property
    def _turned(self) -> float:
        """Angle in radians between the hand and how it should be."""
        return float((self._rotation * self._sim.hand_rotation.inv()).magnitude())

    def _cube(self) -> np.ndarray:
        return self._sim.cubes[0][0]

    def _grasp(self) -> Iterator[np.ndarray]:
        """Until the cube is held, or was lost."""
        self._rotation = _facing(self._sim.cubes[0][1])
        self._calm, self.doing = False, "go above the red cube"
        while self._off(self._cube()) > 0.015 or self._turned > 0.15:
            yield self._to(self._cube() + _ABOVE, _OPEN)
        self._calm, self.doing = True, "go down to the red cube"
        play = self._sim.opened - self._sim.closed - 2 * _HALF_SIZES["cube"]
        aligned = np.clip(play / 4, *_ALIGNED)
        while (height := self._sim.hand[2] - self._cube()[2]) > 0.005:
            off = self._off(self._cube())
            if off > 0.03:
                return
            wait = off > aligned and height < _FINGERTIPS  # above the cube, until the fingers fit over it
            yield self._to(self._cube() + (_FINGERTIPS if wait else 0.0) * _UP, _OPEN)
        self.doing = "grasp the red cube"
        for _ in range(_GRASP_STEPS):
            yield self._to(self._cube(), _CLOSE)
            if self._sim.holds_cube:
                return

    def _carry(self, goal: np.ndarray, near: float) -> Iterator[np.ndarray]:
        """Moves the cube to `goal`, or until it was lost."""
        while self._sim.holds_cube and np.linalg.norm(goal - self._cube()) > near:
            yield self._to(self._sim.hand + goal - self._cube(), _CLOSE)

    def _lift(self) -> Iterator[np.ndarray]:
        while True:
            yield from self._grasp()
            self._calm, self.doing = False, "raise the red cube"
            yield from self._carry(self._cube() + _ABOVE, 0.0)

    def _stack(self) -> Iterator[np.ndarray]:
        while True:
            yield from self._grasp()
            base = self._sim.cubes[1][0]
            on_top = base + (_HALF_SIZES["cubeA"] + _HALF_SIZES["cubeB"]) * _UP
            over = on_top + _CLEARANCE * _UP
            self._calm, self.doing = False, "raise the red cube"
            yield from self._carry(np.array([*self._cube()[:2], over[2]]), 0.015)
            self.doing = "bring it over the green cube"
            yield from self._carry(over, 0.01)
            self._calm, self.doing = True, "put it down on the green cube"
            yield from self._carry(on_top, 0.005)
            self.doing = "let go"
            for _ in range(_RELEASE_STEPS):
                yield self._to(self._sim.hand, _OPEN)
            rest, self.doing = self._sim.hand + _ABOVE, "go up"
            while self._sim.success:
                yield self._to(rest, _OPEN)


def _facing(cube: Rotation) -> Rotation:
    """Fingers down and flat against a cube that lies on the table, turned as little as that needs."""
    angle = cube.as_euler("zyx")[0]
    angle -= np.pi / 2 * np.round(angle / (np.pi / 2))
    return Rotation.from_euler("z", angle) * Rotation.from_matrix([[0, 1, 0], [1, 0, 0], [0, 0, -1]])


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
def _env_class(task: str) -> Any:
    """The package's class of a task, without its observables, which take a tenth of a step, and without chance."""
    module, name, _ = _ENVS[task]
    base: Any = getattr(importlib.import_module(f"robosuite.environments.manipulation.{module}"), name)

    class Env(base):
        def edit_model_xml(self, xml_str: str) -> str:
            root = ET.fromstring(super().edit_model_xml(xml_str))
            for geom in root.iter("geom"):
                cube = (geom.get("name") or "").partition("_")[0]
                if cube in _HALF_SIZES:
                    geom.set("size", " ".join([str(_HALF_SIZES[cube])] * 3))
            return ET.tostring(root, encoding="unicode")

        def _setup_observables(self) -> dict[str, Any]:
            return {}

    return Env


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


def _make_env(task: str, model_name: str) -> Any:
    from robosuite.controllers import load_composite_controller_config

    env = _env_class(task)(
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
    aim(model, _MODEL_CAMERAS["base"], _BASE_POSITION, _BASE_TARGET, _BASE_FOVY)
    return env
