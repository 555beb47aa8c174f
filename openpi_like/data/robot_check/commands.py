"""Is an action a target or a change, of which dims, and how many steps later does the state show it?"""

import dataclasses

import numpy as np

from openpi_like.data.robot_check.findings import Curves, Finding
from openpi_like.data.robot_check.response import Response, follows_which
from openpi_like.data.robot_check.robot_sample import RobotSample
from openpi_like.robots.robot import ActionField, StateField

_EXPLAINS = 0.5  # of the variance: what explains less is no description of a command
_BETTER = 0.2  # of the variance, by which the other description has to be better: arms move to where they are not yet
_TOLD = 0.2  # of the variance: a fit below it has no lag
_AHEAD = 1.25  # times what is not explained at the best lag is not at 1: rounding and noise differ by less
_WEIGHT = 0.25  # of the command's variance: dims that hardly move follow anything
_LONG = 1.0  # seconds: a policy that asks for something this long before it happens cannot correct itself


@dataclasses.dataclass(frozen=True)
class Commands:
    """See the module."""

    name: str = "Commands"
    question: str = "Is each action a target or a change, as the robot says? How long after it does the state move?"

    def findings(self, sample: RobotSample) -> list[Finding]:
        """See `Check.findings`."""
        found = []
        for field in sample.robot.action:
            about = f"action {field.name}"
            state = sample.state_of(field)
            if field.name not in sample.commands:
                found.append(Finding("found", about, "derived from recorded states, so there is nothing to compare"))
            elif field.gripper is not None:
                continue
            elif state is None:
                same = any(s.name in (field.name, field.relative_to) for s in sample.robot.state)
                kind = "the state of its name is of another kind" if same else "no state is of its kind and size"
                advice = "" if same else "give the state that it moves the same name"
                found.append(Finding("found", about, f"{kind}, so it cannot be compared with one", advice))
            else:
                response = Response.measure(sample, field, state)
                found += [_kind(about, field, response, state.name), _lag(about, field, response, sample.hz)]
                found += _order(about, field, state, sample)
        return found


def _kind(about: str, field: ActionField, response: Response, state: str) -> Finding:
    as_target, as_change = response.best_target, response.best_change
    if np.isnan(as_target) or np.isnan(as_change):
        return Finding("found", about, f"command or state {state!r} does not move, so its kind cannot be told")
    numbers = f"state {state!r} explains {as_target:.0%} of it as a target, {as_change:.0%} as a change"
    absolute = field.command == "absolute"
    declared, other = (as_target, as_change) if absolute else (as_change, as_target)
    if other < _EXPLAINS or other < declared + _BETTER:
        doubt = "" if max(declared, other) >= _EXPLAINS else "; neither is much, so this cannot be told well"
        return Finding("found", about, f"{field.command}: {numbers}{doubt}")
    if absolute:
        drop = f" and leave out relative_to={field.relative_to!r}" if field.relative_to else ""
        advice = f'it looks like a change: set command="delta" (or "velocity"){drop}'
    else:
        advice = f'it looks like a target: set command="absolute", relative_to={state!r}'
    return Finding("suspect", about, f"{field.command}, but {numbers}", advice)


def _order(about: str, field: ActionField, state: StateField, sample: RobotSample) -> list[Finding]:
    """Dims of the command that another dim of the state follows, and not their own."""
    if field.rotation is not None or field.size == 1:
        return []
    follows = follows_which(sample, field, state)
    best, own = follows.argmax(axis=1), follows.diagonal()
    wrong = (follows.max(axis=1) >= _EXPLAINS) & (follows.max(axis=1) >= own + _BETTER)
    weight = sample.commands[field.name].var(axis=0)
    if wrong.sum() < 2 or weight[wrong].sum() < _WEIGHT * weight.sum():
        return []
    shown = ", ".join(f"[{d}] is followed by [{best[d]}]" for d in np.flatnonzero(wrong))
    return [
        Finding(
            "suspect",
            about,
            f"order: of state {state.name!r}, {shown}",
            "command and state have their dims in different order, or start= is wrong in one of them",
        )
    ]


def _lag(about: str, field: ActionField, response: Response, hz: float) -> Finding:
    lag, fit = response.lag, response.fit
    curves = (Curves(f"{field.name}: explained at each lag", {"": (response.lags.astype(float), fit)}, "lag in steps"),)
    if lag is None or np.nanmax(fit) < _TOLD:
        return Finding("found", about, "lag: command and state do not move alike, so it cannot be told", "", curves)
    best, at_one = float(np.nanmax(fit)), float(fit[response.lags == 1][0])
    message = f"lag: the state is as commanded after {lag} steps ({lag / hz:.3g} s), where it explains {best:.1%}"
    if lag < 1 and 1 - at_one > _AHEAD * (1 - best):
        return Finding(
            "suspect",
            about,
            f"{message}, after 1 step {at_one:.1%}: the state is ahead of the command",
            f"actions look stored {1 - lag} steps late: that of step t should be what is done from step t on",
            curves,
        )
    if lag / hz > _LONG:
        return Finding(
            "suspect",
            about,
            message,
            "actions look stored too early, or states late; compare their time stamps",
            curves,
        )
    return Finding("found", about, message, "", curves)
