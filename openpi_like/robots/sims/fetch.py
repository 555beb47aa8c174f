"""Fetch tasks of gymnasium-robotics (Plappert et al. 2018), seen by two cameras: goals are red balls, not numbers."""

import contextlib
import importlib
import io
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from openpi_like.robots.fetch import FETCH
from openpi_like.robots.sims.render import Renderer, aim, import_mujoco, make_renderer, renderer_name
from openpi_like.robots.sims.sim import Sim, check_action, prompt_of

PROMPTS = {
    "reach": ("move the hand to the red ball", "go to the red ball", "touch the red ball with the gripper"),
    "push": ("push the block to the red ball", "slide the block over the table onto the red ball", "push the block"),
    "lift": ("lift the block", "pick up the block", "grasp the block and raise it"),
    "pick-and-place": (
        "pick up the block and bring it to the red ball",
        "lift the block to the red ball",
        "grasp the block and hold it at the red ball",
    ),
}
_ENVS = {
    "reach": ("reach", "MujocoFetchReachEnv"),
    "push": ("push", "MujocoFetchPushEnv"),
    "lift": ("pick_and_place", "MujocoFetchPickAndPlaceEnv"),
    "pick-and-place": ("pick_and_place", "MujocoFetchPickAndPlaceEnv"),
}

_MODEL_CAMERAS = {"base": "external_camera_0", "wrist": "gripper_camera_rgb"}
# The package's own views are from afar and sideways, and from between the fingers. These look at the table from the
# front, and from before the hand down to the fingertips (the hand's x axis is down and its z axis to the front).
_BASE_POSITION, _BASE_TARGET, _BASE_FOVY = (2.0, 0.65, 1.15), (1.36, 0.75, 0.5), 32.0
_WRIST_POSITION, _WRIST_TARGET, _WRIST_FOVY = (-0.08, 0.0, 0.1), (0.13, 0.0, 0.02), 95.0
_BALL_RADIUS = 0.03  # m; with the package's 2 cm a goal is two pixels wide
_BLOCK_COLOUR = (0.1, 0.3, 0.9, 1.0)  # the package's is that of the fingers
_LIFTED = 0.08  # m above the table
_FINGER_OPEN = 0.05  # m, of one finger


class FetchSim(Sim):
    """See `Sim`. A seed is a position of the block and of the goal; what is solved at the start is left out."""

    robot = FETCH
    tasks = tuple(PROMPTS)
    max_steps = 150  # three times the benchmark's own horizon: demonstrations are slow, and disturbed
    noises: tuple[float, ...] = (0.0, 0.1, 0.2)

    def __init__(self) -> None:
        self._mujoco = import_mujoco()  # before the package does
        _import("gymnasium_robotics")  # missing packages are to be named here, not at the first reset
        self.renderer = renderer_name()
        self.success = False
        self._envs: dict[str, tuple[Any, np.ndarray]] = {}  # with the state in which each was made
        self._renderers: dict[tuple[str, str, int], Renderer] = {}
        self._task, self._prompt = "", ""

    def reset(self, task: str, seed: int) -> None:
        """See `Sim.reset`."""
        self._prompt = prompt_of(PROMPTS, task, seed, self.robot)
        mujoco = self._mujoco
        everything = mujoco.mjtState.mjSTATE_INTEGRATION
        if task not in self._envs:
            env = _make_env(task)
            state = np.empty(mujoco.mj_stateSize(env.model, everything))
            mujoco.mj_getState(env.model, env.data, state, everything)
            self._envs[task] = env, state
        self._task = task
        env, state = self._envs[task]
        # The package's own reset leaves the mocap body, which pulls the hand, where it was.
        mujoco.mj_setState(env.model, env.data, state, everything)
        env.reset(seed=seed)
        while self._at_goal():
            env.reset()
        env._render_callback()  # puts the ball where the goal is
        self.success = False

    @property
    def hand(self) -> np.ndarray:
        """(3,) position between the fingers, in metres."""
        return self._env.data.site("robot0:grip").xpos.copy()

    @property
    def block(self) -> np.ndarray:
        """(3,) position of the block, in metres; privileged."""
        return self._env.data.site("object0").xpos.copy()

    @property
    def goal(self) -> np.ndarray:
        """(3,) position of the goal, in metres; privileged."""
        return self._env.goal.copy()

    def observe(self) -> dict[str, Any]:
        """See `Sim.observe`."""
        finger = self._env.data.joint("robot0:r_gripper_finger_joint").qpos[0]
        return {
            "images": {c.name: self._draw(_MODEL_CAMERAS[c.name], c.height or 0) for c in self.robot.cameras},
            "state": np.array([*self.hand, finger / _FINGER_OPEN], np.float32),
            "prompt": self._prompt,
        }

    def step(self, action: Float[np.ndarray, "4"]) -> None:
        """See `Sim.step`."""
        self._env.step(np.clip(check_action(action, self.robot), -1.0, 1.0))
        self.success = self.success or self._at_goal()

    def frame(self, size: int) -> UInt8[np.ndarray, "size size 3"]:
        """See `Sim.frame`."""
        return self._draw(_MODEL_CAMERAS["base"], size)

    def expert(self, rng: np.random.Generator, noise: float) -> "FetchExpert":
        """See `Sim.expert`."""
        return FetchExpert(self, self._task, rng, noise)

    @property
    def _env(self) -> Any:
        return self._envs[self._task][0]

    def _at_goal(self) -> bool:
        if self._task == "lift":
            return bool(self.block[2] > self._env.height_offset + _LIFTED)
        achieved = self.hand if self._task == "reach" else self.block
        return bool(np.linalg.norm(achieved - self.goal) < self._env.distance_threshold)

    def _draw(self, camera: str, size: int) -> np.ndarray:
        key = self._task, camera, size
        if key not in self._renderers:
            self._renderers[key] = make_renderer(self._env.model, size, size, camera)
        return self._renderers[key].render(self._env.data)


_GAIN = 10.0  # of the longest step per metre
_SPEED = 0.3  # of the longest step: as fast as people move a robot they teach, 0.4 m/s
_OPEN, _CLOSE = 1.0, -1.0
_ABOVE = np.array([0.0, 0.0, 0.1])  # m, from where the hand goes down
_GRASP_STEPS = 4
_BEHIND = 0.075  # m between hand and block before a push


class FetchExpert:
    """Goes through waypoints around the block and the goal, correcting at every step; starts again if it loses them."""

    def __init__(self, sim: FetchSim, task: str, rng: np.random.Generator, noise: float) -> None:
        self._sim, self._rng, self._noise = sim, rng, noise
        self.doing = ""
        moves = {"reach": self._reach, "push": self._push, "lift": self._lift, "pick-and-place": self._pick_and_place}
        self._actions = moves[task]()

    def act(self) -> Float[np.ndarray, "4"]:
        """See `Expert.act`."""
        action = next(self._actions)
        action[:3] = np.clip(action[:3], -_SPEED, _SPEED)
        return action.astype(np.float32)

    def disturb(self, action: Float[np.ndarray, "4"]) -> Float[np.ndarray, "4"]:
        """Gaussian noise on the hand's three axes; see `Expert.disturb`."""
        noise = self._noise * self._rng.standard_normal(4) * [1, 1, 1, 0]
        return np.clip(action + noise, -1.0, 1.0).astype(np.float32)

    def _to(self, target: np.ndarray, gripper: float) -> np.ndarray:
        return np.append(_GAIN * (target - self._sim.hand), gripper)

    def _off(self, target: np.ndarray) -> float:
        """Distance from the hand to `target`, seen from above."""
        return float(np.linalg.norm((target - self._sim.hand)[:2]))

    def _reach(self) -> Iterator[np.ndarray]:
        self.doing = "go to the ball"
        while True:
            yield self._to(self._sim.goal, _CLOSE)

    def _lift(self) -> Iterator[np.ndarray]:
        return self._grasp_and_bring(lambda: self._sim.block + _ABOVE, "raise the block")

    def _pick_and_place(self) -> Iterator[np.ndarray]:
        return self._grasp_and_bring(lambda: self._sim.goal, "bring the block to the ball")

    def _grasp_and_bring(self, goal: Callable[[], np.ndarray], then: str) -> Iterator[np.ndarray]:
        sim = self._sim
        while True:
            self.doing = "go above the block"
            while self._off(sim.block) > 0.015:
                yield self._to(sim.block + _ABOVE, _OPEN)
            self.doing = "go down to the block"
            while np.linalg.norm(sim.block - sim.hand) > 0.012 and self._off(sim.block) < 0.03:
                yield self._to(sim.block, _OPEN)
            self.doing = "grasp the block"
            for _ in range(_GRASP_STEPS):
                yield self._to(sim.block, _CLOSE)
            self.doing = then
            while np.linalg.norm(sim.block - sim.hand) < 0.06:
                yield self._to(sim.hand + goal() - sim.block, _CLOSE)

    def _push(self) -> Iterator[np.ndarray]:
        sim = self._sim
        while True:
            start = self._push_start()
            self.doing = "go behind the block"
            while self._off(start) > 0.015:
                yield self._to(start + _ABOVE, _CLOSE)
            self.doing = "go down behind the block"
            while sim.hand[2] > start[2] + 0.01 and self._off(start) < 0.05:
                yield self._to(start, _CLOSE)
            self.doing = "push the block to the ball"
            while True:
                way = (sim.goal - sim.block)[:2]
                left = float(np.linalg.norm(way))
                if left < 0.02:
                    yield np.array([0.0, 0.0, 0.0, _CLOSE])
                    continue
                along = way / left
                offset = (sim.hand - sim.block)[:2]
                aside = offset - (offset @ along) * along  # how far the hand is beside the line through the block
                if np.linalg.norm(aside) > 0.025 and left > 0.05:
                    break  # it would turn the block: begin another push
                move = 6.0 * (min(left, 0.08) * along - 2.0 * aside)
                yield np.array([*move, _GAIN * (sim.block[2] - sim.hand[2]), _CLOSE])

    def _push_start(self) -> np.ndarray:
        """Behind the block, seen from the goal."""
        way = (self._sim.goal - self._sim.block)[:2]
        return self._sim.block - np.append(_BEHIND * way / max(float(np.linalg.norm(way)), 1e-6), 0.0)


def _import(module: str) -> Any:
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):  # where the package greets
        warnings.simplefilter("ignore")  # deprecations inside the packages
        return importlib.import_module(module)


def _make_env(task: str) -> Any:
    module, name = _ENVS[task]
    env = getattr(_import(f"gymnasium_robotics.envs.fetch.{module}"), name)()
    aim(env.model, _MODEL_CAMERAS["base"], _BASE_POSITION, _BASE_TARGET, _BASE_FOVY)
    wrist = _MODEL_CAMERAS["wrist"]
    aim(env.model, wrist, _WRIST_POSITION, _WRIST_TARGET, _WRIST_FOVY, body="robot0:gripper_link")
    env.model.site("target0").size[:] = _BALL_RADIUS
    mocap = env.model.body("robot0:mocap")  # drawn by the package as beams through the scene
    env.model.geom_rgba[mocap.geomadr[0] : mocap.geomadr[0] + mocap.geomnum[0], 3] = 0.0
    if env.has_object:
        env.model.geom("object0").matid[:] = -1
        env.model.geom("object0").rgba[:] = _BLOCK_COLOUR
    return env
