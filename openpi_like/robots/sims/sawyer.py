"""Meta-World tasks (Yu et al. 2019; metaworld 3) from one camera and without privileged state."""

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from openpi_like.robots.sawyer import SAWYER
from openpi_like.robots.sims.render import Renderer, aim, import_mujoco, make_renderer, renderer_name
from openpi_like.robots.sims.sim import Sim, check_action, prompt_of

# The simulator runs at 80 Hz; an action is held for four of its steps.
_REPEAT = 4

PROMPTS = {
    "button-press-topdown": ("press the button from above",),
    "button-press": ("press the button",),
    "coffee-button": ("press the button of the coffee machine",),
    "handle-press": ("push the handle down",),
    "plate-slide": ("slide the plate into the goal",),
    "window-open": ("open the window",),
    "window-close": ("close the window",),
    "faucet-open": ("open the faucet",),
    "faucet-close": ("close the faucet",),
    "drawer-open": ("open the drawer",),
    "drawer-close": ("close the drawer",),
    "door-close": ("close the door",),
}

# Where the hand goes, what it does there, and where that is: metres from the object, and how near to it, as the hand
# slides along what it moves.
_SUBTASKS = {
    "button-press-topdown": ("go above the button", "press down", (0.0, 0.0, 0.05), 0.06),
    "button-press": ("go to the button", "press it in", (0.0, -0.05, -0.06), 0.06),
    "coffee-button": ("go to the button", "press it in", (0.0, -0.05, -0.06), 0.06),
    "handle-press": ("go above the handle", "push down", (0.0, -0.03, 0.01), 0.04),
    "plate-slide": ("go to the plate", "slide it", (0.0, -0.045, 0.055), 0.06),
    "window-open": ("go to the handle", "slide it open", (-0.03, -0.03, -0.08), 0.06),
    "window-close": ("go to the handle", "slide it shut", (0.03, -0.03, -0.08), 0.06),
    "faucet-open": ("go to the lever", "turn it open", (-0.03, 0.02, 0.025), 0.06),
    "faucet-close": ("go to the lever", "turn it shut", (0.03, 0.02, 0.025), 0.06),
    "drawer-open": ("go to the handle", "pull", (0.0, 0.0, -0.02), 0.06),
    "drawer-close": ("go to the drawer", "push it in", (0.0, -0.07, 0.0), 0.06),
    "door-close": ("go to the door", "push it shut", (-0.06, 0.17, 0.07), 0.15),
}
_CAMERA = "corner2"


class SawyerExpert:
    """The package's scripted policy of a task, made for 80 Hz, as an expert for 20 Hz.

    Holding its momentary command for four steps would make the arm swing around its path: its gains are too high for
    the delay. So its next four commands are found by simulating ahead, and their mean is the action.
    """

    def __init__(self, sim: "SawyerSim", policy: Any, rng: np.random.Generator, noise: float) -> None:
        self._sim, self._policy, self._rng, self._noise = sim, policy, rng, noise
        self.doing, self._there = "", False

    def act(self) -> Float[np.ndarray, "4"]:
        """See `Expert.act`."""
        go, act, near = self._sim.subtasks
        away = self._sim.away
        self._there = away < near or (self._there and (away < 2.5 * near or self._sim.success))
        self.doing = act if self._there else go
        return self._sim.from_package(self._sim.simulate_ahead(self._command).mean(0))

    def _command(self, observation: np.ndarray) -> np.ndarray:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it asks for up to 25 times the longest step, hence the cut
            action = self._policy.get_action(observation)
        return np.clip(action, -1.0, 1.0).astype(np.float32)

    def disturb(self, action: Float[np.ndarray, "4"]) -> Float[np.ndarray, "4"]:
        """Gaussian noise on the hand's three axes; see `Expert.disturb`."""
        noise = self._noise * self._rng.standard_normal(4) * [1, 1, 1, 0]
        return np.clip(action + noise, -1.0, 1.0).astype(np.float32)


class SawyerSim(Sim):
    """See `Sim`. A seed is a position of the object (or of the goal, where a task has one)."""

    robot = SAWYER
    tasks = tuple(PROMPTS)
    max_steps = 500 // _REPEAT  # the benchmark's own horizon
    noises: tuple[float, ...] = (0.0, 0.15, 0.3)
    # Position, target and field of view of the camera. The package's own are upside down or show goals of one pixel;
    # this one looks from the front right.
    view: tuple[tuple[float, float, float], tuple[float, float, float], float] = (
        (0.75, -0.05, 0.75),
        (0.0, 0.68, 0.12),
        45.0,
    )

    def __init__(self) -> None:
        self.renderer = renderer_name()
        self.success = False
        self.privileged_observation = np.zeros(0)
        self._envs: dict[str, Any] = {}  # building one takes half a second
        self._renderers: dict[tuple[str, int], Renderer] = {}
        self._task, self._prompt = "", ""

    def reset(self, task: str, seed: int) -> None:
        """See `Sim.reset`."""
        self._prompt = prompt_of(PROMPTS, task, seed, self.robot)
        if task not in self._envs:
            self._envs[task] = self._make_env(task)
        env = self._envs[task]
        env.seed(seed)
        self.privileged_observation, _ = env.reset()
        self._task, self.success = task, False

    def observe(self) -> dict[str, Any]:
        """See `Sim.observe`."""
        camera = self.robot.cameras[0]
        return {
            "images": {camera.name: self.frame(camera.height or 0)},
            "state": self.privileged_observation[:4].astype(np.float32),
            "prompt": self._prompt,
        }

    def to_package(self, action: Float[np.ndarray, "4"]) -> Float[np.ndarray, "4"]:
        """Returns an action in robot space as the package has it; `from_package` is the other way round."""
        return action

    def from_package(self, action: Float[np.ndarray, "4"]) -> Float[np.ndarray, "4"]:
        """See `to_package`."""
        return action

    def step(self, action: Float[np.ndarray, "4"]) -> None:
        """See `Sim.step`."""
        action = self.to_package(np.clip(check_action(action, self.robot), -1.0, 1.0).astype(np.float32))
        for _ in range(_REPEAT):
            self.privileged_observation, _, _, _, info = self._envs[self._task].step(action)
            self.success = self.success or bool(info["success"])

    @property
    def subtasks(self) -> tuple[str, str, float]:
        """Where the hand goes, what it does there, and within how many metres of the place it does that."""
        go, act, _, near = _SUBTASKS[self._task]
        return go, act, near

    @property
    def away(self) -> float:
        """How far the hand is from the place where it does what the task is, in metres; privileged."""
        hand, thing = self.privileged_observation[:3], self.privileged_observation[4:7]
        return float(np.linalg.norm(hand - thing - _SUBTASKS[self._task][2]))

    def simulate_ahead(self, command: Callable[[np.ndarray], np.ndarray]) -> Float[np.ndarray, "steps 4"]:
        """Returns what `command` (privileged observation -> action) would do at 80 Hz for one control step.

        The simulation is put back to where it was.
        """
        import mujoco

        env, observation, actions = self._envs[self._task], self.privileged_observation, []
        kept = {name: getattr(env, name) for name in ("curr_path_length", "_prev_obs", "_last_stable_obs")}
        state = np.empty(mujoco.mj_stateSize(env.model, mujoco.mjtState.mjSTATE_INTEGRATION))
        mujoco.mj_getState(env.model, env.data, state, mujoco.mjtState.mjSTATE_INTEGRATION)
        for _ in range(_REPEAT):
            actions.append(command(observation))
            observation = env.step(actions[-1])[0]
        mujoco.mj_setState(env.model, env.data, state, mujoco.mjtState.mjSTATE_INTEGRATION)
        mujoco.mj_forward(env.model, env.data)
        for name, value in kept.items():
            setattr(env, name, value)
        return np.stack(actions)

    def frame(self, size: int) -> UInt8[np.ndarray, "size size 3"]:
        """See `Sim.frame`."""
        env = self._envs[self._task]
        if (self._task, size) not in self._renderers:
            self._renderers[self._task, size] = make_renderer(env.model, size, size, _CAMERA)
        return self._renderers[self._task, size].render(env.data)

    def expert(self, rng: np.random.Generator, noise: float) -> SawyerExpert:
        """See `Sim.expert`."""
        from metaworld.policies import ENV_POLICY_MAP

        policy: Any = ENV_POLICY_MAP[f"{self._task}-v3"]
        return SawyerExpert(self, policy(), rng, noise)

    def _make_env(self, task: str) -> Any:
        import_mujoco()  # before the package does
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecations inside the packages
            env = self._build(task)
        # The package draws a new layout from `env.seed` at each reset only if both are set; it has no call for that.
        env.seeded_rand_vec, env._freeze_rand_vec = True, False
        aim(env.model, _CAMERA, *self.view)
        return env

    def _build(self, task: str) -> Any:
        """Returns the package's environment of a task."""
        from metaworld.env_dict import ALL_V3_ENVIRONMENTS_GOAL_OBSERVABLE

        make: Any = ALL_V3_ENVIRONMENTS_GOAL_OBSERVABLE[f"{task}-v3-goal-observable"]
        return make(seed=0)
