"""By which statistics a run normalises a robot: its own, those of the checkpoint that it starts from, or both.

A config says which (`TrainConfig.statistics`), and a checkpoint holds the numbers themselves. A new way is a class with
what `Statistics` has.
"""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Protocol, runtime_checkable

from openpi_like.config import near_names
from openpi_like.data.blend import blend
from openpi_like.data.normalize import Normalization
from openpi_like.data.stats import load_normalization
from openpi_like.robots.robot import ActionField, Robot, StateField
from openpi_like.train.checkpoints.contract import CheckpointError, Contract


@runtime_checkable
class Statistics(Protocol):
    """How a run comes by the statistics of its robots.

    needs_own: those of its own data are needed. needs_start: so are those of the checkpoint that it starts from.
    """

    @property
    def needs_own(self) -> bool: ...
    @property
    def needs_start(self) -> bool: ...

    def choose(self, robot: Robot, own: Callable[[], Normalization], start: Contract | None) -> Normalization:
        """Returns the statistics of a robot. own: reads those of the run's data. start: of the checkpoint.

        Raises:
            CheckpointError: those of the checkpoint do not fit the robot, or there are none; lists every reason.
        """
        ...


@dataclasses.dataclass(frozen=True)
class Own:
    """Those of the run's own data, as data/stats.py writes them."""

    needs_own = True
    needs_start = False

    def choose(self, robot: Robot, own: Callable[[], Normalization], start: Contract | None) -> Normalization:
        """See `Statistics`."""
        return own()


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """Those of the checkpoint that the run starts from, as they are: what its weights mean by a number stays so.

    robot: name of the checkpoint's robot; None is the one of the same name.
    """

    robot: str | None = None
    needs_own = False
    needs_start = True

    def choose(self, robot: Robot, own: Callable[[], Normalization], start: Contract | None) -> Normalization:
        """See `Statistics`."""
        return pretrained(robot, self.robot, start)


@dataclasses.dataclass(frozen=True)
class Blended:
    """Both, for few episodes, by how many frames each has: see `openpi_like.data.blend.blend` for the formula.

    Own statistics have the weight w = n / (n + min(n0, prior)), for n frames of the run's data and n0 of the
    checkpoint's (`prior` where it does not know them). So those of the checkpoint count for `prior` frames at most, and
    count for little once there are many of one's own: with the default and 200 frames an episode, 5 episodes have a
    weight of 0.09, 50 of 0.5, 1,000 of 0.95.
    robot: as `Pretrained.robot`.
    """

    prior: int = 10_000
    robot: str | None = None
    needs_own = True
    needs_start = True

    def __post_init__(self) -> None:
        if self.prior < 1:
            raise ValueError(f"Blended: prior={self.prior}, expected at least 1 frame; Own() takes no other statistics")

    def choose(self, robot: Robot, own: Callable[[], Normalization], start: Contract | None) -> Normalization:
        """See `Statistics`."""
        before, ours = pretrained(robot, self.robot, start), own()
        w = self.weight(ours.state.count, before.state.count)
        return dataclasses.replace(
            ours, state=blend(ours.state, before.state, w), action=blend(ours.action, before.action, w)
        )

    def weight(self, own: int, before: int) -> float:
        """Returns the weight of own statistics, for so many frames of each; 0 of the checkpoint's are not known."""
        return own / (own + (min(before, self.prior) or self.prior))


def pretrained(robot: Robot, name: str | None, start: Contract | None) -> Normalization:
    """Returns the statistics that a checkpoint has for a robot. name: that of its robot there, None for the same.

    Raises:
        CheckpointError: see `Statistics.choose`.
    """
    if start is None:
        raise CheckpointError(
            f"robot {robot.name!r}: published weights come without statistics; use Own(), or make a run of them and "
            "their norm_stats.json first (train/convert.py --to run), and start from that"
        )
    robots = {r.name: r for r in start.robots}
    theirs = robots.get(name or robot.name)
    if theirs is None:
        wanted = name or robot.name
        raise CheckpointError(
            f"the checkpoint has no statistics of robot {wanted!r}; {near_names(wanted, list(robots))}; name the one "
            "that is like it, Pretrained(robot=...) (of train/finetune.py: --statistics-of NAME), or use Own() "
            "(--statistics own)"
        )
    problems = misfits(theirs, robot)
    if problems:
        raise CheckpointError(
            f"the checkpoint's statistics of {theirs.name!r} do not fit robot {robot.name!r}:\n  "
            + "\n  ".join(problems)
            + "\nuse Own() (of train/finetune.py: --statistics own)"
        )
    chosen = start.normalizations[theirs.name]
    return dataclasses.replace(chosen, robot=robot.name, mode=robot.normalization, plan=robot.plan)


def misfits(theirs: Robot, ours: Robot) -> list[str]:
    """Returns why the numbers of one robot, in model space, are not those of another."""
    problems = []
    if theirs.normalization != ours.normalization:
        problems.append(f"normalization={ours.normalization!r}, theirs is {theirs.normalization!r}")
    scales = [None if r.plan is None else r.plan.scale for r in (ours, theirs)]
    if scales[0] != scales[1] or (scales[0] == "per_step" and ours.action_horizon != theirs.action_horizon):
        of = [f"{r.plan} of {r.action_horizon} entries" for r in (ours, theirs)]
        problems.append(f"plan={of[0]}, theirs is {of[1]}")
    fields: tuple[tuple[str, tuple[StateField, ...], tuple[StateField, ...]], ...] = (
        ("state", theirs.state, ours.state),
        ("action", theirs.action, ours.action),
    )
    for what, before, now in fields:
        names = [f.name for f in before], [f.name for f in now]
        if names[0] != names[1]:
            problems.append(
                f"{what} fields {', '.join(names[1]) or 'none'}; theirs are {', '.join(names[0]) or 'none'}"
            )
            continue
        for a, b in zip(before, now, strict=True):
            mine, its = _meaning(b, ours), _meaning(a, theirs)
            problems += [
                f"{what} {b.name!r}: {key} {value}, theirs is {its[key]}"
                for key, value in mine.items()
                if key in its and value != its[key]  # where it is not, the command is another, or relative to another
            ]
    return problems


def _meaning(field: StateField, robot: Robot) -> dict[str, object]:
    """Returns what the numbers of a field depend on."""
    meaning: dict[str, object] = {
        "size": field.model_size,
        "unit": field.model_unit,
        "rotation": field.model_rotation or field.rotation,
        "gripper": field.gripper is not None,
    }
    if isinstance(field, ActionField):
        meaning |= {"command": field.command, "relative_to": field.relative_to}
        if field.command == "delta":
            meaning["rate [Hz]"] = robot.control_hz  # a change is one per control step
        if field.relative_to is not None:  # the longer after that state, the more it spreads
            meaning["chunks"] = f"of {robot.action_horizon} actions at {robot.control_hz:g} Hz"
    return meaning


def load_statistics(
    statistics: Statistics, directory: str | Path, robots: dict[str, Robot], start: Contract | None
) -> dict[str, Normalization]:
    """Returns the statistics of robots, by name. directory: of own ones, `<robot name>.json`. start: see `Statistics`.

    Raises:
        FileNotFoundError, ValueError: own ones are needed and not there, see `load_normalization`.
        CheckpointError: those of the checkpoint are needed, and do not fit; lists all robots.
    """
    found, problems = {}, []
    for name, robot in robots.items():
        try:
            own = functools.partial(load_normalization, Path(directory) / f"{robot.name}.json", robot)
            found[name] = statistics.choose(robot, own, start)
        except CheckpointError as e:
            problems.append(str(e))
    if problems:
        raise CheckpointError("\n".join(problems))
    return found
