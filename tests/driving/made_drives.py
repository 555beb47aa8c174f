"""A small dataset of the ego vehicle whose poses are known in closed form.

Two episodes, half a second a step. "straight": 12 steps at 4 m/s, from a place and in a direction of the world that are
no round numbers; slot 0 stands 8 m ahead of the start and 6 m to the right, and points across; slot 2 drives 10 m ahead
of the car, in its lane, and is there from step 4 on. "arc": 10 steps at 5 m/s, to the left on a circle of 20 m; alone.
The stored plans lie half a metre to the right of what is driven if nothing disturbs.
"""

import warnings
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np

from openpi_like.data.rlds_writer import Episode, write_rlds
from openpi_like.driving.scenarios import BODIES
from openpi_like.robots.ego_vehicle import AGENTS, EGO_VEHICLE, EGO_VEHICLE_SCENE, LINES
from openpi_like.robots.robot import Robot

START, HEADING = np.array([31.5, -12.25]), 0.7
SPEED, STEPS = {"straight": 4.0, "arc": 5.0}, {"straight": 12, "arc": 10}
RADIUS, ASIDE = 20.0, 0.5
A = 6


def way(task: str, metres: np.ndarray) -> np.ndarray:
    """Returns where the car is after so many metres: right and ahead of the start, and how far it has turned."""
    if task == "straight":
        return np.stack([0 * metres, metres, 0 * metres], -1)
    turned = metres / RADIUS
    return np.stack([-RADIUS * (1 - np.cos(turned)), RADIUS * np.sin(turned), turned], -1)


def world(right: float | np.ndarray, ahead: float | np.ndarray) -> np.ndarray:
    """Returns the place in the world of one seen from the start."""
    c, s = np.cos(HEADING), np.sin(HEADING)
    return START + np.stack([ahead * c + right * s, ahead * s - right * c], -1)


def write_drives(root: Path, *, without: Sequence[str] = (), robot: Robot = EGO_VEHICLE_SCENE) -> Path:
    """Writes both as split "val" and returns the dataset's directory. without: fields of the steps to leave out."""
    episodes = [_episode(task, without) for task in STEPS]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of TensorFlow Datasets
        return write_rlds(root, "drives", robot, {"val": episodes}, description="made up", metadata={})


def _episode(task: str, without: Sequence[str]) -> Episode:
    n, step = STEPS[task], SPEED[task] / 2
    right, ahead, turned = way(task, step * np.arange(n)).T
    pose = np.column_stack([world(right, ahead), HEADING + turned]).astype(np.float32)
    boxes, there = np.zeros((n, len(BODIES), 5), np.float32), np.zeros((n, len(BODIES)), np.int64)
    if task == "straight":
        boxes[:, 0], there[:, 0] = (*world(6.0, 8.0), HEADING + np.pi / 2, 5.0, 2.0), 1
        boxes[:, 2, :2], boxes[:, 2, 2:] = world(0.0, step * np.arange(n) + 10.0), (HEADING, 4.0, 1.8)
        there[4:, 2] = 1
    state = np.zeros((n, EGO_VEHICLE.robot_state_size), np.float32)
    state[:, 1], state[:, 2] = SPEED[task], np.arange(n)  # velocity ahead; the step, where the yaw rate would be
    plan = way(task, step * np.arange(1, A + 1))[:, :2] + (ASIDE, 0.0)
    images = {
        c.name: [_png(np.full((8, 12, 3), (k, t, 0), np.uint8)) for t in range(n)]
        for k, c in enumerate(EGO_VEHICLE.cameras)
    }
    seen = {e.name: np.zeros((n, e.count, e.size), np.float32) for e in EGO_VEHICLE_SCENE.entities}
    seen["agents"][:, 0] = np.arange(n)[:, None]
    steps: dict[str, np.ndarray] = {
        "plan_known": np.full(n, A, np.int64),
        "pose": pose,
        "boxes": boxes,
        "boxes_there": there,
        **{e.key: seen[e.name] for e in EGO_VEHICLE_SCENE.entities},
        "observation/agents_there": (np.arange(AGENTS) < 1).astype(np.int64)[None].repeat(n, 0),
        "observation/map_there": np.zeros((n, LINES), np.int64),
    }
    return Episode(
        images=images,
        state=state,
        action=np.repeat(plan[None].astype(np.float32), n, 0),
        prompt=f"drive {task}",
        success=True,
        metadata={"task": task},
        steps={key: x for key, x in steps.items() if key not in without},
    )


def _png(image: np.ndarray) -> bytes:
    return cv2.imencode(".png", image[..., ::-1])[1].tobytes()
