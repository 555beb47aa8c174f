"""One drive: the car among the others, whether it is done, and how comfortable it was."""

import dataclasses
import math

import numpy as np
from jaxtyping import Float

from openpi_like.driving.ego_motion import CarState, moved
from openpi_like.driving.road_networks import network
from openpi_like.driving.scenarios import Scenario
from openpi_like.driving.traffic import STEP_S, Traffic

PAST_S = 2.0
_OFF = 0.3  # m beyond the edge of a lane that the car's middle may be: two thirds of the car are off then
_ON_ROUTE = 1.2  # m from the middle of the lane, where the goal counts as reached


@dataclasses.dataclass
class Comfort:
    """Largest values so far: acceleration and lateral acceleration in m/s^2, jerk in m/s^3 (of the former)."""

    acceleration: float = 0.0
    lateral: float = 0.0
    jerk: float = 0.0

    def add(self, before: CarState, after: CarState) -> None:
        """Counts a step."""
        self.acceleration = max(self.acceleration, abs(after.acceleration))
        self.lateral = max(self.lateral, abs(after.speed * after.yaw_rate))
        self.jerk = max(self.jerk, abs(after.acceleration - before.acceleration) / STEP_S)


class Drive:
    """The state of an episode.

    car, traffic: now. past: the car's states of the last `PAST_S` seconds, `STEP_S` apart, the present one last; before
    the start it drove along its path. seconds: since the start. collided, off_road: ever. progress: 0 to 1, the share
    of the route that was reached on it. reached: the goal was, without either.
    """

    def __init__(self, scenario: Scenario) -> None:
        self.scenario, self.net = scenario, network(scenario.network)
        self._path = self.net.paths[scenario.path]
        self._goal = self.net.paths[scenario.goal_path]
        count = round(PAST_S / STEP_S)
        back = [scenario.speed * STEP_S * k for k in range(count, -1, -1)]
        self.past = [CarState(*self._path.at(scenario.s - s), scenario.speed) for s in back]
        self.traffic = Traffic(scenario, self.car)
        self.comfort = Comfort()
        self.seconds, self.progress = 0.0, 0.0
        self.collided = self.off_road = self.reached = False

    @property
    def car(self) -> CarState:
        """As it is now."""
        return self.past[-1]

    def step(self, acceleration: float, steering: float) -> None:
        """Goes on by `STEP_S` with controls held (m/s^2, rad). After a collision the car stands."""
        before = self.car
        self.traffic.step(before)
        after = (
            dataclasses.replace(before, speed=0.0, acceleration=0.0)
            if self.collided
            else moved(before, acceleration, steering, STEP_S)
        )
        self.past = [*self.past[1:], after]
        self.seconds += STEP_S
        if hit := self.traffic.hit(after):
            self.collided = True
            for which in hit:
                self.traffic.stop(which)
        self.off_road = self.off_road or not self.net.on_road(after.x, after.y, _OFF)
        if not self.collided:
            self.comfort.add(before, after)
        if not (self.collided or self.off_road):
            self._advance(after)

    def _advance(self, car: CarState) -> None:
        scenario = self.scenario
        s, left = self._path.project(car.x, car.y)
        goal_s, goal_left = self._goal.project(car.x, car.y)
        if min(abs(left), abs(goal_left)) < 2 * _ON_ROUTE:
            done = (s if self._goal is self._path or abs(left) < abs(goal_left) else goal_s) - scenario.s
            self.progress = max(self.progress, min(1.0, done / (scenario.goal - scenario.s)))
        heading = self._goal.at(goal_s)[2]
        along = math.cos(car.heading - heading) > 0.8
        self.reached = self.reached or (goal_s >= scenario.goal and abs(goal_left) < _ON_ROUTE and along)

    def places(self, seconds: float) -> Float[np.ndarray, "N 2"]:
        """Returns where the car was, in its frame of now, (right, ahead) in metres: the oldest first, now last.

        seconds: from one to the next, a multiple of `STEP_S`.
        """
        every = round(seconds / STEP_S)
        return np.array([self.car.to_car(c.x, c.y) for c in self.past[::every]])
