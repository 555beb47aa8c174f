"""SimplerEnv, driven by a policy server. Runs in SimplerEnv's environment, see protocol.py beside it and
docs/evaluation.md.

    python serve/benchmarks/simpler_env_client.py --setup widowx --label pi0 --out widowx.jsonl
    python serve/benchmarks/simpler_env_client.py --setup google_robot --dry-run

The user brings SimplerEnv and ManiSkill2_real2sim, from their repositories with their assets. Conventions, from
SimplerEnv (4ab7178), simpler_env/policies/octo/octo_model.py and evaluation/maniskill2_evaluator.py; of the state,
which those do not use, from open-pi-zero, src/agent/env_adapter/simpler.py.
"""

from __future__ import annotations

import argparse
import math
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
from simpler_scenes import SCENES

CAMERAS = {"widowx": "3rd_view_camera", "google_robot": "overhead_camera"}
RECORDED: dict[str, dict[str, tuple[tuple[int, ...], str]]] = {
    "widowx": {
        "image/3rd_view_camera/rgb": ((480, 640, 3), "u"),
        "agent/qpos": ((8,), "f"),
        "agent/base_pose": ((7,), "f"),
    },
    "google_robot": {
        "image/overhead_camera/rgb": ((512, 640, 3), "u"),
        "agent/qpos": ((11,), "f"),
        "agent/base_pose": ((7,), "f"),
    },
}
"""What is read of an observation in mode "rgbd". `base_pose`: position (m), quaternion w, x, y, z, in the world.

The hand's pose is asked of the environment (`tcp`): scenes with drawers do not have it in their observations.
"""
FINGERS = {"widowx": (slice(-2, None), 0.015, 0.037), "google_robot": (slice(-4, -2), 1.3, 0.0)}
"""Of the joints: where the two fingers are, and their values closed and open (limits of the robots' URDF)."""
TOP_DOWN = np.array([[0.0, 0.0, 1.0], [0.0, 1.0, 0.0], [-1.0, 0.0, 0.0]])
"""Bridge tells the WidowX's orientation from that of a gripper which points down (bridge_data_robot,
widowx_controller.py, `default_rot`)."""
REPEATS = 15  # control steps for which the Google robot's gripper goes on once it was told to move
MOVES = 0.5  # what a gripper's wish has to change by to be one


class StickyGripper:
    """The Google robot's gripper: told to move, it does for `REPEATS` steps, whatever is said meanwhile.

    watch: with what a wish is compared. "last" (SimplerEnv): with that of the step before, so that a policy that closes
    little by little never closes. "moved" (the client of SimplerEnv-OpenVLA for openpi, "fix a bug"): with the one it
    moved to last.
    """

    def __init__(self, watch: str) -> None:
        self._watch = watch
        self._before: float | None = None
        self._command, self._done = 0.0, 0

    def __call__(self, openness: float) -> float:
        """Returns the command: 1 closes, -1 opens, 0 does nothing. openness: the policy's wish, 1 open, 0 closed."""
        change = 0.0 if self._before is None else self._before - openness
        starts = abs(change) > MOVES and self._done == 0
        if self._before is None or self._watch == "last" or starts:
            self._before = openness
        if starts:
            self._command = change
        if not starts and self._done == 0:
            return change
        self._done = (self._done + 1) % REPEATS
        return self._command


class SimplerEnv(Simulator):
    """One of the two robots of SimplerEnv, visual matching.

    Actions are the hand's change (m), its turn (roll, pitch, yaw about fixed axes, rad; sent on as a rotation vector),
    and the gripper's wish: 1 open, 0 closed; of our robot `fractal` -1 open, 1 closed. WidowX: made 1 (open) or -1.
    The Google robot: `StickyGripper`. The state of WidowX is Bridge's: position in the robot's frame (m), roll, pitch,
    yaw from `TOP_DOWN`, openness; of the Google robot that of fractal20220817_data: position, quaternion x, y, z, w,
    closedness. An episode always has all of its steps; what counts is the success of the last one, as in SimplerEnv's
    evaluator. `measures` has whether it succeeded at any step, which other evaluators report.
    """

    squash = True  # Bridge's images are 256 x 256 of a camera of 480 x 640
    execute_steps = 4  # of SimplerEnv-OpenVLA's client for openpi; SimplerEnv's own policies average chunks instead

    def __init__(self, setup: str, watch: str, seed: int, package: Any) -> None:
        """setup: "widowx" or "google_robot". watch: see `StickyGripper`. package: see `installed`."""
        google = setup == "google_robot"
        state = "state" if google else "hand+hand_rotation+pad+gripper"
        self.robots = ("fractal",) if google else ("bridge", "widowx")
        self.keys = {"base": "observation/primary_image", state: "observation/state", "prompt": "prompt"}
        self.sizes = {"base": (256, 320) if google else (256, 256)}  # of the datasets' images
        self._setup, self._google, self._watch, self._seed = setup, google, watch, seed
        self._package, self._built, self.renderer = package, "", package.renderer
        self._env: Any = None

    def tasks(self) -> dict[str, int]:
        return {name: len(scene.starts) for name, scene in SCENES.items() if scene.robot == self._setup}

    def reset(self, task: str, seed: int) -> None:
        """Begins an episode from one of the published layouts, see simpler_scenes.py."""
        start, self.horizon = SCENES[task].starts[seed], SCENES[task].steps
        if repr(start.build) != self._built:
            if self._env is not None:
                self._env.close()
            build = {**start.build, "rgb_overlay_path": f"{self._package.assets}/{start.build['rgb_overlay_path']}"}
            self._env, self._built = self._package.build(**build), repr(start.build)
        options = {name: dict(values) for name, values in start.options.items()}  # environments write into it
        self._seen, _ = self._env.reset(seed=self._seed + seed, options=options)
        check_shapes(self._seen, RECORDED[self._setup], "SimplerEnv")
        self._gripper = StickyGripper(self._watch)
        self.stage = self._instruction()
        self.success = self._ever = self.ended = False
        self._stats: dict[str, Any] = {}

    def _instruction(self) -> str:
        return str(self._env.unwrapped.get_language_instruction())

    def observe(self) -> Observation:
        agent, tool = self._seen["agent"], self._env.unwrapped.tcp.pose
        base, hand = np.asarray(agent["base_pose"], np.float64), np.concatenate([tool.p, tool.q]).astype(np.float64)
        inverse = base[3:] * np.array([1.0, -1.0, -1.0, -1.0])
        position = _matrix(inverse) @ (hand[:3] - base[:3])
        turn = _product(inverse, hand[3:])
        where, closed, opened = FINGERS[self._setup]
        openness = float(np.clip((np.mean(agent["qpos"][where]) - closed) / (opened - closed), 0.0, 1.0))
        if self._google:
            turn = turn if turn[0] >= 0 else -turn
            rotation, gripper = np.roll(turn, -1), 1.0 - openness
        else:
            rotation, gripper = _euler(_matrix(turn) @ TOP_DOWN.T), openness
        state = {"hand": position, "hand_rotation": rotation, "gripper": np.array([gripper])}
        return Observation({"base": self.frame()}, state, self.stage)

    def step(self, action: np.ndarray) -> None:
        openness = float(action[6])
        if self._google and self.ours:
            openness = (1.0 - openness) / 2.0
        gripper = self._gripper(openness) if self._google else (1.0 if openness > 0.5 else -1.0)
        command = np.concatenate([action[:3], rotation_vector(action[3:6]), [gripper]])
        self._seen, _, done, truncated, info = self._env.step(command)
        self.success, self.ended = bool(done), bool(truncated)
        self._ever = self._ever or self.success
        self._stats = info.get("episode_stats") or {}
        if (said := self._instruction()) != self.stage:  # the next part of the task: as a new episode for the policy
            self.stage, self._gripper = said, StickyGripper(self._watch)

    def frame(self) -> np.ndarray:
        return np.ascontiguousarray(self._seen["image"][CAMERAS[self._setup]]["rgb"][..., :3])

    def measures(self) -> dict[str, float]:
        found = {name: float(x) for name, x in self._stats.items() if isinstance(x, (bool, int, float, np.generic))}
        return {"success_at_any_step": float(self._ever), **found}


def rotation_vector(rpy: np.ndarray) -> np.ndarray:
    """Returns roll, pitch, yaw about the fixed axes x, y, z (rad) as a rotation vector (rad)."""
    halves = np.asarray(rpy, np.float64) / 2
    x, y, z = (np.concatenate([[math.cos(h)], math.sin(h) * axis]) for h, axis in zip(halves, np.eye(3)))
    return axis_angle(np.roll(_product(z, _product(y, x)), -1))


def _product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Of quaternions w, x, y, z."""
    return np.concatenate([[a[0] * b[0] - a[1:] @ b[1:]], a[0] * b[1:] + b[0] * a[1:] + np.cross(a[1:], b[1:])])


def _matrix(quaternion: np.ndarray) -> np.ndarray:
    """Of a unit quaternion w, x, y, z."""
    w, x, y, z = quaternion
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
        ]
    )


def _euler(m: np.ndarray) -> np.ndarray:
    """Roll, pitch, yaw about the fixed axes x, y, z."""
    return np.array(
        [
            math.atan2(m[2, 1], m[2, 2]),
            math.atan2(-m[2, 0], math.hypot(m[0, 0], m[1, 0])),
            math.atan2(m[1, 0], m[0, 0]),
        ]
    )


def installed() -> Any:
    """Returns what is used of the packages: `build` makes an environment, `assets` is their folder of assets; renderer.

    Raises:
        BenchmarkError: they are not installed.
    """
    try:
        from mani_skill2_real2sim import ASSET_DIR
        from simpler_env.utils.env.env_builder import build_maniskill2_env
    except ImportError as e:
        raise BenchmarkError(f"SimplerEnv is not installed here ({e}); see docs/evaluation.md, or try --dry-run") from e
    return SimpleNamespace(build=build_maniskill2_env, assets=ASSET_DIR, renderer=versions("sapien"))


# ---- The dry run -----------------------------------------------------------------------------------------------------

_EXECUTED: list[Any] = []


class _NoiseEnv:
    """As the environments; its instruction changes after 10 commands, it ends in success."""

    def __init__(self, env_name: str, robot: str, max_episode_steps: int, **options: Any) -> None:
        self.unwrapped = self
        self.tcp = SimpleNamespace(pose=SimpleNamespace(p=np.ones(3), q=np.full(4, 0.5)))
        self._table = RECORDED["google_robot" if robot.startswith("google") else "widowx"]
        self._random, self._steps, self._most = np.random.RandomState(0), 0, max_episode_steps

    def _look(self) -> Any:
        seen = recorded(self._table, self._random)
        seen["agent"]["base_pose"][3:] = 0.5
        return seen

    def get_language_instruction(self) -> str:
        return "open the drawer" if self._steps < 10 else "put it into the drawer"

    def reset(self, seed: int, options: Any) -> Any:
        self._steps = 0
        return self._look(), {}

    def step(self, action: Any) -> Any:
        self._steps += 1
        _EXECUTED.append(action)
        ended = self._steps == self._most
        return self._look(), 0.0, ended, ended, {"episode_stats": {"grasped": True}}


def parser() -> argparse.ArgumentParser:
    """Returns the command line."""
    p = base_parser(str(__doc__))
    p.add_argument("--setup", choices=list(RECORDED), required=True, help="the robot")
    p.add_argument("--gripper", choices=("last", "moved"), default="last", help="Google robot: see StickyGripper")
    return p


def main() -> None:
    args = parsed(parser())
    noise = SimpleNamespace(build=_NoiseEnv, assets="assets", renderer="noise")
    sim = SimplerEnv(args.setup, args.gripper, args.seed, noise if args.dry_run else installed())
    if args.dry_run:
        dry_run(sim, _EXECUTED, args)
    else:
        run(sim, args)


if __name__ == "__main__":
    try:
        main()
    except BenchmarkError as e:
        raise SystemExit(f"stopped: {e}") from None
