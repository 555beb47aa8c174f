"""Simulated robots: experts succeed, observations are whole and repeatable, evaluation layouts are new."""

import importlib.util
import itertools

import numpy as np
import pytest

from openpi_like.robots.find import find_robot
from openpi_like.robots.robosuite_arms import ARMS
from openpi_like.robots.sims import SIMS, make_sim
from openpi_like.robots.sims.metaworld_tasks import FIRST
from openpi_like.robots.sims.metaworld_tasks import TASKS as META_WORLD
from openpi_like.robots.sims.sim import HELD_OUT_SEED, check_action

PACKAGES = {
    "pusht": "gym_pusht",
    "sawyer": "metaworld",
    "metaworld_fetch": "metaworld",
    "aloha": "gym_aloha",
    "fetch": "gymnasium_robotics",
    "robosuite_panda": "robosuite",  # see test_sims_arms.py for the other arms
}
TASKS = {
    "pusht": ["push-t"],
    "sawyer": ["handle-press", "drawer-open", "plate-slide"],
    "metaworld_fetch": ["button-press", "window-open", "coffee-button"],
    "aloha": ["transfer-cube"],
    "fetch": ["reach", "push", "lift", "pick-and-place"],
    "robosuite_panda": ["lift", "stack"],
}
CASES = [(robot, task) for robot, tasks in TASKS.items() for task in tasks]


@pytest.fixture(scope="module")
def sims():
    """Robot name -> its simulator, made when first asked for: building one takes up to a second."""
    made = {}

    def get(name):
        if importlib.util.find_spec(PACKAGES[name]) is None:
            pytest.skip(f"{PACKAGES[name]} is not installed")
        if name not in made:
            made[name] = make_sim(name)
        return made[name]

    return get


def run_expert(sim, task, seed, noise=0.0, steps=None):
    """Returns the clean actions of an episode, up to success, and the subtasks that they were part of."""
    sim.reset(task, seed)
    expert = sim.expert(np.random.default_rng(seed), noise)
    actions, subtasks = [], []
    for _ in range(steps or sim.max_steps):
        actions.append(expert.act())
        subtasks.append(expert.doing)
        sim.step(expert.disturb(actions[-1]))
        if sim.success:
            break
    return np.stack(actions), subtasks


@pytest.mark.parametrize(("robot", "task"), CASES)
@pytest.mark.parametrize("noisy", [False, True])
def test_expert_succeeds(sims, robot, task, noisy):
    sim = sims(robot)
    actions, subtasks = run_expert(sim, task, seed=4, noise=sim.noises[-1] if noisy else 0.0)
    assert sim.success
    assert all(subtasks)
    assert len(set(subtasks)) > 1 or task == "reach"
    assert len(actions) < sim.max_steps
    assert actions.dtype == np.float32
    assert actions.shape[1] == sim.robot.robot_action_size
    if all(f.command == "delta" for f in sim.robot.action if f.gripper is None):
        assert np.abs(actions).max() <= 1.0  # cut before it is recorded
    if robot == "pusht":
        assert actions.min() >= 0
        assert actions.max() <= 512


@pytest.mark.parametrize("task", FIRST)
def test_sawyers_subtasks_are_the_way_there_and_then_the_task(sims, task):
    """Once it is there it stays there, also while it is disturbed; in 101 the hand begins above the handle."""
    sim = sims("sawyer")
    for seed in (0, 101):
        _, subtasks = run_expert(sim, task, seed, noise=sim.noises[1])
        runs = [name for name, _ in itertools.groupby(subtasks)]
        go, act = META_WORLD[task].go, META_WORLD[task].act
        begins_there = task == "handle-press" and seed == 101
        assert runs == ([act] if begins_there else [go, act]), (seed, subtasks)


@pytest.mark.parametrize("robot", PACKAGES)
def test_nothing_happens_without_the_expert(sims, robot):
    sim = sims(robot)
    sim.reset(sim.tasks[0], 0)
    # Stays where it is: the robot's own state is the target where commands are absolute.
    absolute = any(f.command == "absolute" for f in sim.robot.action if f.gripper is None)
    still = sim.observe()["state"].astype(np.float64) if absolute else np.zeros(sim.robot.robot_action_size)
    for _ in range(20):
        sim.step(still)
    assert not sim.success


@pytest.mark.parametrize(("robot", "task"), CASES)
def test_same_seed_same_episode_bit_for_bit(sims, robot, task):
    sim = sims(robot)
    runs = []
    for between in (1, 2):  # whatever happened before must not show
        run_expert(sim, task, seed=between, steps=3 * between)
        actions, _ = run_expert(sim, task, seed=7, noise=sim.noises[-1], steps=12)
        runs.append((actions, sim.observe()))
    (actions_1, first), (actions_2, second) = runs
    np.testing.assert_array_equal(actions_1, actions_2)
    np.testing.assert_array_equal(first["state"], second["state"])
    for name, image in first["images"].items():
        np.testing.assert_array_equal(image, second["images"][name])


@pytest.mark.parametrize("robot", PACKAGES)
def test_observation_is_what_the_robot_declares(sims, robot):
    sim = sims(robot)
    for task in TASKS[robot]:
        sim.reset(task, 3)
        observation = sim.observe()
        assert set(observation) == {"images", "state", "prompt"}
        assert list(observation["images"]) == [c.name for c in sim.robot.cameras]
        for camera in sim.robot.cameras:
            image = observation["images"][camera.name]
            assert image.shape == (camera.height, camera.width, 3)
            assert image.dtype == np.uint8
            assert len(np.unique(image.reshape(-1, 3), axis=0)) > 5
            assert image.std() > 10
        assert observation["state"].shape == (sim.robot.robot_state_size,)
        assert observation["state"].dtype == np.float32
        assert observation["prompt"].islower() or "T" in observation["prompt"]
        assert sim.frame(100).shape == (100, 100, 3)


@pytest.mark.parametrize(("robot", "task"), CASES)
def test_camera_sees_what_differs_between_layouts(sims, robot, task):
    sim = sims(robot)
    images = []
    for seed in (1, 2, HELD_OUT_SEED + 1):
        sim.reset(task, seed)
        images.append(sim.observe()["images"]["base"].astype(int))
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert (np.abs(images[a] - images[b]).sum(-1) > 30).sum() >= 4  # pixels


@pytest.mark.parametrize(("robot", "task"), CASES)
def test_held_out_layouts_are_new(sims, robot, task):
    sim = sims(robot)

    def layout(seed):
        sim.reset(task, seed)
        if robot in ("sawyer", "metaworld_fetch"):
            return tuple(sim.privileged_observation[[4, 5, 6, 36, 37, 38]])
        if robot == "fetch":
            return tuple(sim.goal)
        if robot == "robosuite_panda":
            return tuple(sim.cubes[0][0])
        return tuple(sim.block_pose if robot == "pusht" else sim.cube)

    train = {layout(seed) for seed in range(8)}
    held_out = {layout(HELD_OUT_SEED + seed) for seed in range(8)}
    assert len(train) == len(held_out) == 8
    assert not train & held_out


@pytest.mark.parametrize("robot", PACKAGES)
def test_moving_the_robot_changes_its_image(sims, robot):
    sim = sims(robot)
    task = TASKS[robot][0]
    sim.reset(task, 5)
    before = {k: v.copy() for k, v in sim.observe()["images"].items()}
    state = sim.observe()["state"]
    run_expert(sim, task, seed=5, steps=12)
    after = sim.observe()
    assert np.abs(after["state"] - state).max() > 0.01
    assert any((after["images"][k] != v).any() for k, v in before.items())


def test_sawyer_state_holds_nothing_privileged(sims):
    sim = sims("sawyer")
    states = []
    for seed in (1, 2):
        sim.reset("plate-slide", seed)
        states.append(sim.observe()["state"])
    np.testing.assert_allclose(states[0], states[1], atol=1e-3)  # the layout differs, the arm does not
    assert 0.0 <= states[0][3] <= 1.0


def test_aloha_gripper_is_normalised(sims):
    sim = sims("aloha")
    sim.reset("transfer-cube", 0)
    # (0.02239 - 0.01844) / (0.058 - 0.01844)
    np.testing.assert_allclose(sim.observe()["state"][[6, 13]], 0.09985, atol=1e-4)
    target = sim.observe()["state"].astype(np.float64)
    target[[6, 13]] = 1.0
    for _ in range(50):
        sim.step(target)
    assert np.all(sim.observe()["state"][[6, 13]] > 0.9)


@pytest.mark.parametrize("seed", [2, 4])
def test_aloha_expert_takes_over_anywhere_and_takes_a_moved_cube(sims, seed):
    sim, rng = sims("aloha"), np.random.default_rng(seed)
    sim.reset("transfer-cube", seed)
    wandering = sim.expert(rng, 0.1)
    for _ in range(20):
        sim.step(wandering.disturb(wandering.act()))
    expert = sim.expert(rng, 0.0)
    for step in range(250):
        if step == 15:
            sim.data.qpos[16:18] += [0.03, -0.04]
        sim.step(expert.act())
    assert sim.success


def test_aloha_demonstrations_come_from_many_sides(sims):
    """Disturbed, the same layout is solved by other ways: where the joints are does not say where the cube is."""
    sim = sims("aloha")
    ways: list[np.ndarray] = []
    for noise in (0.0, 0.06):
        sim.reset("transfer-cube", 6)
        expert, way = sim.expert(np.random.default_rng(1), noise), list[np.ndarray]()
        while not sim.success and len(way) < sim.max_steps:
            way.append(sim.observe()["state"][7:10])
            sim.step(expert.disturb(expert.act()))
        assert sim.success
        ways.append(np.array(way[:30]))
    assert np.abs(ways[1] - ways[0]).max() > 0.05  # rad


def test_pusht_disc_goes_where_it_is_told(sims):
    sim = sims("pusht")
    sim.reset("push-t", 0)
    corner = np.array([40.0, 40.0])
    for _ in range(60):
        sim.step(corner)
    assert np.linalg.norm(sim.disc - corner) < 1.0 or np.linalg.norm(sim.block_pose[:2] - corner) < 150
    image = sim.observe()["images"]["base"].astype(int)
    column, row = np.round(sim.disc / 512 * len(image) - 0.5).astype(int)
    assert image[row, column, 2] > image[row, column, 0] + 50  # x is the column, y the row, the disc is blue


# ---- errors


@pytest.mark.parametrize("robot", PACKAGES)
def test_unknown_task_names_near_ones(sims, robot):
    sim = sims(robot)
    task = sim.tasks[-1]
    with pytest.raises(ValueError, match=f"robot '{robot}' has no task '{task}s'; did you mean '{task}'"):
        sim.reset(task + "s", 0)
    with pytest.raises(ValueError, match=r"seed -1, expected 0 \.\. 9999"):
        sim.reset(task, -1)


@pytest.mark.parametrize("robot", PACKAGES)
def test_bad_actions_are_refused(sims, robot):
    sim = sims(robot)
    sim.reset(sim.tasks[0], 0)
    size = sim.robot.robot_action_size
    with pytest.raises(ValueError, match=f"action of robot '{robot}'.*expected {size} finite numbers"):
        sim.step(np.full(size, np.nan))
    with pytest.raises(ValueError, match=rf"got shape \({size + 1},\)"):
        check_action(np.zeros(size + 1), sim.robot)


def test_unknown_simulator():
    elsewhere = {"ego_vehicle", "ego_controls", "cubes_panda"}  # see tests/driving, test_coloured_cubes.py
    assert {name for name in SIMS if name not in ARMS} | {"robosuite_panda"} == set(PACKAGES) | elsewhere
    with pytest.raises(ValueError, match="no simulator of robot 'sawer'; did you mean 'sawyer'"):
        make_sim("sawer")


def test_missing_extra_is_explained(monkeypatch):
    def missing(name):
        raise ModuleNotFoundError("No module named 'pymunk'", name="pymunk")

    monkeypatch.setattr("openpi_like.robots.sims.importlib.import_module", missing)
    for robot, extra in (("pusht", "sim"), ("robosuite_panda", "arms")):
        message = f"No module named 'pymunk'; the simulated robot '{robot}' needs the `{extra}` extra"
        with pytest.raises(ModuleNotFoundError, match=message):
            make_sim(robot)


@pytest.mark.parametrize("name", SIMS)
def test_every_simulated_robot_is_found_by_its_name(name):
    assert find_robot(name).name == name
