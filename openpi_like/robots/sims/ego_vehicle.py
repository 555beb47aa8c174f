"""Simulated driving, with plans at 2 Hz or with controls at 10 Hz: `openpi_like.driving` behind the interface `Sim`."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
from jaxtyping import Float, Float32, UInt8

from openpi_like.driving.annotations import Annotations, annotate
from openpi_like.driving.drive_log import DriveLog
from openpi_like.driving.ego_motion import (
    LEAST_ACCELERATION,
    LENGTH,
    MOST_ACCELERATION,
    MOST_STEERING,
    controls_towards,
)
from openpi_like.driving.episode import Comfort, Drive
from openpi_like.driving.pilot import Pilot
from openpi_like.driving.scenarios import PROMPTS, make_scenario
from openpi_like.driving.scene_entities import entities
from openpi_like.driving.street_scene import FRAME_WIDTH, HEIGHT, StreetScene
from openpi_like.driving.traffic import STEP_S as TICK_S
from openpi_like.robots.ego_vehicle import EGO_CONTROLS_SCENE, EGO_VEHICLE_SCENE, STEP_S
from openpi_like.robots.robot import Robot
from openpi_like.robots.sims.render import renderer_name
from openpi_like.robots.sims.sim import Sim, SlowNoise, check_action, prompt_of

_LIMIT_S = 40.0
_SHOWN = ("front_left", "front", "front_right", "back_left", "back", "back_right")
_FAR = 5.0  # m; waypoints that are nearer than that are disturbed less


def _with_frames(robot: Robot) -> Robot:
    """The robot, whose cameras deliver frames of the size that is drawn."""
    cameras = tuple(dataclasses.replace(c, height=HEIGHT, width=FRAME_WIDTH) for c in robot.cameras)
    return dataclasses.replace(robot, cameras=cameras)


class _DrivingSim(Sim):
    """What both have in common: see `Sim`. A seed is a start, other vehicles, the light and the buildings.

    A collision, or leaving the road, ends the chance of success; the sim goes on. Actions are cut to what the car can
    do.
    """

    robot: Robot
    tasks = tuple(PROMPTS)
    success = False  # before the first reset

    def __init__(self) -> None:
        self.renderer = renderer_name()
        self._prompt = ""
        self._drive: Drive | None = None
        self._scenes: dict[tuple[str, str], StreetScene] = {}  # by road network and light

    def reset(self, task: str, seed: int) -> None:
        """See `Sim.reset`."""
        self._prompt = prompt_of(PROMPTS, task, seed, self.robot)
        scenario = make_scenario(task, seed)
        self._drive = Drive(scenario)
        self._scene.place_buildings(scenario.buildings)
        self._look()
        self._log = DriveLog((self.tasks.index(task), seed))

    @property
    def drive(self) -> Drive:
        """The whole state of the episode; privileged.

        Raises:
            RuntimeError: before the first reset.
        """
        if self._drive is None:
            raise RuntimeError(f"the simulated robot {self.robot.name!r} has no episode yet; call reset first")
        return self._drive

    def _look(self) -> None:
        """See `Sim`: done is who reached the goal without a collision and on the road; after either there is no way."""
        self.success, self.failed = self.drive.reached, self.drive.collided or self.drive.off_road

    @property
    def collided(self) -> bool:
        """Whether the car ran into anybody, or anybody into it."""
        return self.drive.collided

    @property
    def off_road(self) -> bool:
        """Whether two thirds of the car were beside all lanes, those of oncoming traffic included."""
        return self.drive.off_road

    @property
    def progress(self) -> float:
        """Share of the route that was reached, from 0 to 1."""
        return self.drive.progress

    @property
    def seconds(self) -> float:
        """Since the start."""
        return self.drive.seconds

    @property
    def comfort(self) -> Comfort:
        """The largest accelerations and jerk so far."""
        return self.drive.comfort

    def observe(self) -> dict[str, Any]:
        """See `Sim.observe`."""
        annotations, doing = self._annotated()
        self._log.add(self.drive, annotations, doing)
        seen = {"images": self._placed().views(), "state": self._state(), "prompt": self._prompt}
        return {**seen, "entities": entities(annotations)}

    def frame(self, size: int) -> UInt8[np.ndarray, "size size 3"]:
        """See `Sim.frame`: from above, the car driving up; below it what its cameras see."""
        scene = self._placed()
        high, wide = size // 5, size // 3
        picture = np.zeros((size, size, 3), np.uint8)
        picture[: size - 2 * high] = scene.above(size)[high : size - high]
        views = scene.views()
        for i, name in enumerate(_SHOWN):
            row, column = size - (2 - i // 3) * high, (i % 3) * wide
            small = cv2.resize(views[name], (wide, high), interpolation=cv2.INTER_AREA)
            picture[row : row + high, column : column + wide] = small
        return picture

    def measures(self) -> dict[str, float]:
        """See `Sim.measures`: shares (0 or 1 for what happened), seconds, and the largest accelerations (m/s^2) and
        jerk (m/s^3)."""
        return {
            "progress": self.progress,
            "collided": float(self.collided),
            "off_road": float(self.off_road),
            "seconds": self.drive.seconds,
            **dataclasses.asdict(self.comfort),
        }

    def notes(self) -> dict[str, Sequence[str] | np.ndarray]:
        """See `Sim.notes` and `DriveLog.notes`."""
        return self._log.notes(round(STEP_S * self.robot.control_hz))

    def annotations(self) -> Annotations:
        """Returns who and what is around the car now, and a caption."""
        return self._annotated()[0]

    def _annotated(self) -> tuple[Annotations, str]:
        """Annotations, and what the car does, in words."""
        drive = self.drive
        *_, doing = Pilot(drive.scenario).controls(drive.car, drive.traffic.movers())
        return annotate(drive, doing), doing

    @property
    def _scene(self) -> StreetScene:
        key = self.drive.scenario.network, self.drive.scenario.light
        if key not in self._scenes:
            self._scenes[key] = StreetScene(*key)
        return self._scenes[key]

    def _placed(self) -> StreetScene:
        scene, drive = self._scene, self.drive
        scene.place(drive.car, drive.traffic.slots, drive.traffic.poses())
        return scene

    def _state(self) -> Float32[np.ndarray, "17"]:
        """As `EGO_VEHICLE` has it."""
        car, places = self.drive.car, self.drive.places(STEP_S)
        right, ahead = -np.sin(car.slip), np.cos(car.slip)
        change = (places[-1] - 2 * places[-2] + places[-3]) / STEP_S**2
        # Along the way that the middle takes, and to the centre of the curve.
        pull = car.speed * car.yaw_rate
        felt = (car.acceleration * right - pull * ahead, car.acceleration * ahead + pull * right)
        velocity = (car.speed * right, car.speed * ahead)
        numbers = [*velocity, car.yaw_rate, *change, *felt, car.speed, car.steering, *places[:-1].ravel()]
        return np.array(numbers, np.float32)


class EgoVehicleSim(_DrivingSim):
    """See `Sim`; an action is the place, right and ahead of the car in metres, to be at half a second from now."""

    robot = _with_frames(EGO_VEHICLE_SCENE)
    max_steps = round(_LIMIT_S / STEP_S)
    noises: tuple[float, ...] = (0.0, 0.08, 0.15)  # m

    def step(self, action: Float[np.ndarray, "2"]) -> None:
        """See `Sim.step`: one waypoint, that is driven to at a constant acceleration and along an arc."""
        right, ahead = check_action(action, self.robot)
        acceleration, steering = controls_towards(self.drive.car, float(right), float(ahead), STEP_S)
        for _ in range(round(STEP_S / TICK_S)):
            self.drive.step(acceleration, steering)
        self._look()

    def expert(self, rng: np.random.Generator, noise: float) -> "PlanExpert":
        """See `Sim.expert`."""
        return PlanExpert(self, rng, noise)


class EgoControlsSim(_DrivingSim):
    """See `Sim`; an action is acceleration in m/s^2 and steering in rad, to the left, held for a tenth of a second."""

    robot = _with_frames(EGO_CONTROLS_SCENE)
    max_steps = round(_LIMIT_S / TICK_S)
    noises: tuple[float, ...] = (0.0, 0.25, 0.5)  # m/s^2; see `ControlsExpert.disturb`

    def step(self, action: Float[np.ndarray, "2"]) -> None:
        """See `Sim.step`."""
        acceleration, steering = check_action(action, self.robot)
        self.drive.step(float(acceleration), float(steering))
        self._look()

    def expert(self, rng: np.random.Generator, noise: float) -> "ControlsExpert":
        """See `Sim.expert`."""
        return ControlsExpert(self, rng, noise)


class PlanExpert:
    """See `Expert`; plans from wherever the car is, and remembers nothing."""

    def __init__(self, sim: EgoVehicleSim, rng: np.random.Generator, noise: float) -> None:
        self._sim, self._rng, self._noise = sim, rng, noise
        self._pilot, self._drift = Pilot(sim.drive.scenario), SlowNoise(2, 0.6)
        self.doing = ""

    def act(self) -> Float32[np.ndarray, "6 2"]:
        """Returns the plan for the present state: where to be in 0.5, 1, ... 3 s, right and ahead, metres."""
        drive = self._sim.drive
        plan, self.doing = self._pilot.plan(drive.car, drive.traffic.movers())
        return plan

    def disturb(self, action: Float[np.ndarray, "6 2"]) -> Float32[np.ndarray, "2"]:
        """Returns the waypoint to execute: the plan's first, moved by slowly varying noise; see `Expert.disturb`."""
        first = np.asarray(action, np.float64)[0]
        scale = self._noise * min(1.0, float(np.hypot(*first)) / _FAR)
        return (first + scale * self._drift.next(self._rng)).astype(np.float32)


class ControlsExpert:
    """See `Expert`."""

    def __init__(self, sim: EgoControlsSim, rng: np.random.Generator, noise: float) -> None:
        self._sim, self._rng, self._noise = sim, rng, noise
        self._pilot, self._drift = Pilot(sim.drive.scenario), SlowNoise(2, 0.9)
        self.doing = ""

    def act(self) -> Float32[np.ndarray, "2"]:
        """See `Expert.act`."""
        drive = self._sim.drive
        acceleration, steering, self.doing = self._pilot.controls(drive.car, drive.traffic.movers())
        return _cut(np.array([acceleration, steering]))

    def disturb(self, action: Float[np.ndarray, "2"]) -> Float32[np.ndarray, "2"]:
        """Slowly varying noise on both; see `Expert.disturb`. It pushes to the side as hard as ahead; where the car is
        slow, it turns the wheels by no more than a tenth of its size in rad."""
        per_radian = max(self._sim.drive.car.speed**2 / LENGTH, 10.0)  # m/s^2 to the side
        scale = self._noise * np.array([1.0, 1.0 / per_radian])
        return _cut(action + scale * self._drift.next(self._rng))


def _cut(action: np.ndarray) -> Float32[np.ndarray, "2"]:
    low, high = (LEAST_ACCELERATION, -MOST_STEERING), (MOST_ACCELERATION, MOST_STEERING)
    return np.clip(action, low, high).astype(np.float32)
