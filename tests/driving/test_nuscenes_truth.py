"""What plans on nuScenes are judged by: occupancy against point-in-box tests, shapely, and the metrics themselves."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from shapely.affinity import rotate, translate
from shapely.geometry import Point
from shapely.geometry import box as rectangle

from openpi_like.driving.nuscenes.scenes import read_scenes
from openpi_like.driving.nuscenes.tables import read_tables
from openpi_like.driving.nuscenes.truth import AGENTS, boxes_seen_from, occupied, planning_truth
from openpi_like.driving.planning_metrics import PlanningRules, PlanningScores, collisions, point_collisions
from tests.driving.nuscenes_copy import LEFT, Agent, Curve, Drive, write_copy

# A car that is met 2 s after the first keyframe, when it appears, and a pedestrian who is on the way for 1 s.
CROSSING = Drive(
    "scene-0553",
    Curve(10.0, 20.0, 0.7, 6.0),
    8,
    agents=(
        Agent(
            "vehicle.car", (1.9, 4.5, 1.6), Curve(10 + 13 * math.cos(0.7), 20 + 13 * math.sin(0.7), 0.7, 0.0), first=4
        ),
        Agent("human.pedestrian.adult", (0.8, 0.8, 1.8), Curve(15.0, 24.5, 0.0, 0.0), last=2),
    ),
    can_bus=False,
)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    root = write_copy(tmp_path_factory.mktemp("nuscenes"), (LEFT, CROSSING))
    return {scene.name: scene for scene in read_scenes(read_tables(root, "v1.0-mini"))}


def expected_boxes(drive, now, step, categories):
    """Outlines of agents as seen from the lidar, from their curves."""
    x, y, heading = drive.curve.lidar(now / 2)
    outlines = []
    for agent in drive.agents:
        if agent.category in categories and agent.first <= step <= agent.last:
            ax, ay, turned = agent.curve.at(step / 2)
            width, length, _ = agent.size
            outline = rotate(
                rectangle(-length / 2, -width / 2, length / 2, width / 2), turned, (0, 0), use_radians=True
            )
            placed = translate(outline, ax - x, ay - y)
            # The world's x and y to right and ahead: ahead is where the car looks.
            outlines.append(rotate(placed, math.pi / 2 - heading, (0, 0), use_radians=True))
    return outlines


@pytest.mark.parametrize("agents", AGENTS)
def test_occupancy_is_what_lies_in_a_box(scenes, agents):
    rng = np.random.default_rng(0)
    found = 0
    for now in (0, 3, 8, 12):
        occupancy = planning_truth(scenes[LEFT.name], now, agents, "middles").occupancy
        for i in range(6):
            step = now + 1 + i
            outlines = expected_boxes(LEFT, now, step, AGENTS[agents]) if step < LEFT.keyframes else []
            for outline in outlines:  # cells around each outline, one by one
                x, y = outline.centroid.x, outline.centroid.y
                for dx, dy in rng.uniform(-7, 7, (40, 2)):
                    row, column = math.floor((y + dy + 50) / 0.5), math.floor((50 - x - dx) / 0.5)
                    if 0 <= row < 200 and 0 <= column < 200:
                        middle = Point(50 - 0.25 - 0.5 * column, 0.5 * row - 50 + 0.25)
                        inside = any(o.covers(middle) for o in outlines)
                        found += inside
                        assert occupancy[i, row, column] == inside
            area = sum(outline.area for outline in outlines)
            assert abs(occupancy[i].sum() / 4 - area) <= 0.12 * area + 0.5 * len(outlines)
            assert occupancy[i].any() == bool(outlines)
    assert found > 100


def test_who_occupies_the_map(scenes):
    scene = scenes[LEFT.name]
    few, all_ = (boxes_seen_from(np.eye(4), scene.samples[4].boxes, AGENTS[agents]) for agents in AGENTS)
    assert (len(few), len(all_)) == (2, 4)  # car and bus; and a police car, and a pedestrian; never a barrier
    assert len(boxes_seen_from(np.eye(4), scene.samples[12].boxes, AGENTS["vehicles"])) == 1  # the bus has gone
    np.testing.assert_allclose(few[0, 2:], [0.4, 4.6, 1.9], atol=1e-9)


def test_the_shared_outline_is_rounded_to_cells():
    """Of a box along the axes: from the rounded corner on, the last cell included."""
    box = np.array([[3.1, 10.3, np.pi / 2, 4.6, 2.0]])  # x from 2.1 to 4.1, y from 8.0 to 12.6
    grid = occupied(box)
    rows, columns = (np.flatnonzero(grid.any(axis)) for axis in (1, 0))
    np.testing.assert_array_equal(rows, np.arange(116, 126))  # round(2 * 58.0) to round(2 * 62.6)
    np.testing.assert_array_equal(columns, 199 - np.arange(108, 103, -1))  # round(2 * 54.1) and round(2 * 52.1)
    assert grid.sum() == len(rows) * len(columns)
    exact = occupied(box, fill="middles")
    assert exact.sum() == 4 * 9
    assert not (exact & ~grid).any()


boxes = st.tuples(st.floats(-60, 60), st.floats(-60, 60), st.floats(-4, 4), st.floats(0.4, 12), st.floats(0.4, 3)).map(
    np.array
)


@given(boxes)
def test_the_shared_outline_holds_nearly_all_middles(box):
    """Rounding moves a corner by less than half a cell and the grid's middles lie half a cell farther."""
    shared = occupied(box[None])
    grown, shrunk = (
        occupied(np.array([[*box[:3], *np.maximum(box[3:] + by, 0.01)]]), fill="middles") for by in (2.2, -2.2)
    )
    assert not (shared & ~grown).any()
    assert not (shrunk & ~shared).any()


def test_what_is_beyond_the_grid_is_not_in_it():
    away = np.array([[0.0, 80.0, 0.3, 4.0, 2.0], [-300.0, 5.0, 0.0, 12.0, 3.0]])
    for fill in ("shared", "middles"):
        assert not occupied(away, fill=fill).any()
        assert not occupied(np.zeros((0, 5)), fill=fill).any()
    edge = occupied(np.array([[50.0, 0.0, 0.0, 4.0, 2.0]]), fill="middles")  # half of it is in, at the right
    assert edge[:, 0].any()
    assert edge.sum() == 4 * 4


@pytest.mark.parametrize("fill", ["shared", "middles"])
def test_the_truth_meets_what_stands_on_its_way(scenes, fill):
    scene = scenes[CROSSING.name]
    truth = planning_truth(scene, 0, "vehicles", fill)
    assert truth.valid.all()
    met = collisions(truth.truth[None], truth.occupancy[None])[0]
    # The car of 4.5 m stands with its middle 13 m on, from 2 s on; the ego car's middle is then at 13.4 m.
    np.testing.assert_array_equal(met, [False, False, False, True, True, False])
    people = planning_truth(scene, 0, "vehicles_and_pedestrians", fill)
    assert collisions(people.truth[None], people.occupancy[None])[0, 1]
    np.testing.assert_array_equal(people.occupancy[2:], truth.occupancy[2:])
    # A plan that waits is not met; one that goes where the truth is, is, and is not counted.
    waits = np.zeros((1, 6, 2))
    assert not collisions(waits, truth.occupancy[None]).any()
    beside = truth.truth + np.array([5.0, 0.0])
    assert not point_collisions(beside[None], truth.occupancy[None]).any()
    scores = PlanningScores()
    scores.add(truth.truth[None], truth.truth[None], truth.valid[None], truth.occupancy[None])
    assert scores.uniad()["collision"]["avg"] == scores.uniad()["l2"]["avg"] == 0
    scores = PlanningScores(PlanningRules(skip_truth_collisions=False))
    scores.add(truth.truth[None], truth.truth[None], truth.valid[None], truth.occupancy[None])
    assert scores.uniad()["collision"]["2s"] == 100


def test_truth_at_the_end_of_a_scene(scenes):
    truth = planning_truth(scenes[CROSSING.name], 5)
    np.testing.assert_array_equal(truth.valid, [True, True, False, False, False, False])
    np.testing.assert_allclose(truth.truth[:2], [[0, 3], [0, 6]], atol=1e-6)
    np.testing.assert_array_equal(truth.truth[2:], 0)
    assert not truth.occupancy[2:].any()
    last = planning_truth(scenes[CROSSING.name], 7)
    assert not last.valid.any()


def test_other_grids_are_asked_for_by_the_rules(scenes):
    rules = PlanningRules(cell=0.25, reach=30.0)
    truth = planning_truth(scenes[LEFT.name], 4, "vehicles", "middles", rules)
    assert truth.occupancy.shape == (6, 240, 240)
    coarse = planning_truth(scenes[LEFT.name], 4, "vehicles", "middles")
    assert abs(truth.occupancy[0].sum() / 16 - coarse.occupancy[0].sum() / 4) < 3


def test_what_is_unknown_is_refused(scenes):
    scene = scenes[CROSSING.name]
    with pytest.raises(ValueError, match=r"agents 'cars', expected one of vehicles.*; fill 'all'"):
        planning_truth(scene, 0, "cars", "all")
    with pytest.raises(ValueError, match="fill 'all', expected 'shared' or 'middles'"):
        occupied(np.zeros((0, 5)), fill="all")
    for index in (-1, 8):
        with pytest.raises(IndexError, match="expected 0 to 7"):
            planning_truth(scene, index)
