"""Does a dataset have what a robot and a selection say? All that it lacks is told at once, with near names."""

import logging
import math
from collections.abc import Sequence

import numpy as np

from openpi_like.config import near_names
from openpi_like.data.blocks import blocks
from openpi_like.data.camera_images import blind_steps, damaged_steps, describe_damage, read_image
from openpi_like.data.index import FrameIndex
from openpi_like.data.schema import DatasetError
from openpi_like.data.selection import Selection
from openpi_like.data.step_values import StepValues, describe_not_finite, moves, not_finite
from openpi_like.robots.robot import Camera, Robot, StateField

OUTSIDE = 0.05  # of its range: a gripper value this far beyond open or closed says that these are wrong

# Part by which a robot's rate may differ from that of its data: 29.97 and 30 are the same, 25 and 30 are not.
RATE_TOLERANCE = 0.01

_log = logging.getLogger(__name__)


def check_dataset(
    index: FrameIndex, robot: Robot, part: range, selection: Selection, max_corrupt_fraction: float
) -> dict[str, int]:
    """Checks the steps `part` of a split, and returns for each camera how many bytes its first image takes, decoded.

    max_corrupt_fraction: part of the steps at which an image of the cameras may be damaged.

    Raises:
        DatasetError: lists all that does not fit.
    """
    problems: list[str] = []
    first_image: dict[str, int] = {}
    for camera in robot.cameras:
        found, first_image[camera.name] = _look_at_camera(index, robot, part, camera)
        problems += found
    blind = len(blind_steps(index, part, robot.cameras))
    if blind > max_corrupt_fraction * len(part):
        problems.append(
            f"at {blind} of {len(part)} steps an image of its cameras is damaged, tolerated are "
            f"{max_corrupt_fraction:g} of them (max_corrupt_fraction); copy these files again, or tolerate them:\n"
            + "\n".join(f"    {line}" for line in describe_damage(index, part, robot.cameras))
        )
    usable: list[tuple[str, StateField]] = []
    for what, fields in (("state", robot.state), ("action", robot.action)):
        for field in fields:
            where = f"{what} field {field.name!r}"
            column = index.columns.get(field.key)
            if column is None:
                problems.append(f"{where}: {no_field(index, field.key, list(index.columns))}")
            elif field.start + field.size > math.prod(column.shape[1:]):
                problems.append(
                    f"{where}: takes values {field.start} to {field.start + field.size - 1} of {field.key!r}, "
                    f"which has {math.prod(column.shape[1:])}; correct its start or size"
                )
            elif (
                what == "action"
                and robot.plan is not None
                and (column.shape[1:-1] != (robot.action_horizon,) or field.start + field.size > column.shape[-1])
            ):
                problems.append(
                    f"{where}: {field.key!r} has shape {column.shape[1:]} at each step, expected a plan of "
                    f"{robot.action_horizon} entries, ({robot.action_horizon}, {field.start + field.size}) or more dims"
                )
            else:
                usable.append((what, field))
    # Of plans, entries that are not known may be anything, see `_plan_problems`.
    finite = [(what, field) for what, field in usable if what == "state" or robot.plan is None]
    problems += _entity_problems(index, robot, part)
    problems += _plan_problems(index, robot, part, selection, whole=not problems)
    known = [*index.texts, *index.episode_texts]
    if robot.language_key is not None:
        keys = (
            ("language_key", robot.language_key),
            *(("language_alternatives", key) for key in robot.language_alternatives),
        )
        problems += [f"{what}: {no_field(index, key, known)}" for what, key in keys if key not in known]
    problems += _selection_problems(index, robot, selection)
    problems += _rate_problems(index, robot)
    if index.split.of_requests and robot.action_horizon > 1:
        problems.append(
            "its steps are requests to a policy server, so what follows a step is not what the robot did next: no "
            "chunk to learn from; record the robot's own steps, with openpi_like.serve.recorder on the client"
        )
    if not selection.skip_not_finite:
        for what, field in finite:
            problems += describe_not_finite(index, [field], not_finite(index, part, [field]), f"{what} field ")
    _warn_of_grippers(index, robot, part, usable)
    if problems:
        raise DatasetError(f"{index.split} does not fit robot {robot.name!r}:\n  " + "\n  ".join(problems))
    return first_image


def _entity_problems(index: FrameIndex, robot: Robot, part: range) -> list[str]:
    problems = []
    for things in robot.entities:
        where, found = f"entities {things.name!r}", []
        fields = {things.key: (things.count, things.size), things.mask_key: (things.count,)}
        for key, shape in fields.items():
            if key is None:
                continue
            column = index.columns.get(key)
            if column is None:
                found.append(f"{where}: {no_field(index, key, list(index.columns))}")
            elif column.shape[1:] != shape:
                found.append(f"{where}: {key!r} has shape {column.shape[1:]} at each step, expected {shape}")
        problems += found
        for block in blocks(part) if not found else ():
            values = index.columns[things.key][block]
            bad = ~np.isfinite(values).all(axis=2)
            if things.mask_key is not None:
                bad &= index.columns[things.mask_key][block] > 0
            if bad.any():
                at = index.where(block.start + int(np.argmax(bad.any(axis=1))))
                problems.append(f"{where}: {things.key!r} is not finite at {at}; mark it as not there")
                break
    return problems


def _plan_problems(index: FrameIndex, robot: Robot, part: range, selection: Selection, *, whole: bool) -> list[str]:
    """Returns what is wrong with plans, beside their shapes. whole: these are right."""
    plan = robot.plan
    if plan is None:
        return []
    if plan.known is not None:
        if plan.known not in index.columns:
            return [f"plan.known: {no_field(index, plan.known, list(index.columns))}"]
        counts = index.columns[plan.known][part.start : part.stop]
        wrong = counts.size != len(counts) or ~((counts.ravel() >= 0) & (counts.ravel() <= robot.action_horizon))
        if np.any(wrong):
            at = index.where(part.start + int(np.argmax(wrong)))
            return [f"plan.known: {plan.known!r} at {at}, expected one number, 0 to {robot.action_horizon}"]
    if selection.skip_not_finite or not whole:
        return []
    bad = StepValues(index, robot, part).plans_not_finite()
    return [f"{len(bad)} plans are not finite, the first is at {index.where(int(bad[0]))}"] if len(bad) else []


def no_field(index: FrameIndex, key: str, known: list[str]) -> str:
    """Returns why there is no field `key` of the kind that is needed; known: the fields of that kind."""
    if key in index.left_out:
        return f"{key!r} is not in the index, because {index.left_out[key]}"
    features = index.schema.steps | index.schema.episode
    if key in features:
        return f"{key!r} is a field of kind {features[key].kind!r}; fields that fit: {', '.join(map(repr, known))}"
    return f"the dataset has no {key!r}; {near_names(key, known)}"


def _selection_problems(index: FrameIndex, robot: Robot, selection: Selection) -> list[str]:
    problems = []
    key = selection.success
    if key is not None and selection.success_pattern is None:
        numbers = index.columns | index.episode_columns
        if key not in numbers:
            problems.append(f"selection.success: {no_field(index, key, list(numbers))}")
        elif math.prod(numbers[key].shape[1:]) != 1:
            problems.append(f"selection.success: {key!r} has shape {numbers[key].shape[1:]}, expected one number")
    elif key is not None and key not in index.texts and key not in index.episode_texts:
        problems.append(f"selection.success: {no_field(index, key, [*index.texts, *index.episode_texts])}")
    if selection.intervened is not None:
        key = selection.intervened
        if key not in index.columns:
            problems.append(f"selection.intervened: {no_field(index, key, list(index.columns))}")
        elif math.prod(index.columns[key].shape[1:]) != 1:
            shape = index.columns[key].shape[1:]
            problems.append(f"selection.intervened: {key!r} has shape {shape}, expected one number")
    if selection.keep_ranges is not None:
        problems += [
            f"selection.keep_ranges_key: {no_field(index, k, list(index.episode_texts))}"
            for k in selection.keep_ranges_key
            if k not in index.episode_texts
        ]
    if selection.idle_below is not None and robot.plan is not None:
        problems.append("selection.idle_below: a plan does not say whether its step moves; leave it out")
    elif selection.idle_below is not None and not any(moves(f) for f in robot.action):
        problems.append(
            "selection.idle_below: no action field is a delta, a velocity or relative to a state, so whether the "
            "robot moves cannot be told"
        )
    return problems


def same_rate(rate: float, expected: float) -> bool:
    """Returns whether data of a rate fit a robot that expects another, in Hz."""
    return abs(rate - expected) <= RATE_TOLERANCE * expected


def _rate_problems(index: FrameIndex, robot: Robot) -> list[str]:
    rate, expected = index.split.rate, robot.control_hz * robot.stride
    if rate is None or same_rate(rate, expected):
        return []
    return [
        f"control_hz: the dataset has {rate:g} steps a second, the robot {expected:g} (control_hz x stride: "
        f"{robot.control_hz:g} x {robot.stride}); set control_hz={rate / robot.stride:g}, or a stride if it is slower"
    ]


def _look_at_camera(index: FrameIndex, robot: Robot, part: range, camera: Camera) -> tuple[list[str], int]:
    """Returns what is wrong with a camera, and the bytes of its first image that is shown, decoded; 0 for none."""
    if camera.key not in index.images:
        return [f"camera {camera.name!r}: {no_field(index, camera.key, list(index.images))}"], 0
    feature = index.schema.steps[camera.key]
    if feature.dtype != "uint8" or feature.shape[2:] != (3,):
        return [
            f"camera {camera.name!r}: {camera.key!r} holds {feature.dtype} images of shape {feature.shape}, "
            "expected uint8 with 3 channels"
        ], 0
    ends, damaged = index.episode_start[1:], damaged_steps(index, part, camera)
    for block in blocks(part):
        # As in `is_present`: an image is shown where it is large enough and its episode goes on for `steps_back`.
        steps = np.arange(block.start, block.stop)
        shown = steps + camera.steps_back < ends[np.searchsorted(ends, steps, side="right")]
        shown &= index.images[camera.key][block, 1] >= camera.min_bytes
        shown &= ~np.isin(steps, damaged)
        if not shown.any():
            continue
        try:
            return [], read_image(index, robot, int(steps[np.argmax(shown)]), camera).nbytes
        except DatasetError as e:
            return [str(e)], 0
    _log.warning("%s: camera %r (%s) is absent at every step", index.split, camera.name, camera.key)
    return [], 0


def _warn_of_grippers(index: FrameIndex, robot: Robot, part: range, usable: Sequence[tuple[str, StateField]]) -> None:
    """Warns where stored values say that a gripper convention is not that of this dataset."""
    for what, field in usable:
        gripper = field.gripper
        if gripper is None or gripper.convention != "absolute":
            continue
        outside, least, most = 0, np.inf, -np.inf
        for block in blocks(part):
            stored = index.columns[field.key][block].reshape(block.stop - block.start, -1)
            values = stored[:, field.start : field.start + field.size].astype(np.float64)
            opening = field.to_model(values)
            outside += int(((opening < -OUTSIDE) | (opening > 1 + OUTSIDE)).any(axis=1).sum())
            least, most = min(least, float(values.min())), max(most, float(values.max()))
        if outside:
            _log.warning(
                "%s, robot %r: %s field %r lies outside closed=%g to open=%g in %d of %d steps (%g to %g); is that "
                "what this dataset stores?",
                *(index.split, robot.name, what, field.name, gripper.closed, gripper.open),
                *(outside, len(part), least, most),
            )
