"""What a dataset has of a simulated drive beside plans: rows of numbers, texts, and who was where."""

import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from openpi_like.data.dataset import open_dataset
from openpi_like.data.selection import Selection
from openpi_like.driving.annotations import REACH_M, Agent, Annotations, MapLine
from openpi_like.driving.scene_entities import entities
from openpi_like.driving.scene_texts import TEXTS, in_frame_of, texts_of
from openpi_like.driving.waypoint_text import parse_waypoints
from openpi_like.robots.ego_vehicle import (
    AGENT_NUMBERS,
    AGENTS,
    EGO_VEHICLE_METRES,
    EGO_VEHICLE_SCENE,
    LINE_NUMBERS,
    LINES,
)

pytest.importorskip("highway_env")
pytest.importorskip("mujoco")

from openpi_like.robots.sims.ego_vehicle import EgoVehicleSim

REPOSITORY = Path(__file__).resolve().parents[2]


def agent(number, right, ahead, heading=0.0, speed=5.0, kind="van"):
    velocity = (-speed * math.sin(heading), speed * math.cos(heading))
    return Agent(number, kind, right, ahead, heading, 5.4, 2.0, velocity)


@pytest.fixture(scope="module")
def drive():
    """The expert on a left turn: (observations, notes, plans)."""
    sim = EgoVehicleSim()
    sim.reset("intersection-left", 3)
    expert = sim.expert(np.random.default_rng(0), 0.0)
    seen: list[dict[str, Any]] = []
    plans, annotations = [], []
    while not sim.success and len(seen) < sim.max_steps:
        seen.append(sim.observe())
        annotations.append(sim.annotations())
        plans.append(expert.act())
        sim.step(expert.disturb(plans[-1]))
    assert sim.success
    return seen, sim.notes(), np.stack(plans), annotations


def test_rows_of_agents_and_lines_by_hand():
    line = MapLine("striped", np.array([[0.0, 10.0], [0.0, 30.0]]))
    far, unseen = (MapLine(kind, np.array([[40.0, 0.0], [40.0, 10.0]])) for kind in ("middle", "none"))
    rows = entities(Annotations((agent(3, 5.0, 10.0, math.pi / 2),), (line, unseen, far), ""))
    expected = [5 / 50, 10 / 50, 1.0, 0.0, 0.54, 0.2, -0.5, 0.0, 0.0, 0.0, 1.0, 0.0]
    np.testing.assert_allclose(rows["agents"], [expected], atol=1e-6)
    assert rows["map"].shape == (2, LINE_NUMBERS)
    # Middles come before edges; points are evenly spaced.
    np.testing.assert_allclose(rows["map"][1, :20:2], 0)
    np.testing.assert_allclose(rows["map"][1, 1:20:2], np.linspace(10, 30, 10) / REACH_M, rtol=1e-6)
    np.testing.assert_array_equal(rows["map"][:, 20:], [[1, 0, 0], [0, 1, 0]])
    nobody = entities(Annotations((), (), ""))
    assert (nobody["agents"].shape, nobody["map"].shape) == ((0, AGENT_NUMBERS), (0, LINE_NUMBERS))


def test_there_is_room_for_so_many_and_the_farthest_are_left_out():
    many = tuple(agent(i % 20, 0.0, 1.0 + i) for i in range(AGENTS + 5))
    lines = tuple(MapLine("middle", np.array([[i, 0.0], [i, 5.0]])) for i in range(LINES + 3, -1, -1))
    rows = entities(Annotations(many, lines, ""))
    np.testing.assert_allclose(rows["agents"][:, 1] * REACH_M, 1.0 + np.arange(AGENTS), rtol=1e-6)
    np.testing.assert_allclose(rows["map"][:, 0] * REACH_M, np.arange(LINES), atol=1e-5)


@given(st.floats(-100, 100), st.floats(-100, 100), st.floats(-7, 7), st.floats(-40, 40), st.floats(-40, 40))
def test_places_in_a_frame(x, y, heading, right, ahead):
    along, aside = np.array([math.cos(heading), math.sin(heading)]), np.array([math.sin(heading), -math.cos(heading)])
    there = np.array([x, y]) + ahead * along + right * aside
    np.testing.assert_allclose(in_frame_of(x, y, heading, there[None]), [[right, ahead]], atol=1e-9)


def test_answers_are_true():
    scene = Annotations((agent(0, -0.5, 12.0), agent(1, 4.0, -20.0, speed=0.0)), (), "Two.")
    asked = {}
    for seed in range(60):
        texts = texts_of(scene, "turn left", np.random.default_rng(seed))
        asked[texts["question"]] = texts["answer"]
        number = int(texts["agent_question"].split()[-1].rstrip("?"))
        does = ("it drives at 18 km/h", "it stands")[number - 1]
        assert texts["agent_caption"] == f"a van at {('(0,12)', '(4,-20)')[number - 1]}, {does}"
    assert asked == {
        "how many vehicles are near?": "2",
        "how many vehicles near move?": "1",
        "how far is the nearest vehicle?": "12 m",
        "is somebody straight ahead?": "yes, 12 m ahead",
        "is somebody on the left?": "no",
        "is somebody on the right?": "yes",
        "what does the car do?": "turn left",
    }
    alone = texts_of(Annotations((), (), ""), "", np.random.default_rng(0))
    assert alone["agent_question"] == alone["agent_caption"] == ""


def test_a_drive_keeps_poses_and_forecasts_that_came_true(drive):
    seen, notes, _, annotations = drive
    steps = len(seen)
    assert all(len(notes[key]) == steps for key in (*TEXTS, "pose", "boxes", "boxes_there"))
    pose, boxes = np.asarray(notes["pose"], np.float64), np.asarray(notes["boxes"], np.float64)
    # Annotations are the boxes, seen from the car.
    for t in (0, steps // 2):
        for found in annotations[t].agents:
            x, y, heading = pose[t].tolist()
            place = in_frame_of(x, y, heading, boxes[t, found.number, :2][None])[0]
            np.testing.assert_allclose(place, [found.right, found.ahead], atol=1e-3)
            assert notes["boxes_there"][t][found.number] == 1
    forecasts = 0
    for t, (question, answer) in enumerate(zip(notes["forecast_question"], notes["forecast"], strict=True)):
        if not answer:
            assert t >= steps - 6 or not question
            continue
        forecasts += 1
        number = int(question.removeprefix("where will agent ").partition(",")[0])
        who = annotations[t].agents[number - 1].number
        x, y, heading = boxes[t, who, :3].tolist()
        future = in_frame_of(x, y, heading, boxes[t + 1 : t + 7, who, :2])
        parsed = parse_waypoints(answer, 6)
        assert parsed.whole
        np.testing.assert_allclose(parsed.points, future, atol=0.006)
    assert forecasts > steps / 3
    assert set(notes["forecast"][-6:]) == {""}


def test_texts_are_of_the_layout_alone():
    """Not of what was drawn or driven before."""
    sim = EgoVehicleSim()
    found = []
    for _ in range(2):
        sim.reset("highway-keep", 8)
        sim.observe()
        found.append({k: v for k, v in sim.notes().items() if k in TEXTS})
        sim.step(np.array([0.0, 10.0]))
        sim.observe()
    assert found[0] == found[1]


@pytest.mark.filterwarnings("ignore")
def test_demonstrations_are_read_by_every_such_robot(tmp_path):
    pytest.importorskip("tensorflow_datasets")
    options = ["--tasks", "highway-keep", "--episodes-per-task", "1", "--val-episodes-per-task", "0", "--workers", "1"]
    command = [sys.executable, "data/make_demos.py", "--robot", "ego_vehicle", "--out", str(tmp_path), *options]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    path = tmp_path / "ego_vehicle_sim" / "1.0.0"
    data = open_dataset(path, EGO_VEHICLE_SCENE, "train")
    plans, mask = data.actions(np.arange(len(data)))
    assert mask.all()
    assert plans.shape == (len(data), 6, 2)
    assert np.all(np.diff(plans[:, :, 1]) > 0)  # it drives on
    values, there = data.entities(np.arange(len(data)), EGO_VEHICLE_SCENE.entities[0])
    assert np.all(np.abs(values[there]) <= 3.0)
    texts = data.texts("caption", np.array([0]))
    assert re.match(r"(By day|At dusk|In fog), at a highway, \d+ km/h: ", texts[0])
    # The same data asked for something else.
    asks = open_dataset(path, EGO_VEHICLE_METRES, "train", selection=Selection(labelled=True))
    np.testing.assert_array_equal(asks.actions(np.arange(3))[0], plans[:3])
