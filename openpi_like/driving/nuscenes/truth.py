"""What plans on nuScenes are judged by: where the car went, and which cells of a grid others cover, step by step.

As published: boxes of all annotations of the keyframes to come, in the lidar's frame of now; on a grid of 200 x 200
cells of 0.5 m; neither points in a box nor its visibility matter (UniAD, occflow_label.py with only_vehicle and without
filter_invisible; nuscenes_e2e_dataset.py, occ_get_detection_ann_info). Corners are rounded to whole cells, and all that
the outline touches is filled, so that a box grows by up to half a metre, more to the right and ahead ("shared" here).
Vehicles are those that UniAD maps to its seven classes; with pedestrians, those of VAD (planner/metric_stp3.py): ten
kinds of vehicles and seven of people.

R: VAD moves the boxes of now along their futures, and so leaves out who appears later; here these are in. The files
that are passed around are not ours to compare with. A keyframe that does not exist has an empty grid; there the shared
code fills it, so that the truth collides and nothing is counted: the same numbers, unless
`PlanningRules.skip_truth_collisions` is off.
"""

import dataclasses

import cv2
import numpy as np
from jaxtyping import Bool, Float

from openpi_like.driving.nuscenes.episodes import HORIZON, future
from openpi_like.driving.nuscenes.frames import seen_from, turned_into
from openpi_like.driving.nuscenes.scenes import Boxes, Scene
from openpi_like.driving.planning_metrics import PlanningRules

VEHICLES = tuple(
    f"vehicle.{kind}"
    for kind in ("car", "truck", "bus.bendy", "bus.rigid", "trailer", "construction", "motorcycle", "bicycle")
)
EMERGENCY = ("vehicle.emergency.ambulance", "vehicle.emergency.police")
PEDESTRIANS = tuple(
    f"human.pedestrian.{kind}"
    for kind in (
        "adult", "child", "construction_worker", "police_officer", "personal_mobility", "stroller", "wheelchair",
    )
)  # fmt: skip
AGENTS = {"vehicles": VEHICLES, "vehicles_and_pedestrians": (*VEHICLES, *EMERGENCY, *PEDESTRIANS)}
"""Who occupies the map: for numbers of UniAD's convention, and of ST-P3's."""


@dataclasses.dataclass(frozen=True)
class PlanningTruth:
    """Of one sample. truth: (right, ahead) in metres, 0 where it is not valid. occupancy: as `collisions` takes it."""

    truth: Float[np.ndarray, "A 2"]
    valid: Bool[np.ndarray, "A"]
    occupancy: Bool[np.ndarray, "A R C"]


def planning_truth(
    scene: Scene,
    index: int,
    agents: str = "vehicles",
    fill: str = "shared",
    rules: PlanningRules | None = None,
) -> PlanningTruth:
    """Returns what a plan of keyframe `index` is judged by.

    Args:
        agents: see `AGENTS`. fill: see `occupied`.

    Raises:
        ValueError: agents or fill are unknown. IndexError: there is no such keyframe.
    """
    rules = rules or PlanningRules()
    _check(agents, fill)
    if not 0 <= index < len(scene.samples):
        raise IndexError(f"{scene.name} has no keyframe {index}, expected 0 to {len(scene.samples) - 1}")
    plan, known = future(scene, index)
    valid = np.arange(HORIZON) < known
    occupancy = np.zeros((HORIZON, rules.cells, rules.cells), bool)
    here = scene.samples[index].frame
    for step, sample in enumerate(scene.samples[index + 1 : index + 1 + HORIZON]):
        occupancy[step] = occupied(boxes_seen_from(here, sample.boxes, AGENTS[agents]), rules, fill)
    return PlanningTruth(np.where(valid[:, None], plan, 0.0), valid, occupancy)


def boxes_seen_from(
    frame_44: Float[np.ndarray, "4 4"], boxes: Boxes, categories: tuple[str, ...]
) -> Float[np.ndarray, "N 5"]:
    """Returns boxes of some categories as `boxes_overlap` takes them.

    That is x to the right and y ahead of a frame, the heading in rad from x, length and width in metres.
    """
    some = np.array([category in categories for category in boxes.categories], bool)
    along = turned_into(frame_44, boxes.along[some])
    return np.column_stack(
        [
            seen_from(frame_44, boxes.centres[some]),
            np.arctan2(along[:, 1], along[:, 0]),
            boxes.lengths[some],
            boxes.widths[some],
        ]
    )


def occupied(
    boxes_N5: Float[np.ndarray, "N 5"],
    rules: PlanningRules | None = None,
    fill: str = "shared",
) -> Bool[np.ndarray, "R C"]:
    """Returns which cells boxes cover: rows from behind to ahead, columns from right to left.

    fill: "shared": as published, corners are rounded to cells and the outline is filled; "middles": exactly those cells
        whose middles lie in a box.

    Raises:
        ValueError: fill is unknown.
    """
    rules = rules or PlanningRules()
    _check("vehicles", fill)
    if fill == "middles":
        return _middles(boxes_N5, rules)
    grid = np.zeros((rules.cells, rules.cells), np.uint8)  # columns from left to right here
    for x, y, heading, length, width in boxes_N5:
        c, s = np.cos(heading), np.sin(heading)
        corners = np.array([[1, 1], [-1, 1], [-1, -1], [1, -1]]) * [length / 2, width / 2] @ [[c, s], [-s, c]] + [x, y]
        cv2.fillPoly(grid, [np.round((corners + rules.reach) / rules.cell).astype(np.int32)], 1.0)
    return grid[:, ::-1].astype(bool)


def _middles(boxes_N5: np.ndarray, rules: PlanningRules) -> Bool[np.ndarray, "R C"]:
    middles = np.arange(rules.cells) * rules.cell - (rules.reach - rules.cell / 2)
    grid = np.zeros((rules.cells, rules.cells), bool)
    for x, y, heading, length, width in boxes_N5:
        apart = np.hypot(length, width) / 2 + rules.cell  # farther away no cell is covered
        rows = np.flatnonzero(np.abs(middles - y) <= apart)
        columns = np.flatnonzero(np.abs(-middles - x) <= apart)
        right, ahead = -middles[columns] - x, (middles[rows] - y)[:, None]
        c, s = np.cos(heading), np.sin(heading)
        inside = (np.abs(c * right + s * ahead) <= length / 2) & (np.abs(c * ahead - s * right) <= width / 2)
        grid[np.ix_(rows, columns)] |= inside
    return grid


def _check(agents: str, fill: str) -> None:
    problems = []
    if agents not in AGENTS:
        problems.append(f"agents {agents!r}, expected one of {', '.join(AGENTS)}")
    if fill not in ("shared", "middles"):
        problems.append(f"fill {fill!r}, expected 'shared' or 'middles'")
    if problems:
        raise ValueError("planning truth: " + "; ".join(problems))
