"""A copy of nuScenes that is made up: all 13 tables with all their fields, pictures, CAN bus; along known curves.

Fields and kinds are those of docs/schema_nuscenes.md and python-sdk/nuscenes/can_bus/README.md of nuscenes-devkit.
Everything is a function of the time, so that tests compare with the curves themselves.
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg

HALF_US = 500_000
LIDAR_AHEAD, LIDAR_UP = 0.9437, 1.8402  # of the ego pose's origin, as on nuScenes' cars
CAMERAS = ("CAM_FRONT", "CAM_FRONT_LEFT", "CAM_FRONT_RIGHT", "CAM_BACK", "CAM_BACK_LEFT", "CAM_BACK_RIGHT")
SIZE = (9, 16)  # height and width of the pictures; theirs are 900 x 1600
CATEGORIES = (
    "vehicle.car", "vehicle.bus.rigid", "vehicle.emergency.police", "human.pedestrian.adult", "movable_object.barrier",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Curve:
    """An arc from a place, at a speed that may change: radius in metres, positive to the left; 0 is straight."""

    x: float
    y: float
    heading: float
    speed: float
    acceleration: float = 0.0
    radius: float = 0.0

    def at(self, t: float) -> tuple[float, float, float]:
        """Returns x, y and heading after t seconds, of the ego pose's origin in the world."""
        s = self.speed * t + self.acceleration * t * t / 2
        if not self.radius:
            return self.x + s * math.cos(self.heading), self.y + s * math.sin(self.heading), self.heading
        r, h, turned = self.radius, self.heading, s / self.radius
        return (
            self.x + r * (math.sin(h + turned) - math.sin(h)),
            self.y - r * (math.cos(h + turned) - math.cos(h)),
            h + turned,
        )

    def lidar(self, t: float) -> tuple[float, float, float]:
        """As `at`, of the lidar."""
        x, y, h = self.at(t)
        return x + LIDAR_AHEAD * math.cos(h), y + LIDAR_AHEAD * math.sin(h), h


@dataclasses.dataclass(frozen=True)
class Agent:
    """A box (width, length, height) whose middle moves along a curve, in keyframes first to last, the last included."""

    category: str
    size: tuple[float, float, float]
    curve: Curve
    first: int = 0
    last: int = 10**6


@dataclasses.dataclass(frozen=True)
class Drive:
    """A scene to write. can_bus: whether it has these files."""

    name: str
    curve: Curve
    keyframes: int
    agents: tuple[Agent, ...] = ()
    can_bus: bool = True
    start_us: int = 1_532_402_927_612_460
    location: str = "singapore-onenorth"


LEFT = Drive(
    "scene-0061",
    Curve(400.0, 1100.0, 2.9, 8.0, radius=25.0),  # the heading passes pi
    13,
    agents=(
        Agent("vehicle.car", (1.9, 4.6, 1.7), Curve(385.0, 1116.0, 0.4, 0.0)),
        Agent("vehicle.bus.rigid", (2.9, 11.0, 3.4), Curve(370.0, 1095.0, 1.2, 5.0, radius=-40.0), last=8),
        Agent("human.pedestrian.adult", (0.6, 0.7, 1.8), Curve(392.0, 1099.0, 2.0, 1.3)),
        Agent("vehicle.emergency.police", (2.0, 5.0, 1.7), Curve(380.0, 1120.0, -1.0, 0.0), first=3),
        Agent("movable_object.barrier", (2.0, 0.5, 1.0), Curve(390.0, 1105.0, 0.1, 0.0)),
    ),
)
STRAIGHT = Drive(
    "scene-0103",
    Curve(-50.0, 20.0, -0.7, 38.0, acceleration=0.8),  # faster than any limit of a city
    9,
    can_bus=False,
    start_us=1_533_151_603_512_404,
    location="boston-seaport",
)


def token(*of: Any) -> str:
    """Returns 32 hex digits, as tokens are."""
    return hashlib.md5("/".join(map(str, of)).encode()).hexdigest()


def write_copy(root: Path, drives: tuple[Drive, ...] = (LEFT, STRAIGHT), version: str = "v1.0-mini") -> Path:
    """Writes a copy and returns its root."""
    tables: dict[str, list[dict[str, Any]]] = {name: [] for name in TABLES}
    tables["attribute"].append({"token": token("moving"), "name": "vehicle.moving", "description": "It moves."})
    tables["visibility"].append({"token": "4", "level": "v80-100", "description": "visibility 80 to 100 %"})
    for i, name in enumerate(CATEGORIES):
        tables["category"].append({"token": token(name), "name": name, "description": name, "index": i})
    for channel in ("LIDAR_TOP", "RADAR_FRONT", *CAMERAS):
        kind = {"L": "lidar", "R": "radar", "C": "camera"}[channel[0]]
        tables["sensor"].append({"token": token(channel), "channel": channel, "modality": kind})
    for drive in drives:
        _write_drive(root, drive, tables)
    logs = [row["token"] for row in tables["log"]]
    tables["map"].append(
        {"token": token("map"), "log_tokens": logs, "category": "semantic_prior", "filename": "maps/map.png"}
    )
    (root / version).mkdir(parents=True)
    for name, rows in tables.items():
        (root / version / f"{name}.json").write_text(json.dumps(rows, indent=0))
    return root


TABLES = (
    "attribute", "calibrated_sensor", "category", "ego_pose", "instance", "log", "map", "sample", "sample_annotation",
    "sample_data", "scene", "sensor", "visibility",
)  # fmt: skip


def change(root: Path, table: str, how: Callable[[list[Any]], Any], version: str = "v1.0-mini") -> None:
    """Changes the rows of a table, in place, or to what `how` returns."""
    path = root / version / f"{table}.json"
    rows = json.loads(path.read_text())
    changed = how(rows)
    path.write_text(json.dumps(rows if changed is None else changed))


def about_z(angle: float) -> list[float]:
    """Returns a turn to the left as a quaternion w, x, y, z."""
    return [math.cos(angle / 2), 0.0, 0.0, math.sin(angle / 2)]


def _write_drive(root: Path, drive: Drive, tables: dict[str, list[dict[str, Any]]]) -> None:
    name, n = drive.name, drive.keyframes
    samples = [token(name, "sample", k) for k in range(n)]
    log = token(name, "log")
    tables["log"].append(
        {
            "token": log, "logfile": f"n015-{name}", "vehicle": "n015", "date_captured": "2018-07-24",
            "location": drive.location,
        }
    )  # fmt: skip
    tables["scene"].append(
        {
            "token": token(name), "name": name, "description": f"Parked cars, {name}", "log_token": log,
            "nbr_samples": n, "first_sample_token": samples[0], "last_sample_token": samples[-1],
        }
    )  # fmt: skip
    for k, sample in enumerate(samples):
        tables["sample"].append(
            {
                "token": sample, "timestamp": drive.start_us + k * HALF_US, "scene_token": token(name),
                **_neighbours(samples, k),
            }
        )  # fmt: skip
    for channel in ("LIDAR_TOP", "RADAR_FRONT", *CAMERAS):
        _write_sensor(root, drive, channel, samples, tables)
    for agent in drive.agents:
        _write_agent(drive, agent, samples, tables)
    if drive.can_bus:
        _write_can_bus(root, drive)


def _neighbours(tokens: list[str], k: int) -> dict[str, str]:
    return {"next": tokens[k + 1] if k + 1 < len(tokens) else "", "prev": tokens[k - 1] if k else ""}


def _write_sensor(root: Path, drive: Drive, channel: str, samples: list[str], tables: dict[str, list[Any]]) -> None:
    """A keyframe of every sample, and a sweep between them."""
    camera, lidar = channel.startswith("CAM"), channel == "LIDAR_TOP"
    mounted = token(drive.name, channel, "calibration")
    tables["calibrated_sensor"].append(
        {
            "token": mounted, "sensor_token": token(channel),
            "translation": [LIDAR_AHEAD, 0.0, LIDAR_UP] if lidar else [1.7, 0.1, 1.5],
            "rotation": about_z(-math.pi / 2) if lidar else about_z(0.3),
            "camera_intrinsic": [[1266.4, 0.0, 816.3], [0.0, 1266.4, 491.5], [0.0, 0.0, 1.0]] if camera else [],
        }
    )  # fmt: skip
    frames = 2 * len(samples) - 1
    tokens = [token(drive.name, channel, j) for j in range(frames)]
    folder, suffix = ("samples", "jpg") if camera else ("samples", "pcd.bin")
    late = 20_000 if camera else 0  # cameras are exposed a little later than the lidar turns
    for j, own in enumerate(tokens):
        t = j / 4
        x, y, heading = drive.curve.at(t + late / 1e6)
        pose = token(own, "pose")
        stamp = drive.start_us + j * HALF_US // 2 + late
        where = folder if j % 2 == 0 else "sweeps"
        path = f"{where}/{channel}/n015-{drive.name}__{channel}__{stamp}.{suffix}"
        tables["ego_pose"].append(
            {"token": pose, "translation": [x, y, 0.0], "rotation": about_z(heading), "timestamp": stamp}
        )
        tables["sample_data"].append(
            {
                "token": own, "sample_token": samples[(j + 1) // 2], "ego_pose_token": pose,
                "calibrated_sensor_token": mounted, "filename": path, "fileformat": "jpg" if camera else "pcd",
                "width": SIZE[1] if camera else 0, "height": SIZE[0] if camera else 0, "timestamp": stamp,
                "is_key_frame": j % 2 == 0, **_neighbours(tokens, j),
            }
        )  # fmt: skip
        if camera and where == "samples":
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_bytes(picture(drive.name, channel, j // 2))


def picture(scene: str, channel: str, k: int) -> bytes:
    """Returns the picture of a keyframe, which no other has."""
    rng = np.random.default_rng(int(token(scene, channel, k)[:8], 16))
    pixels = np.broadcast_to(rng.integers(0, 256, 3, np.uint8), (*SIZE, 3))
    return simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), quality=90)


def _write_agent(drive: Drive, agent: Agent, samples: list[str], tables: dict[str, list[Any]]) -> None:
    instance = token(drive.name, agent)
    seen = range(agent.first, min(agent.last + 1, len(samples)))
    tokens = [token(instance, k) for k in seen]
    tables["instance"].append(
        {
            "token": instance, "category_token": token(agent.category), "nbr_annotations": len(tokens),
            "first_annotation_token": tokens[0], "last_annotation_token": tokens[-1],
        }
    )  # fmt: skip
    for i, k in enumerate(seen):
        x, y, heading = agent.curve.at(k / 2)
        tables["sample_annotation"].append(
            {
                "token": tokens[i], "sample_token": samples[k], "instance_token": instance,
                "attribute_tokens": [token("moving")], "visibility_token": "4",
                "translation": [x, y, agent.size[2] / 2], "size": list(agent.size), "rotation": about_z(heading),
                "num_lidar_pts": 12, "num_radar_pts": 0, **_neighbours(tokens, i),
            }
        )  # fmt: skip


def wheel(t: float) -> float:
    """Angle of the steering wheel, rad, to the left."""
    return 0.9 * math.sin(0.8 * t)


def felt(t: float) -> tuple[float, float]:
    """Acceleration, m/s^2, ahead and to the left, as the CAN bus has it."""
    return 0.3 + 0.1 * t, 2.5 - 0.2 * t


def measured_speed(t: float) -> float:
    """Speed of the CAN bus, m/s, ahead: not quite that of the poses."""
    return 8.05 + 0.01 * t


def _write_can_bus(root: Path, drive: Drive) -> None:
    """Messages at 50, 100 and 2 Hz, from 0.2 s before the first keyframe on."""
    end = (drive.keyframes - 1) / 2 + 0.2
    zero = [0.0, 0.0, 0.0]
    pose, steering, monitor = [], [], []
    for t in np.arange(-0.2, end, 0.02).tolist():
        x, y, heading = drive.curve.at(t)
        stamp = drive.start_us + round(1e6 * t)
        pose.append(
            {
                "accel": [*felt(t), 9.8], "orientation": about_z(heading), "pos": [x, y, 0.0], "rotation_rate": zero,
                "utime": stamp, "vel": [measured_speed(t), 0.0, 0.0],
            }
        )  # fmt: skip
    for t in np.arange(-0.2, end, 0.01).tolist():
        steering.append({"utime": drive.start_us + round(1e6 * t), "value": wheel(t)})
    for t in np.arange(-0.2, end, 0.5).tolist():
        monitor.append(
            {
                "available_distance": 100, "battery_level": 80, "brake": 0, "brake_switch": 1, "gear_position": 7,
                "left_signal": 0, "rear_left_rpm": 240.0, "rear_right_rpm": 240.0, "right_signal": 0,
                "steering": round(math.degrees(wheel(t)), 1), "steering_speed": 0.0, "throttle": 120,
                "utime": drive.start_us + round(1e6 * t), "vehicle_speed": 28.98, "yaw_rate": 18.3,
            }
        )  # fmt: skip
    (root / "can_bus").mkdir(parents=True, exist_ok=True)
    for kind, messages in {"pose": pose, "steeranglefeedback": steering, "vehicle_monitor": monitor}.items():
        (root / "can_bus" / f"{drive.name}_{kind}.json").write_text(json.dumps(messages))
