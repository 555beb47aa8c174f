"""The state and the commands of one robot at RLDS steps, from the columns of an index."""

import math
from collections.abc import Sequence

import numpy as np

from openpi_like.data.blocks import blocks, episode_blocks
from openpi_like.data.index import FrameIndex
from openpi_like.robots.robot import ActionField, Robot, StateField

_SHOWN = 5  # places named in one message


class StepValues:
    """States and commands in robot space. All methods take RLDS steps, counted through all episodes of the split.

    index, robot: where they come from, and what it says of them; the index has all fields of the robot.
    part: the steps that are asked for.
    tail: how many of the last steps of an episode have no command.
    """

    def __init__(self, index: FrameIndex, robot: Robot, part: range) -> None:
        self.index, self.robot, self.part = index, robot, part
        # The last step of an episode has no command where commands are derived from the step after.
        self.tail = int(any(f.next_step is not None for f in robot.action))
        self._opens = {f.name: self._derive_gripper(f) for f in robot.action if is_derived(f)}

    @property
    def held_bytes(self) -> int:
        """What this takes in the memory of a process; columns are mapped."""
        return sum(opens.nbytes for opens in self._opens.values())

    def state(self, steps: np.ndarray) -> np.ndarray:
        """Returns the states at steps, (n, sizes), float32."""
        rows: dict[tuple[str, int], np.ndarray] = {}
        parts = [self._values(f, steps, 0, rows) for f in self.robot.state]
        return np.concatenate(parts, axis=1).astype(np.float32) if parts else np.zeros((len(steps), 0), np.float32)

    @property
    def reach(self) -> int:
        """How many steps, from its first on, a chunk is read from."""
        return 1 if self.robot.plan is not None else self.robot.action_horizon * self.robot.stride + self.tail

    def known(self, steps: np.ndarray) -> np.ndarray:
        """Returns how many entries of the plans at steps are known, (n,)."""
        plan, most = self.robot.plan, self.robot.action_horizon
        if plan is None or plan.known is None:
            return np.full(len(steps), most)
        return self.index.columns[plan.known][steps].reshape(len(steps)).astype(np.int64)

    def plans(self, steps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns the plans at steps, (n, A, sizes), and which entries are known, (n, A); others repeat the last."""
        A, known = self.robot.action_horizon, self.known(steps)
        read = [self.index.columns[f.key][steps][..., f.start : f.start + f.size] for f in self.robot.action]
        plans = np.concatenate(read, axis=2).astype(np.float32)
        at = np.minimum(np.arange(A), np.maximum(known[:, None] - 1, 0))
        return np.take_along_axis(plans, at[..., None], axis=1), np.arange(A) < known[:, None]

    def plans_not_finite(self) -> np.ndarray:
        """Returns the steps of the part at which a known entry of the plan is not finite, ascending."""
        bad = [np.zeros(0, np.int64)]
        for block in blocks(self.part) if self.robot.plan is not None else ():
            plans, known = self.plans(np.arange(block.start, block.stop))
            bad.append(block.start + np.flatnonzero(~np.isfinite(plans).all(axis=(1, 2)) & known.any(axis=1)))
        return np.concatenate(bad)

    def commands(self, steps: np.ndarray, fields: Sequence[ActionField]) -> np.ndarray:
        """Returns the commands of the control steps that begin at `steps` and lie inside their episodes, (n, sizes).

        Of plans, which are arrays (A, sizes), that is the first entry.
        """
        stride = self.robot.stride
        rows: dict[tuple[str, int], np.ndarray] = {}
        parts = []
        for field in fields:
            # Of absolute targets only the last of a control step counts.
            offsets = range(stride - 1, stride) if field.command == "absolute" else range(stride)
            commands = [self._command(field, steps, k, rows) for k in offsets]
            parts.append(field.combine(np.stack(commands, axis=1)) if len(commands) > 1 else commands[0])
        return np.concatenate(parts, axis=1).astype(np.float32)

    def _command(
        self, field: ActionField, steps: np.ndarray, offset: int, rows: dict[tuple[str, int], np.ndarray]
    ) -> np.ndarray:
        if field.name in self._opens:
            assert field.gripper is not None  # conventions belong to grippers
            opens = self._opens[field.name][steps + offset - self.part.start]
            return np.where(opens, field.gripper.open, field.gripper.closed)[:, None]
        if field.next_step == "value":
            return self._values(field, steps, offset + 1, rows)
        now = self._values(field, steps, offset, rows)
        return field.change(now, self._values(field, steps, offset + 1, rows)) if field.next_step == "change" else now

    def _values(
        self, field: StateField, steps: np.ndarray, offset: int, rows: dict[tuple[str, int], np.ndarray]
    ) -> np.ndarray:
        """Returns stored values at `steps` + `offset`, (n, size), float64. rows: what was read for other fields."""
        if (field.key, offset) not in rows:
            column = self.index.columns[field.key]
            values = column[steps + offset].reshape(len(steps), math.prod(column.shape[1:]))
            rows[field.key, offset] = values.astype(np.float64)
        return rows[field.key, offset][:, field.start : field.start + field.size]

    def _derive_gripper(self, field: ActionField) -> np.ndarray:
        """Returns whether the gripper is commanded to be open, for every step of the part."""
        assert field.gripper is not None  # conventions belong to grippers
        column, start = self.index.columns[field.key], self.index.episode_start
        opens = np.empty(len(self.part), bool)
        for lo, hi in episode_blocks(start, self.part):
            first = np.zeros(hi - lo, bool)
            begins = start[np.searchsorted(start, lo) : np.searchsorted(start, hi)]
            first[begins - lo] = True
            values = column[lo:hi].reshape(hi - lo, -1)[:, field.start].astype(np.float64)
            opens[lo - self.part.start : hi - self.part.start] = field.gripper.opens(values, first)
        return opens


def whole_episodes(index: FrameIndex, steps: np.ndarray) -> np.ndarray:
    """Returns all steps of the episodes of some steps: what a derived gripper says depends on all of an episode."""
    start = index.episode_start
    episodes = np.unique(np.searchsorted(start, steps, side="right") - 1)
    return np.concatenate([np.zeros(0, np.int64), *(np.arange(start[e], start[e + 1]) for e in episodes)])


def not_finite(index: FrameIndex, part: range, fields: Sequence[StateField]) -> np.ndarray:
    """Returns the steps of the part at which a field is not finite, or no rotation, ascending."""
    bad: list[np.ndarray] = []
    for field in fields:
        column = index.columns[field.key]
        if column.dtype.kind != "f":
            continue
        for block in blocks(part):
            values = column[block].reshape(block.stop - block.start, -1)
            usable = field.usable(values[:, field.start : field.start + field.size])
            bad.append(block.start + np.flatnonzero(~usable))
    return np.unique(np.concatenate(bad)) if bad else np.zeros(0, np.int64)


def describe_not_finite(index: FrameIndex, fields: Sequence[StateField], bad: np.ndarray, what: str = "") -> list[str]:
    """Returns where and which values are not finite, or no rotation, for the first of some steps."""
    shown = []
    for step in bad[:_SHOWN]:
        for field in fields:
            values = np.ravel(index.columns[field.key][step])[field.start : field.start + field.size]
            if not field.usable(values[None]).all():
                expected = "finite numbers" + (f" that are a rotation ({field.rotation})" if field.rotation else "")
                shown.append(
                    f"{index.where(int(step))}: {what}{field.name!r} ({field.key}) is {values.tolist()}, "
                    f"expected {expected}"
                )
    if len(bad) > _SHOWN:
        shown.append(f"... and {len(bad) - _SHOWN} more steps of {', '.join(repr(f.name) for f in fields)}")
    return shown


def is_derived(field: ActionField) -> bool:
    """Whether the commands of a field are not stored, but derived from a whole episode."""
    return field.gripper is not None and field.gripper.convention != "absolute"


def moves(field: ActionField) -> bool:
    """Whether the size of a command says that the robot moves."""
    return field.gripper is None and (field.command != "absolute" or field.relative_to is not None)
