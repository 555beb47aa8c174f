"""Where do recorded actions lead, beside where the robot went?"""

import dataclasses

import numpy as np
from jaxtyping import Float
from scipy.spatial.transform import Rotation

from openpi_like.data.robot_check.findings import Curves, Finding
from openpi_like.data.robot_check.response import Response, Series, size_ratio
from openpi_like.data.robot_check.robot_sample import RobotSample
from openpi_like.robots.representations import UNITS
from openpi_like.robots.robot import ActionField, StateField

_LOST = 1.0  # times the way of the robot: a replay that is as far off is no better than standing still
_WAY = 0.1  # of the usual way: episodes in which a field, or dims that, moves less than that say nothing of it
_OPPOSITE = -0.4  # correlation of where a dim is led and where it goes: of robots that are right, 0.45 to 1
_PANELS = 7  # dims plotted of a field
_EPISODES = 2  # plotted


@dataclasses.dataclass(frozen=True)
class Replay:
    """See the module."""

    name: str = "Replay"
    question: str = (
        "Where do the recorded actions lead from the first state on, if every step does just what is asked? "
        "Errors of changes add up, so a replay drifts; it has to follow the shape."
    )

    def findings(self, sample: RobotSample) -> list[Finding]:
        """See `Check.findings`."""
        found = []
        for field in sample.robot.action:
            state = sample.state_of(field)
            if state is not None and field.gripper is None and field.name in sample.commands:
                found.append(_replay(f"action {field.name}", field, state, sample))
        return found or [Finding("found", "", "no action has a state to be replayed beside")]


def _replay(about: str, field: ActionField, state: StateField, sample: RobotSample) -> Finding:
    c, s = Series(field, sample.commands[field.name]), Series(state, sample.states[state.name])
    factor, scaled = 1 / sample.hz if field.command == "velocity" else 1.0, ""
    if UNITS[field.unit][0].removesuffix("/s") != UNITS[state.unit][0]:
        lag = Response.measure(sample, field, state).lag
        ratio = None if lag is None else size_ratio(sample, field, state, max(lag, 1), 1 / sample.hz)
        if ratio is None or field.command == "absolute":
            return Finding("found", about, f"its unit {field.unit} is not that of state {state.name!r}: not replayed")
        factor, scaled = factor / ratio, f", 1 of it taken as {1 / ratio:.3g} {UNITS[state.unit][0]}"
    errors, ways, curves, shapes = [], [], [], []
    shown = sample.longest(_EPISODES)
    for e in range(len(sample.lengths)):
        rows = sample.episode(e)
        start = np.full(rows.stop - rows.start, rows.start)
        way = s.change(start, np.arange(rows.start, rows.stop))
        led = _led(field, c, s, rows, factor)
        shapes.append((led - led.mean(axis=0), way - way.mean(axis=0)))
        errors.append(float(np.sqrt((_difference(led, way, field) ** 2).sum(axis=1).mean())))
        ways.append(float(np.sqrt((way**2).sum(axis=1).mean())))
        if e in shown:
            at = np.arange(len(way), dtype=float)
            curves += [
                Curves(
                    f"{field.name}[{d}], episode {e + 1} of {len(sample.lengths)}",
                    {"recorded": (at, way[:, d]), "replayed": (at, led[:, d])},
                    "step",
                    UNITS[state.unit][0],
                )
                for d in range(min(way.shape[1], _PANELS))
            ]
    far = np.array(ways) > _WAY * max(np.median(ways), 1e-9)
    if not far.any():
        return Finding("found", about, f"state {state.name!r} does not move, so there is nothing to replay")
    off = float(np.median(np.array(errors)[far] / np.array(ways)[far]))
    size = f"{off:.0%} of" if off < 10 else f"{off:.3g} times"
    message = f"replayed, it is {size} the way off in the median of {far.sum()} episodes{scaled}"
    if opposite := _opposite(*map(np.concatenate, zip(*shapes, strict=True))):
        advice = "these dims have another sign in the command than in the state: turn one of them round in the data"
        return Finding("suspect", about, f"{message}; {opposite}", advice, tuple(curves))
    if off < _LOST:
        return Finding("found", about, message, "", tuple(curves))
    advice = "it does not lead where the robot went: look at command, unit, start, and the order of the fields"
    return Finding("suspect", about, message, advice, tuple(curves))


def _led(field: ActionField, c: Series, s: Series, rows: slice, factor: float) -> Float[np.ndarray, "T D"]:
    """Where the commands of an episode lead, as a change from its first state. An action is done one step later."""
    at = np.arange(rows.start, rows.stop)
    if field.command == "absolute":
        led = c.change_from(s, rows.start, at)
        return np.concatenate([np.zeros_like(led[:1]), led[:-1]])
    steps = np.concatenate([np.zeros((1, c.changes.shape[1])), c.changes[at[:-1]] * factor])
    if field.rotation is None:
        return steps.cumsum(axis=0)
    turned, out = Rotation.identity(), []
    for step in Rotation.from_rotvec(steps):
        turned = step * turned
        out.append(turned.as_rotvec())
    return np.stack(out)


def _opposite(led: Float[np.ndarray, "n D"], way: Float[np.ndarray, "n D"]) -> str:
    """Names the dims that go the opposite way. Both are around their means of each episode."""
    size = np.sqrt((way**2).mean(axis=0))
    together = (led * way).mean(axis=0) / np.maximum(np.sqrt((led**2).mean(axis=0)) * size, 1e-300)
    found = np.flatnonzero((together < _OPPOSITE) & (size > _WAY * size.max()))
    return ", ".join(f"[{d}] goes the opposite way, correlation {together[d]:.2f}" for d in found)


def _difference(a: np.ndarray, b: np.ndarray, field: ActionField) -> np.ndarray:
    if field.rotation is None:
        return a - b
    return (Rotation.from_rotvec(a) * Rotation.from_rotvec(b).inv()).as_rotvec()
