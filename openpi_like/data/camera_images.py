"""What a camera of a robot shows at RLDS steps: whether it is there, its image, and which of its images are damaged."""

from collections.abc import Sequence

import cv2
import numpy as np

from openpi_like.data.images import Target
from openpi_like.data.index import FrameIndex
from openpi_like.data.schema import DatasetError
from openpi_like.robots.robot import Camera, Robot

_SHOWN = 5  # places named in one message


def is_present(index: FrameIndex, camera: Camera, episode: np.ndarray, step: np.ndarray) -> np.ndarray:
    """Returns whether a camera shows an image at steps (n,) of episodes (n,), see `Camera`."""
    at, start = step - camera.steps_back, index.episode_start[episode]
    present = at >= start
    if camera.min_bytes:
        present &= index.images[camera.key][np.maximum(at, start), 1] >= camera.min_bytes
    return present


def image_steps(index: FrameIndex, camera: Camera, episode: np.ndarray, step: np.ndarray) -> np.ndarray:
    """Returns the steps whose images a camera shows at steps (n,) of episodes (n,).

    Raises:
        DatasetError: an episode had not begun then.
    """
    at = step - camera.steps_back
    if (before := at < index.episode_start[episode]).any():
        raise DatasetError(
            f"{index.where(int(step[before][0]))}: camera {camera.name!r} shows {camera.steps_back} steps "
            "before, when the episode had not begun; ask `present` first"
        )
    return at


def read_image(index: FrameIndex, robot: Robot, step: int, camera: Camera, target: Target | None = None) -> np.ndarray:
    """Reads and decodes the image that is stored at a step, (H, W, 3) uint8, RGB and the right way up.

    target: see `decode_for`.

    Raises:
        DatasetError: it cannot be read, or does not have the size that the camera has.
    """
    try:
        image, got = index.read_for(step, camera.key, camera.channel_order, target)
    except DatasetError:
        raise
    except ValueError as e:
        raise DatasetError(
            f"{index.where(step)}: cannot decode {camera.key}: {e} (camera {camera.name!r}); data/index.py "
            "--decode finds all such images, and with max_corrupt_fraction they are then left out"
        ) from e
    if camera.upside_down:
        image = cv2.rotate(image, cv2.ROTATE_180)
    expected = camera.height, camera.width
    if any(b is not None and a != b for a, b in zip(got, expected, strict=True)):
        raise DatasetError(
            f"{index.where(step)}: {camera.key} is {got[0]} x {got[1]} pixels, camera {camera.name!r} of "
            f"robot {robot.name!r} expects {expected[0]} x {expected[1]}; "
            "correct the camera's height and width"
        )
    return image


def damaged_steps(index: FrameIndex, part: range, camera: Camera) -> np.ndarray:
    """Returns the steps of the part whose image, as a camera of the robot has it, is damaged; ascending."""
    steps = index.damaged.get(camera.key, np.zeros(0, np.int64))
    steps = steps[np.searchsorted(steps, part.start) : np.searchsorted(steps, part.stop)]
    return steps[index.images[camera.key][steps, 1] >= camera.min_bytes]


def blind_steps(index: FrameIndex, part: range, cameras: Sequence[Camera]) -> np.ndarray:
    """Returns the steps of the part at which some camera shows a damaged image, ascending; see `is_present`."""
    ends, found = index.episode_start[1:], [np.zeros(0, np.int64)]
    for camera in cameras:
        if camera.key in index.images:
            steps = damaged_steps(index, part, camera)
            end = ends[np.searchsorted(ends, steps, side="right")]
            found.append((steps + camera.steps_back)[steps + camera.steps_back < end])
    return np.unique(np.concatenate(found))


def describe_damage(index: FrameIndex, part: range, cameras: Sequence[Camera]) -> list[str]:
    """Returns where the first damaged images of each camera lie."""
    shown = []
    for camera in cameras:
        steps = damaged_steps(index, part, camera) if camera.key in index.images else np.zeros(0, np.int64)
        shown += [f"{index.where(int(step))}: {camera.key}" for step in steps[:_SHOWN]]
        if len(steps) > _SHOWN:
            shown.append(f"... and {len(steps) - _SHOWN} more images of {camera.key}")
    return shown
