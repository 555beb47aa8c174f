"""The episodes of one split as one robot sees them: states, action chunks, masks, prompts and images, by frame."""

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

from openpi_like.config import near_names
from openpi_like.data.images import decode, fit
from openpi_like.data.index import FrameIndex
from openpi_like.data.schema import DatasetError
from openpi_like.robots.robot import Camera, Robot, StateField

_BLOCK = 1 << 16  # steps looked at together
_SHOWN = 5  # places named in one message


class EpisodeDataset:
    """Frames of one split: those steps from which the policy may be asked to act, in stored order.

    All methods take frame numbers, are pure, and may be called from several threads.
    """

    def __init__(self, index: FrameIndex, robot: Robot, *, frame_stride: int = 1) -> None:
        """
        Args:
            frame_stride: every how many steps of an episode a frame is taken, from its first step on. Action chunks are
                at the full rate whatever this is.

        Raises:
            DatasetError: the dataset does not have what the robot says, or has values that are not finite; lists all.
        """
        self.index, self.robot = index, robot
        start = np.asarray(index.episode_start)
        lengths = np.diff(start)
        step_in_episode = np.arange(index.steps) - np.repeat(start[:-1], lengths)
        self.frame_step = np.flatnonzero(step_in_episode % frame_stride == 0)
        self._episode_end = np.repeat(start[1:], lengths)[self.frame_step]
        self._episode = np.repeat(np.arange(index.episodes), lengths)[self.frame_step]
        problems = self._problems()
        if problems:
            raise DatasetError(f"{index.split} does not fit robot {robot.name!r}:\n  " + "\n  ".join(problems))

    def __len__(self) -> int:
        return len(self.frame_step)

    def state(self, frames: Int[np.ndarray, "B"]) -> Float[np.ndarray, "B Ds"]:
        """Returns the states of frames, in robot space, float32."""
        return self._gather(self.robot.state, self.frame_step[frames])

    def actions(self, frames: Int[np.ndarray, "B"]) -> tuple[Float[np.ndarray, "B A Js"], Bool[np.ndarray, "B A"]]:
        """Returns the action chunks that begin at frames, in robot space, and a mask that ends with the episode.

        A is the robot's action horizon. Masked entries repeat the episode's last action.
        """
        steps = self.frame_step[frames][:, None] + np.arange(self.robot.action_horizon)
        mask = steps < self._episode_end[frames][:, None]
        steps = np.minimum(steps, self._episode_end[frames][:, None] - 1)
        actions = self._gather(self.robot.action, steps.reshape(-1))
        return actions.reshape(*steps.shape, -1), mask

    def encoded(
        self, frames: Int[np.ndarray, "B"]
    ) -> tuple[Float[np.ndarray, "B De"], Float[np.ndarray, "B A J"], Bool[np.ndarray, "B A"]]:
        """Returns states, action chunks and the chunks' mask in model space, not normalised."""
        state = self.state(frames)
        actions, mask = self.actions(frames)
        return self.robot.encode_state(state), self.robot.encode_actions(actions, state), mask

    def prompts(self, frames: Int[np.ndarray, "B"]) -> list[str]:
        """Returns the instruction of each frame."""
        key = self.robot.language_key
        if key is None:
            assert self.robot.default_prompt is not None  # Robot has checked it
            return [self.robot.default_prompt] * len(frames)
        return self.texts(key, frames)

    def texts(self, key: str, frames: Int[np.ndarray, "B"]) -> list[str]:
        """Returns a text field of each frame, of the step or of its episode."""
        if key in self.index.texts:
            texts, at = self.index.texts[key], self.frame_step[frames]
        else:
            texts, at = self.index.episode_texts[key], self._episode[frames]
        return [texts.table[i] for i in texts.ids[at]]

    def check_text(self, key: str) -> None:
        """Raises DatasetError, with near names, unless there is such a text field."""
        known = [*self.index.texts, *self.index.episode_texts]
        if key not in known:
            raise DatasetError(f"{self.index.split}: text_key: {self._no_field(key, known)}")

    def image(self, frame: int, camera: Camera) -> UInt8[np.ndarray, "H W 3"]:
        """Reads and decodes one image, at the size it is stored in.

        Raises:
            DatasetError: it cannot be read, or does not have the size that the robot's camera has.
        """
        step = int(self.frame_step[frame])
        data = self.index.read_image(step, camera.key)
        try:
            image = decode(data, camera.channel_order)
        except ValueError as e:
            raise DatasetError(f"{self.index.where(step)}: cannot decode {camera.key}: {e}") from e
        got, expected = image.shape[:2], (camera.height, camera.width)
        if any(b is not None and a != b for a, b in zip(got, expected, strict=True)):
            raise DatasetError(
                f"{self.index.where(step)}: {camera.key} is {got[0]} x {got[1]} pixels, camera {camera.name!r} of "
                f"robot {self.robot.name!r} expects {expected[0]} x {expected[1]}; "
                "correct the camera's height and width"
            )
        return image

    def image_into(self, frame: int, camera: Camera, out: UInt8[np.ndarray, "h w 3"], *, resize: str = "cubic") -> None:
        """Writes one image into `out`, resized to its size where that differs; resize: see `images.fit`."""
        fit(self.image(frame, camera), out, resize=resize)

    def close(self) -> None:
        """Closes the shard files; reading opens them again."""
        self.index.close()

    def _gather(self, fields: Sequence[StateField], steps: np.ndarray) -> np.ndarray:
        rows = {f.key: self.index.columns[f.key][steps].reshape(len(steps), -1) for f in fields}
        parts = [rows[f.key][:, f.start : f.start + f.size] for f in fields]
        return np.concatenate(parts, axis=1).astype(np.float32)

    # ---- Does the dataset have what the robot says? ------------------------------------------------------------------

    def _problems(self) -> list[str]:
        problems = []
        for camera in self.robot.cameras:
            problems += self._camera_problems(camera)
        usable = []
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
        key = self.robot.language_key
        if key is not None and key not in self.index.texts and key not in self.index.episode_texts:
            known = [*self.index.texts, *self.index.episode_texts]
            problems.append(f"language_key: {self._no_field(key, known)}")
        for what, field in usable:
            problems += self._not_finite(what, field)
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
        try:
            self.image(0, camera)
        except DatasetError as e:
            return [str(e)]
        return []

    def _not_finite(self, what: str, field: StateField) -> list[str]:
        column, bad = self.index.columns[field.key], []
        for at in range(0, len(column), _BLOCK):
            values = column[at : at + _BLOCK].reshape(len(column[at : at + _BLOCK]), -1)
            finite = np.isfinite(values[:, field.start : field.start + field.size]).all(axis=1)
            bad += [at + int(i) for i in np.flatnonzero(~finite)]
        shown = [
            f"{self.index.where(step)}: {what} field {field.name!r} ({field.key}) is "
            f"{np.ravel(self.index.columns[field.key][step])[field.start : field.start + field.size].tolist()}, "
            "expected finite numbers"
            for step in bad[:_SHOWN]
        ]
        if len(bad) > _SHOWN:
            shown.append(f"... and {len(bad) - _SHOWN} more steps of {field.name!r}")
        return shown
