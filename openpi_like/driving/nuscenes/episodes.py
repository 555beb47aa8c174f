"""A scene of nuScenes as an episode of the ego vehicle: pictures, 17 numbers of state, a plan and a command at 2 Hz.

As published, and where (see the package for the sources):
- plan, history: where the lidar is at the next six and at the last four keyframes, in its frame of now; the keyframes
  are taken to be half a second apart (VAD, UniAD; VAD has two of the past, OpenDriveVLA four).
  `plan_known` says how many of the six are before the scene ends.
- command: the side offset of the last known waypoint: 2 m or more to the right, or to the left, else straight (VAD,
  UniAD). It is read off the future, which every number that is reported with it owes to it.
- velocity, yaw rate: by the difference to the keyframe before (VAD); acceleration: of the last two displacements
  (OpenDriveVLA).
- speed, steering: of the CAN bus, the message nearest in time (VAD). Felt, too: VAD takes the first message behind the
  keyframe for it.
- beginning "extrapolate": where the past is not there, the car is taken to have come with its first displacement (VAD).

Ours: velocities are divided by the time that passed, not by half a second, and are in the frame of now (VAD's two
numbers turn a speed by the heading in the world). Felt is turned to right and ahead (VAD hands on ahead and left). The
sign of steering is the same in all cities (VAD turns it in Singapore). The wheels' angle is that of the steering wheel
by `steering_ratio` (R: the official documents give none). Steps without four places of history are left out.

Nothing is clipped.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float, Float32, Int

from openpi_like.data.rlds_writer import Episode, image_format, image_size
from openpi_like.driving.nuscenes.can_bus import CanBus, Signal, read_can_bus
from openpi_like.driving.nuscenes.frames import headings, seen_from
from openpi_like.driving.nuscenes.scenes import Scene
from openpi_like.driving.nuscenes.tables import raise_all
from openpi_like.robots.ego_vehicle import EGO_VEHICLE, HISTORY, VIEWS

HORIZON = EGO_VEHICLE.action_horizon
ASIDE_M = 2.0  # that far to a side at the end of a plan is a turn
WHEELBASE_M = 2.588  # of the Renault Zoe (VAD)
SLOWEST = 1.0  # m/s; below that a path does not tell how the wheels stand


@dataclasses.dataclass(frozen=True)
class Options:
    """beginning: "leave_out" steps without a whole history, or "extrapolate" the way there backwards.

    steering_ratio: rad of the steering wheel for a rad of the front wheels (R).
    """

    beginning: str = "leave_out"
    steering_ratio: float = 16.6

    def __post_init__(self) -> None:
        problems = []
        if self.beginning not in ("leave_out", "extrapolate"):
            problems.append(f"beginning {self.beginning!r}, expected 'leave_out' or 'extrapolate'")
        if not 1 <= self.steering_ratio < float("inf"):
            problems.append(f"steering_ratio {self.steering_ratio}, expected 1 or more")
        if problems:
            raise ValueError("nuScenes options: " + "; ".join(problems))


def steps_of(scene: Scene, options: Options) -> range:
    """Returns which keyframes of a scene become steps; none where it is too short for a history."""
    if options.beginning == "leave_out":
        return range(min(HISTORY, len(scene.samples)), len(scene.samples))
    return range(len(scene.samples) if len(scene.samples) > 1 else 0)


def to_episode(root: Path, scene: Scene, options: Options | None = None) -> Episode:
    """Reads pictures and CAN bus of a scene and returns it as an episode of `EGO_VEHICLE`.

    `steps` has "plan_known", "history_known" (how many of the four places are recorded), "timestamp" (microseconds),
    "sample_token", and "can_bus" (whether felt and speed were measured). Entries of a plan that are not known repeat
    the last that is.

    Raises:
        NuScenesError: no keyframe has a history; pictures that are missing or no JPEG; a damaged CAN bus file.
    """
    options = options or Options()
    kept = steps_of(scene, options)
    if not kept:
        fewest = HISTORY + 1 if options.beginning == "leave_out" else 2
        raise_all(scene.name, [f"{len(scene.samples)} keyframes, expected {fewest} at least; leave the scene out"])
    can_bus = read_can_bus(root, scene.name)
    state, measured = ego_states(scene, can_bus, options)
    plans, known = zip(*(future(scene, i) for i in kept), strict=True)
    times = np.array([sample.timestamp for sample in scene.samples], np.int64)
    return Episode(
        images=_images(root, scene, kept),
        state=state,
        action=np.stack(plans).astype(np.float32),
        prompt=[command(plan[:n]) for plan, n in zip(plans, known, strict=True)],
        success=True,  # a person drove
        metadata={
            "scene_token": scene.token,
            "scene": scene.name,
            "description": scene.description,
            "location": scene.location,
            "vehicle": scene.vehicle,
            "date": scene.date,
            "can_bus": can_bus.files,
            "state_from": _state_from(measured),
            "left_out_steps": len(scene.samples) - len(kept),
            "longest_interval_s": float(np.diff(times).max() / 1e6),
        },
        steps={
            "plan_known": np.array(known, np.int64),
            "history_known": np.minimum(np.array(kept, np.int64), HISTORY),
            "timestamp": times[kept.start :],
            "sample_token": np.array([scene.samples[i].token for i in kept]),
            "can_bus": measured,
        },
    )


def future(scene: Scene, index: int) -> tuple[Float[np.ndarray, "A 2"], int]:
    """Returns the plan of a keyframe, (right, ahead) in metres in its frame, and how many waypoints are known."""
    here, later = scene.samples[index], scene.samples[index + 1 : index + 1 + HORIZON]
    plan = np.zeros((HORIZON, 2))
    if later:
        plan[: len(later)] = seen_from(here.frame, np.stack([sample.frame[:3, 3] for sample in later]))
        plan[len(later) :] = plan[len(later) - 1]
    return plan, len(later)


def command(plan_n2: Float[np.ndarray, "n 2"]) -> str:
    """Returns what a navigator would say, by the last of the waypoints that are known."""
    aside = plan_n2[-1, 0] if len(plan_n2) else 0.0
    return "turn right" if aside >= ASIDE_M else "turn left" if aside <= -ASIDE_M else "go straight"


def ego_states(
    scene: Scene, can_bus: CanBus, options: Options
) -> tuple[Float32[np.ndarray, "T 17"], Bool[np.ndarray, "T"]]:
    """Returns the state of each step, as `EGO_VEHICLE` has it, and whether felt and speed were measured.

    What the CAN bus does not tell is taken from poses: felt is the change of velocity, speed that ahead, and the wheels
    stand as the curve demands, straight below `SLOWEST`.
    """
    kept = steps_of(scene, options)
    frames = np.stack([sample.frame for sample in scene.samples])
    times = np.array([sample.timestamp for sample in scene.samples], np.int64)
    places, looks, seconds = frames[:, :3, 3], headings(frames), (times - times[0]) / 1e6
    if options.beginning == "extrapolate":
        places, looks, seconds = (_extrapolated(x) for x in (places, looks, seconds))
    states = []
    for end, i in enumerate(kept, HISTORY):
        history = seen_from(frames[i], places[end - HISTORY : end])
        before, last = np.diff(seconds[end - 2 : end + 1])
        velocity, earlier = -history[-1] / last, (history[-1] - history[-2]) / before
        turning = (looks[end] - looks[end - 1]) / last
        change = (velocity - earlier) / ((last + before) / 2)
        wheels = np.arctan(WHEELBASE_M * turning / velocity[1]) if velocity[1] >= SLOWEST else 0.0
        states.append(np.hstack([velocity, turning, change, change, velocity[1], wheels, history.ravel()]))
    state, at = np.stack(states), times[kept.start :]
    measured = _measure(state[:, 5:7], can_bus.felt, at)
    _measure(state[:, 7:8], can_bus.speed, at)
    _measure(state[:, 8:9], can_bus.wheel, at, 1 / options.steering_ratio)
    return state.astype(np.float32), measured


def _measure(
    column_TK: np.ndarray, signal: Signal | None, at_T: Int[np.ndarray, "T"], factor: float = 1.0
) -> Bool[np.ndarray, "T"]:
    """Puts what was measured into columns of the state, in place, and returns at which steps it was."""
    if signal is None:
        return np.zeros(len(at_T), bool)
    values, near = signal.at(at_T)
    column_TK[near] = factor * values[near]
    return near


def _extrapolated(x_TN: np.ndarray) -> np.ndarray:
    """Puts as many rows before the first as a history has, which go on backwards as the first two do."""
    back = np.arange(HISTORY, 0, -1).reshape(-1, *[1] * (x_TN.ndim - 1))
    return np.concatenate([x_TN[0] - back * (x_TN[1] - x_TN[0]), x_TN])


def _state_from(measured: Bool[np.ndarray, "T"]) -> str:
    if measured.all():
        return "poses and CAN bus"
    return f"poses and CAN bus, {int((~measured).sum())} steps poses alone" if measured.any() else "poses"


def _images(root: Path, scene: Scene, kept: Sequence[int]) -> dict[str, list[bytes]]:
    images, problems = dict[str, list[bytes]](), list[str]()
    for view in VIEWS:
        images[view] = []
        for i in kept:
            path = scene.samples[i].images[view]
            try:
                data = (root / path).read_bytes()
                if image_format(data) != "jpeg":
                    raise ValueError(f"no JPEG, {len(data)} bytes that begin with {data[:8]!r}")
                image_size(data)
            except (OSError, ValueError) as e:
                problems.append(f"{path}: {e.strerror if isinstance(e, OSError) else e}")
                continue
            images[view].append(data)
    raise_all(f"pictures of {scene.name} in {root} (unpack the blobs again)", problems)
    return images
