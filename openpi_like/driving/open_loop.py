"""What plans for recorded drives of the simulator are judged by, and what becomes of one plan there.

Two truths are at hand. What was driven lies in the poses of the steps to come, a disturbed drive that the driver
corrected all the time: judged by "driven", as nuScenes judges, no plan is exactly right. What is stored as the plan is
the driver's clean one from that very state, what policies are trained on: "plan". Who is in the way is that of the
steps to come in both.

Letters: A waypoints, N other vehicles, R rows and C columns of an occupancy grid.
"""

import dataclasses
import math
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float, Int

from openpi_like.config import near_names
from openpi_like.data.dataset import EpisodeDataset
from openpi_like.data.schema import DatasetError
from openpi_like.driving.drive_log import BOXES, BOXES_THERE, POSE
from openpi_like.driving.ego_motion import LENGTH, WIDTH
from openpi_like.driving.nuscenes.truth import occupied
from openpi_like.driving.planning_metrics import PlanningRules, boxes_overlap, collisions
from openpi_like.driving.scene_texts import in_frame_of
from openpi_like.robots.ego_vehicle import STEP_S

SIM_RULES = PlanningRules(length=LENGTH, width=WIDTH, ahead=0.0, invalid_as_zero=False)
"""The simulator's car: its frame begins in its middle. Steps that are not known are left out."""

Against = Literal["driven", "plan"]
_STANDS = 0.3  # m from one waypoint to the next; in less, what a policy jitters by would turn the car


@dataclasses.dataclass(frozen=True, eq=False)
class FrameTruth:
    """Of one frame, in the car's frame of now.

    truth: (right, ahead) in metres, 0 where it is not valid. valid: whether the truth, and who is in the way, is known.
    boxes: of others at each waypoint, as `boxes_overlap` takes them. there: which of them there are; none where it is
    not valid.
    """

    truth: Float[np.ndarray, "A 2"]
    valid: Bool[np.ndarray, "A"]
    boxes: Float[np.ndarray, "A N 5"]
    there: Bool[np.ndarray, "A N"]

    def occupancy(self, rules: PlanningRules = SIM_RULES) -> Bool[np.ndarray, "A R C"]:
        """Returns which cells others cover, as `collisions` takes it; boxes are filled as published."""
        return np.stack([occupied(b[there], rules) for b, there in zip(self.boxes, self.there, strict=True)])


class RecordedDrives:
    """The truth of the frames of a dataset of simulated drives.

    against: which truth, see above.
    """

    def __init__(self, dataset: EpisodeDataset, against: Against = "driven") -> None:
        """
        Raises:
            ValueError: the robot has no plan of places. DatasetError: the dataset has no poses or boxes; lists all.
        """
        robot, columns = dataset.robot, dataset.index.columns
        velocity = sum(f.size for f in robot.state if f.name == "velocity")
        if robot.plan is None or robot.robot_action_size != 2 or velocity != 2:
            raise ValueError(
                f"robot {robot.name!r} does not plan: expected one whose actions are plans of places (right, ahead), "
                "and whose state has a velocity of 2 numbers, such as ego_vehicle"
            )
        missing = [
            f"no field {key!r} of steps; {near_names(key, list(columns))}"
            for key in (POSE, BOXES, BOXES_THERE)
            if key not in columns
        ]
        if missing:
            raise DatasetError(
                f"{dataset.index.split} says not where the car and others were:\n  "
                + "\n  ".join(missing)
                + "\nit has to be recorded with openpi_like.driving.drive_log: make it with data/make_demos.py"
            )
        self._dataset, self._against = dataset, against
        self._pose, self._boxes, self._there = (columns[key] for key in (POSE, BOXES, BOXES_THERE))
        self._every = round(STEP_S * robot.control_hz)
        self._ends = dataset.index.episode_start[1:]

    def whole(self) -> Int[np.ndarray, "n"]:
        """Returns the frames at which both truths are known at all waypoints."""
        frames = np.arange(len(self._dataset))
        return frames[self._later(frames).all(1) & self._dataset.actions(frames)[1].all(1)]

    def truth(self, frame: int) -> FrameTruth:
        """Returns what a plan at a frame is judged by."""
        frames = np.array([frame])
        (step,), valid = self._dataset.steps(frames), self._later(frames)[0]
        later = step + self._every * np.flatnonzero(np.append(False, valid))
        x, y, heading = self._pose[step].astype(float).tolist()
        A, N = len(valid), self._boxes.shape[1]
        boxes, there = np.zeros((A, N, 5)), np.zeros((A, N), bool)
        seen = self._boxes[later].astype(float)
        seen[..., :2] = in_frame_of(x, y, heading, seen[..., :2].reshape(-1, 2)).reshape(-1, N, 2)
        seen[..., 2] += math.pi / 2 - heading  # from the car's right, which is a quarter turn behind ahead
        boxes[valid], there[valid] = seen, self._there[later] > 0
        if self._against == "plan":
            plans, known = self._dataset.actions(frames)
            truth, valid = plans[0].astype(float), valid & known[0]
        else:
            truth = np.zeros((A, 2))
            truth[valid] = in_frame_of(x, y, heading, self._pose[later, :2].astype(float))
        there &= valid[:, None]
        return FrameTruth(np.where(valid[:, None], truth, 0.0), valid, boxes, there)

    def _later(self, frames: np.ndarray) -> Bool[np.ndarray, "B A"]:
        """Returns which waypoints of frames lie inside their episodes."""
        ends = self._ends[self._dataset.episodes_of(frames)]
        after = self._every * np.arange(1, self._dataset.robot.action_horizon + 1)
        return self._dataset.steps(frames)[:, None] + after < ends[:, None]


def car_boxes(plan_A2: Float[np.ndarray, "A 2"], rules: PlanningRules = SIM_RULES) -> Float[np.ndarray, "A 5"]:
    """Returns the car's box at each waypoint, as `boxes_overlap` takes it.

    It points to where it came from the waypoint before, at first from the origin; where it stands, as before.
    """
    headings, heading, before = [], math.pi / 2, np.zeros(2)
    for place in plan_A2.astype(float):
        right, ahead = place - before
        heading = math.atan2(ahead, right) if math.hypot(right, ahead) > _STANDS else heading
        headings.append(heading)
        before = place
    along = rules.ahead * np.column_stack([np.cos(headings), np.sin(headings)])
    sizes = np.tile([rules.length, rules.width], (len(plan_A2), 1))
    return np.column_stack([plan_A2 + along, headings, sizes])


def overlaps(
    plan_A2: Float[np.ndarray, "A 2"], truth: FrameTruth, rules: PlanningRules = SIM_RULES
) -> Bool[np.ndarray, "A"]:
    """Returns at which steps the car would overlap somebody: exact, without a grid, and with headings."""
    cars = np.broadcast_to(car_boxes(plan_A2, rules)[:, None], truth.boxes.shape)
    hit = boxes_overlap(cars, truth.boxes)
    return (hit & truth.there).any(1)


@dataclasses.dataclass(frozen=True)
class Judged:
    """One plan at one frame, by waypoint.

    plan: (right, ahead) in metres. collided: on the grid, as published. overlapped: see `overlaps`.
    """

    plan: tuple[tuple[float, float], ...]
    collided: tuple[bool, ...]
    overlapped: tuple[bool, ...]


def judge(
    plans: dict[str, Float[np.ndarray, "A 2"]], truth: FrameTruth, rules: PlanningRules = SIM_RULES
) -> dict[str, Judged]:
    """Returns what becomes of plans at a frame, by name.

    Raises:
        ValueError: a plan does not have the truth's shape, or is not finite; lists all.
    """
    expected = truth.truth.shape
    problems = [
        f"plan {name!r}: got shape {p.shape}{'' if np.isfinite(p).all() else ', not finite'}, "
        f"expected {expected} and finite"
        for name, p in plans.items()
        if p.shape != expected or not np.isfinite(p).all()
    ]
    if problems:
        raise ValueError("; ".join(problems))
    occupancy, judged = truth.occupancy(rules), {}
    for name, plan in plans.items():
        collided = collisions(plan.astype(float)[None], occupancy[None], rules)[0]
        rounded = tuple((round(x, 4), round(y, 4)) for x, y in plan.tolist())
        judged[name] = Judged(rounded, tuple(collided.tolist()), tuple(overlaps(plan, truth, rules).tolist()))
    return judged
