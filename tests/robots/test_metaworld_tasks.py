"""All fifty Meta-World tasks: the package's own sets, words that tell them apart, goals that can be seen, experts."""

import importlib.util
import itertools

import numpy as np
import pytest

from openpi_like.robots.sims import make_sim
from openpi_like.robots.sims.metaworld_tasks import FIRST, MT10, MT50, TASKS
from openpi_like.robots.sims.sim import HELD_OUT_SEED

pytestmark = pytest.mark.skipif(importlib.util.find_spec("metaworld") is None, reason="metaworld is not installed")

# The package shows these goals by balls of a pixel, or behind something, or not at all.
UNSEEN = ("reach", "push-wall", "pick-place", "hand-insert", "pick-out-of-hole", "plate-slide-side")


@pytest.fixture(scope="module")
def sim():
    return make_sim("sawyer")


def run_expert(sim, task, seed, noise, steps):
    """Returns pictures and observations of an episode, up to success, and the subtasks of its steps."""
    sim.reset(task, seed)
    expert = sim.expert(np.random.default_rng(seed), noise)
    seen, subtasks = [sim.frame(64)], list[str]()
    while not sim.success and len(subtasks) < steps:
        sim.step(expert.disturb(expert.act()))
        seen.append(sim.privileged_observation)
        subtasks.append(expert.doing)
    return [*seen, sim.frame(64)], subtasks


def test_sets_are_those_of_the_package():
    from metaworld.env_dict import MT10_V3, MT50_V3

    assert {f"{task}-v3" for task in MT10} == set(MT10_V3)
    assert {f"{task}-v3" for task in MT50} == set(MT50_V3)
    assert (len(MT10), len(MT50)) == (10, 50)


def test_programs_do_the_first_tasks_unless_told_otherwise(sim):
    assert sim.tasks == FIRST
    assert FIRST == (
        "button-press-topdown",
        "button-press",
        "coffee-button",
        "handle-press",
        "plate-slide",
        "window-open",
        "window-close",
        "faucet-open",
        "faucet-close",
        "drawer-open",
        "drawer-close",
        "door-close",
    )
    assert sorted(sim.known_tasks()) == sorted(MT50)
    fetch = make_sim("metaworld_fetch")
    assert fetch.known_tasks() == fetch.tasks
    with pytest.raises(ValueError, match="robot 'metaworld_fetch' has no task 'reach'"):
        fetch.reset("reach", 0)
    with pytest.raises(ValueError, match="robot 'sawyer' has no task 'peg-insert'; did you mean 'peg-insert-side'"):
        sim.reset("peg-insert", 0)


def test_every_wording_belongs_to_one_task():
    prompts = [prompt for task in TASKS.values() for prompt in task.prompts]
    assert len(set(prompts)) == len(prompts)
    assert all(prompt == prompt.lower().strip(" .") for prompt in prompts)
    assert all(task.go != task.act for task in TASKS.values())


@pytest.mark.parametrize("task", UNSEEN)
def test_a_goal_is_seen_where_only_the_goal_differs(sim, task):
    sim.reset(task, 0)
    env = sim._envs[task]
    space = env._random_reset_space
    low, high = space.low.copy(), space.high.copy()
    try:
        space.low[:3] = space.high[:3] = (low[:3] + high[:3]) / 2
        pictures, objects, goals = [], [], []
        for seed in (1, 2):
            sim.reset(task, seed)
            pictures.append(sim.frame(64).astype(int))
            objects.append(sim.privileged_observation[4:18])
            goals.append(sim.privileged_observation[36:])
    finally:
        space.low[:], space.high[:] = low, high
    np.testing.assert_allclose(objects[0], objects[1], atol=1e-6)
    assert np.abs(goals[0] - goals[1]).max() > 0.01
    assert (np.abs(pictures[0] - pictures[1]).sum(-1) > 30).sum() >= 4


@pytest.mark.parametrize("task", ["assembly", "pick-place", "dial-turn"])
def test_the_first_picture_and_observation_are_of_this_layout(sim, task):
    """The package itself leaves some bodies and sites where the layout before had them."""
    import mujoco

    for seed in (HELD_OUT_SEED, 3):
        sim.reset(task, seed)
        first, env = sim.frame(64), sim._envs[task]
        mujoco.mj_forward(env.model, env.data)
        np.testing.assert_array_equal(sim.frame(64), first)
        np.testing.assert_array_equal(env._get_curr_obs_combined_no_goal(), sim.privileged_observation[:18])
        np.testing.assert_array_equal(env._target_pos, sim.privileged_observation[36:])


@pytest.mark.parametrize("task", ["pick-place", "plate-slide-side", "dial-turn"])
def test_same_seed_same_episode_whatever_was_before(sim, task):
    runs = []
    for before in (1, 2):
        run_expert(sim, task, before, 0.3, steps=4 * before)
        runs.append(run_expert(sim, task, 7, 0.3, steps=10)[0])
    for first, second in zip(*runs, strict=True):
        np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("task", ["reach", "pick-place", "handle-pull-side", "assembly"])
def test_expert_goes_there_and_does_it(sim, task):
    _, subtasks = run_expert(sim, task, 4, sim.noises[1], sim.max_steps)
    assert sim.success
    assert [name for name, _ in itertools.groupby(subtasks)] == [TASKS[task].go, TASKS[task].act]
