"""How the expert drives: from where the car is, whatever happened before, and from where everybody else is."""

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float32

from openpi_like.driving.ego_motion import LENGTH, CarState, moved, steering_for
from openpi_like.driving.paths import Path
from openpi_like.driving.road_networks import network
from openpi_like.driving.scenarios import Scenario
from openpi_like.driving.traffic_rules import Manner, Mover, drive, following, matters, standing

PLAN = 6
_DT = 0.1  # s
_PER_WAYPOINT = 5
_EASY = -2.0  # m/s^2, that a change of lanes may cost the car or who is behind it
_HURRIED = 0.7  # s of gap, that count as enough to change
_ROOM = 14.0  # m, to steer out of a lane that ends
_FAST = 11.0  # m/s, above which the car is on a highway


class Pilot:
    """Chooses controls for one scenario. Holds no state: all is told from the car and the others."""

    def __init__(self, scenario: Scenario) -> None:
        self._scenario, self._net = scenario, network(scenario.network)
        self._path = self._net.paths[scenario.path]
        self._change = scenario.change
        self._target = self._net.paths[scenario.goal_path]

    def plan(self, car: CarState, others: Sequence[Mover]) -> tuple[Float32[np.ndarray, "6 2"], str]:
        """Returns where to be at 0.5, 1, ... 3 s as (right, ahead) of the car, in metres, and what is being done.

        The others are taken to keep their speeds, within what their paths allow.
        """
        now, doing, points = car, "", []
        movers = self._relevant(car, others)
        for k in range(PLAN * _PER_WAYPOINT):
            acceleration, steering, words = self.controls(now, movers)
            doing = doing or words
            now = moved(now, acceleration, steering, _DT)
            movers = [_moved_on(m) for m in movers]
            if k % _PER_WAYPOINT == _PER_WAYPOINT - 1:
                points.append(car.to_car(now.x, now.y))
        return np.array(points, np.float32), doing

    def _relevant(self, car: CarState, others: Sequence[Mover]) -> list[Mover]:
        """Those who can be in the car's way, or beside it where it changes to."""
        owns = [Mover(path, path.project(car.x, car.y)[0], car.speed, LENGTH) for path in {self._path, self._target}]
        return [other for other in others if any(matters(own, other, self._net.meetings) for own in owns)]

    def controls(self, car: CarState, others: Sequence[Mover]) -> tuple[float, float, str]:
        """Returns acceleration in m/s^2, steering in rad, and what is being done, in words."""
        manner = self._scenario.manner
        s, left = self._path.project(car.x, car.y)
        if self._change is None:
            return self._along(car, self._path, s, left, others, manner)
        target_s, target_left = self._target.project(car.x, car.y)
        own = Mover(self._target, target_s, car.speed, LENGTH)
        beside = [o for o in others if o.path is self._target]
        changing = abs(target_left) < abs(left) and s > self._change.begin - 10.0
        if changing or (self._change.begin <= s <= self._change.end and _gap(own, beside, manner)):
            acceleration, steering, _ = self._along(car, self._target, target_s, target_left, others, manner)
            if not changing:  # still half in the lane that it leaves
                acceleration = min(acceleration, self._along(car, self._path, s, left, others, manner)[0])
            done = abs(target_left) < 0.5
            return acceleration, steering, "keep the lane" if done else self._phase(s)
        acceleration, steering, doing = self._along(car, self._path, s, left, others, manner)
        if s > self._change.begin - 80.0:
            acceleration = min(acceleration, _beside(own, beside, manner))
        if math.isfinite(self._change.end):  # the lane ends
            acceleration = min(acceleration, standing(car.speed, self._path.length - s - _ROOM, manner))
        return acceleration, steering, "wait for a gap" if s >= self._change.begin else doing

    def _along(
        self, car: CarState, path: Path, s: float, left: float, others: Sequence[Mover], manner: Manner
    ) -> tuple[float, float, str]:
        acceleration, why = drive(Mover(path, s, car.speed, LENGTH), others, self._net.meetings, manner)
        doing = self._phase(s) if path is self._path else "keep the lane"
        if why == "give way":
            doing = "give way"
        elif why == "follow" and acceleration < -0.8:
            doing = "brake for the car ahead"
        return acceleration, _steering(car, path, s, left), doing

    def _phase(self, s: float) -> str:
        return [words for begin, words in self._scenario.phases if begin <= s][-1]


def _steering(car: CarState, path: Path, s: float, left: float) -> float:
    """Aims at a place some way ahead on the path; on a highway, at one that is only on the way back to it."""
    ahead = 2.5 + 0.3 * car.speed + 0.045 * car.speed**2
    aside = left * min(0.6, car.speed / 30.0) if car.speed > _FAST else 0.0
    x, y, _ = path.at(s + ahead, aside)
    right, front = car.to_car(x, y)
    distance = math.hypot(right, front)
    bearing = math.atan2(-right, front)
    return steering_for(min(max(bearing / (1 + distance / LENGTH), -0.6), 0.6))


def _gap(own: Mover, beside: Sequence[Mover], manner: Manner) -> bool:
    """Whether the lane beside has room, for the car and for who would be behind it (as MOBIL judges safety)."""
    hurried = Manner(manner.speed, 2.0, _HURRIED, manner.acceleration, manner.braking)
    for other in beside:
        apart = abs(other.s - own.s) - 0.5 * (own.length + other.length)
        ahead = other.s > own.s
        behind, front = (own, other) if ahead else (other, own)
        if apart < 3.0 + max(0.0, behind.speed - front.speed):
            return False
        brakes = hurried.acceleration + following(behind.speed, apart, front.speed, hurried)
        if brakes < _EASY:
            return False
    return True


def _beside(own: Mover, beside: Sequence[Mover], manner: Manner) -> float:
    """The acceleration that finds a gap: lets pass who is beside, and falls in behind who is ahead."""
    best = manner.acceleration
    for other in beside:
        ahead = other.s - own.s
        apart = abs(ahead) - 0.5 * (own.length + other.length)
        if 0.0 <= ahead < 40.0:
            best = min(
                best, max(-1.5, manner.acceleration + following(own.speed, max(apart, 1.0), other.speed, manner))
            )
        elif -25.0 < ahead < 0.0 and other.speed > own.speed - 1.0 and apart < 8.0:
            best = min(best, -1.0)
    return best


def _moved_on(mover: Mover) -> Mover:
    limit = float(mover.path.limit[mover.path.index(mover.s)])
    speed = min(mover.speed, max(limit, mover.speed - 2.0 * _DT))
    return Mover(mover.path, mover.s + speed * _DT, speed, mover.length)
