"""Waypoints as text: what is written is read back, and what is read was written."""

import inspect
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openpi_like.driving.waypoint_text import BEGIN, END, MOST_M, format_waypoints, parse_waypoints

coordinates = st.floats(-MOST_M, MOST_M, allow_nan=False)
plans = st.lists(st.tuples(coordinates, coordinates), min_size=1, max_size=8)
# Digits and marks of plans, so that most texts nearly are some.
nearly = st.text(st.sampled_from("0123456789.,-+()[] e\n<traj_sendTRANé６"), max_size=80)
pieces = st.lists(
    st.sampled_from(["[", "(", ")", "]", ",", "1.25", "-3", " ", "..", BEGIN, END, "(1.00,2.00)", "nan", "1e3", "٣"])
)


@given(plans)
def test_a_plan_comes_back_within_5_mm(points):
    points = np.array(points)
    for text in (format_waypoints(points), f"I keep my lane. {BEGIN}{format_waypoints(points)}{END}"):
        parsed = parse_waypoints(text, len(points))
        assert parsed.whole
        assert np.abs(parsed.points - points).max() <= 0.005 + 1e-9
        assert format_waypoints(parsed.points) == format_waypoints(points)


def test_what_is_rounded_to_zero_has_no_sign():
    assert format_waypoints(np.array([[-0.004, -0.0], [-0.006, 0.005]])) == "[(0.00,0.00),(-0.01,0.01)]"


texts = st.one_of(st.text(), nearly, pieces.map("".join))


@settings(max_examples=1000, deadline=None)
@given(texts, st.integers(0, 7))
def test_no_text_crashes_and_no_point_is_invented(text, count):
    parsed = parse_waypoints(text, count)
    assert parsed.points.ndim == 2
    assert np.abs(parsed.points).max(initial=0) <= MOST_M
    pairs = re.findall(r"\(\s*([+-]?[\d.]+)\s*,\s*([+-]?[\d.]+)\s*\)", text, re.ASCII)
    written = [(float(x), float(y)) for x, y in pairs if x.count(".") < 2 and y.count(".") < 2]
    remaining = iter(written)
    assert all(any(tuple(point) == other for other in remaining) for point in parsed.points.tolist())  # in that order
    assert parsed.whole == (not parsed.problems)
    if parsed.whole:
        assert len(parsed.points) == count


@given(plans, st.integers(0, 200))
def test_of_a_text_that_is_cut_the_points_before_the_cut_are_left(points, cut):
    text = format_waypoints(np.array(points))
    whole, part = (parse_waypoints(t, len(points)) for t in (text, text[:cut]))
    assert part.whole == (cut >= len(text))
    np.testing.assert_array_equal(part.points, whole.points[: len(part.points)])


@pytest.mark.parametrize(
    ("text", "count", "points", "problem"),
    [
        ("", 6, 0, "no list of points [(x,y),...] in nothing"),
        ("turn left", 6, 0, "no list of points"),
        ("[(1.00,2.00),(3.00,4.00)]", 6, 2, "2 points, expected 6"),
        ("[(1,2),(3,4),(5,6)]", 2, 3, "3 points, expected 2"),
        ("[(1.0.0,2.00),(3.00,4.00)]", 2, 0, "point 0: got '(1.0.0,2.00),(3.00,4.00)...', expected (x,y) in metres"),
        ("[(1.00,2.00),(3.00 4.00)]", 2, 1, "point 1: got '(3.00 4.00)]'"),
        ("[(1.00,2.00)(3.00,4.00)]", 2, 1, "after point 0: got '(3.00,4.00)]', expected , or ]"),
        ("[(1.00,2.00,0.5),(3.00,4.00)]", 2, 0, "point 0"),
        ("[(nan,2.00)]", 1, 0, "point 0: got '(nan,2.00)]'"),
        ("[(1e9,2.00)]", 1, 0, "point 0"),
        ("[(1.00,2000.00)]", 1, 0, "(1,2000) is farther than 1000 m"),
        ("[(1,2)] or rather [(3,4)]", 1, 1, "2 lists of points, expected one"),
        ("[(1.00,2.00", 1, 0, "point 0: got '(1.00,2.00'"),
        (f"{BEGIN}{END}[(1,2)]", 1, 0, "no list of points"),
        ("[(1,2),(3,4)],(5,6)]", 2, 2, "behind the list: got ',(5,6)]', expected its end"),
        ("[(1,2)](9,9)", 1, 1, "behind the list: got '(9,9)'"),
        (f"{BEGIN}[(1,2)]]garbage{END}", 1, 1, "behind the list: got ']garbage'"),
        (f"{BEGIN}[(1,2)]{END}{BEGIN}[(3,4)]{END}", 1, 1, "2 times <traj_start>, expected once"),
        ("[(1\u2003,2)]", 1, 0, "point 0"),
    ],
)
def test_what_is_wrong_is_said(text, count, points, problem):
    parsed = parse_waypoints(text, count)
    assert not parsed.whole
    assert len(parsed.points) == points
    assert any(problem in line for line in parsed.problems), parsed.problems


def test_what_cannot_be_written_is_refused():
    with pytest.raises(ValueError, match=r"waypoint 1 has y=inf, expected metres within 1000"):
        format_waypoints(np.array([[0.0, 1.0], [0.0, np.inf]]))
    with pytest.raises(ValueError, match=r"waypoint 0 has x=nan"):
        format_waypoints(np.array([[np.nan, 1.0]]))


def test_words_may_stand_around_a_plan_without_marks():
    assert parse_waypoints("I go on (slowly): [(1,2), (3,4)] and then I stop.", 2).whole


def test_waypoints_have_two_coordinates():
    with pytest.raises(ValueError, match=r"waypoints of shape \(2, 3\), expected \(A, 2\)"):
        inspect.unwrap(format_waypoints)(np.zeros((2, 3)))
