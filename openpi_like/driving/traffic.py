"""The road with everybody on it: other vehicles react to each other and to the car.

On highways they are highway-env's `IDMVehicle`, which changes lanes by MOBIL (Kesting et al. 2007). Where paths cross
and join, highway-env's vehicles run into each other; there they follow their paths and give way, see `traffic_rules`.
"""

import math
from typing import Any

import numpy as np
from highway_env.road.road import Road
from highway_env.vehicle.behavior import IDMVehicle
from highway_env.vehicle.controller import ControlledVehicle
from highway_env.vehicle.kinematics import Vehicle
from jaxtyping import Float

from openpi_like.driving.ego_motion import LENGTH, WIDTH, CarState
from openpi_like.driving.planning_metrics import boxes_overlap
from openpi_like.driving.road_networks import Network, mirrored, network
from openpi_like.driving.scenarios import BODIES, Body, Scenario, Start
from openpi_like.driving.traffic_rules import Mover, drive, following

STEP_S = 0.1
_BESIDE = 2.3  # m from a path within which the car is in the way of who follows it


class _Ego(ControlledVehicle):
    """The car, as highway-env's vehicles see it: it is put where it is, and decides nothing."""

    def act(self, action: Any = None) -> None:
        """Nothing: others drive it."""

    def step(self, dt: float) -> None:
        """Nothing: others move it."""

    def put(self, car: CarState) -> None:
        """Takes the car's place, heading and speed, and finds its lane."""
        self.position, self.heading = mirrored((car.x, car.y), car.heading)
        self.speed = car.speed
        self.on_state_update()
        self.target_lane_index = self.lane_index


class _InLanes(IDMVehicle):
    """Keeps and changes lanes as highway-env has it, with a size and a manner of its own."""

    speed: float

    def __init__(self, road: Road, start: Start, net: Network) -> None:
        x, y, heading = net.paths[start.path].at(start.s)
        super().__init__(road, *mirrored((x, y), heading), start.speed, target_speed=start.manner.speed)
        body = BODIES[start.body]
        # Its own, not the class's: highway-env's scripts share those.
        self.LENGTH, self.WIDTH = body.length, body.width
        self.TIME_WANTED, self.DISTANCE_WANTED = start.manner.gap_s, start.manner.gap_m + body.length
        self.COMFORT_ACC_MAX, self.COMFORT_ACC_MIN = start.manner.acceleration, -start.manner.braking
        self.POLITENESS = 0.3
        self.body, self.net, self.stopped = body, net, False

    def act(self, action: Any = None) -> None:
        """See highway-env; one that was hit brakes."""
        super().act(action)
        if self.stopped:
            self.action = {"steering": 0.0, "acceleration": -6.0 if self.speed > 0 else 0.0}

    def step(self, dt: float) -> None:
        """See highway-env; never backwards."""
        super().step(dt)
        self.speed = max(self.speed, 0.0)

    def mover(self) -> Mover:
        """On the path of the lane that it is in or changes to."""
        (x, y), _ = mirrored(self.position, self.heading)
        path = self.net.paths[f"lane {min(self.target_lane_index[2], 1 if self.net.name == 'merge' else 99)}"]
        return Mover(path, path.project(x, y)[0], self.speed, self.LENGTH)


class _OnPath(Vehicle):
    """Follows a path exactly, at the speed that `traffic_rules` choose."""

    speed: float

    def __init__(self, road: Road, start: Start, net: Network) -> None:
        self.path, self.s, self.net = net.paths[start.path], start.s, net
        x, y, heading = self.path.at(start.s)
        super().__init__(road, *mirrored((x, y), heading), start.speed)
        self.manner, self.body, self.stopped = start.manner, BODIES[start.body], False
        self.LENGTH, self.WIDTH = self.body.length, self.body.width
        self._acceleration = 0.0

    def choose(self, others: list[Mover], car: CarState) -> None:
        """Decides on an acceleration, for the others on their paths, and the car wherever it is."""
        if self.stopped:
            self._acceleration = -6.0
            return
        self._acceleration, _ = drive(self.mover(), others, self.net.meetings, self.manner)
        s, left = self.path.project(car.x, car.y)
        if abs(left) < _BESIDE and 0.0 < s - self.s < 40.0:
            along = max(0.0, car.speed * math.cos(car.heading - self.path.at(s)[2]))
            gap = s - self.s - 0.5 * (self.LENGTH + LENGTH)
            keeping = self.manner.acceleration + following(self.speed, gap, along, self.manner)
            self._acceleration = max(-8.0, min(self._acceleration, keeping))

    def act(self, action: Any = None) -> None:
        """Nothing; see `choose`."""

    def step(self, dt: float) -> None:
        """Goes along the path, never backwards."""
        acceleration = max(self._acceleration, -self.speed / dt)
        self.s += (self.speed + 0.5 * acceleration * dt) * dt
        self.speed += acceleration * dt
        x, y, heading = self.path.at(self.s)
        self.position, self.heading = mirrored((x, y), heading)
        if self.net.name == "merge":  # where others look for who is in their lane
            self.on_state_update()

    def mover(self) -> Mover:
        """See `Mover`."""
        return Mover(self.path, self.s, self.speed, self.LENGTH)


class Traffic:
    """Everybody else of a scenario. The car is put on the road before each step."""

    def __init__(self, scenario: Scenario, car: CarState) -> None:
        self.net = network(scenario.network)
        self._own_path = self.net.paths[scenario.path]
        self._road = Road(self.net.graph, np_random=np.random.RandomState(scenario.seed))
        self._ego = _Ego(self._road, *mirrored((car.x, car.y), car.heading), car.speed)
        self.slots: list[int] = []
        self.vehicles: list[_InLanes | _OnPath] = []
        for start in scenario.others:
            self.vehicles.append((_InLanes if start.lanes else _OnPath)(self._road, start, self.net))
            self.slots.append(start.body)
        self._road.vehicles = [self._ego, *self.vehicles]

    def step(self, car: CarState) -> None:
        """Moves the others by `STEP_S`; `car` is where the car is before that."""
        self._ego.put(car)
        movers = self.movers()
        own = Mover(self._own_path, self._own_path.project(car.x, car.y)[0], car.speed, LENGTH)
        for i, vehicle in enumerate(self.vehicles):
            if isinstance(vehicle, _OnPath):
                vehicle.choose([own, *movers[:i], *movers[i + 1 :]], car)
            else:
                vehicle.act()
        for vehicle in self.vehicles:
            vehicle.step(STEP_S)
        at = enumerate(zip(self.movers(), self.vehicles, strict=True))
        gone = [i for i, (mover, vehicle) in at if mover.s > mover.path.length - vehicle.LENGTH]
        for i in reversed(gone):
            del self.vehicles[i], self.slots[i]
        self._road.vehicles = [self._ego, *self.vehicles]

    def movers(self) -> list[Mover]:
        """Returns all others on their paths."""
        return [vehicle.mover() for vehicle in self.vehicles]

    @property
    def bodies(self) -> list[Body]:
        """Of the others."""
        return [v.body for v in self.vehicles]

    def poses(self) -> Float[np.ndarray, "N 4"]:
        """Returns x, y, heading and speed of the others in our world."""
        rows = []
        for v in self.vehicles:
            (x, y), heading = mirrored(v.position, v.heading)
            rows.append((x, y, heading, v.speed))
        return np.array(rows, float).reshape(-1, 4)

    def hit(self, car: CarState) -> list[int]:
        """Returns which of the others the car overlaps."""
        poses = self.poses()
        sizes = np.array([(b.length, b.width) for b in self.bodies], float).reshape(-1, 2)
        boxes = np.concatenate([poses[:, :3], sizes], axis=1)
        own = np.array([car.x, car.y, car.heading, LENGTH, WIDTH])
        return np.flatnonzero(boxes_overlap(np.broadcast_to(own, boxes.shape), boxes)).tolist()

    def stop(self, which: int) -> None:
        """One that was hit brakes until it stands."""
        self.vehicles[which].stopped = True
