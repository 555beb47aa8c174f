"""Meta-World's scenes with Fetch's arm: what the package relies on is where it was, and the arm is Fetch's."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from openpi_like.robots.sims import make_sim
from openpi_like.robots.sims.metaworld_scene import fetch_scene

pytestmark = pytest.mark.skipif(importlib.util.find_spec("metaworld") is None, reason="metaworld is not installed")


@pytest.fixture(scope="module")
def sims():
    return {name: make_sim(name) for name in ("sawyer", "metaworld_fetch")}


@pytest.mark.parametrize("task", ["drawer-open", "coffee-button"])  # a slide joint after the robot's; a mug before them
def test_layouts_are_those_of_sawyer(sims, task):
    """Object, goal and hand are where Sawyer finds them with the same seed; another one moves the object."""
    for seed in (3, 10_003):
        for sim in sims.values():
            sim.reset(task, seed)
        sawyer, fetch = (sim.privileged_observation for sim in sims.values())
        np.testing.assert_allclose(fetch[4:7], sawyer[4:7], atol=2e-3)  # the object
        np.testing.assert_allclose(fetch[36:], sawyer[36:], atol=1e-6)  # the goal
        np.testing.assert_allclose(fetch[:3], sawyer[:3], atol=0.03)  # the hand
    before = sims["metaworld_fetch"].privileged_observation[4:7]
    sims["metaworld_fetch"].reset(task, 4)
    assert np.abs(sims["metaworld_fetch"].privileged_observation[4:7] - before).max() > 0.005


def test_the_arm_is_that_of_fetch(sims):
    """It has Fetch's joints and none of Sawyer's links; it reaches where the hand is sent, and touches nothing."""
    sim = sims["metaworld_fetch"]
    sim.reset("drawer-open", 1)
    env = sim._envs["drawer-open"]
    joints = [env.model.joint(i).name for i in range(9)]
    assert joints[:7] == [
        f"robot0:{name}_joint"
        for name in ("shoulder_pan", "shoulder_lift", "upperarm_roll", "elbow_flex", "forearm_roll", "wrist_flex")
    ] + ["robot0:wrist_roll_joint"]
    assert joints[7:] == ["r_close", "l_close"]
    bodies = {env.model.body(i).name for i in range(env.model.nbody)}
    assert "right_l6" not in bodies
    for i in range(env.model.ngeom):
        if env.model.body(env.model.geom_bodyid[i]).name.startswith("robot0:"):
            assert (env.model.geom_contype[i], env.model.geom_conaffinity[i]) == (0, 0)
    hand = env.data.body("hand")
    for target in ((0.2, 0.55, 0.15), (-0.2, 0.75, 0.25)):
        for _ in range(200):
            env.data.mocap_pos[0], env.data.mocap_quat[0] = target, (1, 0, 1, 0)
            env.do_simulation([-1, 1], env.frame_skip)
        np.testing.assert_allclose(hand.xpos, target, atol=5e-3)
        np.testing.assert_allclose(hand.xmat.reshape(3, 3)[:, 0], [0, 0, -1], atol=0.03)  # the fingers point down


def test_the_gripper_is_commanded_the_other_way_round(sims):
    """What opens one closes the other; both states say how far it is open."""
    openings = {}
    for name, sim in sims.items():
        for command in (1.0, -1.0):
            sim.reset("drawer-open", 2)
            for _ in range(8):
                sim.step(np.array([0, 0, 0, command]))
            openings[name, command] = sim.observe()["state"][3]
    assert openings["sawyer", 1.0] < openings["sawyer", -1.0] - 0.2
    assert openings["metaworld_fetch", -1.0] < openings["metaworld_fetch", 1.0] - 0.2
    np.testing.assert_allclose(openings["metaworld_fetch", 1.0], openings["sawyer", -1.0], atol=0.05)


def test_a_scene_without_an_arm_is_refused(tmp_path: Path):
    (tmp_path / "table.xml").write_text("<mujoco><worldbody><body name='base'/></worldbody></mujoco>")
    with pytest.raises(ValueError, match=r"table\.xml: expected a body 'base' with a body 'hand' in it"):
        fetch_scene(tmp_path / "table.xml")


def test_the_package_of_the_arm_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="No module named 'gymnasium_robotics', whose Fetch this needs"):
        fetch_scene(Path("scene.xml"))
