"""The episodes of one split as one robot sees them: states, action chunks, masks, prompts and images, by frame."""

import logging
import math
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

from openpi_like.data.blocks import blocks
from openpi_like.data.camera_images import image_steps, is_present, read_image
from openpi_like.data.dataset_check import check_dataset, no_field
from openpi_like.data.frames import handed_back, interventions_left, select_frames, warn_of_no_instruction
from openpi_like.data.images import Target, fit
from openpi_like.data.index import FrameIndex, open_index
from openpi_like.data.schema import DatasetError
from openpi_like.data.selection import Selection
from openpi_like.data.step_values import StepValues
from openpi_like.robots.entities import Entities
from openpi_like.robots.robot import Camera, Robot

_log = logging.getLogger(__name__)


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
        self.index, self.robot = index, robot
        part = range(index.episodes) if episodes is None else episodes
        self._part = range(int(index.episode_start[part.start]), int(index.episode_start[part.stop]))
        self._skip_last = selection.skip_last
        self._first_image = check_dataset(index, robot, self._part, selection, max_corrupt_fraction)
        self._interventions = handed_back(index, selection, self._part)
        self._values = StepValues(index, robot, self._part)
        self._frames, self.removed = select_frames(self._values, selection, part, frame_stride)
        left_out = "left out: " + (", ".join(f"{n} ({reason})" for reason, n in self.removed.items()) or "nothing")
        if not len(self):
            raise DatasetError(f"{index.split}: no frame is left for robot {robot.name!r}; {left_out}")
        if not selection.labelled:
            warn_of_no_instruction(self._values, self._frames)
        self.episodes = int((self.frames_per_episode() > 0).sum())
        if self.removed:
            _log.info("%s: %d frames for robot %r; %s", index.split, len(self), robot.name, left_out)

    def __len__(self) -> int:
        return len(self._frames)

    def steps(self, frames: Int[np.ndarray, "B"]) -> Int[np.ndarray, "B"]:
        """Returns the RLDS steps of frames, counted through all episodes of the split."""
        return self._frames.place(frames)[1]

    def episodes_of(self, frames: Int[np.ndarray, "B"]) -> Int[np.ndarray, "B"]:
        """Returns the episodes of frames, counted through all of the split."""
        return self._frames.place(frames)[0]

    def frames_per_episode(self) -> Int[np.ndarray, "E"]:
        """Returns how many frames each episode of the split has, 0 for those left out."""
        return self._frames.per_episode(self.index.episodes)

    def where(self, frame: int) -> str:
        """Returns a description of one frame for error messages, see `FrameIndex.where`."""
        return self.index.where(int(self.steps(np.array([frame]))[0]))

    def state(self, frames: Int[np.ndarray, "B"]) -> Float[np.ndarray, "B Ds"]:
        """Returns the states of frames, in robot space, float32."""
        return self._values.state(self.steps(frames))

    def actions(self, frames: Int[np.ndarray, "B"]) -> tuple[Float[np.ndarray, "B A Js"], Bool[np.ndarray, "B A"]]:
        """Returns the action chunks that begin at frames, in robot space, and a mask that ends with the episode.

        A is the robot's action horizon; entry a is for control step a, which is `Robot.stride` RLDS steps long and
        whole inside the episode, without the last ones that the selection skips, and inside the expert's intervention
        where the selection asks for these. Masked entries repeat the last one
        that is not. Plans are those of the frames, and the mask is which entries are known.
        """
        episode, step = self._frames.place(frames)
        if self.robot.plan is not None:
            return self._values.plans(step)
        end = self.index.episode_start[episode + 1] - self._values.tail - self._skip_last
        if self._interventions is not None:
            end = np.minimum(end, step + interventions_left(self._interventions, step))
        whole = (end - step) // self.robot.stride
        a = np.arange(self.robot.action_horizon)
        steps = step[:, None] + np.minimum(a, whole[:, None] - 1) * self.robot.stride
        actions = self._values.commands(steps.reshape(-1), self.robot.action)
        return actions.reshape(*steps.shape, self.robot.robot_action_size), a < whole[:, None]

    def entities(
        self, frames: Int[np.ndarray, "B"], things: Entities
    ) -> tuple[Float[np.ndarray, "B N F"], Bool[np.ndarray, "B N"]]:
        """Returns the numbers of things around the robot, float32, 0 where there is none, and where there is one."""
        steps = self.steps(frames)
        values = self.index.columns[things.key][steps].astype(np.float32)
        there = np.ones(values.shape[:2], bool)
        if things.mask_key is not None:
            there = self.index.columns[things.mask_key][steps] > 0
        return np.where(there[..., None], values, 0), there

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
        table = self.index.text_table(key)
        return [table[i] for i in self.index.text_ids(key, *self._frames.place(frames))]

    def check_text(self, key: str) -> None:
        """Raises DatasetError, with near names, unless there is such a text field."""
        known = [*self.index.texts, *self.index.episode_texts]
        if key not in known:
            raise DatasetError(f"{self.index.split}: text_key: {no_field(self.index, key, known)}")

    def present(self, frames: Int[np.ndarray, "B"], camera: Camera) -> Bool[np.ndarray, "B"]:
        """Returns whether a camera of the robot has an image at frames, see `Camera`."""
        return is_present(self.index, camera, *self._frames.place(frames))

    def image(self, frame: int, camera: Camera) -> UInt8[np.ndarray, "H W 3"]:
        """Reads and decodes one image, at the size it is stored in, RGB and the right way up.

        Raises:
            DatasetError: it cannot be read, does not have the size that the robot's camera has, or is of a step before
                the episode began (see `present`).
        """
        (step,) = image_steps(self.index, camera, *self._frames.place(np.array([frame]))).tolist()
        return read_image(self.index, self.robot, step, camera)

    def images_into(
        self,
        frames: Int[np.ndarray, "B"],
        camera: Camera,
        out: Sequence[UInt8[np.ndarray, "h w 3"]],
        *,
        resize: str = "cubic",
        scaled: bool = False,
    ) -> None:
        """Writes images into `out`, each resized to the size it has there where that differs.

        resize: see `images.fit`. scaled: large JPEGs are decoded at a part of their size, see `decode_for`.

        Raises:
            DatasetError: as `image`.
        """
        steps = image_steps(self.index, camera, *self._frames.place(frames)).tolist()
        for step, image in sorted(zip(steps, out, strict=True), key=lambda at: at[0]):  # frames of a video in its order
            target = Target(image.shape[0], image.shape[1], camera.fit) if scaled else None
            fit(read_image(self.index, self.robot, step, camera, target), image, resize=resize, fit=camera.fit)

    def held_bytes(self) -> int:
        """Returns what this takes in the memory of a process: its own arrays and all texts. Columns are mapped."""
        own = self._values.held_bytes + self._frames.held_bytes
        own += 0 if self._interventions is None else self._interventions.nbytes
        tables = [t.table for t in (*self.index.texts.values(), *self.index.episode_texts.values())]
        return own + sum(sys.getsizeof(x) for table in tables for x in (table, *table))

    def image_bytes(self, camera: Camera) -> tuple[int, int]:
        """Returns the most that an image takes while it is read: what is read for it, and its pixels.

        Those are those of the camera's size, or of the larger of the size that features.json states and that of the
        first image that is shown, where images may be of any size; and once more where they are turned.
        """
        images, read = self.index.images, 0
        for block in blocks(self._part):
            of = {key: spans[block] for key, spans in images.items()}
            read = max(read, self.index.split.storage.read_bytes(of, camera.key))
        declared = [side or 0 for side in self.index.schema.steps[camera.key].shape]
        return read, (1 + camera.upside_down) * max(self._first_image[camera.name], math.prod(declared))

    def frames_digest(self) -> str:
        """Returns a digest of which step every frame is, and of the lengths of the episodes."""
        return self._frames.digest(self.index.episode_start)

    def close(self) -> None:
        """Closes the shard files; reading opens them again."""
        self.index.close()
