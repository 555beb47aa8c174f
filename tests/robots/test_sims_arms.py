"""Robosuite's arms are one embodiment to a policy: what it sees and says means the same on each of them."""

import dataclasses
import importlib.util
import logging
import os
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest

from openpi_like.robots.robosuite_arms import ARMS
from openpi_like.robots.sims import make_sim
from openpi_like.robots.sims.robosuite_arms import SawyerSim

SPEC = importlib.util.find_spec("robosuite")
if SPEC is None or SPEC.origin is None:
    pytest.skip("robosuite is not installed: make arms", allow_module_level=True)


@pytest.fixture(scope="module", params=ARMS)
def sim(request):
    """Each arm in turn: building one takes up to three seconds."""
    return make_sim(request.param)


def test_arms_differ_in_name_only():
    robots = [dataclasses.replace(robot, name="arm") for robot in ARMS.values()]
    assert len(robots) == 5
    assert all(robot == robots[0] for robot in robots)
    assert (robots[0].robot_action_size, robots[0].control_hz) == (7, 20.0)
    assert [camera.name for camera in robots[0].cameras] == ["base", "wrist"]


@pytest.mark.parametrize("task", ["lift", "stack"])
def test_expert_succeeds(sim, task):
    sim.reset(task, 12)
    expert = sim.expert(np.random.default_rng(0), sim.noises[-1])
    for _ in range(sim.max_steps):
        sim.step(expert.disturb(expert.act()))
        if sim.success:
            break
    assert sim.success
    moved, *others = (position for position, _ in sim.cubes)
    if task == "lift":
        assert moved[2] > 0.8 + 0.04
    else:  # one half size on the other
        np.testing.assert_allclose(moved - others[0], [0.0, 0.0, 0.045], atol=0.02)


def test_actions_mean_the_same(sim):
    """Commands of half a step: along the scene's axes, about them by the right hand, and to the gripper."""
    for axis in range(3):
        for sign in (-1.0, 1.0):
            sim.reset("lift", 0)
            start = sim.hand
            action = np.zeros(7)
            action[axis] = 0.5 * sign
            for _ in range(8):
                sim.step(action)
            moved = sign * (sim.hand - start)
            assert moved[axis] > 0.02
            assert np.abs(np.delete(moved, axis)).max() < 0.4 * moved[axis]
    sim.reset("lift", 0)
    start = sim.hand_rotation
    for _ in range(8):
        sim.step(np.array([0.0, 0.0, 0.0, 0.0, 0.0, 0.5, 0.0]))
    turn = (sim.hand_rotation * start.inv()).as_rotvec()
    assert turn[2] > 0.2
    assert np.abs(turn[:2]).max() < 0.2 * turn[2]
    for command, opening in ((-1.0, 1.0), (1.0, 0.0)):
        for _ in range(25):
            sim.step(np.array([0.0, 0.0, 0.2, 0.0, 0.0, 0.0, command]))
        assert abs(sim.observe()["state"][7] - opening) < 0.06


def test_state_is_the_pose_of_the_hand_above_the_table(sim):
    states = []
    for seed in (1, 2):
        sim.reset("lift", seed)
        states.append(sim.observe()["state"])
    np.testing.assert_allclose(states[0], states[1], atol=1e-6)  # the layout differs, the arm does not
    x, y, z = states[0][:3]
    assert abs(x) < 0.3
    assert abs(y) < 0.2
    assert 0.85 < z < 1.1
    np.testing.assert_allclose(np.linalg.norm(states[0][3:7]), 1.0, atol=1e-6)
    # Fingers point down, and close along the scene's x axis: within 10 degrees, on every arm.
    matrix = sim.hand_rotation.as_matrix()
    assert matrix[2, 2] < -np.cos(np.deg2rad(10))
    assert matrix[0, 1] > np.cos(np.deg2rad(10))


def test_wordings_take_turns(sim):
    prompts = []
    for seed in range(6):
        sim.reset("lift", seed)
        prompts.append(sim.observe()["prompt"])
    assert prompts[:3] == prompts[3:]
    assert len(set(prompts)) == 3


def test_sawyer_loads_with_its_own_masses_and_a_free_shoulder():
    """Its thin meshes are treated as shells, which must add nothing to its bodies."""
    sim = SawyerSim()
    sim.reset("lift", 0)
    model, data = sim._env.sim.model._model, sim._data
    assert SPEC is not None
    file = Path(str(SPEC.origin)).parent / "models" / "assets" / "robots" / "sawyer" / "robot.xml"
    masses = {
        body.get("name"): float(inertial.attrib["mass"])
        for body in ET.parse(file).getroot().iter("body")
        if (inertial := body.find("inertial")) is not None
    }
    assert len(masses) > 8
    for name, mass in masses.items():
        np.testing.assert_allclose(model.body(f"robot0_{name}").mass, mass, rtol=1e-6, err_msg=name)
    bodies = [{model.body(model.geom_bodyid[g]).name for g in pair} for pair in data.contact.geom]
    assert [pair for pair in bodies if all(name.startswith("robot0_") for name in pair)] == []


def test_the_package_leaves_no_traces(monkeypatch, caplog):
    monkeypatch.setenv("MUJOCO_GL", "disabled")
    with caplog.at_level(logging.INFO):
        make_sim("robosuite_kinova3").reset("lift", 0)
    assert caplog.records == []
    assert os.environ["MUJOCO_GL"] == "disabled"
