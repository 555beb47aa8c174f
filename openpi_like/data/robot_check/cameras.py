"""What does the policy see: is each camera there, bright, alive, and itself?"""

import dataclasses
import itertools

import numpy as np
from jaxtyping import UInt8

from openpi_like.data import traps
from openpi_like.data.camera_images import image_steps, is_present, read_image
from openpi_like.data.images import fit
from openpi_like.data.robot_check.findings import Finding, Picture
from openpi_like.data.robot_check.robot_sample import RobotSample
from openpi_like.robots.robot import Camera

_EPISODES = 4  # shown, and of each as many frames:
_FRAMES = 3
_SAMPLED = 24  # images that brightness is measured on
_ABSENT = 0.5  # of the steps
_DARK, _BRIGHT = 20, 235  # mean of 255, of pictures with
_SHALLOW = 12.0  # a standard deviation below this: a night or an overexposed wall; drawn worlds on white have more
_FLAT = 3.0  # standard deviation of 255: a cap, or a camera that delivers one colour
_FROZEN = 0.5  # of the steps in which the robot moves: cameras at 30 Hz, stored at 50, repeat 0.4 of their frames
_MOVES = 0.01  # of the range of a state: a smaller movement may not change a picture
_PAIRS = 32  # of images that are compared
_ALIKE = 2  # of 255 levels, everywhere: a video codec may change a frozen picture by so much


@dataclasses.dataclass(frozen=True)
class Cameras:
    """See the module."""

    name: str = "Cameras"
    question: str = "What does the policy see? Are cameras absent, black, frozen, or the same?"

    def findings(self, sample: RobotSample) -> list[Finding]:
        """See `Check.findings`."""
        found, seen = [], {}
        for camera in sample.robot.cameras:
            steps = _present(sample, camera)
            if len(steps):
                chosen = steps[np.unique(np.linspace(0, len(steps) - 1, _SAMPLED).round().astype(int))]
                at = _shown_at(sample, camera, chosen)
                images = [read_image(sample.index, sample.robot, int(s), camera) for s in at]
                seen[camera.name] = dict(zip(chosen.tolist(), images, strict=True))
                found += [_view(sample, camera), *_light(sample, camera, at, images)]
                if any(image.max() > traps.BLACK for image in images):
                    found += _frozen(sample, camera)
            found += _absent(sample, camera, len(steps))
        return found + _same(seen)


def _episodes_of(sample: RobotSample, steps: np.ndarray) -> np.ndarray:
    return np.searchsorted(np.asarray(sample.index.episode_start), steps, side="right") - 1


def _present(sample: RobotSample, camera: Camera) -> np.ndarray:
    """The steps of the sample at which a camera shows an image that is not known to be damaged."""
    steps = sample.sample.steps
    steps = steps[is_present(sample.index, camera, _episodes_of(sample, steps), steps)]
    damaged = sample.index.damaged.get(camera.key)
    return steps if damaged is None else steps[~np.isin(steps - camera.steps_back, damaged)]


def _shown_at(sample: RobotSample, camera: Camera, steps: np.ndarray) -> np.ndarray:
    return image_steps(sample.index, camera, _episodes_of(sample, steps), steps)


def _absent(sample: RobotSample, camera: Camera, present: int) -> list[Finding]:
    share = 1 - present / len(sample.sample.steps)
    if not share:
        return []
    advice = "leave it out, or look at its key and min_bytes"
    level = "suspect" if share > _ABSENT else "found"
    return [Finding(level, camera.name, f"absent in {share:.0%} of the steps", advice)]


def _view(sample: RobotSample, camera: Camera) -> Finding:
    """Pictures as the policy sees them, of several episodes from beginning to end."""
    height, width = sample.image_size
    present, pictures, sizes = set(_present(sample, camera).tolist()), [], set()
    episodes = np.unique(np.linspace(0, len(sample.lengths) - 1, _EPISODES).round().astype(int))
    for e in episodes.tolist():
        steps = [s for s in sample.sample.steps[sample.episode(e)].tolist() if s in present]
        for i in np.unique(np.linspace(0, len(steps) - 1, min(_FRAMES, len(steps))).round().astype(int)):
            at = int(_shown_at(sample, camera, np.array([steps[i]]))[0])
            image = read_image(sample.index, sample.robot, at, camera)
            sizes.add(f"{image.shape[0]} x {image.shape[1]}")
            out = np.zeros((height, width, 3), np.uint8)
            fit(image, out, fit=camera.fit)
            step = steps[i] - int(sample.sample.steps[sample.starts[e]])
            pictures.append(Picture(f"{camera.name}, episode {e + 1}, step {step}", out))
    message = f"{camera.key}, {', '.join(sorted(sizes))} pixels, seen at {height} x {width} by fit={camera.fit!r}"
    return Finding("found", camera.name, message, "", (), tuple(pictures))


def _light(
    sample: RobotSample, camera: Camera, at: np.ndarray, images: list[UInt8[np.ndarray, "_ _ 3"]]
) -> list[Finding]:
    sizes = np.asarray(sample.index.images[camera.key][:, 1])
    found = Finding.of_trap(traps.black_camera(camera.key, images, sizes, at), camera.name)
    means, deviations = [float(i.mean()) for i in images], [float(i.std()) for i in images]
    mean, deviation = float(np.median(means)), float(np.median(deviations))
    found.append(
        Finding("found", camera.name, f"mean brightness {mean:.0f} of 255 ({min(means):.0f} to {max(means):.0f})")
    )
    if found[0].level == "found" and (mean < _DARK or mean > _BRIGHT) and deviation < _SHALLOW:
        what = "dark" if mean < _DARK else "bright"
        advice = "look at exposure; a policy that learned from such pictures sees little"
        found.append(Finding("suspect", camera.name, f"too {what}: mean brightness {mean:.0f} of 255", advice))
    elif found[0].level == "found" and deviation < _FLAT:
        message = f"it shows one colour: standard deviation {deviation:.1f} of 255"
        found.append(Finding("suspect", camera.name, message, "is it covered? leave it out"))
    advice = 'look at the pictures: if skin and wood are blue, leave out channel_order="bgr" of this camera'
    swapped = traps.swapped_channels(camera.key, images)
    return found + Finding.of_trap(swapped, camera.name, advice if camera.channel_order == "bgr" else "")


def _frozen(sample: RobotSample, camera: Camera) -> list[Finding]:
    """Images that are those of the step before, although the robot has moved."""
    t, steps = sample.rows_with(0, 1), sample.sample.steps
    moves = np.zeros(len(t), bool)
    for x in sample.states.values():
        span = np.ptp(np.quantile(x, [0.01, 0.99], axis=0), axis=0)
        moves |= ((np.abs(x[t + 1] - x[t]) > _MOVES * span) & (span > 0)).any(axis=1)
    t = t[moves] if sample.states else t
    t = t[np.isin(steps[t], present := _present(sample, camera)) & np.isin(steps[t + 1], present)]
    if not len(t):
        return []
    repeated = []
    for i in t[np.unique(np.linspace(0, len(t) - 1, _PAIRS).round().astype(int))]:
        before, after = (
            read_image(sample.index, sample.robot, int(s), camera).astype(np.int16)
            for s in _shown_at(sample, camera, steps[i : i + 2])
        )
        repeated.append(before.shape == after.shape and int(np.abs(before - after).max()) <= _ALIKE)
    message = f"{np.mean(repeated):.0%} of {len(repeated)} frames repeat the one before although the robot moves"
    if np.mean(repeated) > _FROZEN:
        return [Finding("suspect", camera.name, message, "it froze, or is far slower than the data: leave it out")]
    return [Finding("found", camera.name, message)]


def _same(seen: dict[str, dict[int, UInt8[np.ndarray, "_ _ 3"]]]) -> list[Finding]:
    """Cameras with the same pictures at the same steps."""
    found = []
    for (a, of_a), (b, of_b) in itertools.combinations(seen.items(), 2):
        both = of_a.keys() & of_b.keys()
        if both and all(np.array_equal(of_a[s], of_b[s]) for s in both):
            found.append(Finding("suspect", b, f"shows the same pictures as {a}", "look at the keys of both cameras"))
    return found
