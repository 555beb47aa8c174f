"""LIBERO, driven by a policy server. Runs in LIBERO's environment, see protocol.py beside it and docs/evaluation.md.

    python serve/benchmarks/libero_client.py --suite libero_spatial --label pi0 --out libero_spatial.jsonl
    python serve/benchmarks/libero_client.py --suite libero_spatial --dry-run

The user brings LIBERO (its repository, or PyPI's hf-libero) and its assets. Conventions, from openpi,
examples/libero/main.py (15a9616), and openvla-oft, experiments/robot/libero (213c5ff), which agree but for what is an
option here.
"""

from __future__ import annotations

import argparse
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from benchmark_results import BenchmarkError, versions
from protocol import (
    Observation,
    Simulator,
    axis_angle,
    base_parser,
    check_shapes,
    dry_run,
    parsed,
    recorded,
    run,
)

MAX_STEPS = {"libero_spatial": 220, "libero_object": 280, "libero_goal": 300, "libero_10": 520, "libero_90": 400}
"""Control steps of an episode by suite, without those of waiting: a little more than the longest demonstration has."""
EPISODES = 50  # of a task, each from an initial state of its own
WAIT_STEPS = 10  # in which the things fall onto the table
WAIT_ACTION = [0.0] * 6 + [-1.0]  # keep still, gripper open
RENDER_SIZE = 256  # as the training images of both were rendered
RECORDED: dict[str, tuple[tuple[int, ...], str]] = {
    "agentview_image": ((RENDER_SIZE, RENDER_SIZE, 3), "u"),
    "robot0_eye_in_hand_image": ((RENDER_SIZE, RENDER_SIZE, 3), "u"),
    "robot0_eef_pos": ((3,), "f"),
    "robot0_eef_quat": ((4,), "f"),
    "robot0_gripper_qpos": ((2,), "f"),
}
"""What is read of an observation of `OffScreenRenderEnv`, with robosuite 1.4."""


class Libero(Simulator):
    """A suite of LIBERO.

    Images are turned by 180 degrees, as the training data was. The state is the hand's position (m), its orientation as
    `axis_angle` (rad), and the two fingers (m). Actions are what the controller takes; of the gripper, -1 opens and 1
    closes. `--gripper openness` is for policies that say 1 for open and 0 for closed, as openvla and openvla-oft do:
    made -1 or 1 and turned round. An episode ends where it succeeds.
    """

    robots = ("libero",)
    keys = {  # noqa: RUF012
        "base": "observation/image",
        "wrist": "observation/wrist_image",
        "state": "observation/state",
        "prompt": "prompt",
    }
    sizes = {"base": (RENDER_SIZE, RENDER_SIZE), "wrist": (RENDER_SIZE, RENDER_SIZE)}  # noqa: RUF012
    execute_steps = 5  # openpi's; openvla-oft executes its chunks of 8

    def __init__(self, suite: str, gripper: str, seed: int, package: Any) -> None:
        """package: get_benchmark_dict, get_libero_path and OffScreenRenderEnv, as LIBERO has them; renderer.

        Raises:
            BenchmarkError: the package has no such suite.
        """
        suites = package.get_benchmark_dict()
        if suite not in suites:
            raise BenchmarkError(f"LIBERO here has the suites {', '.join(suites)}, expected {suite}")
        self._suite, self._package = suites[suite](), package
        self._gripper, self._seed, self.renderer = gripper, seed, package.renderer
        self._tasks = {self._suite.get_task(i).name: i for i in range(self._suite.n_tasks)}
        self.horizon = MAX_STEPS[suite]
        self._env: Any = None
        self._of = ""

    def tasks(self) -> dict[str, int]:
        return {name: EPISODES for name in self._tasks}

    def reset(self, task: str, seed: int) -> None:
        """Begins an episode. The random state is set every time: "seed seems to affect object positions even when using
        fixed initial state" (openpi), so that an episode is the same whatever was run before it.

        Raises:
            BenchmarkError: LIBERO's file has fewer initial states, or cannot be read.
        """
        i = self._tasks[task]
        if task != self._of:
            self._make(i)
            self._of = task
        if not seed < len(self._states):
            raise BenchmarkError(f"{task} has {len(self._states)} initial states here, expected {EPISODES}")
        np.random.seed(self._seed)  # noqa: NPY002  what LIBERO and robosuite draw from
        self._env.seed(self._seed)
        self._env.reset()
        self._seen = self._env.set_init_state(self._states[seed])
        for _ in range(WAIT_STEPS):
            self._seen, *_ = self._env.step(WAIT_ACTION)
        check_shapes(self._seen, RECORDED, "LIBERO")
        self.success = self.ended = False

    def _make(self, i: int) -> None:
        task = self._suite.get_task(i)
        try:
            self._states = self._suite.get_task_init_states(i)
        except pickle.UnpicklingError as e:
            raise BenchmarkError(
                "the initial states cannot be read: torch 2.6 and newer want weights_only=False for LIBERO's files; "
                "install an older torch, or hf-libero, which says so"
            ) from e
        if self._env is not None:
            self._env.close()
        file = Path(self._package.get_libero_path("bddl_files")) / task.problem_folder / task.bddl_file
        size = {"camera_heights": RENDER_SIZE, "camera_widths": RENDER_SIZE}
        self._env = self._package.OffScreenRenderEnv(bddl_file_name=str(file), **size)
        self._prompt = str(task.language)

    def observe(self) -> Observation:
        seen = self._seen
        state = {
            "hand": np.asarray(seen["robot0_eef_pos"]),
            "hand_rotation": axis_angle(seen["robot0_eef_quat"]),
            "fingers": np.asarray(seen["robot0_gripper_qpos"]),
        }
        return Observation(
            {"base": self.frame(), "wrist": _turned(seen["robot0_eye_in_hand_image"])}, state, self._prompt
        )

    def step(self, action: np.ndarray) -> None:
        command = np.array(action, dtype=np.float64)
        if self._gripper == "openness":
            command[6] = -1.0 if command[6] > 0.5 else 1.0
        self._seen, _, done, _ = self._env.step(command.tolist())
        self.success = self.ended = bool(done)

    def frame(self) -> np.ndarray:
        return _turned(self._seen["agentview_image"])


def _turned(image: np.ndarray) -> np.ndarray:
    """By 180 degrees: LIBERO's images are upside down, the training data's were turned round once more."""
    return np.ascontiguousarray(image[::-1, ::-1])


def installed() -> Any:
    """Returns what is used of the package.

    Raises:
        BenchmarkError: it is not installed, or was never started.
    """
    try:
        from libero.libero import benchmark, get_libero_path
        from libero.libero.envs import OffScreenRenderEnv
    except ImportError as e:
        raise BenchmarkError(f"LIBERO is not installed here ({e}); see docs/evaluation.md, or try --dry-run") from e
    except EOFError as e:
        raise BenchmarkError(
            "LIBERO asks where datasets are when it is first imported; answer it once: python -c 'import libero.libero'"
        ) from e
    return SimpleNamespace(
        get_benchmark_dict=benchmark.get_benchmark_dict,
        get_libero_path=get_libero_path,
        OffScreenRenderEnv=OffScreenRenderEnv,
        renderer=versions("libero", "hf-libero", "robosuite", "mujoco"),
    )


# ---- The dry run -----------------------------------------------------------------------------------------------------


class _NoiseEnv:
    """As `OffScreenRenderEnv`; succeeds after 30 commands."""

    executed: list[Any] = []  # noqa: RUF012

    def __init__(self, **options: Any) -> None:
        self._random, self._steps = np.random.RandomState(0), 0

    def seed(self, seed: int) -> None:
        pass

    def reset(self) -> Any:
        self._steps = 0

    def set_init_state(self, state: Any) -> Any:
        return recorded(RECORDED, self._random)

    def step(self, action: Any) -> Any:
        self._steps += 1
        self.executed.append(action)
        return recorded(RECORDED, self._random), 0.0, self._steps == WAIT_STEPS + 30, {}


class _NoiseSuite:
    n_tasks = 1

    def get_task(self, i: int) -> Any:
        return SimpleNamespace(name="some_task", language="some task", problem_folder="folder", bddl_file="file")

    def get_task_init_states(self, i: int) -> Any:
        return np.zeros((EPISODES, 10))


_NOISE = SimpleNamespace(
    get_benchmark_dict=lambda: {suite: _NoiseSuite for suite in MAX_STEPS},
    get_libero_path=lambda name: name,
    OffScreenRenderEnv=_NoiseEnv,
    renderer="noise",
)


def parser() -> argparse.ArgumentParser:
    """Returns the command line."""
    p = base_parser(str(__doc__))
    p.add_argument("--suite", choices=list(MAX_STEPS), required=True)
    p.add_argument("--gripper", choices=("command", "openness"), default="command", help="what the policy's says")
    return p


def main() -> None:
    args = parsed(parser())
    sim = Libero(args.suite, args.gripper, args.seed, _NOISE if args.dry_run else installed())
    if args.dry_run:
        dry_run(sim, _NoiseEnv.executed, args)
    else:
        run(sim, args)


if __name__ == "__main__":
    try:
        main()
    except BenchmarkError as e:
        raise SystemExit(f"stopped: {e}") from None
