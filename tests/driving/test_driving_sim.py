"""The simulated car: episodes are repeatable, numbers are those of the true motion, and what fails is a failure."""

import itertools
import math

import numpy as np
import pytest

from openpi_like.driving.ego_motion import CarState
from openpi_like.driving.scenarios import PROMPTS, make_scenario
from openpi_like.robots.ego_vehicle import EGO_CONTROLS, EGO_VEHICLE
from openpi_like.robots.find import find_robot
from openpi_like.robots.sims.sim import HELD_OUT_SEED, Expert, Sim, check_action

NAMES = ("ego_vehicle", "ego_controls")
WORDS = {
    "highway-keep": "keep the lane",
    "highway-left": "change to the left lane",
    "highway-right": "change to the right lane",
    "merge": "pass the ramp",
    "roundabout-right": "enter the roundabout",
    "roundabout-ahead": "go around the roundabout",
    "roundabout-left": "leave the roundabout",
    "intersection-left": "turn left",
    "intersection-ahead": "cross the intersection",
    "intersection-right": "turn right",
}


def run(sim, task, seed, noise=0.0, steps=None):
    """Drives with the expert; returns the actions and the states, one more of these, and what was done."""
    sim.reset(task, seed)
    expert = sim.expert(np.random.default_rng(seed), noise)
    actions, states, doing = [], [sim._state()], []
    for _ in range(steps or sim.max_steps):
        actions.append(expert.act())
        doing.append(expert.doing)
        sim.step(expert.disturb(actions[-1]))
        states.append(sim._state())
        if sim.success or sim.collided or sim.off_road:
            break
    return np.stack(actions), np.stack(states), doing


# ---- the interface


@pytest.mark.parametrize("name", NAMES)
def test_is_a_sim_and_its_robot_is_found(cars, name):
    sim = cars(name)
    assert isinstance(sim, Sim)
    sim.reset("merge", 0)
    assert isinstance(sim.expert(np.random.default_rng(0), 0.0), Expert)
    declared = {"ego_vehicle": EGO_VEHICLE, "ego_controls": EGO_CONTROLS}[name]
    assert find_robot(name) == declared
    assert (sim.robot.name, sim.robot.action, sim.robot.state) == (name, declared.action, declared.state)


@pytest.mark.parametrize("task", PROMPTS)
def test_observation_is_what_the_robot_declares(cars, task):
    sim = cars("ego_vehicle")
    sim.reset(task, 3)
    observation = sim.observe()
    assert list(observation["images"]) == [c.name for c in sim.robot.cameras]
    for camera in sim.robot.cameras:
        image = observation["images"][camera.name]
        assert image.shape == (camera.height, camera.width, 3)
        assert image.dtype == np.uint8
        assert image.std() > 10
    assert observation["state"].shape == (17,)
    assert observation["state"].dtype == np.float32
    assert observation["prompt"] in PROMPTS[task]
    assert sim.frame(64).shape == (64, 64, 3)


@pytest.mark.parametrize("task", PROMPTS)
def test_seeds_take_turns_with_the_wordings(cars, task):
    sim, said = cars("ego_vehicle"), set()
    for seed in range(len(PROMPTS[task])):
        sim.reset(task, seed)
        said.add(sim._prompt)
    assert said == set(PROMPTS[task])
    assert 3 <= len(said) <= 4


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("task", ["highway-left", "merge", "roundabout-ahead", "intersection-right"])
def test_same_seed_same_episode_bit_for_bit(cars, name, task):
    sim, runs = cars(name), []
    for between in (1, 2):  # whatever happened before must not show
        run(sim, "intersection-left", seed=between, steps=3 * between)
        actions, states, doing = run(sim, task, seed=7, noise=sim.noises[-1], steps=10)
        runs.append((actions, states, doing, sim.drive.traffic.poses(), sim.observe()))
    (*first, seen), (*second, seen_again) = runs
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a, b)
    for view, image in seen["images"].items():
        np.testing.assert_array_equal(image, seen_again["images"][view])


def test_nothing_of_highway_envs_classes_is_changed(cars):
    from highway_env.vehicle.behavior import IDMVehicle
    from highway_env.vehicle.kinematics import Vehicle

    before = {c: {k: v for k, v in vars(c).items() if k.isupper()} for c in (IDMVehicle, Vehicle)}
    for task in ("highway-keep", "merge", "intersection-left"):
        run(cars("ego_vehicle"), task, 1, steps=4)
    assert before == {c: {k: v for k, v in vars(c).items() if k.isupper()} for c in before}


@pytest.mark.parametrize("task", PROMPTS)
def test_layouts_differ_between_seeds(task):
    scenarios = [make_scenario(task, seed) for seed in (*range(6), *range(HELD_OUT_SEED, HELD_OUT_SEED + 6))]
    assert len({(s.s, s.speed) for s in scenarios}) == len(scenarios)
    assert len({s.others for s in scenarios}) == len(scenarios)
    for s in scenarios:
        assert 3 <= len(s.others) <= 14
        assert len({o.body for o in s.others}) == len(s.others)
    assert len({make_scenario(task, seed).light for seed in range(20)}) == 3


# ---- experts


@pytest.mark.parametrize("task", PROMPTS)
def test_expert_succeeds_with_plans(cars, task):
    """With most noise; the words are those of the task, and turns go where they are named: left is positive."""
    sim = cars("ego_vehicle")
    actions, states, doing = run(sim, task, 1, noise=sim.noises[-1])
    assert sim.success
    assert (sim.collided, sim.off_road, sim.progress) == (False, False, 1.0)
    assert actions.dtype == np.float32
    assert actions.shape[1:] == (6, 2)
    assert 5.0 < sim.seconds < 40.0
    assert sim.seconds == pytest.approx(0.5 * len(actions))
    assert sim.comfort.lateral < 5.0
    np.testing.assert_array_less(np.hypot(states[:, 0], states[:, 1]), 30.0)
    assert all(doing)
    assert WORDS[task] in doing
    roads, _, turn = task.partition("-")
    if roads in ("intersection", "roundabout"):
        turned, aside = {"left": (90, -1), "ahead": (0, 0), "right": (-90, 1)}[turn]
        scenario, car = sim.drive.scenario, sim.drive.car
        x, y, heading = sim.drive.net.paths[scenario.path].at(scenario.s)
        begin = CarState(x, y, heading, 0.0)
        assert math.degrees(car.heading - begin.heading) == pytest.approx(turned, abs=20)
        right, ahead = begin.to_car(car.x, car.y)
        assert ahead > 10
        assert right * aside > 15 if aside else abs(right) < 4
        if roads == "intersection" and aside:
            assert np.sign(-states[:, 2].sum()) == aside


@pytest.mark.parametrize("task", ["highway-right", "merge", "roundabout-right", "intersection-left"])
def test_expert_succeeds_with_controls(cars, task):
    sim = cars("ego_controls")
    actions, _, doing = run(sim, task, seed=2, noise=sim.noises[-1])
    assert sim.success
    assert actions.dtype == np.float32
    assert actions.shape[1:] == (2,)
    lower, upper, *_ = EGO_CONTROLS.action_limits.arrays(2)
    assert (actions >= lower - 1e-6).all()
    assert (actions <= upper + 1e-6).all()
    assert len(set(doing)) > 1


@pytest.mark.parametrize("task", ["highway-left", "merge", "roundabout-left", "intersection-right"])
def test_first_waypoint_is_where_the_expert_is_half_a_second_later(cars, task):
    """Within 2 cm: the plan's half second has five controls, the way there is one arc; limits are not reached."""
    sim = cars("ego_vehicle")
    sim.reset(task, 4)
    expert = sim.expert(np.random.default_rng(0), 0.0)
    for _ in range(12):
        plan = expert.act()
        before = sim.drive.car
        sim.step(expert.disturb(plan))
        reached = before.to_car(sim.drive.car.x, sim.drive.car.y)
        np.testing.assert_allclose(reached, plan[0], atol=0.02)


def test_expert_takes_over_from_a_disturbed_car(cars):
    """Turned and moved aside in its lane, the car is back in the middle of it after seven seconds."""
    sim = cars("ego_vehicle")
    sim.reset("highway-keep", 5)
    drive = sim.drive
    drive.car.heading += 0.12
    drive.car.y += 0.8
    expert = sim.expert(np.random.default_rng(0), 0.0)
    for _ in range(14):
        sim.step(expert.disturb(expert.act()))
    path = drive.net.paths[drive.scenario.path]
    _, left = path.project(drive.car.x, drive.car.y)
    assert abs(left) < 0.4
    assert abs(drive.car.heading) < 0.03


# ---- left is left


def test_a_left_turn_of_highway_env_is_one_of_ours():
    from highway_env.road.lane import CircularLane

    from openpi_like.driving.road_networks import mirrored, network

    net = network("intersection")
    lane = net.graph.get_lane(("ir0", "il1", 0))  # from the south to the west
    assert isinstance(lane, CircularLane)
    (x0, y0), h0 = mirrored(lane.position(0.0, 0.0), lane.heading_at(0.0))
    (x1, y1), h1 = mirrored(lane.position(lane.length, 0.0), lane.heading_at(lane.length))
    assert math.degrees(h1 - h0) == pytest.approx(90)
    assert math.degrees(math.atan2(y1 - y0, x1 - x0)) == pytest.approx(135)  # to the north and west
    assert net.paths["0 left"].heading[-1] == pytest.approx(math.pi)  # ends westward
    np.testing.assert_allclose(mirrored(*mirrored((3.0, 4.0), 0.5))[0], (3.0, 4.0))


# ---- the state


@pytest.mark.parametrize("task", ["highway-right", "intersection-left"])
def test_state_is_that_of_the_true_motion(cars, task):
    """Against finite differences of the places, a tenth of a second apart, while controls are held."""
    sim = cars("ego_controls")
    sim.reset(task, 6)
    expert = sim.expert(np.random.default_rng(0), 0.0)
    for _ in range(35):
        sim.step(expert.act())
    before = sim.drive.car
    held = [before.acceleration, before.steering]
    state = sim._state()
    sim.step(np.array(held))
    after = sim.drive.car
    right, ahead = before.to_car(after.x, after.y)
    np.testing.assert_allclose(state[:2], np.array([right, ahead]) / 0.1, atol=0.15)  # speed changes on the way
    assert state[2] == pytest.approx((after.heading - before.heading) / 0.1, abs=0.03)
    assert state[7] == pytest.approx(before.speed)
    assert np.hypot(*state[:2]) == pytest.approx(before.speed, rel=1e-5)
    assert state[8] == pytest.approx(held[1])
    sim.step(np.array(held))
    last = sim.drive.car
    second = np.array(before.to_car(last.x, last.y)) - 2 * np.array([right, ahead])
    np.testing.assert_allclose(state[5:7], second / 0.01, atol=0.35)


@pytest.mark.parametrize("name", NAMES)
def test_history_is_where_the_car_was_in_the_frame_of_now(cars, name):
    sim = cars(name)
    sim.reset("intersection-right", 2)
    per_half = round(0.5 * sim.robot.control_hz)
    expert, places = sim.expert(np.random.default_rng(0), 0.0), []
    for _ in range(24 * per_half):
        places.append((sim.drive.car.x, sim.drive.car.y))
        sim.step(expert.disturb(expert.act()))
    now, state = sim.drive.car, sim._state()
    expected = [now.to_car(*places[-k * per_half]) for k in (4, 3, 2, 1)]
    np.testing.assert_allclose(state[9:], np.ravel(expected), atol=1e-4)
    a, b, c = np.array([*expected[-2:], (0.0, 0.0)])
    np.testing.assert_allclose(state[3:5], (c - 2 * b + a) / 0.25, atol=1e-3)


def test_before_the_start_the_car_drove_in_its_lane(cars):
    sim = cars("ego_vehicle")
    sim.reset("highway-keep", 3)
    state = sim._state()
    history = state[9:].reshape(4, 2)
    np.testing.assert_allclose(history[:, 0], 0.0, atol=1e-5)
    np.testing.assert_allclose(history[:, 1], -state[7] * np.array([2.0, 1.5, 1.0, 0.5]), rtol=1e-5)
    np.testing.assert_allclose(state[3:5], 0.0, atol=1e-3)


# ---- failures


def straight_on(sim, steps):
    """Holds speed and goes straight."""
    for _ in range(steps):
        sim.step(np.array([0.0, 0.0]))


def test_straight_on_where_the_road_turns_is_off_the_road(cars):
    sim = cars("ego_controls")
    sim.reset("roundabout-right", 3)
    sim.drive.traffic.vehicles.clear()
    sim.drive.traffic.slots.clear()
    straight_on(sim, 120)
    assert sim.off_road
    assert not sim.success
    assert 0.0 < sim.progress < 0.8
    straight_on(sim, 3)
    assert not sim.success


def test_another_way_than_told_is_no_success(cars):
    sim = cars("ego_controls")
    sim.reset("intersection-left", 3)
    sim.drive.traffic.vehicles.clear()
    sim.drive.traffic.slots.clear()
    straight_on(sim, 150)
    assert not sim.success
    assert not sim.collided


def test_who_rams_another_has_collided_for_good(cars):
    sim = cars("ego_controls")
    sim.reset("highway-keep", 0)
    drive = sim.drive
    ahead = next(
        (i for i, m in enumerate(drive.traffic.movers()) if m.path is drive.net.paths[drive.scenario.path]), None
    )
    assert ahead is not None
    car = drive.car
    victim = drive.traffic.vehicles[ahead]
    victim.position = np.array([car.x + 12.0, -car.y])
    victim.speed = 0.0
    victim.stopped = True
    for _ in range(20):
        sim.step(np.array([5.0, 0.0]))
    assert sim.collided
    assert not sim.success
    assert sim.drive.car.speed == 0.0
    progress = sim.progress
    for _ in range(5):
        sim.step(np.array([5.0, 0.0]))  # goes on accepting steps
    assert (sim.success, sim.progress) == (False, progress)
    assert np.isfinite(sim.observe()["state"]).all()


@pytest.mark.parametrize("task", ["highway-keep", "intersection-ahead"])
def test_others_brake_for_a_car_that_stands(cars, task):
    """The one who follows stops behind it."""
    sim = cars("ego_controls")
    for seed in itertools.count():
        sim.reset(task, seed)
        drive = sim.drive
        own = drive.net.paths[drive.scenario.path]
        behind = [
            m for m in drive.traffic.movers() if m.path is own and 12.0 < drive.scenario.s - m.s < 45.0 and m.speed > 3
        ]
        if behind:
            break
    for _ in range(90):
        sim.step(np.array([-3.0, 0.0]))
    assert drive.car.speed == 0.0
    assert not sim.collided


# ---- errors


@pytest.mark.parametrize("name", NAMES)
def test_errors(cars, name):
    sim = cars(name)
    with pytest.raises(ValueError, match=f"robot '{name}' has no task 'merg'; did you mean 'merge'"):
        sim.reset("merg", 0)
    with pytest.raises(ValueError, match=r"seed -1, expected 0 \.\. 9999"):
        sim.reset("merge", -1)
    sim.reset("merge", 0)
    with pytest.raises(ValueError, match="expected 2 finite numbers"):
        sim.step(np.full(2, np.nan))
    with pytest.raises(ValueError, match=r"got shape \(3,\)"):
        check_action(np.zeros(3), sim.robot)


def test_before_the_first_reset(cars):
    from openpi_like.robots.sims.ego_vehicle import EgoVehicleSim

    sim = EgoVehicleSim()
    assert not sim.success
    with pytest.raises(RuntimeError, match="'ego_vehicle' has no episode yet; call reset first"):
        sim.observe()


def test_unknown_network():
    from openpi_like.driving.road_networks import network

    with pytest.raises(ValueError, match="no road network 'highwy'; did you mean 'highway'"):
        network("highwy")
