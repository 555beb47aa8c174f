"""What recorded drives are judged by, against closed forms, and scores against the shared code's sums."""

import dataclasses
import json

import numpy as np
import pytest

from openpi_like.data.dataset import open_dataset
from openpi_like.data.schema import DatasetError
from openpi_like.driving.nuscenes.truth import occupied
from openpi_like.driving.open_loop import SIM_RULES, FrameTruth, Judged, RecordedDrives, car_boxes, judge, overlaps
from openpi_like.driving.open_loop_scores import FrameResult, Scored, append_frame, read_frames, rows, shown
from openpi_like.driving.planning_metrics import PlanningRules, PlanningScores
from openpi_like.robots.ego_vehicle import EGO_VEHICLE, EGO_VEHICLE_METRES
from tests.driving import made_drives
from tests.driving.made_drives import ASIDE, RADIUS, A, way, write_drives

ARC = made_drives.STEPS["straight"]  # its first frame


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_drives(tmp_path_factory.mktemp("drives"))


@pytest.fixture(scope="module")
def dataset(path):
    return open_dataset(path, EGO_VEHICLE, "val")


# ---- The truth -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [0, 3])
def test_what_was_driven_is_seen_from_the_present_car(dataset, step):
    """On a circle it looks the same from everywhere."""
    seen = RecordedDrives(dataset).truth(ARC + step)
    angle = 2.5 * np.arange(1, A + 1) / RADIUS
    expected = np.column_stack([-RADIUS * (1 - np.cos(angle)), RADIUS * np.sin(angle)])
    np.testing.assert_allclose(seen.truth, expected, atol=2e-5)
    assert seen.valid.all()
    assert not seen.there.any()


def test_what_is_not_known_is_not_valid(dataset):
    drives = RecordedDrives(dataset)
    seen = drives.truth(9)  # of 12 steps, two are to come
    assert seen.valid.tolist() == [True, True, False, False, False, False]
    np.testing.assert_allclose(seen.truth, [[0, 2], [0, 4], [0, 0], [0, 0], [0, 0], [0, 0]], atol=1e-5)
    assert seen.there.any(1).tolist() == seen.valid.tolist()
    assert seen.occupancy().any((1, 2)).tolist() == seen.valid.tolist()
    last = drives.truth(11)
    assert not last.valid.any()
    assert not last.occupancy().any()
    assert drives.whole().tolist() == [*range(6), *range(ARC, ARC + 4)]


def test_others_are_where_they_will_be_seen_from_now(dataset):
    """At step 1 the one that stands is 6 m ahead; the one ahead is there from the third waypoint on, moving away."""
    seen = RecordedDrives(dataset).truth(1)
    standing = np.tile([6.0, 6.0, np.pi, 5.0, 2.0], (A, 1))
    np.testing.assert_allclose(seen.boxes[:, 0], standing, atol=1e-5)
    moving = np.column_stack([np.zeros(A), 10 + 2.0 * np.arange(1, A + 1), np.full(A, np.pi / 2)])
    np.testing.assert_allclose(seen.boxes[:, 2, :3], moving, atol=1e-5)
    assert seen.there[:, 2].tolist() == [False, False, True, True, True, True]
    assert seen.there[:, 0].all()
    grid = seen.occupancy()
    np.testing.assert_array_equal(grid[0], occupied(standing[:1]))
    np.testing.assert_array_equal(grid[5], occupied(np.array([standing[0], [0, 22, np.pi / 2, 4.0, 1.8]])))


def test_the_plan_is_the_other_truth(dataset):
    drives = RecordedDrives(dataset, "plan")
    seen, driven = drives.truth(ARC), RecordedDrives(dataset).truth(ARC)
    np.testing.assert_allclose(seen.truth - driven.truth, np.tile([ASIDE, 0.0], (A, 1)), atol=2e-5)
    assert drives.truth(9).valid.tolist() == [True, True, False, False, False, False]  # who is in the way is not known
    assert drives.whole().tolist() == RecordedDrives(dataset).whole().tolist()


def test_waypoints_are_half_a_second_apart_whatever_the_rate(path):
    """As if the 12 steps had been recorded at 4 Hz: every second of them is a waypoint."""
    fast = open_dataset(path, dataclasses.replace(EGO_VEHICLE, control_hz=4.0), "val")
    seen = RecordedDrives(fast).truth(1)
    assert seen.valid.sum() == 5
    np.testing.assert_allclose(seen.truth[:5], [[0, 4 * k] for k in range(1, 6)], atol=1e-5)


def test_a_dataset_without_poses_is_refused(tmp_path):
    bare = open_dataset(write_drives(tmp_path, without=("pose", "boxes")), EGO_VEHICLE, "val")
    with pytest.raises(
        DatasetError, match=r"no field 'pose' of steps(.|\n)*no field 'boxes'.*boxes_there(.|\n)*make_d"
    ):
        RecordedDrives(bare)


def test_a_robot_without_a_velocity_is_refused(path):
    blind = open_dataset(path, dataclasses.replace(EGO_VEHICLE_METRES, state=EGO_VEHICLE.state[1:]), "val")
    with pytest.raises(ValueError, match=r"robot 'ego_vehicle' does not plan: expected .* a velocity of 2 numbers"):
        RecordedDrives(blind)


# ---- Collisions ------------------------------------------------------------------------------------------------------


def test_the_car_points_where_it_goes():
    plan = np.array([[0.0, 2.0], [1.0, 3.0], [0.8, 3.0], [3.0, 3.0], [3.0, 1.0], [3.0, 1.0]])
    boxes = car_boxes(plan, PlanningRules(length=5.0, width=2.0, ahead=1.0))
    quarter = np.pi / 4
    headings = np.array([2, 1, 1, 0, -2, -2]) * quarter
    np.testing.assert_allclose(boxes[:, 2], headings, atol=1e-9)
    np.testing.assert_allclose(boxes[:, :2], plan + np.column_stack([np.cos(headings), np.sin(headings)]), atol=1e-9)
    assert boxes[:, 3:].tolist() == [[5.0, 2.0]] * A
    np.testing.assert_allclose(car_boxes(np.zeros((A, 2)))[:, 2], np.pi / 2)


def test_collisions_are_where_they_are_by_hand(dataset):
    """Aside is one who stands, from 3.5 to 8.5 m right and 7 to 9 m ahead; ahead, from step 4 on, one in the lane."""
    seen = RecordedDrives(dataset).truth(0)
    straight = way("straight", 2.0 * np.arange(1, A + 1))[:, :2]
    into = straight.copy()
    into[2:4] = (6.0, 8.0)
    # 16 m ahead at 2 s is the rear of the one that is at 18 m then; before 2 s nobody is there.
    fast = np.array([[0.0, 12.0], [0.0, 14.0], [0.0, 16.0], [0.0, 18.0], [0.0, 30.0], [0.0, 32.0]])
    found = judge({"straight": straight, "into": into, "fast": fast}, seen)
    assert not any(found["straight"].overlapped + found["straight"].collided)
    assert found["into"].overlapped == (False, False, True, True, False, False)
    assert found["into"].collided == (False, False, True, True, False, False)
    assert found["fast"].overlapped == (False, False, False, True, False, False)
    assert found["fast"].collided == (False, False, False, True, False, False)


def test_headings_count():
    """Across the road the car is 5 m wide; who has never turned passes on the grid."""
    box = np.tile([3.0, 4.0, np.pi / 2, 4.0, 1.0], (A, 1, 1))
    truth = FrameTruth(np.zeros((A, 2)), np.ones(A, bool), box, np.ones((A, 1), bool))
    plan = np.array([[0.0, 4.0], [0.5, 4.0], [0.5, 4.0], [0.5, 4.0], [0.5, 4.0], [0.5, 4.0]])
    assert overlaps(plan, truth).tolist() == [False, True, True, True, True, True]
    assert judge({"p": plan}, truth)["p"].collided == (False,) * A
    gone = dataclasses.replace(truth, there=np.zeros((A, 1), bool))
    assert not overlaps(plan, gone).any()


def test_plans_that_are_none_are_refused(dataset):
    seen = RecordedDrives(dataset).truth(0)
    with pytest.raises(ValueError, match=r"plan 'a': got shape \(5, 2\), expected \(6, 2\).*; plan 'b'.*not finite"):
        judge({"a": np.zeros((5, 2)), "b": np.full((A, 2), np.nan)}, seen)


# ---- Scores ----------------------------------------------------------------------------------------------------------

STILL = Judged(((0.0, 0.0),) * A, (False,) * A, (False,) * A)
NAMES = ("constant velocity", "standing still", "driver's plan")


def result(episode, away, collided=(False,) * A, **changes):
    """A frame at which every name is `away` metres to the right of the truth, and collides."""
    answer = Judged(((float(away), 0.0),) * A, collided, collided[::-1])
    values = {"data": "d", "label": "ours", "episode": episode, "step": 0, "task": "t", "against": "driven"}
    values |= {"valid": (True,) * A, "truth": STILL, "answers": dict.fromkeys(("ours", *NAMES), answer)}
    return FrameResult(**{**values, **changes})


def test_tables_are_those_of_the_shared_code():
    n, rng = 80, np.random.default_rng(3)
    plans, truths = rng.normal(0, 8, (2, n, A, 2)).round(4)
    boxes = rng.uniform(-15, 15, (n, A, 2, 5))
    boxes[..., 3:] = rng.uniform(1, 6, (n, A, 2, 2))
    valid = rng.random((n, A)) < 0.8
    found, scores, occupancies = [], PlanningScores(SIM_RULES), []
    for i in range(n):
        truth = FrameTruth(truths[i], valid[i], boxes[i], np.ones((A, 2), bool))
        judged = judge({"ours": plans[i], "truth": truths[i]}, truth)
        occupancies.append(truth.occupancy())
        there = {"valid": tuple(valid[i].tolist()), "truth": judged.pop("truth"), "answers": judged}
        found.append(result(i % 7, 0, **there))
    scores.add(plans, truths, valid, np.stack(occupancies))
    ours = Scored(found, "ours").table()
    for convention, expected in (("uniad", scores.uniad()), ("stp3", scores.stp3())):
        for metric in ("l2", "collision"):
            values = {time: number[0] for time, number in ours[convention][metric].items()}
            assert values == pytest.approx(expected[metric], rel=1e-5)
    assert scores.uniad()["collision"]["avg"] > 1


def test_intervals_of_means_draw_episodes():
    """Of two episodes a bootstrap draws one of them twice in half of the cases, however many frames they have."""
    found = [result(4, 1.0)] * 30 + [result(9, 3.0)] * 10
    numbers = Scored(found, "ours").table()["uniad"]["l2"]
    assert numbers["3s"] == pytest.approx([1.5, 1.0, 3.0])
    assert numbers["avg"] == pytest.approx([1.5, 1.0, 3.0])
    alone = Scored(found[:30], "ours").table()["stp3"]["l2"]["1s"]
    assert alone == [pytest.approx(1.0), None, None]
    assert shown(alone) == "1.00"
    assert shown([1.5, 1.0, 3.0]) == "1.50 [1.00, 3.00]"
    assert [x[0] for x in Scored(found, "ours").horizon()] == pytest.approx([1.5] * A)


def test_intervals_of_shares():
    """Wilson's at one step, and where nothing happened; by hand, 2 of 10: 0.0567 to 0.5098, 0 of 10: up to 0.2775."""
    hit = (False, False, False, False, False, True)
    found = [result(e, 0.0, hit if e < 2 else (False,) * A) for e in range(10)]
    table = Scored(found, "ours").table()
    assert table["uniad"]["collision"]["3s"] == pytest.approx([20.0, 5.67, 50.98], abs=0.01)
    assert table["uniad"]["collision"]["1s"] == pytest.approx([0.0, 0.0, 27.75], abs=0.01)
    assert table["stp3"]["collision"]["2s"] == pytest.approx([0.0, 0.0, 27.75], abs=0.01)
    assert table["stp3"]["exact_collision"]["3s"][0] == pytest.approx(100 * 2 / 60)
    # A mean of six steps: every draw of 10 episodes has k of the 2, and k / 60 of the steps.
    mean = table["stp3"]["collision"]["3s"]
    drawn = np.random.default_rng(0).binomial(10, 0.2, 200_000) / 60
    assert mean == pytest.approx([100 / 30, *(100 * np.quantile(drawn, (0.025, 0.975)))])


def test_steps_at_which_the_truth_collides_are_none_of_the_plan():
    first = (True,) + (False,) * 5
    both = result(0, 0.0, (True,) * A, truth=Judged(STILL.plan, first, first))
    counted = Scored([both], "ours")
    assert counted.collided.tolist() == [[False] + [True] * 5]
    assert counted.overlapped.all()
    strict = dataclasses.replace(SIM_RULES, skip_truth_collisions=False)
    assert Scored([both], "ours", strict).collided.all()


def test_waypoints_that_are_never_known_have_no_number():
    table = Scored([result(e, 2.0, valid=(True,) * 4 + (False,) * 2) for e in (0, 1)], "ours").table()
    assert table["uniad"]["l2"]["2s"] == [2.0, 2.0, 2.0]
    assert table["uniad"]["l2"]["3s"] == [None, None, None]
    assert shown(table["uniad"]["l2"]["3s"]) == "?"


def test_baselines_stand_beside_the_policy():
    assert [row["name"] for row in rows([result(0, 1.0)], "ours")] == ["ours", *NAMES]
    assert [row["name"] for row in rows([result(0, 1.0)])] == list(NAMES)
    with pytest.raises(ValueError, match="no answer of 'theirs' at episode 5 step 0, expected one at each of 1 frames"):
        rows([result(5, 1.0)], "theirs")
    with pytest.raises(ValueError, match="no answer of 'ours' at any frame"):
        Scored([], "ours")


def test_lines_are_read_as_written_and_cut_ones_dropped(tmp_path):
    path = tmp_path / "plans.jsonl"
    wrote = [result(0, 1.25, latency_ms=3.5, thought="a car"), result(1, 2.0)]
    for one in wrote:
        append_frame(path, one)
    whole = path.read_text()
    path.write_text(whole + '{"data": "d"')
    assert read_frames(path) == wrote
    assert path.read_text() == whole
    assert read_frames(tmp_path / "none.jsonl") == []
    path.write_text(whole + json.dumps({"data": "d"}) + "\n")
    with pytest.raises(ValueError, match=r"plans.jsonl, line 3: not a frame: KeyError.*remove the file"):
        read_frames(path)
