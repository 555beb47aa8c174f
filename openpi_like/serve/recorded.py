"""Recorded episodes as RLDS: looked at, written with the keys that their robot reads, and read back. Needs `rlds`.

Looking comes first and tells everything at once. What makes an episode unfit is a problem: another robot, wrong sizes,
values that are not finite, another rate, too many missing frames, damage. What only has to be known is a note.
"""

import collections
import dataclasses
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from openpi_like.data.dataset import open_dataset
from openpi_like.data.images import decode
from openpi_like.data.prepare import Prepare
from openpi_like.data.rlds_writer import (
    VERSION,
    Episode,
    image_format,
    image_size,
    stored_actions,
    stored_cameras,
    write_rlds,
)
from openpi_like.data.selection import INTERVENED
from openpi_like.robots.robot import Camera, Robot
from openpi_like.serve.spool import Recording, RecordingError

_SHOWN = 5  # places named in one line
_LATE = 1.5  # an interval of so many control steps lacks a frame
_FROZEN_S = 1.0  # a picture that stays the same for so long is worth a note

PROPOSED = "proposed_action"
"""Key of an RLDS step: what the policy wanted (NaN where none was asked)."""
CHUNK = "proposed_chunk"
"""Key of an RLDS step: all that the policy answered, where a recording has that (NaN where it was not asked)."""


@dataclasses.dataclass(frozen=True)
class Limits:
    """Up to where an episode is fit. rate: relative difference of the median rate. missing: part of its frames."""

    rate: float = 0.05
    missing: float = 0.02


@dataclasses.dataclass(frozen=True)
class Looked:
    """What an episode is. state (T, Ds), action (T, J): as recorded. expert: steps at which an expert acted.

    chunks: how many steps have the whole answer of the policy.
    encodings: "png", "jpeg" or "jpeg and png", by camera of the robot, as they are kept.
    """

    recording: Recording
    state: np.ndarray
    action: np.ndarray
    expert: int
    chunks: int
    encodings: Mapping[str, str]
    rate_hz: float
    problems: tuple[str, ...]
    notes: tuple[str, ...]


def look(recording: Recording, robot: Robot, limits: Limits = Limits()) -> Looked:
    """Reads one recording whole and returns what it is, and everything that is wrong with it."""
    problems, notes = [], []
    if recording.head["robot"] != robot.name:
        problems.append(f"it is of robot {recording.head['robot']!r}, not of {robot.name!r}")
    if not recording.steps:
        problems.append("it has no steps")
    numbers: dict[str, list[Any]] = {"state": [], "action": [], "time_s": [], "intervened": []}
    sizes: dict[str, collections.Counter] = {}
    shown: dict[str, list[int]] = {}  # camera -> a hash of each picture
    found: dict[str, set] = {}  # camera -> encodings
    chunks = collections.Counter[tuple[int, ...]]()  # by shape
    try:
        for step in recording.read():
            for key, values in numbers.items():
                values.append(step[key])
            if "chunk" in step:
                chunks[step["chunk"].shape] += 1
            for camera, data in step["images"].items():
                sizes.setdefault(camera, collections.Counter())[image_size(data)] += 1
                shown.setdefault(camera, []).append(hash(data))
                found.setdefault(camera, set()).add(image_format(data))
    except ValueError as e:  # of the spool, or of an image that is none
        problems.append(str(e))
    state, action = (np.stack(numbers[k]) if numbers[k] else np.zeros((0, 0)) for k in ("state", "action"))
    wanted = {"state": (state, robot.robot_state_size), "action": (action, robot.robot_action_size)}
    for what, (x, size) in wanted.items():
        if len(x) and x.shape[1] != size:
            problems.append(f"its {what} has {x.shape[1]} values, robot {robot.name!r} has {size}")
        if len(bad := np.flatnonzero(~np.isfinite(x).all(axis=1))):
            problems.append(f"{what} is not finite at {_places(bad)}")
    problems += [
        f"{count} of its chunks have shape {shape}, those of robot {robot.name!r} {_chunk_shape(robot)}"
        for shape, count in chunks.items()
        if shape != _chunk_shape(robot)
    ]
    problems += _camera_problems(robot, sizes, recording.steps)
    if robot.entities:
        problems.append(f"robot {robot.name!r} learns of the things around it, which recordings do not have")
    if robot.plan is not None:
        problems.append(
            f"robot {robot.name!r} learns plans, and what was recorded is what was executed of them; make plans of "
            "what was driven, and write them with openpi_like.data.rlds_writer"
        )
    turned = {c.name: c.upside_down or c.channel_order == "bgr" for c in stored_cameras(robot)}
    encodings = {c: "png" if turned[c] else " and ".join(sorted(found[c])) for c in turned if c in found}
    notes += [f"camera {c!r} is not the robot's, and is not written" for c in sizes if c not in _names(robot)]
    for camera, hashes in shown.items():
        longest, at = _longest_run(hashes)
        if longest > _FROZEN_S * robot.control_hz * robot.stride:
            notes.append(f"camera {camera!r} shows the same picture for {longest} steps from step {at} on")
    times = np.array(numbers["time_s"], np.float64)
    if recording.of_requests:
        rate_hz = float(1 / np.median(np.diff(times))) if len(times) > 1 else float("nan")
        notes.append("its steps are requests to a server")
    else:
        rate_hz, said, unfit = _look_at_times(times, robot, limits)
        notes += said
        problems += unfit
    if recording.success is None:
        notes.append("nobody said whether it was a success")
    expert = sum(map(bool, numbers["intervened"]))
    return Looked(recording, state, action, expert, chunks.total(), encodings, rate_hz, tuple(problems), tuple(notes))


def _chunk_shape(robot: Robot) -> tuple[int, int]:
    return robot.action_horizon, robot.robot_action_size


def _names(robot: Robot) -> list[str]:
    return [c.name for c in robot.cameras]


def _camera_problems(robot: Robot, sizes: Mapping[str, collections.Counter], steps: int) -> list[str]:
    problems = []
    for camera in stored_cameras(robot):
        counts, expected = sizes.get(camera.name), (camera.height, camera.width)
        if counts is None:
            problems.append(f"camera {camera.name!r} was not recorded; there are {', '.join(sizes) or 'none'}")
            continue
        if counts.total() < steps:
            problems.append(f"camera {camera.name!r} has {counts.total()} images for {steps} steps")
        for (height, width), count in counts.items():
            if any(b not in (None, a) for a, b in zip((height, width), expected, strict=True)):
                problems.append(
                    f"camera {camera.name!r} is {height} x {width} at {count} steps, the robot's is "
                    f"{expected[0]} x {expected[1]}"
                )
    return problems


def _look_at_times(times: np.ndarray, robot: Robot, limits: Limits) -> tuple[float, list[str], list[str]]:
    """Returns the median rate in Hz, and notes and problems of the times of steps."""
    expected = robot.control_hz * robot.stride
    if len(times) < 2:
        return expected, [], []
    intervals, notes, problems = np.diff(times), list[str](), list[str]()
    if len(back := np.flatnonzero(intervals <= 0)):
        return float("nan"), [], [f"time stands still or goes back after {_places(back)}"]
    rate = float(1 / np.median(intervals))
    if abs(rate / expected - 1) > limits.rate:
        problems.append(f"its steps come at {rate:.1f} Hz, {_expected_rate(robot)} (--limits.rate {limits.rate:g})")
    if len(late := np.flatnonzero(intervals * rate > _LATE)):
        missing = int((np.round(intervals[late] * rate) - 1).sum())
        worst = 1e3 * float(intervals[late].max())
        said = f"{missing} frames are missing, the longest pause is {worst:.0f} ms; after {_places(late)}"
        if len(late) > 2 and not (np.diff(late) % robot.execute_steps).any():
            said += (
                f", always a multiple of {robot.execute_steps} steps apart: the robot may stand still while it waits "
                "for the next chunk; ask for it ahead of time"
            )
        if missing > limits.missing * len(times):
            problems.append(f"{said} (more than --limits.missing {limits.missing:g} of {len(times)})")
        else:
            notes.append(said)
    return rate, notes, problems


def _expected_rate(robot: Robot) -> str:
    if robot.stride == 1:
        return f"robot {robot.name!r} expects {robot.control_hz:g}"
    return (
        f"robot {robot.name!r} expects {robot.control_hz * robot.stride:g}, as it reads every {robot.stride}. step; "
        f"what is recorded at {robot.control_hz:g} Hz is of the same robot with stride 1, under a name of its own"
    )


def _places(steps: np.ndarray) -> str:
    more = f" and {len(steps) - _SHOWN} more" if len(steps) > _SHOWN else ""
    return f"{len(steps)} steps ({', '.join(map(str, steps[:_SHOWN]))}{more})"


def _longest_run(values: Sequence[int]) -> tuple[int, int]:
    """Returns length and start of the longest run of equal values."""
    changes = np.flatnonzero(np.diff(np.array(values, np.int64)))
    bounds = np.concatenate([[0], changes + 1, [len(values)]])
    longest = int(np.argmax(np.diff(bounds)))
    return int(np.diff(bounds)[longest]), int(bounds[longest])


# ---- What all episodes of a dataset have alike -----------------------------------------------------------------------


def metadata_kinds(looked: Sequence[Looked]) -> tuple[dict[str, type], list[str], list[str]]:
    """Returns the type of each metadata that users added, notes, and problems.

    One dataset has one type for each. Where a text is missing it is "" there; numbers that are of several types, or
    missing in some episodes, are floats, NaN where there is none.
    """
    kinds, notes, problems = dict[str, type](), list[str](), list[str]()
    for key in dict.fromkeys(k for x in looked for k in x.recording.head["metadata"]):
        episodes: dict[type, list[str]] = {}
        for x in looked:
            found = x.recording.head["metadata"]
            episodes.setdefault(type(found[key]) if key in found else type(None), []).append(x.recording.name)
        lacking = episodes.pop(type(None), [])
        if str in episodes and len(episodes) > 1:
            parts = ", ".join(f"{kind.__name__} in {_some(names)}" for kind, names in episodes.items())
            problems.append(f"metadata {key!r} is a text and a number: {parts}; leave one of them out")
            continue
        kinds[key] = next(iter(episodes)) if len(episodes) == 1 and (str in episodes or not lacking) else float
        if lacking:
            instead = "an empty text" if kinds[key] is str else "NaN"
            notes.append(f"metadata {key!r} is missing in {len(lacking)} episodes, and {instead} there")
    return kinds, notes, problems


def kind_problems(looked: Sequence[Looked]) -> list[str]:
    """Returns whether some episodes are of requests, and others of control steps."""
    by = {kind: [x.recording.name for x in looked if x.recording.of_requests is kind] for kind in (True, False)}
    if not (by[True] and by[False]):
        return []
    steps = f"the steps of {_some(by[True])} are requests to a server, those of {_some(by[False])} control steps"
    return [f"{steps}: they are not for one dataset, leave one kind out"]


def encoding_problems(looked: Sequence[Looked]) -> list[str]:
    """Returns which cameras would be stored as PNG and as JPEG."""
    problems = []
    for camera in dict.fromkeys(c for x in looked for c in x.encodings):
        episodes: dict[str, list[str]] = {}
        for x in looked:
            if camera in x.encodings:
                episodes.setdefault(x.encodings[camera], []).append(x.recording.name)
        if episodes.keys() not in ({"png"}, {"jpeg"}):
            parts = ", ".join(f"{how} in {_some(names)}" for how, names in episodes.items())
            problems.append(f"camera {camera!r}: {parts}; give --images jpeg, or leave one kind out")
    return problems


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{len(names)} episodes ({' '.join(names[:_SHOWN])}{more})"


# ---- Writing ---------------------------------------------------------------------------------------------------------


def to_episode(
    recording: Recording, robot: Robot, images: Prepare | None, kinds: Mapping[str, type], *, chunks: bool = False
) -> Episode:
    """Returns a recording as an episode of RLDS.

    kinds: of metadata that users added, see `metadata_kinds`. chunks: with the policy's whole answers.
    images: how to encode them; None keeps them as they were recorded, encoded or not compressed. A camera of the robot
    whose stored pictures have swapped channels, or are upside down, gets such ones (as PNG unless `images` says else).
    """
    steps = list(recording.read())
    cameras = stored_cameras(robot)
    size = robot.robot_action_size
    proposed = np.stack([s.get("proposed", np.full(size, np.nan, np.float32)) for s in steps])
    whole = {}
    if chunks:
        none = np.full(_chunk_shape(robot), np.nan, np.float32)
        whole[CHUNK] = np.stack([s.get("chunk", none) for s in steps])
    times = np.array([s["time_s"] for s in steps], np.float64)
    policy, own = recording.head["policy"], recording.head["metadata"]
    return Episode(
        images={c.name: [_stored(s["images"][c.name], c, images) for s in steps] for c in cameras},
        state=np.stack([s["state"] for s in steps]),
        action=np.stack([s["action"] for s in steps]),
        prompt=[s["prompt"] for s in steps],
        success=bool(recording.success),
        metadata={
            "file_path": recording.name,
            "success": {True: 1, False: 0, None: -1}[recording.success],
            "started": recording.head["started"],
            "policy": f"{policy['contract']}, step {policy['step']}" if policy else "",
            "notes": recording.notes,
            # None of these names, see RESERVED.
            **{k: kind(own.get(k, "" if kind is str else "nan")) for k, kind in kinds.items()},
        },
        steps={
            INTERVENED: np.array([s["intervened"] for s in steps], np.bool_),
            PROPOSED: proposed.astype(np.float32),
            **whole,
            "timestamp": (times - times[0]).astype(np.float32),
            "wall_time_ms": np.array([round(1e3 * s["wall_s"]) for s in steps], np.int64),  # more than a float holds
        },
    )


def _stored(data: bytes, camera: Camera, images: Prepare | None) -> bytes:
    height, width = image_size(data)
    turned = camera.upside_down or camera.channel_order == "bgr"
    if turned or len(data) > 3 * height * width:  # more than its pixels: not compressed
        image = decode(data, camera.channel_order)
        if camera.upside_down:
            image = cv2.rotate(image, cv2.ROTATE_180)
        data = cv2.imencode(".png", image[..., ::-1])[1].tobytes()
    return data if images is None else images.image(data)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a conversion will write: a version of a dataset, its splits, and which episodes the one before lacks.

    before: the newest version that is there, whose episodes are all in this one. new: names. unchanged: nothing is.
    """

    version: str
    splits: Mapping[str, tuple[str, ...]]
    before: str | None
    new: tuple[str, ...]

    @property
    def unchanged(self) -> bool:
        return not self.new


def plan(root: Path, name: str, robot: Robot, recordings: Sequence[Recording], val_fraction: float) -> Plan:
    """Returns what to write so that dataset `name` under `root` has these episodes.

    An episode stays in the split in which an earlier version has it; of the new ones, as many go to "val" as make it
    this fraction of all. A version is never changed: the next one holds its episodes and the new ones.

    Raises:
        RecordingError: the newest version has episodes that are not among these, or is of another robot.
    """
    versions = [p for p in (root / name).glob("*") if re.fullmatch(r"\d+\.\d+\.\d+", p.name)]
    there = {tuple(map(int, p.name.split("."))): p for p in versions}
    names = [r.name for r in recordings]
    splits: dict[str, list[str]] = {"train": [], "val": []}
    version, before = VERSION, None
    if there:
        (major, minor, _), directory = max(there.items())
        version, before = f"{major}.{minor + 1}.0", directory.name
        try:
            said = json.loads((directory / "metadata.json").read_text())
            splits |= {split: list(of) for split, of in said["recorded"].items()}
        except (OSError, ValueError, KeyError, AttributeError) as e:
            raise RecordingError(f"{directory} was not written from recordings ({e!r}); choose another --name") from e
        if said["robot"] != robot.name:
            raise RecordingError(
                f"{directory} is of robot {said['robot']!r}, not {robot.name!r}; choose another --name"
            )
        if lost := sorted({n for of in splits.values() for n in of} - set(names)):
            raise RecordingError(
                f"{directory} has {len(lost)} episodes that version {version} would not have, {lost[0]} first: they "
                "are not in the spool, or left out; put them back, or choose another --name and add that dataset as a "
                "further MixtureEntry"
            )
    known = {n for of in splits.values() for n in of}
    new = tuple(n for n in names if n not in known)
    for i, n in enumerate(new, len(known) + 1):
        splits["val" if len(splits["val"]) < int(val_fraction * i) else "train"].append(n)
    return Plan(version, {split: tuple(of) for split, of in splits.items() if of}, before, new)


def write(
    root: Path,
    name: str,
    robot: Robot,
    looked: Sequence[Looked],
    plan: Plan,
    *,
    images: Prepare | None = None,
    file_format: str = "tfrecord",
    on_episode: Callable[[], None] = lambda: None,
) -> Path:
    """Writes what is planned, reads all numbers back as the robot reads them, and returns the dataset's directory.

    Raises:
        RecordingError: what the robot reads is not what was recorded.
        ValueError: as `write_rlds`.
    """
    found, kinds = {x.recording.name: x for x in looked}, metadata_kinds(looked)[0]
    chunks, of_requests = any(x.chunks for x in looked), any(x.recording.of_requests for x in looked)
    what = "what it asked a server, a step for each request" if of_requests else "what it did"

    def episodes(split: str) -> Iterator[Episode]:
        return (to_episode(found[n].recording, robot, images, kinds, chunks=chunks) for n in plan.splits[split])

    directory = write_rlds(
        root,
        name,
        robot,
        {split: episodes(split) for split in plan.splits},
        description=f"{len(found)} recorded episodes of robot {robot.name}: {what}.",
        metadata={
            "robot": robot.name,
            "recorded": {split: list(of) for split, of in plan.splits.items()},
            "of_requests": of_requests,
        },
        version=plan.version,
        file_format=file_format,
        on_episode=on_episode,
    )
    for split, names in plan.splits.items():
        _read_back(directory, split, robot, [found[n] for n in names])
    return directory


def _read_back(directory: Path, split: str, robot: Robot, looked: Sequence[Looked]) -> None:
    """Compares states, and commands that are stored as such, bit for bit."""
    stored = {f.name for f in stored_actions(robot) if f.gripper is None or f.gripper.convention == "absolute"}
    own = np.concatenate([np.full(f.size, f.name in stored) for f in robot.action])
    every = dataclasses.replace(robot, stride=1, action_horizon=1, execute_steps=1)
    dataset = open_dataset(directory, every, split)
    try:
        frames = np.arange(len(dataset))
        steps = dataset.steps(frames)
        state, action = (np.concatenate([getattr(x, what) for x in looked])[steps] for what in ("state", "action"))
        same_state = np.array_equal(dataset.state(frames), state.astype(np.float32))
        same_action = np.array_equal(dataset.actions(frames)[0][:, 0, own], action[:, own].astype(np.float32))
    finally:
        dataset.close()
    if not (same_state and same_action):
        raise RecordingError(
            f"{directory}: robot {robot.name!r} reads other numbers than were recorded; keep the spool, and do not "
            "train on this version: fields of the robot may lie over each other"
        )
