"""Do the units fit: each number by itself, and commands beside the states that they move?"""

import dataclasses
import math

import numpy as np

from openpi_like.data.robot_check.findings import Finding
from openpi_like.data.robot_check.response import Response, size_ratio
from openpi_like.data.robot_check.robot_sample import RobotSample
from openpi_like.robots.representations import UNITS
from openpi_like.robots.robot import ActionField, StateField

# Greatest position, or speed, of a robot in SI units: reach of the largest arms, more than one turn of a joint, tools
# and joints that are far faster than what is demonstrated to a policy.
_MOST = {"m": 5.0, "rad": 2.5 * math.pi, "m/s": 10.0, "rad/s": 50.0}
# Least range of the numbers of a field that moves at all: an arm that stays within a centimetre or half a degree
# over a whole dataset, or is slower than a millimetre or a tenth of a degree per second at its fastest.
_LEAST = {"m": 1e-2, "rad": math.radians(0.5), "m/s": 1e-3, "rad/s": math.radians(0.1)}
_DEGREES = math.radians(2 * math.pi)  # angles in degrees that never exceed this would be one turn in radians
_FACTOR = 3.0  # by which sizes of command and state may differ: controllers do a part of what is asked, units are 10
_FITS = 1.6  # by which they may differ still with a unit that explains the difference
_FAST = 0.999  # quantile of speeds: glitches of a single step are no unit


@dataclasses.dataclass(frozen=True)
class Units:
    """See the module."""

    name: str = "Units"
    question: str = "Are numbers as large as their units let expect? Does a state go as far as its command says?"

    def findings(self, sample: RobotSample) -> list[Finding]:
        """See `Check.findings`."""
        found = []
        for field in sample.robot.state:
            found += _alone(f"state {field.name}", field, sample.states[field.name], "absolute", sample.hz)
        for field in sample.robot.action:
            if field.name in sample.commands:
                about = f"action {field.name}"
                found += _alone(about, field, sample.commands[field.name], field.command, sample.hz)
                found += _beside_its_state(about, field, sample)
        return found


def _alone(about: str, field: StateField, x: np.ndarray, command: str, hz: float) -> list[Finding]:
    """Sizes that no robot has in this unit, with the units in which it would have them."""
    unit = UNITS[field.unit][0]
    if field.gripper is not None or unit not in _MOST or (field.rotation or "").startswith(("quaternion", "rotation")):
        return []
    if command == "delta":  # a change per step, judged by the speed that it asks for
        size, range_, kind = np.abs(x) * hz, np.abs(x) * hz, f"{unit}/s"
    else:
        size, range_, kind = np.abs(x), np.abs(x - np.median(x, axis=0)), unit
    largest, moves = (float(np.quantile(v, _FAST, axis=0).max()) for v in (size, range_))
    if moves == 0:
        return []

    def plausible(name: str) -> bool:
        factor = UNITS[name][1]
        return largest * factor <= _MOST[kind] and moves * factor >= _LEAST[kind]

    # Angles in degrees that all fit into one turn in radians are within a few degrees: no arm works so, a hand might.
    narrow = field.unit == "deg" and command == "absolute" and field.rotation is None
    if plausible(field.unit) and not (narrow and largest * UNITS["deg"][1] <= _DEGREES):
        return [Finding("found", about, f"reaches {largest * UNITS[field.unit][1]:.3g} {kind}, unit {field.unit}")]
    others = [name for name in UNITS if UNITS[name][0] == unit and name != field.unit and plausible(name)]
    advice = f"its unit is probably {' or '.join(map(repr, others))}" if others else "look at these numbers"
    return [
        Finding(
            "suspect",
            about,
            f"would reach {largest * UNITS[field.unit][1]:.3g} {kind} and move by {moves * UNITS[field.unit][1]:.3g} "
            f"{kind}, if its unit were {field.unit}",
            advice,
        )
    ]


def _beside_its_state(about: str, field: ActionField, sample: RobotSample) -> list[Finding]:
    state = sample.state_of(field)
    if state is None or field.gripper is not None:
        return []
    lag = Response.measure(sample, field, state).lag
    ratio = None if lag is None else size_ratio(sample, field, state, max(lag, 1), 1 / sample.hz)
    if ratio is None:
        return [Finding("found", about, f"does not move like state {state.name!r}, so their sizes cannot be compared")]
    of_state = f"state {state.name!r} [{state.unit}]"
    if UNITS[field.unit][0].removesuffix("/s") != UNITS[state.unit][0]:
        what = f"{1 / ratio:.3g} {UNITS[state.unit][0]}" + ("" if field.command == "absolute" else " in a step")
        return [Finding("found", about, f"1 of it moves {of_state} by {what}")]
    if 1 / _FACTOR <= ratio <= _FACTOR:
        return [Finding("found", about, f"{field.command} [{field.unit}] goes {ratio:.3g} times as far as {of_state}")]
    return [
        Finding(
            "suspect",
            about,
            f"{field.command} [{field.unit}] goes {ratio:.4g} times as far as {of_state}",
            _explanation(field, state, ratio, sample.hz),
        )
    ]


def _explanation(field: ActionField, state: StateField, ratio: float, hz: float) -> str:
    """What would make command and state go equally far."""

    def fits(factor: float) -> bool:
        return 1 / _FITS <= ratio * factor <= _FITS

    found = []
    for what, changed, sign in (("", field, 1), (f" of state {state.name!r}", state, -1)):
        unit, factor = UNITS[changed.unit]
        for name, (other, other_factor) in UNITS.items():
            if other == unit and name != changed.unit and fits((other_factor / factor) ** sign):
                found.append(f'unit="{name}"{what}')
    if field.command == "delta" and fits(1 / hz):
        found.append('command="velocity"')
    if field.command == "velocity" and fits(hz):
        found.append('command="delta"')
    if not found:
        return "no unit explains it: look at scale and frame of both, and at whether the robot does what is asked"
    return f"they would agree with {', or '.join(found)}"
