"""What every simulated robot offers: to a policy the observations of the wire, to demonstrations an expert."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Shaped, UInt8

from openpi_like.config import near_names
from openpi_like.robots.robot import Robot

HELD_OUT_SEED = 10_000
"""Seeds from here on are for evaluation: demonstrations never use them, so their layouts are new to the policy."""

SECONDS_AFTER_SUCCESS = 0.2
"""What is recorded after success, so that the chunk that reaches the goal is whole."""


class SlowNoise:
    """Gaussian noise that varies slowly, for `Expert.disturb`: noise that is new at every step averages out.

    It starts at zero and grows to unit variance (an autoregressive process of first order).
    memory: correlation from one control step to the next.
    """

    def __init__(self, dims: int, memory: float) -> None:
        self._value, self._memory = np.zeros(dims), memory

    def next(self, rng: np.random.Generator) -> Float[np.ndarray, "J"]:
        """Returns the noise of the next control step, without unit."""
        fresh = rng.standard_normal(len(self._value))
        self._value = self._memory * self._value + np.sqrt(1 - self._memory**2) * fresh
        return self._value


@runtime_checkable
class Expert(Protocol):
    """A scripted demonstrator for one episode; it knows the simulator's whole state.

    doing: the subtask that the last action is part of, in words; for policies that think before they act.
    """

    doing: str

    def act(self) -> Float[np.ndarray, "*A J"]:
        """Returns the clean action for the present state: robot space, cut to the valid range, float32.

        For a robot that plans, the whole plan (A, J), see `Robot.executed`.
        """

    def disturb(self, action: Float[np.ndarray, "*A J"]) -> Float[np.ndarray, "J"]:
        """Returns what to execute instead of the clean `action`, so that recoveries are demonstrated too.

        Record the clean action and execute this one (noise injection: Laskey et al. 2017, DART).
        """


@runtime_checkable
class Sim(Protocol):
    """A simulated robot and its tasks. Simulators inherit from it, for what most have no need to say.

    robot: what it is; observations and actions are in its robot space.
    tasks: names that `reset` takes, and that programs do all of when they are told none.
    more_tasks: names that it takes, too; programs do those that they are told to.
    renderer: what draws the frames.
    max_steps: control steps after which an episode counts as failed.
    noises: standard deviations that demonstrations are disturbed with, drawn per episode; units of the action.
    success: whether the task is done; stays True until the next reset.
    failed: whether it cannot be done any more (a crash), so that there is no use in going on.
    """

    robot: Robot
    tasks: tuple[str, ...]
    renderer: str
    max_steps: int
    noises: tuple[float, ...]
    success: bool
    failed: bool = False
    more_tasks: tuple[str, ...] = ()

    def known_tasks(self) -> tuple[str, ...]:
        """Returns all names that `reset` takes."""
        return self.tasks + self.more_tasks

    def reset(self, task: str, seed: int) -> None:
        """Starts an episode. The same task and seed give the same episode; see `HELD_OUT_SEED`.

        Raises:
            ValueError: no such task, or a negative seed.
        """

    def observe(self) -> dict[str, Any]:
        """Draws the cameras and returns {"images": {name: uint8 (H, W, 3)}, "state": float32 (Ds,), "prompt": str}.

        Where the robot has `entities`, also {"entities": {slot: float32 (n, F)}}.
        """

    def step(self, action: Float[np.ndarray, "J"]) -> None:
        """Executes one action for one control step. What lies outside the valid range is cut, as a controller does.

        Raises:
            ValueError: the action has the wrong shape or is not finite.
        """

    def frame(self, size: int) -> UInt8[np.ndarray, "size size 3"]:
        """Returns a square picture of the scene for people to look at."""

    def measures(self) -> dict[str, float]:
        """Returns what is measured of the episode so far beside success, by name; here nothing."""
        return {}

    def notes(self) -> dict[str, Sequence[str] | Shaped[np.ndarray, "T ..."]]:
        """Returns what a dataset has of every step that was observed since the reset, beside the observation, by key of
        the step: texts, and numbers; here nothing."""
        return {}

    def expert(self, rng: np.random.Generator, noise: float) -> Expert:
        """Returns an expert for the episode just started, or, to correct a policy, from where it is now on.

        noise: standard deviation of what `Expert.disturb` adds, in units of the action.
        """


def prompt_of(prompts: Mapping[str, tuple[str, ...]], task: str, seed: int, robot: Robot) -> str:
    """Returns the instruction of `task`: of its wordings, the seeds take turns.

    Raises:
        ValueError: no such task, or a negative seed.
    """
    if task not in prompts:
        raise ValueError(f"robot {robot.name!r} has no task {task!r}; {near_names(task, list(prompts))}")
    if seed < 0:
        raise ValueError(f"seed {seed}, expected 0 .. {HELD_OUT_SEED - 1} for demonstrations or more for evaluation")
    return prompts[task][seed % len(prompts[task])]


def check_action(action: np.ndarray, robot: Robot) -> np.ndarray:
    """Returns `action` as float64.

    Raises:
        ValueError: it has the wrong shape or is not finite.
    """
    action = np.asarray(action, np.float64)
    if action.shape != (robot.robot_action_size,) or not np.all(np.isfinite(action)):
        raise ValueError(
            f"action of robot {robot.name!r}: got shape {action.shape} {action}, "
            f"expected {robot.robot_action_size} finite numbers"
        )
    return action
