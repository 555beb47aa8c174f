"""How the car moves: a kinematic bicycle about its middle, and the controller that drives it to a waypoint."""

import dataclasses
import math

LENGTH, WIDTH = 5.0, 2.0  # m, of the car
LEAST_ACCELERATION, MOST_ACCELERATION = -8.0, 5.0  # m/s^2
MOST_STEERING = 0.8  # rad, of the front wheels, to either side
_BEHIND = LENGTH / 2  # m from the middle to the rear axle: highway-env's bicycle
_SHORTEST = 1.0  # m; to aim at what is nearer would turn the wheels wildly where the car stands


@dataclasses.dataclass
class CarState:
    """Where the car is, and how it moves. x east and y north in metres, heading in rad counter-clockwise from east,
    speed m/s, and the controls of the last step: acceleration m/s^2, steering rad to the left."""

    x: float
    y: float
    heading: float
    speed: float
    acceleration: float = 0.0
    steering: float = 0.0

    @property
    def slip(self) -> float:
        """Angle in rad between where the car points and where its middle goes, to the left."""
        return math.atan(0.5 * math.tan(self.steering))

    @property
    def yaw_rate(self) -> float:
        """rad/s, to the left."""
        return self.speed * math.sin(self.slip) / _BEHIND

    def to_world(self, right: float, ahead: float) -> tuple[float, float]:
        """Returns the place in the world of one in the car's frame."""
        c, s = math.cos(self.heading), math.sin(self.heading)
        return self.x + ahead * c + right * s, self.y + ahead * s - right * c

    def to_car(self, x: float, y: float) -> tuple[float, float]:
        """Returns (right, ahead) of a place in the world."""
        c, s, dx, dy = math.cos(self.heading), math.sin(self.heading), x - self.x, y - self.y
        return s * dx - c * dy, c * dx + s * dy


def moved(car: CarState, acceleration: float, steering: float, seconds: float) -> CarState:
    """Returns the car after `seconds` with controls held; they are cut to what the car can do. It never reverses."""
    acceleration = min(max(acceleration, LEAST_ACCELERATION), MOST_ACCELERATION)
    steering = min(max(steering, -MOST_STEERING), MOST_STEERING)
    acceleration = max(acceleration, -car.speed / seconds)
    distance = (car.speed + 0.5 * acceleration * seconds) * seconds
    slip = math.atan(0.5 * math.tan(steering))
    turn = distance * math.sin(slip) / _BEHIND
    # The chord of the arc, so that the place does not depend on how long a step is.
    chord = distance * (math.sin(turn / 2) / (turn / 2) if abs(turn) > 1e-9 else 1.0)
    direction = car.heading + slip + turn / 2
    return CarState(
        car.x + chord * math.cos(direction),
        car.y + chord * math.sin(direction),
        car.heading + turn,
        car.speed + acceleration * seconds,
        acceleration,
        steering,
    )


def steering_for(slip: float) -> float:
    """Returns the steering that makes the middle of the car go at angle `slip` to where it points; both in rad."""
    return math.atan(2 * math.tan(min(max(slip, -1.2), 1.2)))


def controls_towards(car: CarState, right: float, ahead: float, seconds: float) -> tuple[float, float]:
    """Returns (acceleration, steering) that, held for `seconds`, bring the car to a place in its frame.

    It goes there on an arc and with a constant acceleration, so it arrives exactly where limits allow. Of a place that
    is nearer than a metre the direction counts less, and one behind the car makes it stop.
    """
    distance = math.hypot(right, ahead)
    bearing = math.atan2(-right, max(ahead, 1e-6)) * min(1.0, distance / _SHORTEST)
    if ahead <= 0.0:
        distance, bearing = 0.0, 0.0
    # The chord to the place lies at slip + half the turn, and the turn is distance * sin(slip) / _BEHIND.
    slip, arc = bearing / (1 + distance / LENGTH), distance
    for _ in range(4):
        turn = arc * math.sin(slip) / _BEHIND
        slip += (bearing - slip - turn / 2) / (1 + arc / LENGTH * math.cos(slip))
        arc = distance * ((turn / 2) / math.sin(turn / 2) if 1e-9 < abs(turn) < 3 else 1.0)
    return 2 * (arc - car.speed * seconds) / seconds**2, steering_for(slip)
