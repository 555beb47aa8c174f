"""Do grippers open where the robot says so, with these values, and is a command a position or a change?"""

import dataclasses
import math

import numpy as np

from openpi_like.data import traps
from openpi_like.data.dataset_check import OUTSIDE
from openpi_like.data.robot_check.findings import Curves, Finding
from openpi_like.data.robot_check.robot_sample import RobotSample
from openpi_like.robots.robot import ActionField, StateField

_BEYOND = 0.05  # of the steps: measured fingers overshoot now and then
_NARROW = 0.2  # of the way from closed to open: two-ended commands that stay within are on another scale, as are states
_WIDE = 0.8  # of which a command asks for so much
_BETWEEN = 0.1  # of the steps: triggers say nothing most of the time, positions are at an end
_SURE = 0.8  # of the episodes that begin open, or closed
_LAG = 8  # steps within which a gripper has followed its command
_LEVEL = 0.6  # correlation of positions from which on two grippers are said to be opposite,
_CLEAR = (
    0.3  # where that of any other lag is so much smaller: a gripper that opens and closes fast lags by half a cycle
)


@dataclasses.dataclass(frozen=True)
class Grippers:
    """See the module."""

    name: str = "Grippers"
    question: str = "Are open= and closed= the right values, and do command and state open at the same time?"

    def findings(self, sample: RobotSample) -> list[Finding]:
        """See `Check.findings`."""
        found = []
        wide = _asked_for(sample)
        for field in sample.robot.state:
            if field.gripper is not None:
                asked = field.name in wide
                found += _values(f"state {field.name}", field, sample.states[field.name], asked)
        for action in sample.robot.action:
            if action.gripper is None:
                continue
            about = f"action {action.name}"
            if action.gripper.convention == "trigger":
                found += _said(about, action, sample)
            if action.name in sample.commands:
                x = sample.commands[action.name]
                found += _values(about, action, x, bool(traps.gripper_dims(x)))
                found += _polarity(about, action, sample)
        return found or [Finding("found", "", "the robot has no gripper")]


def _asked_for(sample: RobotSample) -> set[str]:
    """Gripper states that were commanded over most of their way, or over so little that the command is suspected."""
    found = set()
    for action in sample.robot.action:
        state = sample.state_of(action)
        if action.gripper is not None and state is not None and action.name in sample.commands:
            x = sample.commands[action.name]
            way = _way(action, x)
            if way >= _WIDE or (way < _NARROW and traps.gripper_dims(x)):
                found.add(state.name)
    return found


def _way(field: StateField, x: np.ndarray) -> float:
    """How much of the way from closed to open its values take."""
    return float(np.ptp(np.quantile(field.to_model(x), [0.01, 0.99])))


def _values(about: str, field: StateField, x: np.ndarray, asked: bool) -> list[Finding]:
    """Values beside open and closed. Triggers are commands of open and closed by now.

    asked: whether it should have gone most of the way between the two, as a command with two ends should.
    """
    assert field.gripper is not None
    low, high = (float(v) for v in np.quantile(x, [0.01, 0.99]))
    said = f"closed={field.gripper.closed:g} to open={field.gripper.open:g}"
    if low == high and x.min() == x.max():
        return [Finding("found", about, f"always {low:.4g}: it never moves, so nothing can be told of {said}")]
    opening = field.to_model(x)
    beyond = float(((opening < -OUTSIDE) | (opening > 1 + OUTSIDE)).any(axis=1).mean())
    is_open, closed = (high, low) if field.gripper.open > field.gripper.closed else (low, high)
    digits = max(0, 2 - math.floor(math.log10(high - low))) if high > low else 4
    measured = f"open={round(is_open, digits):g} and closed={round(closed, digits):g}"
    if isinstance(field, ActionField) and field.gripper.convention == "absolute" and traps.trigger_gripper(about, x):
        return [
            Finding(
                "suspect",
                about,
                f"its values are -1, 0 and 1, mostly 0 ({(x == 0).mean():.0%}): changes, not positions",
                f'set Gripper(open={field.gripper.open:g}, closed={field.gripper.closed:g}, convention="trigger")',
            )
        ]
    if beyond > _BEYOND:
        message = f"{beyond:.0%} of its values lie outside {said}: it has {low:.4g} to {high:.4g}"
        return [Finding("suspect", about, message, f"set {measured}, if the data have both")]
    if asked and _way(field, x) < _NARROW:
        message = f"it goes from {low:.4g} to {high:.4g}, a small part of {said}"
        return [Finding("suspect", about, message, f"set {measured}, if the data have both")]
    return [Finding("found", about, f"{low:.4g} to {high:.4g} between {said}")]


def _said(about: str, action: ActionField, sample: RobotSample) -> list[Finding]:
    """Whether stored triggers are triggers."""
    assert action.gripper is not None
    stored = sample.sample.rows(action.key)[:, action.start].astype(np.float64)
    opening = action.to_model(stored)
    silent = float(((opening > 0.45) & (opening < 0.55)).mean())
    if silent >= _BETWEEN:
        return [Finding("found", about, f"{silent:.0%} of its triggers leave it as it is")]
    return [
        Finding(
            "suspect",
            about,
            f"a trigger, but it says open or closed in {1 - silent:.0%} of the steps",
            'these look like positions: set convention="absolute"',
        )
    ]


def _polarity(about: str, action: ActionField, sample: RobotSample) -> list[Finding]:
    state = sample.state_of(action)
    if state is None:
        return [Finding("found", about, "the robot has no gripper state, so which way it opens cannot be compared")]
    command = action.to_model(sample.commands[action.name])
    width = state.to_model(sample.states[state.name])
    episode = sample.episode(sample.longest(1)[0])
    at = np.arange(episode.stop - episode.start, dtype=float)
    found = []
    for d in range(action.size):
        curves = (
            Curves(
                f"{action.name}: 1 is open",
                {"command": (at, command[episode, d]), f"state {state.name}": (at, width[episode, d])},
                "step",
            ),
        )
        follows = traps.follows(command[:, d], width[:, d], sample.starts)
        alike, opposite = _levels(command[:, d], width[:, d], sample)
        message = (
            f"command and state {state.name!r} correlate by {alike if alike >= opposite else -opposite:.2f}, command "
            f"and change of the state by {follows:.2f} (1: open together, -1: opposite)"
        )
        if follows >= traps.OPPOSITE and (opposite < _LEVEL or opposite < alike + _CLEAR):
            found.append(Finding("found", about, message, "", curves))
            continue
        first = sample.starts[:-1]
        which = _inverted(command[first, d], width[first, d])
        found.append(
            Finding(
                "suspect",
                about,
                message,
                f"{which} looks inverted: swap open= and closed= there; the first picture shows which",
                curves,
            )
        )
    return found


def _levels(command: np.ndarray, width: np.ndarray, sample: RobotSample) -> tuple[float, float]:
    """Greatest correlation of a command, and of its opposite, with the state up to 8 steps later; 0 for constants."""
    alike = opposite = 0.0
    for lag in range(_LAG + 1):
        t = sample.rows_with(0, lag)
        a, b = command[t], width[t + lag]
        if len(t) and np.ptp(a) > 0 and np.ptp(b) > 0:
            r = float(np.corrcoef(a, b)[0, 1])
            alike, opposite = max(alike, r), max(opposite, -r)
    return alike, opposite


def _inverted(command: np.ndarray, width: np.ndarray) -> str:
    """Which of two that disagree is likely to be wrong: most episodes begin with an open gripper."""
    open_command, open_width = float((command > 0.5).mean()), float((width > 0.5).mean())
    if open_width >= _SURE and open_command <= 1 - _SURE:
        return f"the action (in {open_width:.0%} of the episodes the state begins open)"
    if open_command >= _SURE and open_width <= 1 - _SURE:
        return f"the state (in {open_command:.0%} of the episodes the command begins open)"
    return "one of the two, action or state,"
