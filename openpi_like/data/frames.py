"""Which steps are frames, those from which the policy may be asked to act: what a `Selection` leaves of a split."""

import dataclasses
import hashlib
import logging
import re
from collections.abc import Iterator

import numpy as np

from openpi_like.data.blocks import blocks, episode_blocks
from openpi_like.data.camera_images import blind_steps, describe_damage
from openpi_like.data.index import FrameIndex
from openpi_like.data.selection import Selection, read_ranges
from openpi_like.data.step_values import StepValues, describe_not_finite, is_derived, moves, not_finite, whole_episodes
from openpi_like.robots.representations import ROTATIONS
from openpi_like.robots.robot import Robot

_GRIPPER_MOVES = 0.05  # of its range: a gripper command that changes by this is no idle step

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Frames:
    """Every `stride`-th step of consecutive episodes, without those that were left out.

    first_episode: the episode of the split that `first` begins with. first: (n,), first frame of each episode, a step
        of the split. start: (n + 1,), how many frames the episodes before have, before some were left out.
    kept: numbers, counted as in `start`, of those frames that are left, ascending; None for all.
    """

    first_episode: int
    stride: int
    first: np.ndarray
    start: np.ndarray
    kept: np.ndarray | None = None

    def __len__(self) -> int:
        return int(self.start[-1]) if self.kept is None else len(self.kept)

    def place(self, frames: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns the episodes and steps of frames. Frames of an episode are evenly spaced before some are left out."""
        if self.kept is not None:
            frames = self.kept[frames].astype(np.int64)
        e = np.searchsorted(self.start, frames, side="right") - 1
        return self.first_episode + e, self.first[e] + self.stride * (frames - self.start[e])

    def per_episode(self, episodes: int) -> np.ndarray:
        """Returns how many frames each of all episodes of the split has, (episodes,), 0 for those left out."""
        counts = np.zeros(episodes, np.int64)
        part = slice(self.first_episode, self.first_episode + len(self.first))
        bounds = self.start if self.kept is None else np.searchsorted(self.kept, self.start)
        counts[part] = np.diff(bounds)
        return counts

    @property
    def held_bytes(self) -> int:
        """What this takes in the memory of a process."""
        return self.first.nbytes + self.start.nbytes + (0 if self.kept is None else self.kept.nbytes)

    def digest(self, episode_start: np.ndarray) -> str:
        """Returns a digest of which step every frame is, and of the lengths of the episodes, 16 hex digits."""
        digest = hashlib.sha256(f"{self.first_episode} {self.stride}".encode())
        for array in (episode_start, self.first, self.start, self.kept):
            if array is not None:
                digest.update(f"{array.dtype} {array.shape}".encode())
                digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()[:16]


def select_frames(
    values: StepValues, selection: Selection, episodes: range, stride: int
) -> tuple[Frames, dict[str, int]]:
    """Returns the frames that a selection leaves, and why steps are none -> how many.

    episodes: of the split, those of `values.part`. stride: every how many steps of an episode a frame is taken. What is
    left out is counted in the order in which reasons are looked at, of every so many-th step.

    Raises:
        DatasetError: the ranges to keep cannot be read, or have none of the episodes.
    """
    index, robot = values.index, values.robot
    start = np.asarray(index.episode_start[episodes.start : episodes.stop + 1], np.int64)
    first, end = start[:-1].copy(), start[1:].copy()
    removed: dict[str, int] = {}

    def frames() -> np.ndarray:
        return np.maximum(0, -(-(end - first) // stride))

    def remove(reason: str, before: int) -> None:
        if before > (left := int(frames().sum())):
            removed[reason] = before - left

    # What concerns whole episodes, or their ends
    before = int(frames().sum())
    end -= values.tail + robot.stride - 1
    remove("no whole action left in the episode", before)
    before = int(frames().sum())
    end = np.where(np.diff(start) < selection.min_length, first, end)
    remove(f"episode shorter than {selection.min_length}", before)
    before = int(frames().sum())
    first += selection.skip_first
    remove(f"first {selection.skip_first} of the episode", before)
    before = int(frames().sum())
    end -= selection.skip_last
    remove(f"last {selection.skip_last} of the episode", before)
    ranges = None
    if selection.keep_ranges is not None:
        ranges, known = read_ranges(selection, index, episodes)
        before = int(frames().sum())
        end = np.where(known, end, first)
        remove("episode not in keep_ranges", before)
    every = Frames(episodes.start, stride, first, np.append(0, np.cumsum(frames())))

    # What concerns single steps
    filters = _StepFilters(values, selection, ranges)
    if not filters.any:
        return every, removed
    kept = []
    for at in blocks(range(len(every))):
        block = np.arange(at.start, at.stop)
        keep = np.ones(len(block), bool)
        for reason, good in filters.kept(*every.place(block)):
            if lost := int((keep & ~good).sum()):
                removed[reason] = removed.get(reason, 0) + lost
            keep &= good
        kept.append(block[keep].astype(np.uint32 if len(every) < 1 << 32 else np.int64))
    filters.warn()
    return dataclasses.replace(every, kept=np.concatenate(kept) if kept else np.zeros(0, np.uint32)), removed


class _StepFilters:
    """What a selection says of single steps. ranges: of steps to keep, (R, 2), see `read_ranges`."""

    def __init__(self, values: StepValues, selection: Selection, ranges: np.ndarray | None) -> None:
        self._values, self._selection, self._ranges = values, selection, ranges
        index, robot, part = values.index, values.robot, values.part
        # Steps with values that are not finite in the state, in the action
        self._not_finite = np.zeros(0, np.int64), np.zeros(0, np.int64)
        self._shown: list[str] = []
        if selection.skip_not_finite:
            stored = robot.action if robot.plan is None else ()
            of_state, of_action = not_finite(index, part, robot.state), not_finite(index, part, stored)
            self._shown = describe_not_finite(index, robot.state, of_state)
            self._shown += describe_not_finite(index, stored, of_action)
            derived = not_finite(index, part, [f for f in robot.action if is_derived(f)])
            of_action = np.union1d(of_action, values.plans_not_finite())
            self._not_finite = of_state, np.union1d(of_action, whole_episodes(index, derived))
        self._blind = blind_steps(index, part, robot.cameras)
        self._said = _labels(index, robot) if selection.labelled else {}
        self._success_texts = _success_texts(index, selection)
        self._handed_back = handed_back(index, selection, part)

    @property
    def any(self) -> bool:
        """Whether any step may be left out."""
        asked = (self._selection.success, self._handed_back, self._ranges, self._selection.idle_below)
        found = (*self._not_finite, self._blind)
        plan = self._values.robot.plan
        unknown = plan is not None and plan.known is not None
        return any(f is not None for f in asked) or self._selection.labelled or any(map(len, found)) or unknown

    def kept(self, episode: np.ndarray, step: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
        """Yields (reason, whether a step is kept) for steps (n,) and their episodes."""
        values, selection, ranges, index = self._values, self._selection, self._ranges, self._values.index
        if values.robot.plan is not None:
            yield "no entry of the plan is known", values.known(step) > 0
        if selection.success is not None:
            good = _succeeded(index, selection.success, self._success_texts, episode, step)
            yield f"{selection.success} says no", good
        if self._handed_back is not None:
            left = interventions_left(self._handed_back, step)
            yield f"{selection.intervened} says no", left >= values.robot.stride
        if self._said:
            yield "no instruction", _labelled(index, self._said, episode, step)
        if ranges is not None:
            i = np.searchsorted(ranges[:, 0], step, side="right") - 1
            yield "not in keep_ranges", (i >= 0) & (step < ranges[np.maximum(i, 0), 1])
        if any(map(len, self._not_finite)):
            end = np.minimum(step + values.reach, index.episode_start[episode + 1] - selection.skip_last)
            of_state, of_action = self._not_finite
            good = np.searchsorted(of_state, step) == np.searchsorted(of_state, step + 1)
            yield "not finite", good & (np.searchsorted(of_action, step) == np.searchsorted(of_action, end))
        if len(self._blind):
            yield "damaged image", ~np.isin(step, self._blind)
        if selection.idle_below is not None:
            yield f"idle, below {selection.idle_below:g}", ~_idle(values, selection.idle_below, episode, step)

    def warn(self) -> None:
        """Warns of values and images that are not as they should be, with the first places."""
        index, robot, part = self._values.index, self._values.robot, self._values.part
        if self._shown:
            _log.warning(
                "%s has values that are not finite or no rotation, which are skipped:\n  %s",
                index.split,
                "\n  ".join(self._shown),
            )
        if len(self._blind):
            _log.warning(
                "%s: at %d of %d steps an image of robot %r is damaged; they are left out:\n  %s",
                *(index.split, len(self._blind), len(part), robot.name),
                "\n  ".join(describe_damage(index, part, robot.cameras)),
            )


def _labels(index: FrameIndex, robot: Robot) -> dict[str, np.ndarray]:
    """Returns for every instruction field which texts of its table are not empty."""
    if robot.language_key is None:
        return {}
    keys = (robot.language_key, *robot.language_alternatives)
    return {k: np.array([bool(t.strip()) for t in index.text_table(k)], bool) for k in keys}


def _labelled(index: FrameIndex, said: dict[str, np.ndarray], episode: np.ndarray, step: np.ndarray) -> np.ndarray:
    """Whether any instruction of a step is not empty."""
    return np.any([good[index.text_ids(key, episode, step)] for key, good in said.items()], axis=0)


def warn_of_no_instruction(values: StepValues, frames: Frames) -> None:
    """Warns, with their number and the first, where frames have no instruction."""
    index = values.index
    said = _labels(index, values.robot)
    if not said or any(good.all() for good in said.values()):
        return
    missing, first = 0, -1
    for block in blocks(range(len(frames))):
        episode, step = frames.place(np.arange(block.start, block.stop))
        labelled = _labelled(index, said, episode, step)
        if first < 0 and not labelled.all():
            first = int(step[np.argmin(labelled)])
        missing += int((~labelled).sum())
    if missing:
        _log.warning(
            "%s: %d of %d frames have no instruction (%s), the first is %s; set labelled in the selection to leave "
            "them out",
            *(index.split, missing, len(frames), ", ".join(map(repr, said)), index.where(first)),
        )


def _success_texts(index: FrameIndex, selection: Selection) -> np.ndarray | None:
    """Returns which texts say that it was a success, None where a number says it."""
    if selection.success is None or selection.success_pattern is None:
        return None
    table = index.text_table(selection.success)
    return np.array([re.search(selection.success_pattern, t) is not None for t in table], bool)


def _succeeded(
    index: FrameIndex, key: str, texts: np.ndarray | None, episode: np.ndarray, step: np.ndarray
) -> np.ndarray:
    if texts is not None:
        return texts[index.text_ids(key, episode, step)]
    values = index.columns[key][step] if key in index.columns else index.episode_columns[key][episode]
    return values.reshape(-1) > 0


def handed_back(index: FrameIndex, selection: Selection, part: range) -> np.ndarray | None:
    """Returns first and last step (exclusive) of each intervention of an expert, (n, 2); None where all steps count."""
    if selection.intervened is None:
        return None
    column, start, runs = index.columns[selection.intervened], index.episode_start, []
    for lo, hi in episode_blocks(start, part):
        acts = np.ravel(column[lo:hi]) > 0
        first = np.zeros(hi - lo, bool)
        first[start[np.searchsorted(start, lo) : np.searchsorted(start, hi)] - lo] = True
        begins = acts & (first | ~np.append(False, acts[:-1]))
        ends = acts & (np.append(first[1:], True) | ~np.append(acts[1:], False))
        runs.append(lo + np.stack([np.flatnonzero(begins), np.flatnonzero(ends) + 1], axis=1))
    return np.concatenate(runs) if runs else np.zeros((0, 2), np.int64)


def interventions_left(runs: np.ndarray, step: np.ndarray) -> np.ndarray:
    """Returns how many steps the intervention at a step still lasts, itself included; 0 where there is none."""
    if not len(runs):
        return np.zeros(len(step), np.int64)
    i = np.searchsorted(runs[:, 0], step, side="right") - 1
    return np.where(i >= 0, np.maximum(runs[np.maximum(i, 0), 1] - step, 0), 0)


def _idle(values: StepValues, below: float, episode: np.ndarray, step: np.ndarray) -> np.ndarray:
    """Whether nothing is commanded in the control step that begins at a step."""
    before = np.maximum(step - 1, values.index.episode_start[episode])
    still = np.arange(len(step))  # where nothing has moved so far; turns, which cost the most, come last
    for field in sorted(values.robot.action, key=lambda f: f.rotation is not None):
        if not len(still) or not (moves(field) or field.gripper is not None):
            continue
        alone, at = dataclasses.replace(values.robot, action=(field,)), step[still]
        part = alone.encode_actions(values.commands(at, [field])[:, None], values.state(at))[:, 0]
        if field.gripper is not None:
            earlier = field.to_model(values.commands(before[still], [field]))
            moved = (np.abs(part - earlier) >= _GRIPPER_MOVES).any(axis=1)
        elif field.model_size > 3 and field.rotation is not None:
            # The numbers of a quaternion or of 6-D are not 0 where nothing turns
            turn = ROTATIONS[field.model_rotation or field.rotation][1](part.astype(np.float64))
            moved = turn.magnitude() >= below
        else:
            moved = (np.abs(part) >= below).any(axis=1)
        still = still[~moved]
    idle = np.zeros(len(step), bool)
    idle[still] = True
    return idle
