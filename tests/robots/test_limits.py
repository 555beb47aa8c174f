"""Limits: what goes beyond them by hand, against a loop over steps, and every error."""

import dataclasses
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from openpi_like.config import from_json, to_json
from openpi_like.robots import ActionField, Limits, StateField
from openpi_like.robots.limits import joined
from tests.robots.single_fields import ACTION, STATE, make_robot

KINDS = ("lower", "upper", "velocity", "acceleration")


def test_excess_by_hand() -> None:
    """Two joints at 10 Hz; the second has no upper limit, and no speed that is known."""
    limits = Limits(lower=-1.0, upper=(1.0, None), velocity=(2.0, None), acceleration=30.0)
    x = np.array([[0.0, 0.0], [0.1, -3.0], [0.4, 9.0], [1.5, 9.0]])
    found = limits.excess(x, 10.0)
    np.testing.assert_allclose(found["lower"], [[0, 0], [0, 2], [0, 0], [0, 0]])
    np.testing.assert_allclose(found["upper"], np.array([[0, 0], [0, 0], [0, 0], [0.5, 0]]))
    # Speeds of the first: 1, 3, 11 from the second step on.
    np.testing.assert_allclose(found["velocity"][:, 0], [0, 0, 1, 9], rtol=1e-6)
    assert not found["velocity"][:, 1].any()
    # Their changes: 20 and 80 from the third on. The second joint's: (120 + 30) * 10, -120 * 10.
    np.testing.assert_allclose(found["acceleration"], [[0, 0], [0, 0], [0, 1470], [50, 1170]], rtol=1e-6)


def by_loop(limits: Limits, x: np.ndarray, hz: float, command: str) -> dict[str, np.ndarray]:
    """Step by step, dim by dim, as `Limits` words it; of one sequence."""
    found = {kind: np.zeros(x.shape) for kind in KINDS}
    for d in range(x.shape[1]):
        bounds: dict[str, float | None] = {}
        for kind in KINDS:
            bound = getattr(limits, kind)
            bounds[kind] = bound[d] if isinstance(bound, tuple) else bound
        speeds: list[float | None] = []
        for t in range(len(x)):
            now = float(x[t, d])
            if command == "absolute":
                speed = None if t == 0 else (now - float(x[t - 1, d])) * hz
            else:
                speed = now * hz if command == "delta" else now
            before = speeds[-1] if speeds else None
            speeds.append(speed)
            change = None if speed is None or before is None else (speed - before) * hz
            for kind, value in (("lower", -now), ("upper", now), ("velocity", speed), ("acceleration", change)):
                bound = bounds[kind]
                if bound is None or value is None:
                    continue
                value = abs(value) if kind in ("velocity", "acceleration") else value
                found[kind][t, d] = max(value - (-bound if kind == "lower" else bound), 0.0)
    return found


BOUND = st.none() | st.floats(0.5, 30.0)


@given(
    command=st.sampled_from(["absolute", "delta", "velocity"]),
    hz=st.sampled_from([5.0, 50.0]),
    bounds=st.lists(st.tuples(BOUND, BOUND), min_size=4, max_size=4),
    batch=st.sampled_from([(), (2,), (2, 1)]),
    data=st.data(),
)
@settings(max_examples=150, deadline=None)
def test_excess_is_that_of_a_loop(command, hz, bounds, batch, data) -> None:
    lower = tuple(None if b is None else -b for b in bounds[0])
    limits = Limits(lower, *bounds[1:])
    steps = data.draw(st.integers(1, 5))
    x = data.draw(arrays(np.float32, (*batch, steps, 2), elements=st.floats(-40, 40, width=32)))
    found = limits.excess(x, hz, command)
    expected = [by_loop(limits, one, hz, command) for one in x.reshape(-1, steps, 2)]
    for kind in KINDS:
        wanted = np.stack([e[kind] for e in expected]).reshape(x.shape)
        # A ten-thousandth of the bounds is rounding; whatever is beyond that is reported in full.
        np.testing.assert_allclose(found[kind], wanted, rtol=1e-5, atol=4e-3, err_msg=kind)


def test_rounding_is_not_beyond() -> None:
    """A joint that stands at its limit, through float32 and the model's radians and back."""
    limits = Limits(0.0, 180.0, velocity=90.0, acceleration=1000.0)
    robot = make_robot(
        [StateField("j", "s", 1, unit="deg", limits=limits)],
        [ActionField("j", "a", 1, unit="deg", relative_to="j", limits=limits)],
        control_hz=50.0,
    )
    ramp = np.clip(np.arange(400)[:, None] * np.float32(90.0 / 50.0), 0.0, 180.0)
    state = np.array([137.7])
    there_and_back = robot.decode_actions(robot.encode_actions(ramp, state), state)
    assert np.abs(there_and_back - ramp).max() > 0.0
    start = there_and_back[:100]  # the ramp alone: at its end the joint stops at once
    assert robot.limit_problems(start) == []
    assert robot.limit_problems(start * 1.001)
    assert robot.limit_problems(start - 0.1) == [
        "j_0 [deg]: lower limit 0, got -0.1 at step 0 (1 of 100 steps)",
    ]


def test_limits_of_a_robot_join_its_fields() -> None:
    arm = ActionField("arm", "a", 2, unit="deg", names=("waist", "elbow"), limits=Limits(-90.0, (90.0, 45.0)))
    push = ActionField("push", "a", 1, start=2, command="delta", limits=Limits(velocity=2.0))
    robot = make_robot([STATE], [arm, ACTION, push], control_hz=20.0)
    assert robot.action_limits == Limits(
        (-90.0, -90.0, None, None, None, None),
        (90.0, 45.0, None, None, None, None),
        (None, None, None, None, None, 2.0),
        (None,) * 6,
    )
    assert robot.state_limits == joined([(None, 3)])
    chunk = np.zeros((2, 3, 6))
    chunk[1, 2, 1], chunk[0, :, 0], chunk[0, 1, 5] = 50.0, -91.0, -0.2
    assert robot.limit_problems(chunk) == [
        "waist [deg]: lower limit -90, got -91 at step 0, 0 (3 of 6 steps)",
        "elbow [deg]: upper limit 45, got 50 at step 1, 2 (1 of 6 steps)",
        "push_0 [1]: velocity limit 2, got 4 at step 0, 1 (1 of 6 steps)",
    ]
    assert len(robot.limit_problems(chunk, hz=10.0)) == 2  # a change of 0.2 per step is then 2 per second
    excess = robot.action_excess(chunk)
    assert {kind: by.shape for kind, by in excess.items()} == dict.fromkeys(KINDS, (2, 3, 6))
    stored = json.dumps(to_json(robot), allow_nan=False)
    assert from_json(json.loads(stored)) == robot


def test_values_that_are_no_numbers_are_refused() -> None:
    robot = make_robot([STATE], [dataclasses.replace(ACTION, limits=Limits(-1.0, 1.0))])
    chunk = np.zeros((4, 3))
    chunk[2, 1] = math.nan
    with pytest.raises(ValueError, match=r"1 values are not finite, the first at \[2, 1\] of \(4, 3\)"):
        robot.limit_problems(chunk)
    with pytest.raises(ValueError, match=r"actions of robot 'r': got shape \(4, 2\), expected last axis 3"):
        robot.limit_problems(np.zeros((4, 2)))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Limits(upper=math.inf), r"upper \[inf\], expected finite numbers, or None where there is no limit"),
        (lambda: Limits(lower=(0.0, math.nan)), r"lower \[nan\]"),
        (lambda: Limits(velocity=0.0), "velocity 0.0, expected numbers > 0"),
        (lambda: Limits(acceleration=(1.0, -1.0)), r"acceleration \(1.0, -1.0\), expected numbers > 0"),
        (lambda: Limits(1.0, 1.0), "lower 1.0 and upper 1.0, expected each lower below its upper"),
        (lambda: Limits((0.0, 2.0), 1.0), r"lower \(0.0, 2.0\) and upper 1.0"),
        (lambda: Limits((0.0, 0.0), velocity=(1.0,)), r"numbers per bound \{'lower': 2, 'velocity': 1\}"),
        (lambda: Limits(math.inf, velocity=-1.0), r"limits: lower \[inf\].*; velocity -1.0"),  # all at once
    ],
)
def test_errors(build, message) -> None:
    with pytest.raises(ValueError, match=message):
        build()
