"""Scenes of nuScenes: their keyframes in order, each with its frame, pictures and annotated boxes."""

import collections
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float
from scipy.spatial.transform import Rotation

from openpi_like.config import near_names
from openpi_like.driving.nuscenes.frames import looks_ahead, matrix
from openpi_like.driving.nuscenes.tables import Row, Tables, raise_all
from openpi_like.robots.ego_vehicle import VIEWS

LIDAR = "LIDAR_TOP"
CHANNELS = {view: f"CAM_{view.upper()}" for view in VIEWS}
"""Camera of the ego vehicle -> channel of nuScenes, such as "front_left" -> "CAM_FRONT_LEFT"."""


@dataclasses.dataclass(frozen=True)
class Boxes:
    """Annotated boxes of a keyframe, in the frame of the world.

    categories: names such as "vehicle.car". centres, in metres. along: unit vectors of their lengths. lengths, widths,
    in metres.
    """

    categories: tuple[str, ...]
    centres: Float[np.ndarray, "N 3"]
    along: Float[np.ndarray, "N 3"]
    lengths: Float[np.ndarray, "N"]
    widths: Float[np.ndarray, "N"]


@dataclasses.dataclass(frozen=True)
class Sample:
    """A keyframe. timestamp: microseconds. frame: see `frames`. images: camera -> path below the root."""

    token: str
    timestamp: int
    frame: Float[np.ndarray, "4 4"]
    images: Mapping[str, str]
    boxes: Boxes


@dataclasses.dataclass(frozen=True)
class Scene:
    """Some 20 s of driving, a keyframe about every half a second. location: such as "singapore-onenorth"."""

    token: str
    name: str
    description: str
    location: str
    vehicle: str
    date: str
    samples: tuple[Sample, ...]


def read_scenes(tables: Tables, names: Sequence[str] | None = None) -> list[Scene]:
    """Returns scenes in the order of `names`, or all of them by name.

    Raises:
        NuScenesError: scenes that are not there; keyframes that do not follow on each other, or lack a camera or the
            lidar; a lidar that does not look ahead.
    """
    by_name = {row["name"]: row for row in tables["scene"].values()}
    chosen = sorted(by_name) if names is None else list(names)
    if unknown := [name for name in chosen if name not in by_name]:
        raise_all(
            f"{tables.root / tables.version}, of {len(by_name)} scenes",
            [f"no scene {name!r}, {_nearest(name, sorted(by_name))}" for name in unknown],
        )
    problems = list[str]()
    chains = {name: _chain(by_name[name], tables, problems) for name in chosen}
    wanted = {row["token"] for chain in chains.values() for row in chain}
    data = _data(tables, wanted, problems)
    annotations = _by_sample(tables, wanted)
    for name, chain in chains.items():
        for row in chain:
            if lost := [c for c in (LIDAR, *CHANNELS.values()) if c not in data[row["token"]]]:
                problems.append(f"{name}: sample {row['token']} has no keyframe of {', '.join(lost)} in sample_data")
    problems += _slanted(tables)
    raise_all(str(tables.root / tables.version), problems)
    return [
        _scene(by_name[name], tables, [_sample(row, tables, data[row["token"]], annotations) for row in chains[name]])
        for name in chosen
    ]


def check_images(root: Path, scenes: Sequence[Scene]) -> None:
    """Looks whether all pictures of scenes are there.

    Raises:
        NuScenesError: files that are missing or empty.
    """
    problems = list[str]()
    for scene in scenes:
        paths = [path for sample in scene.samples for path in sample.images.values()]
        lost = [p for p in paths if not (root / p).is_file() or not (root / p).stat().st_size]
        if lost:
            problems.append(f"{scene.name}: {len(lost)} of {len(paths)} are missing or empty, the first: {lost[0]}")
    raise_all(f"pictures in {root} (unpack all blobs of this version, or choose scenes)", problems)


def _nearest(name: str, known: list[str]) -> str:
    return near_names(name, known) if len(known) < 20 else near_names(name, known).partition("known: ")[0] or "not one"


def _chain(scene: Row, tables: Tables, problems: list[str]) -> list[Row]:
    """Returns the rows of a scene's samples from its first to where `next` ends."""
    samples, name = tables["sample"], scene["name"]
    chain, seen, token = list[Row](), set[str](), scene["first_sample_token"]
    while token and token not in seen:
        seen.add(token)
        chain.append(samples[token])
        token = samples[token]["next"]
    found = list[str]()
    if token:
        found.append(f"sample {chain[-1]['token']} leads back to {token}")
    if len(chain) != scene["nbr_samples"]:
        found.append(f"{len(chain)} samples from first_sample_token on, expected nbr_samples {scene['nbr_samples']}")
    if chain[-1]["token"] != scene["last_sample_token"]:
        found.append(f"it ends at sample {chain[-1]['token']}, expected last_sample_token {scene['last_sample_token']}")
    for before, row in zip([None, *chain], chain, strict=False):
        if row["scene_token"] != scene["token"]:
            found.append(f"sample {row['token']} says that it belongs to scene {row['scene_token']}")
        if row["prev"] != ("" if before is None else before["token"]):
            expected = "an empty text" if before is None else before["token"]
            found.append(f"sample {row['token']} has prev {row['prev'] or 'an empty text'}, expected {expected}")
        if before is not None and row["timestamp"] <= before["timestamp"]:
            found.append(
                f"sample {row['token']} has timestamp {row['timestamp']}, expected later than {before['timestamp']}, "
                "that of the one before"
            )
    problems += [f"{name}: {problem}" for problem in found]
    return chain


def _data(tables: Tables, wanted: set[str], problems: list[str]) -> Mapping[str, dict[str, Row]]:
    """Returns token of a sample -> channel -> row of sample_data."""
    channels = {
        token: tables["sensor"][row["sensor_token"]]["channel"] for token, row in tables["calibrated_sensor"].items()
    }
    used = {LIDAR, *CHANNELS.values()}
    data: Mapping[str, dict[str, Row]] = collections.defaultdict(dict)
    for row in tables["sample_data"].values():
        channel = channels[row["calibrated_sensor_token"]]
        if row["sample_token"] not in wanted or channel not in used:
            continue
        if channel in data[row["sample_token"]]:
            problems.append(f"sample {row['sample_token']} has two keyframes of {channel}, expected one")
        data[row["sample_token"]][channel] = row
    return data


def _by_sample(tables: Tables, wanted: set[str]) -> Mapping[str, list[Row]]:
    found: Mapping[str, list[Row]] = collections.defaultdict(list)
    for row in tables["sample_annotation"].values():
        if row["sample_token"] in wanted:
            found[row["sample_token"]].append(row)
    return found


def _slanted(tables: Tables) -> list[str]:
    problems = []
    for token, row in tables["calibrated_sensor"].items():
        if tables["sensor"][row["sensor_token"]]["channel"] != LIDAR:
            continue
        calibration = matrix(row["translation"], row["rotation"])
        if not looks_ahead(calibration):
            right, ahead = (np.round(calibration[:3, i], 2).tolist() for i in (0, 1))
            problems.append(
                f"calibrated_sensor {token}, {LIDAR}: its x and y point to {right} and {ahead} of the car (ahead, "
                "left, up), expected x to the right and y ahead, which plans are in"
            )
    return problems


def _sample(row: Row, tables: Tables, data: Mapping[str, Row], annotations: Mapping[str, list[Row]]) -> Sample:
    pose = tables["ego_pose"][data[LIDAR]["ego_pose_token"]]
    mounted = tables["calibrated_sensor"][data[LIDAR]["calibrated_sensor_token"]]
    return Sample(
        token=row["token"],
        timestamp=row["timestamp"],
        frame=matrix(pose["translation"], pose["rotation"]) @ matrix(mounted["translation"], mounted["rotation"]),
        images={view: data[channel]["filename"] for view, channel in CHANNELS.items()},
        boxes=_boxes(annotations.get(row["token"], []), tables),
    )


def _boxes(rows: list[Row], tables: Tables) -> Boxes:
    categories = (tables["instance"][row["instance_token"]]["category_token"] for row in rows)
    rotations = np.array([row["rotation"] for row in rows]).reshape(-1, 4)[:, [1, 2, 3, 0]]  # w first -> w last
    sizes = np.array([row["size"] for row in rows], np.float64).reshape(-1, 3)
    along = Rotation.from_quat(rotations).as_matrix()[:, :, 0] if rows else np.zeros((0, 3))
    return Boxes(
        categories=tuple(tables["category"][token]["name"] for token in categories),
        centres=np.array([row["translation"] for row in rows], np.float64).reshape(-1, 3),
        along=along,
        lengths=sizes[:, 1],
        widths=sizes[:, 0],
    )


def _scene(row: Row, tables: Tables, samples: list[Sample]) -> Scene:
    log = tables["log"][row["log_token"]]
    return Scene(
        token=row["token"],
        name=row["name"],
        description=row["description"],
        location=log["location"],
        vehicle=log["vehicle"],
        date=log["date_captured"],
        samples=tuple(samples),
    )
