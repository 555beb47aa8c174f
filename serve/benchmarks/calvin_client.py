"""CALVIN, driven by a policy server. Runs in CALVIN's environment, see protocol.py beside it and docs/evaluation.md.

    python serve/benchmarks/calvin_client.py --data task_ABC_D --label pi0 --out calvin_abc_d.jsonl
    python serve/benchmarks/calvin_client.py --dry-run

The user brings calvin_agent and calvin_env from their repositories, and a split of the dataset, whose validation folder
says how the scene is made. Conventions, from CALVIN (fa03f01), calvin_agent/evaluation/evaluate_policy.py and
dataset/README.md; chunks and keys from openpi's own example, examples/calvin/main.py, which it had until b5b2e11.
"""

from __future__ import annotations

import argparse
import sys
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Mapping, Sequence

import numpy as np
from benchmark_results import BenchmarkError, counted, versions
from protocol import (
    Observation,
    Simulator,
    base_parser,
    check_shapes,
    dry_run,
    parsed,
    recorded,
    run,
)

TASK = "calvin"
SEQUENCES, LENGTH = 1000, 5
"""How many there are, and subtasks of each. Fewer are always the first of these: `get_sequences(100)` makes others."""
SUBTASK_STEPS = 360  # `EP_LEN`
FINGERPRINT = 3088838289
"""Of the sequences, see `fingerprint`: with Python 3.8 and numpy 1.24 as with 3.11 and 2, whatever `num_workers` is."""
RECORDED: dict[str, tuple[tuple[int, ...], str]] = {
    "rgb_obs/rgb_static": ((200, 200, 3), "u"),
    "rgb_obs/rgb_gripper": ((84, 84, 3), "u"),
    "robot_obs": ((15,), "f"),
}
"""What is read of an observation of `PlayTableSimEnv`."""


class Calvin(Simulator):
    """The chains of CALVIN: five instructions one after the other, without a reset between them, until one fails.

    Images are as they are rendered. The state is `robot_obs`: position (m) and x, y, z angles (rad) of the tool in the
    world, width of the gripper (m), seven joints (rad), and the last command to the gripper (1 open, -1 closed).
    Actions are `rel_actions` of the dataset: fractions of 2 cm and 0.05 rad; the gripper's is made 1 (open, above 0) or
    -1, as the environment takes nothing else. An instruction is the first of its validation texts; whether it was done
    says the package's oracle, against the state in which it was given.
    """

    robots = ("calvin",)
    keys = {  # noqa: RUF012
        "base": "observation/rgb_static",
        "wrist": "observation/rgb_gripper",
        "state": "observation/state",
        "prompt": "prompt",
    }
    sizes = {"base": (200, 200), "wrist": (84, 84)}  # noqa: RUF012
    execute_steps = 5
    horizon = LENGTH * SUBTASK_STEPS

    def __init__(self, package: Any) -> None:
        """package: see `installed`."""
        self._package, self.renderer = package, package.renderer

    def tasks(self) -> dict[str, int]:
        return {TASK: SEQUENCES}

    def reset(self, task: str, seed: int) -> None:
        """Begins the chain of this number."""
        initial, self._chain = self._package.sequences[seed]
        robot, scene = self._package.initial_condition(initial)
        self._package.env.reset(robot_obs=robot, scene_obs=scene)
        self._seen = self._package.env.get_obs()
        check_shapes(self._seen, RECORDED, "CALVIN")
        self.success = self.ended = False
        self._completed = 0
        self._begin_subtask()

    def _begin_subtask(self) -> None:
        self.stage, self._steps = self._completed, 0
        self._start = self._package.env.get_info()

    def observe(self) -> Observation:
        robot = np.asarray(self._seen["robot_obs"])
        parts = np.split(robot, (3, 6, 7, 14))
        state = dict(zip(("hand", "hand_rotation", "gripper", "joints", "gripper_command"), parts))
        prompt = str(self._package.instructions[self._chain[self._completed]][0])
        images = {"base": self.frame(), "wrist": np.ascontiguousarray(self._seen["rgb_obs"]["rgb_gripper"])}
        return Observation(images, state, prompt)

    def step(self, action: np.ndarray) -> None:
        command = np.array(action, dtype=np.float64)
        command[6] = 1.0 if command[6] > 0 else -1.0
        self._seen, _, _, info = self._package.env.step(command)
        self._steps += 1
        subtask = self._chain[self._completed]
        if self._package.oracle.get_task_info_for_set(self._start, info, {subtask}):
            self._completed += 1
            self.success = self.ended = self._completed == len(self._chain)
            if not self.ended:
                self._begin_subtask()
        elif self._steps == SUBTASK_STEPS:
            self.ended = True

    def frame(self) -> np.ndarray:
        return np.ascontiguousarray(self._seen["rgb_obs"]["rgb_static"])

    def measures(self) -> dict[str, float]:
        return {"completed": float(self._completed)}

    def summary(self, lines: Sequence[Mapping[str, Any]]) -> list[str]:
        """Returns how many chains got to each length, and the mean length."""
        completed = [int(line["measures"]["completed"]) for line in lines]
        if not completed:
            return ["no episodes"]
        reached = [sum(n >= length for n in completed) for length in range(1, LENGTH + 1)]
        texts = [f"{counted(n, len(completed))}  {i + 1} in a row" for i, n in enumerate(reached)]
        return [*texts, f"mean length of {len(completed)} chains: {sum(completed) / len(completed):.3f}"]


def fingerprint(sequences: Sequence[tuple[Mapping[str, Any], Sequence[str]]]) -> int:
    """Returns a number of initial states and chains, by which evaluations can be told apart."""
    texts = [
        f"{[(name, str(initial[name])) for name in sorted(initial)]} {list(chain)}" for initial, chain in sequences
    ]
    return zlib.crc32("\n".join(texts).encode())


def installed(data: Path) -> Any:
    """Returns what is used of the packages: env, oracle, instructions, sequences, initial_condition, renderer.

    Raises:
        BenchmarkError: they are not installed, or the dataset is not there.
    """
    try:
        import calvin_agent
        import hydra
        from calvin_agent.evaluation.multistep_sequences import get_sequences
        from calvin_agent.evaluation.utils import get_env_state_for_initial_condition
        from calvin_env.envs.play_table_env import get_env
        from omegaconf import OmegaConf
    except ImportError as e:
        raise BenchmarkError(f"CALVIN is not installed here ({e}); see docs/evaluation.md, or try --dry-run") from e
    made_with = data / "validation" / ".hydra" / "merged_config.yaml"
    if not made_with.is_file():
        raise BenchmarkError(f"no {made_with}; give --data a split of CALVIN's dataset, such as task_ABC_D")
    conf = Path(str(calvin_agent.__file__)).resolve().parents[1] / "conf"
    tasks, texts = "callbacks/rollout/tasks/new_playtable_tasks.yaml", "annotations/new_playtable_validation.yaml"
    sequences = get_sequences(SEQUENCES)
    if (got := fingerprint(sequences)) != FINGERPRINT:
        print(
            f"warning: these chains have the fingerprint {got}, those of CALVIN fa03f01 {FINGERPRINT}; results "
            "of the two do not compare",
            file=sys.stderr,
        )
    return SimpleNamespace(
        env=get_env(data / "validation", show_gui=False),
        oracle=hydra.utils.instantiate(OmegaConf.load(conf / tasks)),
        instructions=OmegaConf.load(conf / texts),
        sequences=sequences,
        initial_condition=get_env_state_for_initial_condition,
        renderer=versions("pybullet"),
    )


# ---- The dry run -----------------------------------------------------------------------------------------------------


class _NoiseEnv:
    """As `PlayTableSimEnv`."""

    def __init__(self) -> None:
        self._random = np.random.RandomState(0)
        self.executed: list[Any] = []

    def get_obs(self) -> Any:
        return recorded(RECORDED, self._random)

    def reset(self, robot_obs: Any, scene_obs: Any) -> None:
        pass

    def get_info(self) -> Any:
        return len(self.executed)

    def step(self, action: Any) -> Any:
        self.executed.append(action)
        return self.get_obs(), 0, False, self.get_info()


class _NoiseOracle:
    """Every subtask takes 20 commands."""

    def get_task_info_for_set(self, start: Any, now: Any, subtasks: set[str]) -> Any:
        return subtasks if now - start >= 20 else set()


def parser() -> argparse.ArgumentParser:
    """Returns the command line."""
    p = base_parser(str(__doc__))
    p.add_argument("--data", type=Path, default=None, help="split of the dataset, the folder that has validation/")
    return p


def main() -> None:
    p = parser()
    args = parsed(p)
    if args.dry_run:
        env, chain = _NoiseEnv(), ("open_drawer", "close_drawer", "turn_on_led", "turn_off_led", "push_into_drawer")
        noise = SimpleNamespace(
            env=env,
            oracle=_NoiseOracle(),
            instructions={name: [name.replace("_", " ")] for name in chain},
            sequences=[({}, chain)],
            initial_condition=lambda initial: (np.zeros(15), np.zeros(24)),
            renderer="noise",
        )
        dry_run(Calvin(noise), env.executed, args)
        return
    if args.data is None:
        p.error("--data is needed, or --dry-run")
    run(Calvin(installed(args.data)), args)


if __name__ == "__main__":
    try:
        main()
    except BenchmarkError as e:
        raise SystemExit(f"stopped: {e}") from None
