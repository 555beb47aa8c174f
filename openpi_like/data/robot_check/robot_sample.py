"""The steps of a dataset that a robot is checked on: states, commands, and how they lie in time."""

import dataclasses
import functools

import numpy as np
from jaxtyping import Bool, Float, Int

from openpi_like.data.dataset_check import check_dataset
from openpi_like.data.episode_sample import Sample, time_gaps
from openpi_like.data.index import FrameIndex
from openpi_like.data.schema import DatasetError
from openpi_like.data.selection import Selection
from openpi_like.data.step_values import StepValues, not_finite
from openpi_like.robots.robot import ActionField, Robot, StateField

STEPS = 50_000  # of a sample: correlations are stable long before, and every check stays below a second or two
LATE = 1.5  # times the usual time between steps: one is missing
_SECONDS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}  # units of time stamps


@dataclasses.dataclass(frozen=True)
class Rate:
    """Steps per second at which a dataset was recorded. source: what says so. gaps: seconds between steps, if known."""

    hz: float
    source: str
    gaps: Float[np.ndarray, "m"] | None = None


@dataclasses.dataclass(frozen=True)
class RobotSample:
    """Whole episodes of a split, evenly spaced, as a robot sees them, one row per stored step.

    sample: n steps of e episodes whose numbers are all finite. not_finite: steps of the split that are not.
    states, commands: field name -> (n, size), robot space, float64. Commands that are derived from states (`next_step`)
        are not among them: they would be compared with themselves.
    rate: of the recording, None where nothing says it. image_size: height and width that the policy sees.
    simulate: episodes to replay in a simulator of the robot, where there is one.
    """

    robot: Robot
    index: FrameIndex
    sample: Sample
    not_finite: Int[np.ndarray, "_"]
    states: dict[str, Float[np.ndarray, "n _"]]
    commands: dict[str, Float[np.ndarray, "n _"]]
    rate: Rate | None
    image_size: tuple[int, int] = (224, 224)
    simulate: int = 0

    @classmethod
    def take(
        cls,
        index: FrameIndex,
        robot: Robot,
        *,
        rate: float | None = None,
        most: int = STEPS,
        image_size: tuple[int, int] = (224, 224),
        simulate: int = 0,
        max_corrupt_fraction: float = 0.0,
    ) -> "RobotSample":
        """Takes at most `most` steps, see `Sample.take`, without episodes that have values that are not finite.

        rate: steps per second, where someone knows better than the dataset's own description and its time stamps.

        Raises:
            DatasetError: the dataset does not have what the robot says, or no episode is left; lists all.
        """
        if robot.plan is not None:
            raise DatasetError(
                f"{index.split}: robot {robot.name!r} plans, and what is checked here are commands of single steps, "
                "beside the state; look at its plans with data/show.py"
            )
        part = range(index.steps)
        check_dataset(index, at_its_rate(robot, index), part, Selection(skip_not_finite=True), max_corrupt_fraction)
        bad = not_finite(index, part, [*robot.state, *robot.action])
        sample = Sample.take(index, most)
        known = _rate(sample, robot, rate)
        sample = _without(sample, bad)
        if not len(sample.steps):
            raise DatasetError(
                f"{index.split}: in every episode that was looked at, values of robot {robot.name!r} are not finite or "
                "no rotation; data/show.py says where"
            )
        values = StepValues(index, dataclasses.replace(robot, stride=1), part)
        recorded = [f for f in robot.action if f.next_step is None]
        states = values.state(sample.steps).astype(np.float64)
        ends = np.cumsum([f.size for f in robot.state])
        return cls(
            robot,
            index,
            sample,
            bad,
            {f.name: states[:, end - f.size : end] for f, end in zip(robot.state, ends, strict=True)},
            {f.name: values.commands(sample.steps, [f]).astype(np.float64) for f in recorded},
            known,
            image_size,
            simulate,
        )

    @property
    def starts(self) -> Int[np.ndarray, "e1"]:
        """First row of each episode, and n."""
        return self.sample.starts

    @functools.cached_property
    def hz(self) -> float:
        """Steps per second: what is known, or else what the robot says."""
        return self.rate.hz if self.rate is not None else self.robot.control_hz * self.robot.stride

    @functools.cached_property
    def lengths(self) -> Int[np.ndarray, "e"]:
        """Steps of each episode."""
        return np.diff(self.starts)

    def episode(self, e: int) -> slice:
        """Returns the rows of an episode."""
        return slice(int(self.starts[e]), int(self.starts[e + 1]))

    def longest(self, count: int) -> list[int]:
        """Returns episodes to show, evenly spaced among the longer half, in order."""
        longer = np.flatnonzero(self.lengths >= np.median(self.lengths))
        return sorted({int(longer[i]) for i in np.linspace(0, len(longer) - 1, count).round().astype(int)})

    def rows_with(self, *offsets: int) -> Int[np.ndarray, "m"]:
        """Returns the rows whose episode also has the rows at all these offsets from them."""
        at = np.arange(len(self.sample.steps))
        first, end = np.repeat(self.starts[:-1], self.lengths), np.repeat(self.starts[1:], self.lengths)
        return np.flatnonzero((at + min(offsets) >= first) & (at + max(offsets) < end))

    def state_of(self, field: ActionField) -> StateField | None:
        """Returns the state that a command moves, None where the robot does not say it.

        That is the one it is relative to, or that has its name, or the only one of its kind and size; none where the
        one of its name is of another kind.
        """
        named = [s for s in self.robot.state if s.name in (field.relative_to, field.name)]
        alike = [s for s in named or self.robot.state if _comparable(field, s)]
        return alike[0] if len(alike) == 1 or (named and alike) else None


def at_its_rate(robot: Robot, index: FrameIndex) -> Robot:
    """Returns the robot at the rate that the dataset says, if it says one.

    A wrong rate is a finding of `Rates`, which says more than the error that a dataset would raise.
    """
    described = index.split.rate
    return robot if described is None else dataclasses.replace(robot, control_hz=described / robot.stride)


def _comparable(action: ActionField, state: StateField) -> bool:
    if action.gripper is not None or state.gripper is not None:
        return action.gripper is not None and state.gripper is not None and action.size == state.size
    if action.rotation is not None or state.rotation is not None:
        return action.rotation is not None and state.rotation is not None
    return action.size == state.size


def _without(sample: Sample, bad: np.ndarray) -> Sample:
    """The sample without episodes that have one of the steps `bad`."""
    spoilt = np.isin(sample.steps, bad)
    good: Bool[np.ndarray, e] = np.add.reduceat(spoilt, sample.starts[:-1]) == 0
    lengths = np.diff(sample.starts)
    return Sample(sample.index, sample.steps[np.repeat(good, lengths)], np.append(0, np.cumsum(lengths[good])))


def _rate(sample: Sample, robot: Robot, known: float | None) -> Rate | None:
    """The rate, by who says it: the caller, the dataset's description, a time stamp.

    The unit of a time stamp is not known: the one is taken that is nearest to what the robot says.
    """
    stamps, described = time_gaps(sample), sample.index.split.rate
    gaps, stamped = None, ""
    if stamps is not None:
        gap = float(np.median(stamps[1]))
        unit = min(_SECONDS, key=lambda u: abs(np.log(gap * _SECONDS[u] * robot.control_hz * robot.stride)))
        gaps, stamped = stamps[1] * _SECONDS[unit], f"{stamps[0]} (taken as {unit})"
    if known is not None:
        return Rate(known, "what was given", gaps)
    if described is not None:
        return Rate(described, "the dataset's description", gaps)
    if gaps is None:
        return None
    # Of those that are usual: the median of whole milliseconds would say 30.3 Hz of 30.
    apart = gaps / np.median(gaps)
    return Rate(float(1 / gaps[(apart < LATE) & (apart > 1 / LATE)].mean()), stamped, gaps)
