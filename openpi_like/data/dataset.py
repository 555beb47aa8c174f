"""The episodes of one split as one robot sees them: states, action chunks, masks, prompts and images, by frame."""

import dataclasses
import hashlib
import json
import logging
import math
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import cv2
import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

from openpi_like.config import near_names
from openpi_like.data.images import decode, fit
from openpi_like.data.index import FrameIndex, Texts, open_index
from openpi_like.data.schema import DatasetError
from openpi_like.robots.robot import ROTATIONS, ActionField, Camera, Robot, StateField

_BLOCK = 1 << 16  # steps looked at together
_SHOWN = 5  # places named in one message
_OUTSIDE = 0.05  # of its range: a gripper value this far beyond open or closed says that these are wrong
_GRIPPER_MOVES = 0.05  # of its range: a gripper command that changes by this is no idle step

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Selection:
    """Which steps of a split may begin a chunk. What is left out is counted in `EpisodeDataset.removed` and logged.

    success: a number or bool of the step or episode that must be above 0; or a text that `success_pattern`, a regular
        expression, must be found in.
    labelled: only steps with an instruction.
    min_length: only episodes of at least so many RLDS steps. skip_first: not the first steps of an episode.
    skip_last: not the last steps of an episode, such as a terminal one with an action of zeros; chunks end before them.
    keep_ranges: a JSON file of {episode: [[start, end), ...]}, the steps to keep; an episode that is not in it is left
        out. Its name there is that of the texts `keep_ranges_key`, joined with "--". Defaults fit the ranges that were
        published for DROID.
    idle_below: leave out steps at which nothing is commanded: no delta, velocity or relative target of at least this
        size (model units, over one control step; of the largest dim, or the angle of a quaternion or 6-D rotation), and
        no gripper command other than at the step before.
    skip_not_finite: leave out, and name in a warning, steps whose state or chunk has NaN, infinity, or a quaternion or
        6-D rotation that is none (all 0), which otherwise are an error.
    """

    success: str | None = None
    success_pattern: str | None = None
    labelled: bool = False
    min_length: int = 1
    skip_first: int = 0
    skip_last: int = 0
    keep_ranges: str | None = None
    keep_ranges_key: tuple[str, ...] = ("episode_metadata/recording_folderpath", "episode_metadata/file_path")
    idle_below: float | None = None
    skip_not_finite: bool = False

    def __post_init__(self) -> None:
        problems = []
        if self.success_pattern is not None:
            try:
                re.compile(self.success_pattern)
            except re.error as e:
                problems.append(f"success_pattern {self.success_pattern!r} is no regular expression: {e}")
            if self.success is None:
                problems.append("success_pattern without success, expected the text to look in")
        if self.min_length < 1:
            problems.append(f"min_length={self.min_length}, expected >= 1")
        if self.skip_first < 0 or self.skip_last < 0:
            problems.append(f"skip_first={self.skip_first}, skip_last={self.skip_last}, expected both >= 0")
        if self.idle_below is not None and not self.idle_below > 0:
            problems.append(f"idle_below={self.idle_below}, expected a number above 0")
        if not self.keep_ranges_key:
            problems.append("keep_ranges_key is empty, expected the names of texts")
        if problems:
            raise ValueError("Selection: " + "; ".join(problems))


def open_dataset(
    path: str | Path,
    robot: Robot,
    split: str,
    *,
    frame_stride: int = 1,
    selection: Selection = Selection(),
    index_dir: str | Path | None = None,
    max_corrupt_fraction: float = 0.0,
) -> "EpisodeDataset":
    """Opens a split, or a part of one, as a robot sees it.

    split: "train"; or a part of its episodes, by percent ("train[:95%]") or number ("train[200:]"), as TFDS has it.
    selection, frame_stride: see `EpisodeDataset`. index_dir: see `open_index`.
    max_corrupt_fraction: part of the records that may be damaged, see `open_index`, and of the steps that may have a
        damaged image, see `EpisodeDataset`.

    Raises:
        DatasetError: as `open_index` and `EpisodeDataset`; or there is no such part.
    """
    found = re.fullmatch(r"([^\[\]]+)(?:\[(?:(\d+)(%?))?:(?:(\d+)(%?))?\])?", split)
    if found is None:
        raise DatasetError(f"{path}: split {split!r}, expected a name, or a part like 'train[:95%]' or 'train[200:]'")
    name, low, low_percent, high, high_percent = found.groups()
    index = open_index(path, name, index_dir=index_dir, max_corrupt_fraction=max_corrupt_fraction)

    beyond = [
        f"{number}{percent}"
        for number, percent in ((low, low_percent), (high, high_percent))
        if number is not None and int(number) > (100 if percent else index.episodes)
    ]
    if beyond:
        raise DatasetError(f"{path}: {split!r} goes to {beyond[-1]}, but {name!r} has {index.episodes} episodes (100%)")

    def episode(number: str | None, percent: str | None, default: int) -> int:
        if number is None:
            return default
        return round(int(number) * index.episodes / 100) if percent else int(number)

    part = range(episode(low, low_percent, 0), episode(high, high_percent, index.episodes))
    if not part:
        raise DatasetError(f"{path}: {split!r} is empty: {name!r} has {index.episodes} episodes")
    try:
        return EpisodeDataset(
            index,
            robot,
            frame_stride=frame_stride,
            selection=selection,
            episodes=part,
            max_corrupt_fraction=max_corrupt_fraction,
        )
    except DatasetError:
        index.close()
        raise


class EpisodeDataset:
    """Frames of one split: those steps from which the policy may be asked to act, in stored order.

    All methods take frame numbers, are pure, and may be called from several threads.

    removed: why steps are not frames -> how many, in the order in which reasons are looked at (each counts what the
        ones before it left); with a frame_stride, of every so many-th step. episodes: how many the frames come from.
    """

    def __init__(
        self,
        index: FrameIndex,
        robot: Robot,
        *,
        frame_stride: int = 1,
        selection: Selection = Selection(),
        episodes: range | None = None,
        max_corrupt_fraction: float = 0.0,
    ) -> None:
        """
        Args:
            frame_stride: every how many steps of an episode a frame is taken, from its first step (or the first that
                is not skipped) on. Action chunks are at the full rate whatever this is.
            selection: which steps may be frames.
            episodes: of the split, None for all.
            max_corrupt_fraction: part of the steps at which an image of the robot's cameras may be damaged. These are
                no frames. The index knows them where all images were decoded once, see `FrameIndex.damaged`.

        Raises:
            DatasetError: the dataset does not have what the robot or the selection says, has values that are not
                finite or no rotation, or more damaged images than may be, or nothing is left of it; lists all.
        """
        self.index, self.robot, self._stride = index, robot, frame_stride
        part = range(index.episodes) if episodes is None else episodes
        self._part = range(int(index.episode_start[part.start]), int(index.episode_start[part.stop]))
        # The last step of an episode has no command where commands are derived from the step after.
        self._tail = int(any(f.next_step is not None for f in robot.action))
        self._skip_last = selection.skip_last
        self._first_image = {c.name: 0 for c in robot.cameras}  # bytes of pixels
        problems = self._problems(selection, max_corrupt_fraction)
        if problems:
            raise DatasetError(f"{index.split} does not fit robot {robot.name!r}:\n  " + "\n  ".join(problems))
        self._opens = {f.name: self._derive_gripper(f) for f in robot.action if _is_derived(f)}
        self._select(selection, part)
        if not len(self):
            raise DatasetError(f"{index.split}: no frame is left for robot {robot.name!r}; {self._removed_text()}")
        if not selection.labelled:
            self._warn_of_no_instruction()
        self.episodes = int((self.frames_per_episode() > 0).sum())
        if self.removed:
            _log.info("%s: %d frames for robot %r; %s", index.split, len(self), robot.name, self._removed_text())

    def __len__(self) -> int:
        return int(self._frame_start[-1]) if self._kept is None else len(self._kept)

    def steps(self, frames: Int[np.ndarray, "B"]) -> Int[np.ndarray, "B"]:
        """Returns the RLDS steps of frames, counted through all episodes of the split."""
        return self._place(frames)[1]

    def frames_per_episode(self) -> Int[np.ndarray, "E"]:
        """Returns how many frames each episode of the split has, 0 for those left out."""
        counts = np.zeros(self.index.episodes, np.int64)
        part = slice(self._first_episode, self._first_episode + len(self._frame_first))
        bounds = self._frame_start if self._kept is None else np.searchsorted(self._kept, self._frame_start)
        counts[part] = np.diff(bounds)
        return counts

    def where(self, frame: int) -> str:
        """Returns a description of one frame for error messages, see `FrameIndex.where`."""
        return self.index.where(int(self.steps(np.array([frame]))[0]))

    def state(self, frames: Int[np.ndarray, "B"]) -> Float[np.ndarray, "B Ds"]:
        """Returns the states of frames, in robot space, float32."""
        return self._state(self.steps(frames))

    def actions(self, frames: Int[np.ndarray, "B"]) -> tuple[Float[np.ndarray, "B A Js"], Bool[np.ndarray, "B A"]]:
        """Returns the action chunks that begin at frames, in robot space, and a mask that ends with the episode.

        A is the robot's action horizon; entry a is for control step a, which is `Robot.stride` RLDS steps long and
        whole inside the episode, without the last ones that the selection skips. Masked entries repeat the last one
        that is not.
        """
        episode, step = self._place(frames)
        end = self.index.episode_start[episode + 1] - self._tail - self._skip_last
        whole = (end - step) // self.robot.stride
        a = np.arange(self.robot.action_horizon)
        steps = step[:, None] + np.minimum(a, whole[:, None] - 1) * self.robot.stride
        actions = self._commands(steps.reshape(-1), self.robot.action)
        return actions.reshape(*steps.shape, self.robot.robot_action_size), a < whole[:, None]

    def encoded(
        self, frames: Int[np.ndarray, "B"]
    ) -> tuple[Float[np.ndarray, "B De"], Float[np.ndarray, "B A J"], Bool[np.ndarray, "B A"]]:
        """Returns states, action chunks and the chunks' mask in model space, not normalised."""
        state = self.state(frames)
        actions, mask = self.actions(frames)
        return self.robot.encode_state(state), self.robot.encode_actions(actions, state), mask

    def prompts(self, frames: Int[np.ndarray, "B"], draws: Float[np.ndarray, "B"] | None = None) -> list[str]:
        """Returns the instruction of each frame.

        draws: in [0, 1), choose among the instructions of a frame that are not empty, where the robot has
            `language_alternatives`. None takes the first.
        """
        key = self.robot.language_key
        if key is None:
            assert self.robot.default_prompt is not None  # Robot has checked it
            return [self.robot.default_prompt] * len(frames)
        columns = [self.texts(k, frames) for k in (key, *self.robot.language_alternatives)]
        prompts = []
        for i, texts in enumerate(zip(*columns, strict=True)):
            said = [text for text in texts if text.strip()] or texts[:1]
            prompts.append(said[0 if draws is None else int(draws[i] * len(said))])
        return prompts

    def texts(self, key: str, frames: Int[np.ndarray, "B"]) -> list[str]:
        """Returns a text field of each frame, of the step or of its episode."""
        texts, ids = self._texts(key, *self._place(frames))
        return [texts.table[i] for i in ids]

    def check_text(self, key: str) -> None:
        """Raises DatasetError, with near names, unless there is such a text field."""
        known = [*self.index.texts, *self.index.episode_texts]
        if key not in known:
            raise DatasetError(f"{self.index.split}: text_key: {self._no_field(key, known)}")

    def present(self, frames: Int[np.ndarray, "B"], camera: Camera) -> Bool[np.ndarray, "B"]:
        """Returns whether a camera of the robot has an image at frames, see `Camera`."""
        episode, step = self._place(frames)
        at, start = step - camera.steps_back, self.index.episode_start[episode]
        present = at >= start
        if camera.min_bytes:
            present &= self.index.images[camera.key][np.maximum(at, start), 1] >= camera.min_bytes
        return present

    def image(self, frame: int, camera: Camera) -> UInt8[np.ndarray, "H W 3"]:
        """Reads and decodes one image, at the size it is stored in, RGB and the right way up.

        Raises:
            DatasetError: it cannot be read, does not have the size that the robot's camera has, or is of a step before
                the episode began (see `present`).
        """
        return self._image(int(self._image_steps(np.array([frame]), camera)[0]), camera)

    def images_into(
        self,
        frames: Int[np.ndarray, "B"],
        camera: Camera,
        out: Sequence[UInt8[np.ndarray, "h w 3"]],
        *,
        resize: str = "cubic",
    ) -> None:
        """Writes images into `out`, each resized to the size it has there where that differs.

        resize: see `images.fit`.

        Raises:
            DatasetError: as `image`.
        """
        for step, image in zip(self._image_steps(frames, camera).tolist(), out, strict=True):
            fit(self._image(step, camera), image, resize=resize, fit=camera.fit)

    def held_bytes(self) -> int:
        """Returns what this takes in the memory of a process: its own arrays and all texts. Columns are mapped."""
        own = [*self._opens.values(), self._frame_first, self._frame_start]
        if self._kept is not None:
            own.append(self._kept)
        tables = [t.table for t in (*self.index.texts.values(), *self.index.episode_texts.values())]
        return sum(x.nbytes for x in own) + sum(sys.getsizeof(x) for table in tables for x in (table, *table))

    def image_bytes(self, camera: Camera) -> tuple[int, int]:
        """Returns the most that an image takes while it is read: what is read for it, and its pixels.

        Those are those of the camera's size, or of the larger of the size that features.json states and that of the
        first image that is shown, where images may be of any size; and once more where they are turned.
        """
        images, read = self.index.images, 0
        for block in self._blocks():
            if self.index.split.file_format == "array_record":  # a whole record, compressed and not; most is images
                read = max(read, *(2 * int(of[block].sum(axis=1).max()) for of in images.values()))
            else:
                read = max(read, int(images[camera.key][block, 1].max()))
        declared = [side or 0 for side in self.index.schema.steps[camera.key].shape]
        return read, (1 + camera.upside_down) * max(self._first_image[camera.name], math.prod(declared))

    def frames_digest(self) -> str:
        """Returns a digest of which step every frame is, and of the lengths of the episodes."""
        digest = hashlib.sha256(f"{self._first_episode} {self._stride}".encode())
        for array in (self.index.episode_start, self._frame_first, self._frame_start, self._kept):
            if array is not None:
                digest.update(f"{array.dtype} {array.shape}".encode())
                digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()[:16]

    def close(self) -> None:
        """Closes the shard files; reading opens them again."""
        self.index.close()

    # ---- From columns to states and commands -------------------------------------------------------------------------

    def _place(self, frames: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns the episodes and steps of frames. Frames of an episode are evenly spaced before some are left out."""
        if self._kept is not None:
            frames = self._kept[frames].astype(np.int64)
        e = np.searchsorted(self._frame_start, frames, side="right") - 1
        return self._first_episode + e, self._frame_first[e] + self._stride * (frames - self._frame_start[e])

    def _state(self, steps: np.ndarray) -> np.ndarray:
        rows: dict[tuple[str, int], np.ndarray] = {}
        parts = [self._values(f, steps, 0, rows) for f in self.robot.state]
        return np.concatenate(parts, axis=1).astype(np.float32) if parts else np.zeros((len(steps), 0), np.float32)

    def _commands(self, steps: np.ndarray, fields: Sequence[ActionField]) -> np.ndarray:
        """Returns the commands of the control steps that begin at `steps` and lie inside their episodes, (n, sizes)."""
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
            opens = self._opens[field.name][steps + offset - self._part.start]
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

    def _texts(self, key: str, episode: np.ndarray, step: np.ndarray) -> tuple[Texts, np.ndarray]:
        if key in self.index.texts:
            return self.index.texts[key], self.index.texts[key].ids[step]
        return self.index.episode_texts[key], self.index.episode_texts[key].ids[episode]

    def _image_steps(self, frames: np.ndarray, camera: Camera) -> np.ndarray:
        """Returns the steps whose images a camera shows at frames."""
        episode, step = self._place(frames)
        at = step - camera.steps_back
        if (before := at < self.index.episode_start[episode]).any():
            raise DatasetError(
                f"{self.index.where(int(step[before][0]))}: camera {camera.name!r} shows {camera.steps_back} steps "
                "before, when the episode had not begun; ask `present` first"
            )
        return at

    def _image(self, step: int, camera: Camera) -> np.ndarray:
        data = self.index.read_image(step, camera.key)
        try:
            image = decode(data, camera.channel_order)
        except ValueError as e:
            raise DatasetError(
                f"{self.index.where(step)}: cannot decode {camera.key}: {e} (camera {camera.name!r}); data/index.py "
                "--decode finds all such images, and with max_corrupt_fraction they are then left out"
            ) from e
        if camera.upside_down:
            image = cv2.rotate(image, cv2.ROTATE_180)
        got, expected = image.shape[:2], (camera.height, camera.width)
        if any(b is not None and a != b for a, b in zip(got, expected, strict=True)):
            raise DatasetError(
                f"{self.index.where(step)}: {camera.key} is {got[0]} x {got[1]} pixels, camera {camera.name!r} of "
                f"robot {self.robot.name!r} expects {expected[0]} x {expected[1]}; "
                "correct the camera's height and width"
            )
        return image

    def _derive_gripper(self, field: ActionField) -> np.ndarray:
        """Returns whether the gripper is commanded to be open, for every step of the part."""
        assert field.gripper is not None  # conventions belong to grippers
        column, start = self.index.columns[field.key], self.index.episode_start
        opens = np.empty(len(self._part), bool)
        for lo, hi in self._episode_blocks():
            first = np.zeros(hi - lo, bool)
            begins = start[np.searchsorted(start, lo) : np.searchsorted(start, hi)]
            first[begins - lo] = True
            values = column[lo:hi].reshape(hi - lo, -1)[:, field.start].astype(np.float64)
            opens[lo - self._part.start : hi - self._part.start] = field.gripper.opens(values, first)
        return opens

    def _whole_episodes(self, steps: np.ndarray) -> np.ndarray:
        """Returns all steps of the episodes of some steps: what a derived gripper says depends on all of an episode."""
        start = self.index.episode_start
        episodes = np.unique(np.searchsorted(start, steps, side="right") - 1)
        return np.concatenate([np.zeros(0, np.int64), *(np.arange(start[e], start[e + 1]) for e in episodes)])

    def _episode_blocks(self) -> Iterator[tuple[int, int]]:
        """Yields first and last step (exclusive) of blocks of whole episodes of the part, of about _BLOCK steps."""
        start, lo = self.index.episode_start, self._part.start
        while lo < self._part.stop:
            e = int(np.searchsorted(start, lo + _BLOCK, side="right")) - 1
            hi = min(int(start[max(e, int(np.searchsorted(start, lo, side="right")))]), self._part.stop)
            yield lo, hi
            lo = hi

    # ---- Which steps are frames --------------------------------------------------------------------------------------

    def _select(self, selection: Selection, part: range) -> None:
        """Sets frames: evenly spaced from `_frame_first` on in every episode, without those that are not `_kept`."""
        start = np.asarray(self.index.episode_start[part.start : part.stop + 1], np.int64)
        first, end = start[:-1].copy(), start[1:].copy()
        self._first_episode, self._kept = part.start, None
        self.removed: dict[str, int] = {}

        def frames() -> np.ndarray:
            return np.maximum(0, -(-(end - first) // self._stride))

        def remove(reason: str, before: int) -> None:
            if before > (left := int(frames().sum())):
                self.removed[reason] = before - left

        # What concerns whole episodes, or their ends
        before = int(frames().sum())
        end -= self._tail + self.robot.stride - 1
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
            ranges, known = self._read_ranges(selection, part)
            before = int(frames().sum())
            end = np.where(known, end, first)
            remove("episode not in keep_ranges", before)
        self._frame_first, self._frame_start = first, np.append(0, np.cumsum(frames()))

        # What concerns single steps
        not_finite = np.zeros(0, np.int64), np.zeros(0, np.int64)  # steps with such values in the state, in the action
        shown: list[str] = []
        if selection.skip_not_finite:
            of_state, of_action = self._not_finite(self.robot.state), self._not_finite(self.robot.action)
            shown = self._describe(self.robot.state, of_state) + self._describe(self.robot.action, of_action)
            derived = self._not_finite([f for f in self.robot.action if _is_derived(f)])
            not_finite = of_state, np.union1d(of_action, self._whole_episodes(derived))
        blind = self._blind()
        filters = (selection.success, ranges, selection.idle_below)
        if all(f is None for f in filters) and not selection.labelled and not any(map(len, (*not_finite, blind))):
            return
        said = self._labels() if selection.labelled else {}
        succeeded = self._success_texts(selection)
        kept = []
        for at in range(0, int(self._frame_start[-1]), _BLOCK):
            block = np.arange(at, min(at + _BLOCK, int(self._frame_start[-1])))
            episode, step = self._place(block)
            keep = np.ones(len(block), bool)
            for reason, good in self._step_filters(
                selection, said, succeeded, ranges, not_finite, blind, episode, step
            ):
                if removed := int((keep & ~good).sum()):
                    self.removed[reason] = self.removed.get(reason, 0) + removed
                keep &= good
            kept.append(block[keep].astype(np.uint32 if self._frame_start[-1] < 1 << 32 else np.int64))
        self._kept = np.concatenate(kept) if kept else np.zeros(0, np.uint32)
        if shown:
            _log.warning(
                "%s has values that are not finite or no rotation, which are skipped:\n  %s",
                self.index.split,
                "\n  ".join(shown),
            )
        if len(blind):
            _log.warning(
                "%s: at %d of %d steps an image of robot %r is damaged; they are left out:\n  %s",
                *(self.index.split, len(blind), len(self._part), self.robot.name),
                "\n  ".join(self._describe_damage()),
            )

    def _step_filters(
        self,
        selection: Selection,
        said: dict[str, np.ndarray],
        succeeded: np.ndarray | None,
        ranges: np.ndarray | None,
        not_finite: tuple[np.ndarray, np.ndarray],
        blind: np.ndarray,
        episode: np.ndarray,
        step: np.ndarray,
    ) -> Iterator[tuple[str, np.ndarray]]:
        """Yields (reason, whether a step is kept) for steps (n,) and their episodes.

        said, succeeded, blind: see `_labels`, `_success_texts` and `_blind`.
        """
        if selection.success is not None:
            yield f"{selection.success} says no", self._succeeded(selection.success, succeeded, episode, step)
        if said:
            yield "no instruction", self._labelled(said, episode, step)
        if ranges is not None:
            i = np.searchsorted(ranges[:, 0], step, side="right") - 1
            yield "not in keep_ranges", (i >= 0) & (step < ranges[np.maximum(i, 0), 1])
        if any(map(len, not_finite)):
            horizon = self.robot.action_horizon * self.robot.stride + self._tail
            end = np.minimum(step + horizon, self.index.episode_start[episode + 1] - self._skip_last)
            of_state, of_action = not_finite
            good = np.searchsorted(of_state, step) == np.searchsorted(of_state, step + 1)
            yield "not finite", good & (np.searchsorted(of_action, step) == np.searchsorted(of_action, end))
        if len(blind):
            yield "damaged image", ~np.isin(step, blind)
        if selection.idle_below is not None:
            yield f"idle, below {selection.idle_below:g}", ~self._idle(selection.idle_below, episode, step)

    def _labels(self) -> dict[str, np.ndarray]:
        """Returns for every instruction field which texts of its table are not empty."""
        if self.robot.language_key is None:
            return {}
        none = np.zeros(0, np.int64)
        keys = (self.robot.language_key, *self.robot.language_alternatives)
        return {k: np.array([bool(t.strip()) for t in self._texts(k, none, none)[0].table], bool) for k in keys}

    def _labelled(self, said: dict[str, np.ndarray], episode: np.ndarray, step: np.ndarray) -> np.ndarray:
        """Whether any instruction of a step is not empty."""
        return np.any([good[self._texts(key, episode, step)[1]] for key, good in said.items()], axis=0)

    def _warn_of_no_instruction(self) -> None:
        said = self._labels()
        if not said or any(good.all() for good in said.values()):
            return
        missing, first = 0, -1
        for at in range(0, len(self), _BLOCK):
            episode, step = self._place(np.arange(at, min(at + _BLOCK, len(self))))
            labelled = self._labelled(said, episode, step)
            if first < 0 and not labelled.all():
                first = int(step[np.argmin(labelled)])
            missing += int((~labelled).sum())
        if missing:
            _log.warning(
                "%s: %d of %d frames have no instruction (%s), the first is %s; set labelled in the selection to leave "
                "them out",
                *(self.index.split, missing, len(self), ", ".join(map(repr, said)), self.index.where(first)),
            )

    def _success_texts(self, selection: Selection) -> np.ndarray | None:
        """Returns which texts say that it was a success, None where a number says it."""
        if selection.success is None or selection.success_pattern is None:
            return None
        none = np.zeros(0, np.int64)
        table = self._texts(selection.success, none, none)[0].table
        return np.array([re.search(selection.success_pattern, t) is not None for t in table], bool)

    def _succeeded(self, key: str, texts: np.ndarray | None, episode: np.ndarray, step: np.ndarray) -> np.ndarray:
        if texts is not None:
            return texts[self._texts(key, episode, step)[1]]
        values = (
            self.index.columns[key][step] if key in self.index.columns else self.index.episode_columns[key][episode]
        )
        return values.reshape(-1) > 0

    def _idle(self, below: float, episode: np.ndarray, step: np.ndarray) -> np.ndarray:
        """Whether nothing is commanded in the control step that begins at a step."""
        before = np.maximum(step - 1, self.index.episode_start[episode])
        still = np.arange(len(step))  # where nothing has moved so far; turns, which cost the most, come last
        for field in sorted(self.robot.action, key=lambda f: f.rotation is not None):
            if not len(still) or not (_moves(field) or field.gripper is not None):
                continue
            alone, at = dataclasses.replace(self.robot, action=(field,)), step[still]
            part = alone.encode_actions(self._commands(at, [field])[:, None], self._state(at))[:, 0]
            if field.gripper is not None:
                earlier = field.to_model(self._commands(before[still], [field]))
                moves = (np.abs(part - earlier) >= _GRIPPER_MOVES).any(axis=1)
            elif field.model_size > 3 and field.rotation is not None:
                # The numbers of a quaternion or of 6-D are not 0 where nothing turns
                turn = ROTATIONS[field.model_rotation or field.rotation][1](part.astype(np.float64))
                moves = turn.magnitude() >= below
            else:
                moves = (np.abs(part) >= below).any(axis=1)
            still = still[~moves]
        idle = np.zeros(len(step), bool)
        idle[still] = True
        return idle

    def _read_ranges(self, selection: Selection, part: range) -> tuple[np.ndarray, np.ndarray]:
        """Returns the steps [start, end) of all ranges, (R, 2), and per episode whether it has any entry."""
        path, start = Path(selection.keep_ranges or ""), self.index.episode_start
        try:
            stored = json.loads(path.read_text())
            entries = {k: np.array(v, np.int64).reshape(-1, 2) for k, v in stored.items()}
        except (OSError, ValueError, AttributeError, TypeError) as wrong:
            raise DatasetError(
                f"keep_ranges {path}: {wrong}; expected JSON like {{episode: [[start, end], ...]}}"
            ) from wrong
        bad = [k for k, v in entries.items() if (v[:, 0] < 0).any() or (v[:, 1] < v[:, 0]).any()]
        if bad:
            raise DatasetError(f"keep_ranges {path}: ranges that are not 0 <= start <= end in {bad[:_SHOWN]}")
        texts = [self.index.episode_texts[key] for key in selection.keep_ranges_key]
        found, known, name = [], np.zeros(len(part), bool), ""
        for i, e in enumerate(part):
            name = "--".join(t.table[t.ids[e]] for t in texts)
            if name in entries:
                known[i] = True
                found.append(np.sort(np.minimum(entries[name] + start[e], start[e + 1]), axis=0))
        if not known.any():
            raise DatasetError(
                f"keep_ranges {path} has none of the episodes of {self.index.split}: it has names like "
                f"{next(iter(entries), None)!r}, the episodes have names like {name!r}; correct keep_ranges_key"
            )
        return np.concatenate(found), known

    def _removed_text(self) -> str:
        return "left out: " + (", ".join(f"{n} ({reason})" for reason, n in self.removed.items()) or "nothing")

    # ---- Does the dataset have what the robot and the selection say? -------------------------------------------------

    def _problems(self, selection: Selection, max_corrupt_fraction: float) -> list[str]:
        problems = []
        for camera in self.robot.cameras:
            problems += self._camera_problems(camera)
        blind = len(self._blind())
        if blind > max_corrupt_fraction * len(self._part):
            problems.append(
                f"at {blind} of {len(self._part)} steps an image of its cameras is damaged, tolerated are "
                f"{max_corrupt_fraction:g} of them (max_corrupt_fraction); copy these files again, or tolerate them:\n"
                + "\n".join(f"    {line}" for line in self._describe_damage())
            )
        usable: list[tuple[str, StateField]] = []
        for what, fields in (("state", self.robot.state), ("action", self.robot.action)):
            for field in fields:
                where = f"{what} field {field.name!r}"
                column = self.index.columns.get(field.key)
                if column is None:
                    problems.append(f"{where}: {self._no_field(field.key, list(self.index.columns))}")
                elif field.start + field.size > math.prod(column.shape[1:]):
                    problems.append(
                        f"{where}: takes values {field.start} to {field.start + field.size - 1} of {field.key!r}, "
                        f"which has {math.prod(column.shape[1:])}; correct its start or size"
                    )
                else:
                    usable.append((what, field))
        known = [*self.index.texts, *self.index.episode_texts]
        if self.robot.language_key is not None:
            keys = (
                ("language_key", self.robot.language_key),
                *(("language_alternatives", key) for key in self.robot.language_alternatives),
            )
            problems += [f"{what}: {self._no_field(key, known)}" for what, key in keys if key not in known]
        problems += self._selection_problems(selection)
        if not selection.skip_not_finite:
            for what, field in usable:
                problems += self._describe([field], self._not_finite([field]), f"{what} field ")
        self._warn_of_grippers(usable)
        return problems

    def _selection_problems(self, selection: Selection) -> list[str]:
        problems = []
        index, key = self.index, selection.success
        if key is not None and selection.success_pattern is None:
            numbers = index.columns | index.episode_columns
            if key not in numbers:
                problems.append(f"selection.success: {self._no_field(key, list(numbers))}")
            elif math.prod(numbers[key].shape[1:]) != 1:
                problems.append(f"selection.success: {key!r} has shape {numbers[key].shape[1:]}, expected one number")
        elif key is not None and key not in index.texts and key not in index.episode_texts:
            problems.append(f"selection.success: {self._no_field(key, [*index.texts, *index.episode_texts])}")
        if selection.keep_ranges is not None:
            problems += [
                f"selection.keep_ranges_key: {self._no_field(k, list(index.episode_texts))}"
                for k in selection.keep_ranges_key
                if k not in index.episode_texts
            ]
        if selection.idle_below is not None and not any(_moves(f) for f in self.robot.action):
            problems.append(
                "selection.idle_below: no action field is a delta, a velocity or relative to a state, so whether the "
                "robot moves cannot be told"
            )
        return problems

    def _no_field(self, key: str, known: list[str]) -> str:
        if key in self.index.left_out:
            return f"{key!r} is not in the index, because {self.index.left_out[key]}"
        features = self.index.schema.steps | self.index.schema.episode
        if key in features:
            return f"{key!r} is a field of kind {features[key].kind!r}; fields that fit: {', '.join(map(repr, known))}"
        return f"the dataset has no {key!r}; {near_names(key, known)}"

    def _camera_problems(self, camera: Camera) -> list[str]:
        if camera.key not in self.index.images:
            return [f"camera {camera.name!r}: {self._no_field(camera.key, list(self.index.images))}"]
        feature = self.index.schema.steps[camera.key]
        if feature.dtype != "uint8" or feature.shape[2:] != (3,):
            return [
                f"camera {camera.name!r}: {camera.key!r} holds {feature.dtype} images of shape {feature.shape}, "
                "expected uint8 with 3 channels"
            ]
        ends, damaged = self.index.episode_start[1:], self._damaged(camera)
        for block in self._blocks():
            # As in `present`: an image is shown where it is large enough and its episode goes on for `steps_back`.
            steps = np.arange(block.start, block.stop)
            shown = steps + camera.steps_back < ends[np.searchsorted(ends, steps, side="right")]
            shown &= self.index.images[camera.key][block, 1] >= camera.min_bytes
            shown &= ~np.isin(steps, damaged)
            if not shown.any():
                continue
            try:
                self._first_image[camera.name] = self._image(int(steps[np.argmax(shown)]), camera).nbytes
            except DatasetError as e:
                return [str(e)]
            return []
        _log.warning("%s: camera %r (%s) is absent at every step", self.index.split, camera.name, camera.key)
        return []

    def _damaged(self, camera: Camera) -> np.ndarray:
        """Returns the steps of the part whose image, as a camera of the robot has it, is damaged; ascending."""
        steps = self.index.damaged.get(camera.key, np.zeros(0, np.int64))
        steps = steps[np.searchsorted(steps, self._part.start) : np.searchsorted(steps, self._part.stop)]
        return steps[self.index.images[camera.key][steps, 1] >= camera.min_bytes]

    def _blind(self) -> np.ndarray:
        """Returns the steps of the part at which some camera shows a damaged image, ascending; see `present`."""
        ends, found = self.index.episode_start[1:], [np.zeros(0, np.int64)]
        for camera in self.robot.cameras:
            if camera.key in self.index.images:
                steps = self._damaged(camera)
                end = ends[np.searchsorted(ends, steps, side="right")]
                found.append((steps + camera.steps_back)[steps + camera.steps_back < end])
        return np.unique(np.concatenate(found))

    def _describe_damage(self) -> list[str]:
        """Returns where the first damaged images of each of the robot's cameras lie."""
        shown = []
        for camera in self.robot.cameras:
            steps = self._damaged(camera) if camera.key in self.index.images else np.zeros(0, np.int64)
            shown += [f"{self.index.where(int(step))}: {camera.key}" for step in steps[:_SHOWN]]
            if len(steps) > _SHOWN:
                shown.append(f"... and {len(steps) - _SHOWN} more images of {camera.key}")
        return shown

    def _blocks(self) -> Iterator[slice]:
        for at in range(self._part.start, self._part.stop, _BLOCK):
            yield slice(at, min(at + _BLOCK, self._part.stop))

    def _not_finite(self, fields: Sequence[StateField]) -> np.ndarray:
        """Returns the steps of the part at which a field is not finite, or no rotation, ascending."""
        bad: list[np.ndarray] = []
        for field in fields:
            column = self.index.columns[field.key]
            if column.dtype.kind != "f":
                continue
            for block in self._blocks():
                values = column[block].reshape(block.stop - block.start, -1)
                usable = field.usable(values[:, field.start : field.start + field.size])
                bad.append(block.start + np.flatnonzero(~usable))
        return np.unique(np.concatenate(bad)) if bad else np.zeros(0, np.int64)

    def _describe(self, fields: Sequence[StateField], bad: np.ndarray, what: str = "") -> list[str]:
        """Returns where and which values are not finite, or no rotation, for the first of some steps."""
        shown = []
        for step in bad[:_SHOWN]:
            for field in fields:
                values = np.ravel(self.index.columns[field.key][step])[field.start : field.start + field.size]
                if not field.usable(values[None]).all():
                    expected = "finite numbers" + (f" that are a rotation ({field.rotation})" if field.rotation else "")
                    shown.append(
                        f"{self.index.where(int(step))}: {what}{field.name!r} ({field.key}) is {values.tolist()}, "
                        f"expected {expected}"
                    )
        if len(bad) > _SHOWN:
            shown.append(f"... and {len(bad) - _SHOWN} more steps of {', '.join(repr(f.name) for f in fields)}")
        return shown

    def _warn_of_grippers(self, usable: Sequence[tuple[str, StateField]]) -> None:
        """Warns where stored values say that a gripper convention is not that of this dataset."""
        for what, field in usable:
            gripper = field.gripper
            if gripper is None or gripper.convention != "absolute":
                continue
            outside, least, most = 0, np.inf, -np.inf
            for block in self._blocks():
                stored = self.index.columns[field.key][block].reshape(block.stop - block.start, -1)
                values = stored[:, field.start : field.start + field.size].astype(np.float64)
                opening = field.to_model(values)
                outside += int(((opening < -_OUTSIDE) | (opening > 1 + _OUTSIDE)).any(axis=1).sum())
                least, most = min(least, float(values.min())), max(most, float(values.max()))
            if outside:
                _log.warning(
                    "%s, robot %r: %s field %r lies outside closed=%g to open=%g in %d of %d steps (%g to %g); is that "
                    "what this dataset stores?",
                    *(self.index.split, self.robot.name, what, field.name, gripper.closed, gripper.open),
                    *(outside, len(self._part), least, most),
                )


def _is_derived(field: ActionField) -> bool:
    return field.gripper is not None and field.gripper.convention != "absolute"


def _moves(field: ActionField) -> bool:
    """Whether the size of a command says that the robot moves."""
    return field.gripper is None and (field.command != "absolute" or field.relative_to is not None)
