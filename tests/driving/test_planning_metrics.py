"""Planning metrics: the shared code's numbers, a table by hand, geometry against a raster and against areas."""

import inspect
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from shapely.affinity import rotate, translate
from shapely.geometry import box as rectangle

from openpi_like.driving.planning_metrics import (
    PlanningRules,
    PlanningScores,
    boxes_overlap,
    collisions,
    constant_velocity,
    distances,
    from_shared_code,
    point_collisions,
)
from tests.bench.planning_samples import draw

GOLDEN = json.loads((Path(__file__).parent / "planning_golden.json").read_text())
EMPTY = np.zeros((1, 6, 200, 200), bool)


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: f"{case['seed']}-{case['dtype']}")
def test_numbers_are_those_of_the_shared_code(case):
    samples = draw(case["seed"], case["count"], case["dtype"])
    scores = PlanningScores()
    for some in (slice(0, 7), slice(7, None)):
        of = samples._replace(**{name: x[some] for name, x in samples._asdict().items()})
        scores.add(of.plans, of.truth, of.valid, from_shared_code(of.occupancy))
    for name, expected in case["steps"].items():
        np.testing.assert_allclose(scores.steps[name], expected, rtol=1e-6, atol=1e-7)
    for table, found in (("uniad", scores.uniad()), ("stp3", scores.stp3())):
        shown = {name: [f"{value:.2f}" for value in values.values()] for name, values in found.items()}
        assert shown == case["tables"][table]
    assert max(case["steps"]["collision"]) > 0.05  # something was hit


def test_the_two_conventions_by_hand():
    scores = PlanningScores()
    truth = np.zeros((1, 6, 2))
    plans = truth + np.arange(1, 7)[:, None] * [1.0, 0.0]
    scores.add(plans, truth, np.ones((1, 6), bool), EMPTY)
    assert scores.uniad()["l2"] == {"1s": 2.0, "2s": 4.0, "3s": 6.0, "avg": 4.0}
    assert scores.stp3()["l2"] == {"1s": 1.5, "2s": 2.5, "3s": 3.5, "avg": 2.5}
    assert scores.uniad()["collision"] == {"1s": 0.0, "2s": 0.0, "3s": 0.0, "avg": 0.0}


def test_steps_whose_truth_is_unknown():
    plans, truth = np.ones((2, 6, 2)) * [3.0, 4.0], np.zeros((2, 6, 2))
    truth[1, 5] = np.nan
    valid = np.isfinite(truth[..., 0])
    np.testing.assert_array_equal(distances(plans, truth, valid)[1], [5, 5, 5, 5, 5, 0])
    got = {}
    for as_zero in (True, False):
        scores = PlanningScores(PlanningRules(invalid_as_zero=as_zero))
        scores.add(plans, truth, valid, np.repeat(EMPTY, 2, 0))
        got[as_zero] = scores.steps["l2"][5]
    assert got == {True: 2.5, False: 5.0}
    scores = PlanningScores()
    with pytest.raises(ValueError, match="truth 1 is not finite at step 5"):
        scores.add(plans, truth, np.ones((2, 6), bool), np.repeat(EMPTY, 2, 0))
    assert scores.samples == 0


def test_a_collision_that_the_driver_had_too_is_counted_only_where_that_is_wanted():
    plans, occupancy = np.zeros((1, 6, 2)), EMPTY.copy()
    occupancy[:, 3, 100, 100] = True
    for skip, share in ((True, 0.0), (False, 1.0)):
        scores = PlanningScores(PlanningRules(skip_truth_collisions=skip))
        scores.add(plans, plans, np.ones((1, 6), bool), occupancy)
        np.testing.assert_array_equal(scores.steps["collision"], [0, 0, 0, share, 0, 0])


@given(st.floats(-40, 40), st.floats(-40, 40), st.integers(0, 199), st.integers(0, 199))
def test_the_car_covers_the_cells_that_lie_under_it(x, y, row, column):
    """But for the cutting to whole cells, which moves it by less than a cell. Rows go ahead, columns to the left."""
    occupancy = EMPTY.copy()
    occupancy[:, 0, row, column] = True
    plan = np.zeros((1, 6, 2))
    plan[:, 0] = x, y
    there_y, there_left = row * 0.5 - 49.75, column * 0.5 - 49.75
    away = abs(there_y - y - 0.5) - 4.084 / 2, abs(there_left + x) - 1.85 / 2
    found = bool(collisions(plan, occupancy)[0, 0])
    if max(away) > 0.5:
        assert not found
    if max(away) < -0.5:
        assert found
    assert not collisions(plan, occupancy)[0, 1:].any()
    if point_collisions(plan, occupancy)[0, 0]:
        assert abs(there_y - y) <= 0.5
        assert abs(there_left + x) <= 0.5


def test_where_the_files_of_the_shared_code_have_a_car_on_the_right_ahead():
    """In files of UniAD columns go to the right; in those of VAD, rows go back as well."""
    plan = np.zeros((1, 6, 2))
    plan[:, 0] = 10.25, 20.25
    row, right = 140, 120  # the middle of that cell is at y = 20.25, x = 10.25
    uniad, vad = EMPTY.copy(), EMPTY.copy()
    uniad[:, 0, row, right] = True
    vad[:, 0, 199 - row, right] = True
    for occupancy, turned in ((uniad, False), (vad, True)):
        found = point_collisions(plan, from_shared_code(occupancy, turned=turned))
        np.testing.assert_array_equal(found, [[True, *[False] * 5]])


box = st.tuples(st.floats(-4, 4), st.floats(-4, 4), st.floats(-4, 4), st.floats(0.2, 5), st.floats(0.2, 3))


@given(box, box)
def test_boxes_overlap_where_their_intersection_has_an_area(a, b):
    shapes = []
    for x, y, heading, length, width in (a, b):
        flat = rectangle(-length / 2, -width / 2, length / 2, width / 2)
        shapes.append(translate(rotate(flat, heading, use_radians=True, origin=(0, 0)), x, y))
    area = shapes[0].intersection(shapes[1]).area
    found = bool(boxes_overlap(np.array(a), np.array(b)))
    if area > 1e-9:
        assert found
    if shapes[0].distance(shapes[1]) > 1e-9:
        assert not found
    assert found == bool(boxes_overlap(np.array(b), np.array(a)))


def test_going_on_as_now():
    plan = constant_velocity(np.array([[2.0, 10.0]]))
    np.testing.assert_allclose(plan[0, [0, 5]], [[1, 5], [6, 30]])


def test_what_does_not_fit_is_refused():
    plans, valid, scores = np.zeros((1, 6, 2)), np.ones((1, 6), bool), PlanningScores()
    with pytest.raises(ValueError, match=r"occupancy of shape \(1, 6, 100, 200\), expected \(1, 6, 200, 200\)"):
        scores.add(plans, plans, valid, EMPTY[:, :, :100])
    with pytest.raises(ValueError, match=r"plans \(1, 5, 2\), truth \(1, 5, 2\), .* expected \(1, 6, 2\)"):
        scores.add(plans[:, :5], plans[:, :5], valid[:, :5], EMPTY[:, :5])
    with pytest.raises(ValueError, match="plan 0 is not finite at step 2"):
        collisions(np.where(np.arange(6)[:, None] == 2, np.nan, plans), EMPTY)
    with pytest.raises(ValueError, match="no samples yet"):
        scores.uniad()
    with pytest.raises(ValueError, match=r"\{'cell': 0.0\}, expected metres above 0"):
        PlanningRules(cell=0.0)
    with pytest.raises(ValueError, match=r"4.084 x 0.3 m covers the middle of no cell of 0.5 m"):
        PlanningRules(width=0.3)


def test_without_type_checks_numbers_of_other_kinds_are_refused():
    """As in a program that is not under test, where nothing checks the signatures."""
    plans, valid = np.zeros((1, 6, 2)), np.ones((1, 6), bool)
    add, *others = (inspect.unwrap(of) for of in (PlanningScores.add, collisions, point_collisions))
    with pytest.raises(ValueError, match=r"valid, once for x and y, \(6, 2\), expected \(1, 6, 2\)"):
        add(PlanningScores(), plans, plans, valid[0], EMPTY)
    for of in others:
        with pytest.raises(ValueError, match="occupancy of uint8 and plans of float64, expected bool and floats"):
            of(plans, EMPTY.astype(np.uint8))
        with pytest.raises(ValueError, match="occupancy of bool and plans of int64"):
            of(plans.astype(int), EMPTY)
