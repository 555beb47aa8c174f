"""Meta-World tasks (Yu et al. 2019; metaworld 3) from one camera and without privileged state."""

import collections
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from openpi_like.robots.sawyer import SAWYER
from openpi_like.robots.sims.metaworld_tasks import FIRST, MT50, TASKS
from openpi_like.robots.sims.render import Renderer, aim, import_mujoco, make_renderer, renderer_name
from openpi_like.robots.sims.sim import Sim, check_action, prompt_of

# The simulator runs at 80 Hz; an action is held for four of its steps.
_REPEAT = 4
_KEPT_ENVS = 12  # the tasks that programs do when they are told none
_CAMERA = "corner2"
# Balls at goals that nothing else shows: a colour that no scene has, and radii in metres of some pixels. The one below
# a goal in the air is of a site that the package leaves at the robot's base and never uses.
_GOAL_COLOUR, _GOAL_RADIUS = (1.0, 0.0, 1.0, 1.0), 0.03
_BELOW, _BELOW_COLOUR, _BELOW_RADIUS = "basesite", (1.0, 1.0, 0.0, 1.0), 0.02
# An expert presses down in vain whose hand stays within so many metres of height, while it is told to go down by more
# than so much, for so many control steps; then it rises for so many. Of the noise it keeps a share where it must fit.
_STILL, _DOWN, _PRESSED, _RISEN = 0.01, -0.1, 14, 5
_CALM = 0.25


class SawyerExpert:
    """The package's scripted policy of a task, made for 80 Hz, as an expert for 20 Hz.

    Holding its momentary command for four steps would make the arm swing around its path: its gains are too high for
    the delay. So its next four commands are found by simulating ahead, and their mean is the action.

    Where fingers close before they are around what they should hold, the policy presses them down on it for ever: it
    takes what is near for held. This expert then opens them, rises and lets the policy begin again. There it is also
    disturbed less, as a hand that must fit has no room for more.
    """

    def __init__(self, sim: "SawyerSim", policy: Any, rng: np.random.Generator, noise: float) -> None:
        self._sim, self._policy, self._rng, self._noise = sim, policy, rng, noise
        self.doing, self._there = "", False
        # Heights of the hand in m and commands along z, of the steps before; steps to go of beginning again.
        self._pressing, self._again = collections.deque[tuple[float, float]](maxlen=_PRESSED), 0

    def act(self) -> Float[np.ndarray, "4"]:
        """See `Expert.act`."""
        go, act, near = self._sim.subtasks
        away = self._sim.away
        self._there = away < near or (self._there and (away < 2.5 * near or self._sim.success))
        if self._sim.held and self._presses_in_vain():
            self._pressing.clear()
            self._again = _RISEN
        if self._again:
            self._again -= 1
            self._there, self.doing = False, go
            return self._sim.from_package(np.array([0.0, 0.0, 1.0, -1.0], np.float32))
        self.doing = act if self._there else go
        action = self._sim.simulate_ahead(self._command).mean(0)
        self._pressing.append((float(self._sim.privileged_observation[2]), float(action[2])))
        return self._sim.from_package(action)

    def _presses_in_vain(self) -> bool:
        if len(self._pressing) < _PRESSED:
            return False
        heights, commands = zip(*self._pressing, strict=True)
        return max(heights) - min(heights) < _STILL and max(commands) < _DOWN

    def _command(self, observation: np.ndarray) -> np.ndarray:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it asks for up to 25 times the longest step, hence the cut
            action = self._policy.get_action(observation)
        return np.clip(action, -1.0, 1.0).astype(np.float32)

    def disturb(self, action: Float[np.ndarray, "4"]) -> Float[np.ndarray, "4"]:
        """Gaussian noise on the hand's three axes, less where it must fit; see `Expert.disturb`."""
        sigma = self._noise * (_CALM if self._there and self._sim.held else 1.0)
        noise = sigma * self._rng.standard_normal(4) * [1, 1, 1, 0]
        return np.clip(action + noise, -1.0, 1.0).astype(np.float32)


class SawyerSim(Sim):
    """See `Sim`. A seed is a position of the object (or of the goal, where a task has one)."""

    robot = SAWYER
    tasks = FIRST
    more_tasks = tuple(task for task in MT50 if task not in FIRST)
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
        self._envs: dict[str, Any] = {}  # building one takes half a second, and each has 0.15 GB with its renderers
        self._renderers: dict[tuple[str, int], Renderer] = {}
        self._task, self._prompt = "", ""

    def reset(self, task: str, seed: int) -> None:
        """See `Sim.reset`."""
        prompts = {known: TASKS[known].prompts for known in self.known_tasks()}
        self._prompt = prompt_of(prompts, task, seed, self.robot)
        if task not in self._envs and len(self._envs) == _KEPT_ENVS:
            longest_ago = next(iter(self._envs))
            del self._envs[longest_ago]
            self._renderers = {key: r for key, r in self._renderers.items() if key[0] != longest_ago}
        env = self._envs[task] = self._envs.pop(task, None) or self._make_env(task)
        env.seed(seed)
        self.privileged_observation, _ = env.reset()
        self._task, self.success = task, False
        self._bring_up_to_date(env)

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
        task = TASKS[self._task]
        return task.go, task.act, task.near

    @property
    def held(self) -> bool:
        """Whether fingers must fit around what the task is about."""
        return TASKS[self._task].held

    @property
    def away(self) -> float:
        """How far the hand is from the place where it does what the task is, in metres; privileged."""
        task, hand = TASKS[self._task], self.privileged_observation[:3]
        thing = self.privileged_observation[36:39] if task.goal else self.privileged_observation[4:7]
        return float(np.linalg.norm(hand - thing - task.offset))

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

    def _bring_up_to_date(self, env: Any) -> None:
        """Puts everything where the layout just drawn has it, and marks the goal.

        The package moves bodies and goals without computing where that puts what is on them, so that the first picture
        and observation would show some of them where they were before.
        """
        import mujoco

        task, goal, model, data = TASKS[self._task], env._get_pos_goal(), env.model, env.data
        if task.ball is not None:
            _put_ball(model, env._target_site_config[0][0], np.add(goal, [0, 0, task.ball]), _GOAL_RADIUS, _GOAL_COLOUR)
        mujoco.mj_forward(model, data)
        if task.foot:
            height = mujoco.mj_ray(model, data, goal, np.array([0.0, 0.0, -1.0]), None, 1, -1, np.zeros(1, np.int32))
            _put_ball(model, _BELOW, np.subtract(goal, [0, 0, height]), _BELOW_RADIUS, _BELOW_COLOUR)
            mujoco.mj_forward(model, data)
        now = env._get_curr_obs_combined_no_goal()
        self.privileged_observation = np.concatenate([now, now, goal])

    def _build(self, task: str) -> Any:
        """Returns the package's environment of a task."""
        from metaworld.env_dict import ALL_V3_ENVIRONMENTS_GOAL_OBSERVABLE

        make: Any = ALL_V3_ENVIRONMENTS_GOAL_OBSERVABLE[f"{task}-v3-goal-observable"]
        return make(seed=0)


def _put_ball(
    model: Any, site: str, position: Float[np.ndarray, "3"], radius: float, colour: tuple[float, float, float, float]
) -> None:
    """Makes a ball of a site: at `position` in the world, in metres."""
    import mujoco

    index = model.site(site).id
    model.site_bodyid[index], model.site_sameframe[index] = 0, 0
    model.site_type[index], model.site_size[index] = mujoco.mjtGeom.mjGEOM_SPHERE, radius
    model.site_group[index], model.site_rgba[index] = 0, colour
    model.site_pos[index] = position
