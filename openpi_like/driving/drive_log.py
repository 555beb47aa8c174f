"""What a dataset has of a simulated drive beside observations and plans: texts about every step, and who was where."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Shaped

from openpi_like.driving.annotations import Annotations
from openpi_like.driving.episode import Drive
from openpi_like.driving.scenarios import BODIES
from openpi_like.driving.scene_texts import forecast_texts, in_frame_of, texts_of

POSE, BOXES, BOXES_THERE = "pose", "boxes", "boxes_there"
"""Fields of the steps: of the car x, y, heading (T, 3); of each of `BODIES` x, y, heading, length, width (T, N, 5), and
which are there, (T, N). Metres and rad of the world; no policy reads them."""

_FORECAST = 6  # places of an agent, half a second apart


class _Step(NamedTuple):
    annotations: Annotations
    doing: str
    pose: tuple[float, float, float]
    boxes: Float[np.ndarray, "N 5"]
    there: Bool[np.ndarray, "N"]


class DriveLog:
    """The steps of one episode. seed: of what is drawn for its texts."""

    def __init__(self, seed: tuple[int, ...]) -> None:
        self._seed, self._steps = seed, list[_Step]()

    def add(self, drive: Drive, annotations: Annotations, doing: str) -> None:
        """Notes the present step."""
        car, boxes, there = drive.car, np.zeros((len(BODIES), 5)), np.zeros(len(BODIES), bool)
        for slot, body, pose in zip(drive.traffic.slots, drive.traffic.bodies, drive.traffic.poses(), strict=True):
            boxes[slot], there[slot] = (*pose[:3], body.length, body.width), True
        self._steps.append(_Step(annotations, doing, (car.x, car.y, car.heading), boxes, there))

    def notes(self, every: int) -> dict[str, Sequence[str] | Shaped[np.ndarray, "T ..."]]:
        """Returns the fields of all steps. every: steps in half a second."""
        texts = [self._texts(i, every) for i in range(len(self._steps))]
        boxes = np.array([step.boxes for step in self._steps], np.float32).reshape(-1, len(BODIES), 5)
        there = np.array([step.there for step in self._steps], np.int64).reshape(-1, len(BODIES))
        notes: dict[str, Sequence[str] | np.ndarray] = {key: [t[key] for t in texts] for key in (texts or [{}])[0]}
        pose = np.array([step.pose for step in self._steps], np.float32).reshape(-1, 3)
        return {**notes, POSE: pose, BOXES: boxes, BOXES_THERE: there}

    def _texts(self, i: int, every: int) -> dict[str, str]:
        step, rng = self._steps[i], np.random.default_rng((*self._seed, i))
        texts = texts_of(step.annotations, step.doing, rng)
        later = self._steps[i + every : i + (_FORECAST + 1) * every : every]
        stay = np.all([step.there, *(s.there for s in later)], axis=0)
        agents = [(n, a) for n, a in enumerate(step.annotations.agents) if stay[a.number]]
        if len(later) < _FORECAST or not agents:
            return {**texts, "forecast_question": "", "forecast": ""}
        # Who moves is asked about three times as often as who stands, which is easily told.
        weights = np.array([3.0 if math.hypot(*a.velocity) > 0.5 else 1.0 for _, a in agents])
        row, agent = agents[int(rng.choice(len(agents), p=weights / weights.sum()))]
        x, y, heading = (float(v) for v in step.boxes[agent.number, :3])
        future = in_frame_of(x, y, heading, np.array([s.boxes[agent.number, :2] for s in later]))
        return {**texts, **forecast_texts(row, agent, future)}
