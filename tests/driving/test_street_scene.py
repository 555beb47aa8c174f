"""Pictures and annotations of a simulated drive agree with what is there, and with each other."""

import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from openpi_like.driving.annotations import REACH_M, annotate
from openpi_like.driving.ego_motion import CarState
from openpi_like.driving.scenarios import BODIES, PROMPTS
from openpi_like.driving.street_scene import HEIGHT, VIEWS, StreetScene

RED = next(i for i, body in enumerate(BODIES) if body.kind == "car" and body.colour == (0.8, 0.1, 0.1))
CAR = CarState(100.0, -4.0, 0.0, 10.0)  # eastwards, on the highway's second lane


@pytest.fixture(scope="module")
def street():
    """The highway by day, without buildings."""
    pytest.importorskip("highway_env")
    scene = StreetScene("highway", "day")
    scene.place_buildings([])
    return scene


def red_pixels(image):
    """How many, and the mean column."""
    r, g, b = image.astype(int).transpose(2, 0, 1)
    rows, columns = np.nonzero((r > 2 * g + 20) & (r > 2 * b + 20))
    return len(rows), float(columns.mean()) if len(rows) else math.nan


@pytest.mark.parametrize(
    ("view", "degrees"),
    [("front", 0), ("front_left", 55), ("front_right", -55), ("back", 180), ("back_left", 110), ("back_right", -110)],
)
@pytest.mark.parametrize("heading", [0.0, 2.5])
def test_a_red_car_is_seen_by_the_camera_that_looks_there(street, view, degrees, heading):
    """Twelve metres away, in the middle of that picture; cameras that look elsewhere see less of it, or nothing."""
    car = CarState(100.0, -4.0, heading, 0.0)
    angle = heading + math.radians(degrees)
    there = car.x + 12 * math.cos(angle), car.y + 12 * math.sin(angle)
    street.place(car, [RED], np.array([[*there, angle + 1.2, 0.0]]))
    seen = {name: red_pixels(image)[0] for name, image in street.views().items()}
    assert max(seen, key=lambda name: seen[name]) == view
    assert seen[view] > 30
    opposite = {"front": "back", "back": "front"}.get(view)
    if opposite:
        assert seen[opposite] == 0
    assert red_pixels(street.views()[view])[1] == pytest.approx(39.5, abs=9)


def test_left_in_the_picture_is_left_of_the_car(street):
    columns = []
    for left in (3.0, -3.0):
        street.place(CAR, [RED], np.array([[CAR.x + 14, CAR.y + left, 0.0, 0.0]]))
        columns.append(red_pixels(street.views()["front"])[1])
    assert columns[0] < 30 < 50 < columns[1]


def test_who_is_not_there_is_not_seen(street):
    street.place(CAR, [], np.zeros((0, 4)))
    assert all(red_pixels(image)[0] == 0 for image in street.views().values())


def test_the_car_does_not_see_itself(street):
    """It is yellow, as nothing else here."""
    street.place(CAR, [], np.zeros((0, 4)))
    for image in street.views().values():
        r, g, b = image.astype(int).transpose(2, 0, 1)
        assert not ((r > 150) & (g > 150) & (b < 100)).any()
    r, g, b = street.above(64).astype(int).transpose(2, 0, 1)
    rows, columns = np.nonzero((r > 130) & (g > 130) & (b < 90))
    assert len(rows) > 4
    assert columns.mean() == pytest.approx(31.5, abs=2)  # in the middle, longer ahead than to the side
    assert np.ptp(rows) > np.ptp(columns)


def test_horizon_and_lines_are_where_they_should_be(street):
    """Grey road below, sky above; the lane's lines run left and right of the middle."""
    street.place(CAR, [], np.zeros((0, 4)))
    front = street.views()["front"].astype(int)
    assert front[2].std() < front.std()
    assert np.abs(front[-1, 40] - front[-1, 40].mean()).max() < 25  # grey
    white = (front > 180).all(-1) & (np.arange(HEIGHT) > 26)[:, None]
    columns = np.nonzero(white[-18:])[1]
    assert (columns < 36).any()
    assert (columns > 43).any()


@pytest.mark.parametrize("light", ["dusk", "fog"])
def test_light_changes_the_picture(street, light):
    scene = StreetScene("highway", light)
    scene.place_buildings([])
    for s in (street, scene):
        s.place(CAR, [RED], np.array([[CAR.x + 14, CAR.y, 0.0, 0.0]]))
    a, b = (s.views()["front"].astype(int) for s in (street, scene))
    assert np.abs(a - b).mean() > 4


def test_unused_views_are_named_as_the_robots_cameras():
    from openpi_like.robots.ego_vehicle import VIEWS as CAMERAS

    assert tuple(VIEWS) == CAMERAS


@pytest.mark.parametrize("renderer", ["egl", "raycast"])
def test_every_renderer_draws_it(renderer):
    """In a process of its own: what draws is chosen once."""
    code = """
import numpy as np
from openpi_like.robots.sims import make_sim
sim = make_sim("ego_vehicle")
sim.reset("intersection-left", 0)
images = sim.observe()["images"]
print(sim.renderer, len(images), min(i.std() for i in images.values()) > 10, sim.frame(32).shape)
"""
    root = Path(__file__).parents[2]
    environment = {**os.environ, "OPENPI_LIKE_RENDERER": renderer, "PYTHONPATH": str(root)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    if renderer == "egl" and "does not work on this machine" in done.stderr:
        pytest.skip("no EGL here")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split(maxsplit=3) == [renderer, "6", "True", "(32, 32, 3)\n"]


# ---- annotations


@pytest.mark.parametrize("task", ["highway-left", "roundabout-left", "intersection-right"])
def test_agents_are_where_the_traffic_is(cars, task):
    sim = cars("ego_vehicle")
    sim.reset(task, 1)
    expert = sim.expert(np.random.default_rng(0), 0.0)
    for _ in range(6):
        sim.step(expert.disturb(expert.act()))
    car, poses = sim.drive.car, sim.drive.traffic.poses()
    agents = sim.annotations().agents
    expected = [p for p in poses.tolist() if math.hypot(p[0] - car.x, p[1] - car.y) <= REACH_M]
    assert len(agents) == len(expected) > 0
    assert [a.distance for a in agents] == sorted(a.distance for a in agents)
    for agent in agents:
        x, y = car.to_world(agent.right, agent.ahead)
        gaps = [math.hypot(x - p[0], y - p[1]) for p in expected]
        true = expected[int(np.argmin(gaps))]
        assert min(gaps) < 1e-6
        assert math.remainder(agent.heading + car.heading - true[2], 2 * math.pi) == pytest.approx(0, abs=1e-6)
        assert math.hypot(*agent.velocity) == pytest.approx(true[3])
        vx, vy = np.subtract(car.to_world(*agent.velocity), (car.x, car.y))
        assert (vx, vy) == pytest.approx((true[3] * math.cos(true[2]), true[3] * math.sin(true[2])), abs=1e-6)


def test_agents_velocity_is_how_they_move(cars):
    sim = cars("ego_controls")
    sim.reset("roundabout-ahead", 2)
    before = sim.drive.traffic.poses()
    sim.step(np.zeros(2))
    after = sim.drive.traffic.poses()
    moved = (after - before)[:, :2] / 0.1
    speeds = 0.5 * (before[:, 3] + after[:, 3])
    np.testing.assert_allclose(np.hypot(*moved.T), speeds, atol=0.1)


@pytest.mark.parametrize("task", PROMPTS)
def test_the_car_begins_in_the_middle_of_its_lane(cars, task):
    sim = cars("ego_vehicle")
    sim.reset(task, 2)
    annotations = sim.annotations()
    middles = [line.points for line in annotations.lines if line.kind == "middle"]
    assert min(np.hypot(*m.T).min() for m in middles) < 0.6  # points are a metre apart
    for line in annotations.lines:
        assert line.kind in ("middle", "striped", "continuous", "none")
        assert np.hypot(*line.points.T).max() <= REACH_M
    edges = np.concatenate([line.points for line in annotations.lines if line.kind != "middle"])
    here = edges[np.abs(edges[:, 1]) < 1.0]
    assert np.abs(here[:, 0]).min() == pytest.approx(2.0, abs=0.15)
    assert annotations.caption.endswith(".")
    assert "km/h" in annotations.caption


def test_caption_says_where_somebody_is(cars):
    sim = cars("ego_controls")
    sim.reset("highway-keep", 1)
    drive = sim.drive
    del drive.traffic.vehicles[1:], drive.traffic.slots[1:]
    other = drive.traffic.vehicles[0]
    for (ahead, right), words in {
        (20.0, 0.0): "ahead drives the same way",
        (-15.0, 0.0): "behind drives the same way",
        (0.5, -4.0): "on the left drives",
        (10.0, 10.0): "ahead on the right drives",
    }.items():
        other.position = np.array([drive.car.x + ahead, -(drive.car.y - right)])
        caption = annotate(drive, "keep the lane").caption
        assert words in caption
        assert "keep the lane" in caption
    other.heading = math.pi
    assert "comes the other way" in annotate(drive, "keep the lane").caption
    other.speed = 0.0
    assert "stands" in annotate(drive, "keep the lane").caption
    del drive.traffic.vehicles[:], drive.traffic.slots[:]
    assert "Nobody is near" in annotate(drive, "keep the lane").caption
