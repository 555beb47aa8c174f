"""What a simulated drive knows of itself: who is around, where the lanes are, and both in words.

All of it is in the car's frame of now: x to the right and y ahead, metres; headings in rad, counter-clockwise from
ahead, so that one who drives as the car does has 0, and one who comes from the right and crosses has a quarter turn.
"""

import dataclasses
import math

import numpy as np
from jaxtyping import Float

from openpi_like.driving.ego_motion import CarState
from openpi_like.driving.episode import Drive

REACH_M = 50.0


@dataclasses.dataclass(frozen=True)
class Agent:
    """Another vehicle: the middle of its box; its velocity over the ground, m/s, as its place in the car's frame.

    number: which of `BODIES` it has; no other has it in the same drive.
    """

    number: int
    kind: str
    right: float
    ahead: float
    heading: float
    length: float
    width: float
    velocity: tuple[float, float]

    @property
    def distance(self) -> float:
        """Metres between the middles of the two."""
        return math.hypot(self.right, self.ahead)


@dataclasses.dataclass(frozen=True, eq=False)
class MapLine:
    """A polyline of the map, (N, 2) metres. kind: "middle" of a lane, or its edge: "striped", "continuous", "none"."""

    kind: str
    points: Float[np.ndarray, "N 2"]


@dataclasses.dataclass(frozen=True, eq=False)
class Annotations:
    """agents: those within `REACH_M`, the nearest first. lines: of the map, cut off there. caption: what is around and
    what the car does, in words."""

    agents: tuple[Agent, ...]
    lines: tuple[MapLine, ...]
    caption: str


def annotate(drive: Drive, doing: str) -> Annotations:
    """Returns the annotations of the present step. doing: what the car does, in words."""
    agents = _agents(drive)
    return Annotations(agents, _lines(drive), _caption(drive, agents, doing))


def _agents(drive: Drive) -> tuple[Agent, ...]:
    car, found = drive.car, []
    traffic = drive.traffic
    others = zip(traffic.slots, traffic.bodies, traffic.poses().tolist(), strict=True)
    for number, body, (x, y, heading, speed) in others:
        right, ahead = car.to_car(x, y)
        turned = math.remainder(heading - car.heading, 2 * math.pi)
        velocity = (-speed * math.sin(turned), speed * math.cos(turned))
        found.append(Agent(number, body.kind, right, ahead, turned, body.length, body.width, velocity))
    return tuple(sorted((a for a in found if a.distance <= REACH_M), key=lambda a: a.distance))


def _lines(drive: Drive) -> tuple[MapLine, ...]:
    car, found = drive.car, []
    for lane in drive.net.lanes:
        steps = np.gradient(lane.xy, axis=0)
        normal = np.stack([-steps[:, 1], steps[:, 0]], axis=1) / np.linalg.norm(steps, axis=1, keepdims=True)
        for kind, left in (("middle", 0.0), (lane.left, lane.width / 2), (lane.right, -lane.width / 2)):
            points = _to_car(car, lane.xy + left * normal)
            near = np.flatnonzero(np.hypot(*points.T) <= REACH_M)
            for run in np.split(near, np.flatnonzero(np.diff(near) > 1) + 1):
                if len(run) > 1:
                    found.append(MapLine(kind, points[run]))
    return tuple(found)


def _to_car(car: CarState, xy: np.ndarray) -> np.ndarray:
    c, s = math.cos(car.heading), math.sin(car.heading)
    apart = xy - (car.x, car.y)
    return apart @ np.array([[s, c], [-c, s]])


def _caption(drive: Drive, agents: tuple[Agent, ...], doing: str) -> str:
    light = {"day": "By day", "dusk": "At dusk", "fog": "In fog"}[drive.scenario.light]
    road = {"merge": "a highway with a ramp", "intersection": "an intersection"}
    where = road.get(drive.net.name, f"a {drive.net.name}")
    words = [f"{light}, at {where}, {3.6 * drive.car.speed:.0f} km/h: {doing}."]
    words += [_in_words(agent) for agent in agents[:3]]
    if not agents:
        words.append("Nobody is near.")
    return " ".join(words)


def _in_words(agent: Agent) -> str:
    bearing = math.degrees(math.atan2(-agent.right, agent.ahead)) % 360
    sides = ("ahead", "ahead on the left", "on the left", "behind on the left", "behind", "behind on the right")
    side = (*sides, "on the right", "ahead on the right")[round(bearing / 45) % 8]
    speed = math.hypot(*agent.velocity)
    if speed < 0.5:
        does = "stands"
    else:
        turned = abs(math.degrees(agent.heading))
        crosses = "crosses to the left" if agent.heading > 0 else "crosses to the right"
        does = "drives the same way" if turned < 45 else "comes the other way" if turned > 135 else crosses
        does += f" at {3.6 * speed:.0f} km/h"
    return f"A {agent.kind} {agent.distance:.0f} m {side} {does}."
