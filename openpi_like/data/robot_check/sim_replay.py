"""Do the recorded actions, executed in a simulator of the robot, lead through the recorded states?"""

import dataclasses

import numpy as np

from openpi_like.data.robot_check.findings import Curves, Finding
from openpi_like.data.robot_check.robot_sample import RobotSample
from openpi_like.robots.robot import Robot
from openpi_like.robots.sims import SIMS, make_sim
from openpi_like.robots.sims.sim import Sim

_TASK, _SEED, _NOISE = "episode_metadata/task", "episode_metadata/seed", "episode_metadata/noise"
_OFF = 0.2  # of the range of the states: what is executed once more ends where it ended, but for rounding
_PANELS = 8  # dims plotted


@dataclasses.dataclass(frozen=True)
class SimReplay:
    """See the module. Episodes have to say their task and seed, as those of `data/make_demos.py` do."""

    name: str = "Replay in a simulator"
    question: str = "Do the recorded actions lead through the recorded states once more, from the same layout on?"

    def findings(self, sample: RobotSample) -> list[Finding]:
        """See `Check.findings`."""
        robot = sample.robot
        if robot.name not in SIMS:
            return [Finding("found", "", f"there is no simulator of robot {robot.name!r}")]
        if not sample.simulate:
            return [Finding("found", "", "not asked for")]
        if missing := _missing(sample):
            return [Finding("found", "", f"cannot be replayed: {missing}")]
        try:
            sim = make_sim(robot.name)
        except ModuleNotFoundError as e:
            return [Finding("found", "", f"not replayed: {e}")]
        if _layout(sim.robot) != _layout(robot):
            return [Finding("found", "", "not replayed: the robot's fields are not those of its simulator")]
        episodes = _undisturbed(sample)[: sample.simulate]
        if not len(episodes):
            return [Finding("found", "", "not replayed: what was executed had noise, which the actions do not have")]
        return [_replay(sim, sample, int(e)) for e in episodes]


def _layout(robot: Robot) -> list[tuple[str, int, int]]:
    return [(f.key, f.start, f.size) for f in (*robot.state, *robot.action)]


def _missing(sample: RobotSample) -> str:
    index = sample.index
    known = {**index.episode_columns, **index.episode_texts}
    missing = [key for key in (_TASK, _SEED) if key not in known]
    missing += [f"commands of {f.name!r}" for f in sample.robot.action if f.name not in sample.commands]
    return f"the data have no {', '.join(missing)}" if missing else ""


def _episodes_of(sample: RobotSample) -> np.ndarray:
    """The episode of the split that each one of the sample is."""
    first = sample.sample.steps[sample.starts[:-1]]
    return np.searchsorted(np.asarray(sample.index.episode_start), first, side="right") - 1


def _undisturbed(sample: RobotSample) -> np.ndarray:
    """Episodes of the sample in which the recorded action is what was executed."""
    noise = sample.index.episode_columns.get(_NOISE)
    episodes = np.arange(len(sample.lengths))
    return episodes if noise is None else episodes[noise[_episodes_of(sample)] == 0]


def _replay(sim: Sim, sample: RobotSample, e: int) -> Finding:
    index, rows, episode = sample.index, sample.episode(e), int(_episodes_of(sample)[e])
    task = index.episode_texts[_TASK].table[int(index.episode_texts[_TASK].ids[episode])]
    seed = int(index.episode_columns[_SEED][episode])
    recorded = np.concatenate([sample.states[f.name][rows] for f in sample.robot.state], axis=1)
    actions = np.concatenate([sample.commands[f.name][rows] for f in sample.robot.action], axis=1)
    sim.reset(task, seed)
    states = []
    for action in actions:
        states.append(sim.observe()["state"])
        sim.step(action.astype(np.float32))
    simulated = np.stack(states).astype(np.float64)
    span = np.ptp(recorded, axis=0)
    off = np.abs(simulated - recorded).max(axis=0) / np.maximum(span, max(0.01 * span.max(), 1e-6))
    worst = int(off.argmax())
    names = [n for f in sample.robot.state for n in f.dim_names]
    at = np.arange(len(recorded), dtype=float)
    curves = tuple(
        Curves(names[d], {"recorded": (at, recorded[:, d]), "simulated": (at, simulated[:, d])}, "step")
        for d in np.argsort(-span)[:_PANELS]
    )
    done = "and succeeds" if sim.success else "but does not succeed"
    message = f"{task}, seed {seed}: at most {off[worst]:.1%} of its range off, in {names[worst]}; {done}"
    if off[worst] < _OFF and sim.success:
        return Finding("found", f"episode {episode}", message, "", curves)
    advice = "the actions are not what was executed: look for a shift in time, noise, or another order of the fields"
    return Finding("suspect", f"episode {episode}", message, advice, curves)
