"""The car's motion and the controller that drives it to waypoints."""

import math

import numpy as np
import pytest

from openpi_like.driving.ego_motion import (
    LEAST_ACCELERATION,
    MOST_ACCELERATION,
    MOST_STEERING,
    CarState,
    controls_towards,
    moved,
)


def driven(car, right, ahead, seconds=0.5, step=0.1):
    """The car after it was driven to a place."""
    acceleration, steering = controls_towards(car, right, ahead, seconds)
    for _ in range(round(seconds / step)):
        car = moved(car, acceleration, steering, step)
    return car


@pytest.mark.parametrize("speed", [2.0, 6.0, 15.0, 25.0])
@pytest.mark.parametrize("bearing", [-20.0, 0.0, 8.0])
def test_waypoints_are_reached_exactly(speed, bearing):
    """Where limits allow: within a millimetre, whatever the step of integration."""
    distance = 0.5 * speed + 0.2
    bearing = math.radians(bearing * min(1.0, 6.0 / speed))
    right, ahead = -distance * math.sin(bearing), distance * math.cos(bearing)
    for step in (0.1, 0.05, 0.5):
        before = CarState(3.0, -2.0, 1.1, speed)
        after = driven(before, right, ahead, step=step)
        np.testing.assert_allclose(before.to_car(after.x, after.y), (right, ahead), atol=1e-3)


def test_what_the_car_cannot_do_is_cut():
    car = CarState(0.0, 0.0, 0.0, 10.0)
    assert driven(car, 0.0, 100.0).speed == pytest.approx(10 + 0.5 * MOST_ACCELERATION)
    assert driven(car, 0.0, 0.0).speed == pytest.approx(10 + 0.5 * LEAST_ACCELERATION)
    turned = moved(car, 0.0, 5.0, 0.1)
    assert turned.steering == MOST_STEERING
    assert turned.heading > 0  # to the left


def test_it_never_reverses_and_stands_still():
    car = CarState(0.0, 0.0, 0.0, 0.0)
    for place in ((0.0, 0.0), (0.3, -5.0), (-4.0, 0.0)):
        after = driven(car, *place)
        assert (after.x, after.y, after.speed, after.heading) == (0.0, 0.0, 0.0, 0.0)


def test_noisy_waypoints_where_it_stands_do_not_turn_the_wheels_wildly():
    rng, car = np.random.default_rng(0), CarState(0.0, 0.0, 0.0, 0.0)
    for _ in range(100):
        car = driven(car, *rng.normal(0.0, 0.05, 2))
        assert abs(car.steering) < 0.35
    assert math.hypot(car.x, car.y) < 5.0
    assert car.speed < 1.0


def test_noisy_waypoints_are_followed_smoothly():
    """Waypoints of a straight road with 10 cm of noise: it stays on it, at its speed."""
    rng, car = np.random.default_rng(1), CarState(0.0, 0.0, 0.0, 8.0)
    for _ in range(60):
        ahead = 0.5 * (car.speed + 0.3 * (8.0 - car.speed))
        # On the way back to the road, as a planner has it: a second and a half away.
        right, _ = car.to_car(car.x + 3 * ahead, 0.0)
        car = driven(car, right * (1 / 3) ** 1.5 + rng.normal(0.0, 0.05), ahead + rng.normal(0.0, 0.1))
        assert abs(car.y) < 1.5
        assert abs(car.speed - 8.0) < 2.5


def test_frames_are_inverse_and_right_is_right():
    car = CarState(5.0, 7.0, math.pi / 2, 0.0)  # northwards
    assert car.to_world(2.0, 3.0) == pytest.approx((7.0, 10.0))
    assert car.to_car(*car.to_world(-1.5, 4.0)) == pytest.approx((-1.5, 4.0))


def test_one_long_step_is_many_short_ones():
    a = b = CarState(1.0, 2.0, 0.3, 9.0)
    a = moved(a, 1.0, 0.0, 0.5)
    for _ in range(50):
        b = moved(b, 1.0, 0.0, 0.01)
    assert (a.x, a.y, a.speed) == pytest.approx((b.x, b.y, b.speed))
