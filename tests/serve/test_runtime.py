"""A robot's loop: chunks that overlap, counted in steps; commands within limits; a rate that is kept; a safe stop."""

import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openpi_like.serve.chunks import Chunks, Ensemble, Newest, RealTime
from openpi_like.serve.client import DeadlineError, PolicyClient, ServerError
from openpi_like.serve.runtime import Runtime, SpeedLimiter
from tests.serve.running import Stub, serving

H = 10  # of a chunk


def _chunk(step, offset=0.0):
    """Actions that name their step."""
    return (np.arange(step, step + H, dtype=np.float32) + offset)[:, None]


def _drive(chunks, periods, delay, offsets=None):
    """Runs; an answer comes `delay` control periods after its request. Returns what was executed, and what was sent."""
    executed, sent, coming = [], [], None
    for now in range(periods):
        if chunks.due():
            coming = (now + (delay if now else 0), chunks.step)
            sent.append((chunks.step, chunks.ask()))
        if coming is not None and coming[0] == now:
            chunks.arrived(_chunk(coming[1], 0.0 if offsets is None else offsets[len(sent) - 1]))
            coming = None
        executed.append(chunks.next())
    return executed, sent


# ---- Steps -----------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.integers(1, 12), st.integers(0, 14))
def test_every_action_is_executed_once_and_in_order(every, delay):
    """Where chunks are too short to reach the next one, there is none for a while; that is counted, never filled up."""
    chunks = Chunks(Newest(), every=every)
    executed, _ = _drive(chunks, 60, delay)
    actions = [float(action[0]) for action in executed if action is not None]
    assert actions == list(range(len(actions)))
    assert chunks.seams.empty == 60 - len(actions)
    between = max(every, delay + (delay > 0))  # a request waits for the answer of the one before
    assert (chunks.seams.empty == 0) == (min(between, H) + delay <= H)
    np.testing.assert_allclose(chunks.seams.jumps, 0)
    assert chunks.delay == max(chunks.seams.delays) <= delay


def test_a_new_chunk_takes_over_at_the_step_it_arrives():
    chunks = Chunks(Newest(), every=4)
    executed, sent = _drive(chunks, 12, delay=2, offsets=[0, 100, 200])
    assert [step for step, _ in sent] == [0, 4, 8]
    assert [float(a[0]) for a in executed] == [0, 1, 2, 3, 4, 5, 106, 107, 108, 109, 210, 211]
    np.testing.assert_allclose(chunks.seams.jumps, [100, 100])
    assert all(more == {} for _, more in sent)


def test_real_time_chunking_sends_what_is_left_and_how_long_it_takes():
    chunks = Chunks(RealTime(), every=4, delay=1, max_delay=3)
    _, sent = _drive(chunks, 40, delay=2)
    assert sent[0] == (0, {})  # there is nothing yet
    step, more = sent[1]
    np.testing.assert_array_equal(more["previous"], _chunk(0)[4:])
    assert (step, more["delay"]) == (4, 1)  # what was expected
    step, more = sent[2]
    np.testing.assert_array_equal(more["previous"], _chunk(4)[4:])
    assert (step, more["delay"]) == (8, 2)  # what was measured
    slow = Chunks(RealTime(), every=4, max_delay=3)
    _, sent = _drive(slow, 40, delay=5)
    assert (slow.delay, sent[2][1]["delay"]) == (5, 3)  # no more than the policy takes
    assert all(more["delay"] <= len(more["previous"]) for _, more in sent[1:] if more)


def test_an_ensemble_is_the_weighted_mean_oldest_first():
    chunks = Chunks(Ensemble(decay=0.5), every=2)
    executed, _ = _drive(chunks, 6, delay=0, offsets=[0, 30, 60])
    w = np.exp(-0.5 * np.arange(3))
    assert [float(a[0]) for a in executed[:2]] == [0, 1]
    np.testing.assert_allclose(
        [a[0] for a in executed[2:4]], [2 + 30 * w[1] / w[:2].sum(), 3 + 30 * w[1] / w[:2].sum()]
    )
    np.testing.assert_allclose(executed[4][0], 4 + (30 * w[1] + 60 * w[2]) / w.sum(), rtol=1e-6)


def test_steps_without_a_chunk_are_counted_and_asked_for_again():
    chunks = Chunks(Newest(), every=5)
    assert chunks.due()
    chunks.ask()
    with pytest.raises(RuntimeError, match="request of step 0 has no answer yet"):
        chunks.ask()
    assert chunks.next() is None
    assert not chunks.due()
    chunks.failed()
    assert chunks.due()
    with pytest.raises(RuntimeError, match="nothing was asked"):
        chunks.arrived(_chunk(0))
    assert chunks.seams.empty == 1
    with pytest.raises(ValueError, match="every=0"):
        Chunks(Newest(), every=0)


# ---- Limits ----------------------------------------------------------------------------------------------------------


def _about(**limits):
    none = {name: [None, None] for name in ("lower", "upper", "velocity", "acceleration")}
    return {"limits": {**none, "command": ["absolute", "delta"], **limits}}


@settings(deadline=None)
@given(st.lists(st.tuples(st.floats(-5, 5), st.floats(-1, 1)), min_size=2, max_size=20))
def test_commands_stay_within_limits_and_changes_are_counted(wanted):
    hz = 10.0
    about = _about(lower=[-2.0, None], upper=[3.0, None], velocity=[8.0, 4.0], acceleration=[20.0, 30.0])
    limiter = SpeedLimiter(about, hz)
    limiter.reset(np.array([0.5, 0.0]))
    sent = np.array([limiter(np.array(action)) for action in wanted])
    assert ((sent[:, 0] >= -2) & (sent[:, 0] <= 3)).all()
    speed = np.stack([np.diff(sent[:, 0], prepend=0.5) * hz, sent[:, 1] * hz], axis=1)
    assert (np.abs(speed) <= np.array([8.0, 4.0]) + 1e-6).all()
    assert (np.abs(np.diff(speed, axis=0, prepend=[[0.0, 0.0]])) * hz <= np.array([20.0, 30.0]) + 1e-6).all()
    changed = np.abs(sent - np.array(wanted)).max() > 1e-5
    assert changed == (sum(limiter.limited.values()) > 0)


def test_a_target_at_a_bound_is_reached_without_passing_it():
    """Joint 1 of a Panda, at its limits of acceleration."""
    limiter = SpeedLimiter(_about(upper=[2.8973, None], acceleration=[15.0, None]), 15.0)
    limiter.reset(np.array([2.0, 0.0]))
    sent = np.array([limiter(np.array([2.8973, 0.0]))[0] for _ in range(40)])
    assert (sent <= 2.8973).all()
    assert sent[-1] == pytest.approx(2.8973, abs=1e-9)
    assert (np.diff(sent) >= -1e-12).all()
    limiter.stand()
    again = limiter(np.array([-2.0, 0.0]))[0]
    assert again == pytest.approx(2.8973 - 15.0 / 15**2)


def test_commands_within_limits_are_not_changed():
    limiter = SpeedLimiter(_about(velocity=[100.0, 100.0], acceleration=[1e4, 1e4]), 10.0)
    actions = np.random.default_rng(0).normal(size=(50, 2)).astype(np.float32)
    np.testing.assert_array_equal([limiter(action) for action in actions], actions)
    assert set(limiter.limited.values()) == {0}


# ---- Time ------------------------------------------------------------------------------------------------------------


class Robot:
    """Counts steps, and says in its state how many there were."""

    def __init__(self):
        self.executed, self.holds = [], 0

    def observe(self):
        return {"state": np.array([len(self.executed)], np.float32), "prompt": "go", "images": {}}

    def act(self, action):
        self.executed.append(float(action[0]))

    def hold(self):
        self.holds += 1


class Slow(Stub):
    """Takes some time; the chunk counts up from the state."""

    def __init__(self, seconds, horizon=80):
        about = {"control_hz": 50.0, "execute_steps": 10, "action_horizon": horizon}
        super().__init__(self.answer, {"robots": {"r": about}})
        self.seconds, self.horizon, self.stall = seconds, horizon, threading.Event()
        self.previous = []

    def answer(self, observation):
        self.previous.append(observation.get("previous"))
        self.stall.wait(self.seconds)
        return (observation["state"][0] + np.arange(self.horizon, dtype=np.float32))[:, None]


def test_the_rate_is_kept_while_answers_take_half_a_second():
    policy, robot = Slow(0.5), Robot()
    with serving(policy) as server:
        client = PolicyClient(port=server.port)
        report = Runtime(client, "r", merge=RealTime(), stop_s=5.0).run(
            observe=robot.observe, act=robot.act, hold=robot.hold, steps=120
        )
        client.close()
    assert robot.executed == list(range(120))  # each chunk went on where the one before was
    assert (report.steps, report.held, report.lost, report.stopped) == (120, 0, 0, "")
    assert report.delay_steps >= 24
    assert report.jump_max == 0
    assert policy.previous[0] is None
    assert all(len(previous) >= 1 for previous in policy.previous[1:])


def test_a_robot_holds_and_stops_when_the_server_is_gone():
    policy, robot = Slow(0.0, horizon=20), Robot()
    with serving(policy) as server:
        client = PolicyClient(port=server.port, timeout_s=1.0, reconnect_s=0.2)
        runtime = Runtime(client, "r", stop_s=0.3)
        first = runtime.run(observe=robot.observe, act=robot.act, hold=robot.hold, steps=20)
        assert (first.held, first.stopped) == (0, "")
        with pytest.raises(ValueError, match="the server has no robot 's', it has r"):
            Runtime(client, "s")
    begun, n = time.monotonic(), len(robot.executed)
    report = runtime.run(observe=robot.observe, act=robot.act, hold=robot.hold, steps=1000)
    assert report.stopped == "no first action within 0.3 s"
    assert len(robot.executed) == n
    assert robot.holds > 5
    assert time.monotonic() - begun < 5
    client.close()


class Flaky:
    """A server that fails in the middle, in one of the ways there are."""

    def __init__(self, error, fails):
        self.metadata = {"robots": {"r": {"control_hz": 100.0, "execute_steps": 5}}}
        self._error, self._fails, self._asked = error, fails, 0

    def infer(self, observation):
        self._asked += 1
        if self._asked in self._fails:
            raise self._error
        return {"actions": (observation["state"][0] + np.arange(8, dtype=np.float32))[:, None]}


@pytest.mark.parametrize("error", [ConnectionError("gone"), DeadlineError("late"), ServerError("busy: 64 wait")])
def test_a_robot_goes_on_when_answers_come_again(error):
    robot = Robot()
    report = Runtime(Flaky(error, range(3, 6)), "r", stop_s=2.0).run(
        observe=robot.observe, act=robot.act, hold=robot.hold, steps=60
    )
    assert (report.steps, report.stopped) == (60, "")
    assert report.lost + report.refused == 3
    assert robot.executed == list(range(len(robot.executed)))
    assert len(robot.executed) == 60 - report.held


def test_an_observation_that_is_refused_ends_the_run_at_once():
    robot = Robot()
    with pytest.raises(ServerError, match="state: got shape"):
        Runtime(Flaky(ServerError("invalid: state: got shape (1,)"), [2]), "r").run(
            observe=robot.observe, act=robot.act, hold=robot.hold, steps=1000
        )
    assert robot.holds >= 1
    assert len(robot.executed) < 50
