"""Are rotations rotations, and do their numbers go on smoothly where the robot does?"""

import dataclasses

import numpy as np
from jaxtyping import Float
from scipy.spatial.transform import Rotation

from openpi_like.data import traps
from openpi_like.data.robot_check.findings import Finding
from openpi_like.data.robot_check.robot_sample import RobotSample
from openpi_like.robots.representations import ROTATIONS
from openpi_like.robots.robot import ActionField, StateField

_TURN = np.pi / 2  # from one step to the next: at 5 Hz that were 450 degrees per second
_CALM = 0.5  # rad: a smaller turn
_JUMP = 1.0  # of the numbers, which a calm turn moves by about its size; a wrap moves them by 2 or more
_NORM = 0.02  # by which the length of a stored quaternion or axis may differ from 1: float16 does by less
_FEW = 0.01  # of the steps


@dataclasses.dataclass(frozen=True)
class Rotations:
    """See the module."""

    name: str = "Rotations"
    question: str = "Are rotations declared, valid and continuous in the numbers that the policy sees?"

    def findings(self, sample: RobotSample) -> list[Finding]:
        """See `Check.findings`."""
        fields: list[tuple[str, StateField, np.ndarray]] = [
            (f"state {f.name}", f, sample.states[f.name]) for f in sample.robot.state
        ]
        targets = [f for f in sample.robot.action if f.command == "absolute" and f.name in sample.commands]
        fields += [(f"action {f.name}", f, sample.commands[f.name]) for f in targets]
        found = []
        for about, field, x in fields:
            if field.rotation is not None:
                found += _norms(about, field, x) + _steps(about, field, x, sample)
            elif field.gripper is None and field.unit in ("rad", "deg", "1"):
                advice = 'these three look like angles: declare rotation="rpy", model_rotation="rotation_6d"'
                trap = traps.angle_wraps(field.key, x, sample.starts)
                found += Finding.of_trap(trap, about, advice if field.size == 3 else "")
        return found or [Finding("found", "", "the robot has no rotation, and nothing wraps like an angle")]


def _norms(about: str, field: StateField, x: Float[np.ndarray, "n size"]) -> list[Finding]:
    representation = field.rotation or ""
    if representation.startswith("quaternion"):
        lengths = np.linalg.norm(x, axis=1)[:, None]
    elif representation == "rotation_6d":
        lengths = np.linalg.norm(x.reshape(-1, 2, 3), axis=2)
    else:
        return []
    off = float((np.abs(lengths - 1) > _NORM).any(axis=1).mean())
    if off <= _FEW:
        return []
    return [
        Finding(
            "suspect",
            about,
            f"{off:.0%} of these are not of length 1 ({lengths.min():.3g} to {lengths.max():.3g}), as {representation}",
            "look at key, start and rotation: these are probably other numbers",
        )
    ]


def _steps(about: str, field: StateField, x: Float[np.ndarray, "n size"], sample: RobotSample) -> list[Finding]:
    """Turns from step to step, and how far the numbers go that the policy sees."""
    rotation: Rotation = field.to_rotation(x)
    t = sample.rows_with(0, 1)
    turns = (rotation[t + 1] * rotation[t].inv()).magnitude()
    large = int((turns > _TURN).sum())
    if large > max(traps.WRAPS - 1, _FEW * len(t)):
        return [
            Finding(
                "suspect",
                about,
                f"turns by more than 90 degrees from one step to the next {large} times in {len(t)}",
                f"these are not {field.rotation} in {field.unit}: look at unit, rotation, key and start",
            )
        ]
    seen_as = field.model_rotation or field.rotation or ""
    if isinstance(field, ActionField) and field.relative_to is not None:
        return [Finding("found", about, f"turns by up to {turns.max(initial=0.0):.2g} rad in a step; seen relative")]
    numbers = ROTATIONS[seen_as][2](rotation)
    moved = np.abs(numbers[t + 1] - numbers[t]).max(axis=1)
    jumps = int(((moved > _JUMP) & (turns < _CALM)).sum())
    message = f"as {seen_as}, its numbers jump {jumps} times in {len(t)} steps where it hardly turns"
    if jumps >= traps.WRAPS:
        return [Finding("suspect", about, message, 'set model_rotation="rotation_6d", which never jumps')]
    return [Finding("found", about, message)]
