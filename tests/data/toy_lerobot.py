"""Small LeRobot datasets of versions 2.1 and 3.0, written with pyarrow and PyAV as their specification has them."""

import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from openpi_like.robots import ActionField, Camera, Robot, StateField

FPS = 20
LENGTHS = (7, 12, 5, 9)
TASKS = ("put the cube into the bowl", "öffne die Schublade")
FRONT, WRIST = "observation.images.front", "observation.images.wrist"
CODECS = {
    "libx264": {"g": "6", "bf": "2"},
    "libx265": {"g": "5", "x265-params": "log-level=none"},
    "libsvtav1": {"g": "2"},
}
HEIGHT, WIDTH = 64, 80

ARM = Robot(
    name="lerobot_arm",
    cameras=(Camera("base", FRONT, HEIGHT, WIDTH), Camera("wrist", WRIST)),
    state=(StateField("joints", "observation.state", 3, unit="deg"),),
    action=(ActionField("joints", "action", 3, unit="deg", relative_to="joints"),),
    control_hz=float(FPS),
    action_horizon=4,
    execute_steps=2,
    language_key="task",
)


def pictures(episode: int, length: int, seed: int = 0) -> np.ndarray:
    """Returns (T, H, W, 3), soft stripes that move: no two frames of all episodes are the same."""
    t = np.arange(length)[:, None, None, None] + 31 * episode + 7 * seed
    x, y = np.arange(WIDTH)[None, None, :, None], np.arange(HEIGHT)[None, :, None, None]
    wave = np.sin((x + 3 * t) / 9 + np.arange(3)) + np.cos((y - 2 * t) / 7)
    return np.round(127 + 60 * wave).astype(np.uint8)


def rows(episode: int, length: int) -> dict[str, np.ndarray]:
    """Returns the numbers of an episode."""
    rng = np.random.default_rng([5, episode])
    return {
        "observation.state": rng.normal(size=(length, 3)).astype(np.float32),
        "action": rng.normal(size=(length, 3)).astype(np.float32),
        "grid": rng.normal(size=(length, 2, 2)).astype(np.float32),
        "reward": rng.normal(size=length).astype(np.float64),
        "done": np.arange(length) == length - 1,
    }


def encode(path: Path, frames: np.ndarray, codec: str, fps: int = FPS) -> None:
    """Writes a video."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream(codec, fps, options=CODECS[codec])
        stream.pix_fmt, stream.height, stream.width = "yuv420p", *frames.shape[1:3]
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, "rgb24")))
        container.mux(stream.encode())


def decoded(path: Path) -> np.ndarray:
    """Returns all frames of a video as PyAV decodes them in order, (M, H, W, 3)."""
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def png(image: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(image).save(out, format="png")
    return out.getvalue()


def table(numbers: Sequence[int], lengths: Sequence[int], images: Sequence[str] = ()) -> pa.Table:
    """Returns the rows of episodes, with pictures in the columns `images`."""
    parts = []
    for number, length in zip(numbers, lengths, strict=True):
        of: dict[str, Any] = {k: pa.array(v.tolist(), _type(v)) for k, v in rows(number, length).items()}
        frame = np.arange(length)
        of["timestamp"] = pa.array((frame / FPS).astype(np.float32))
        of["frame_index"], of["episode_index"] = pa.array(frame), pa.array(np.full(length, number))
        of["index"] = pa.array(frame + sum(LENGTHS[:number]))
        of["task_index"] = pa.array(np.full(length, number % 2))
        for key in images:
            shown = pictures(number, length, key == WRIST)
            kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
            of[key] = pa.array([{"bytes": png(x), "path": f"{i}.png"} for i, x in enumerate(shown)], kind)
        parts.append(pa.table(of))
    return pa.concat_tables(parts)


def _type(values: np.ndarray) -> pa.DataType:
    kind = pa.from_numpy_dtype(values.dtype)
    for _ in values.shape[1:]:
        kind = pa.list_(kind)
    return kind


def features(kinds: dict[str, str]) -> dict[str, Any]:
    """Returns the features of meta/info.json. kinds: key -> "video" or "image"."""
    of: dict[str, Any] = {
        key: {"dtype": v.dtype.name, "shape": list(v.shape[1:] or (1,)), "names": None} for key, v in rows(0, 2).items()
    }
    of["observation.state"]["names"] = ["waist", "elbow", "gripper"]
    for key, kind in kinds.items():
        of[key] = {"dtype": kind, "shape": [HEIGHT, WIDTH, 3], "names": ["height", "width", "channels"]}
        if key == WRIST:  # as some writers have it
            of[key] |= {"shape": [3, HEIGHT, WIDTH], "names": ["channels", "height", "width"]}
    for key in ("frame_index", "episode_index", "index", "task_index"):
        of[key] = {"dtype": "int64", "shape": [1], "names": None}
    return of | {"timestamp": {"dtype": "float32", "shape": [1], "names": None}}


def _info(directory: Path, version: str, kinds: dict[str, str], lengths: Sequence[int], **more: Any) -> None:
    info = {
        "codebase_version": version,
        "robot_type": "toy",
        "total_episodes": len(lengths),
        "total_frames": sum(lengths),
        "fps": FPS,
        "chunks_size": 1000,
        "splits": {"train": f"0:{len(lengths)}"},
        "features": features(kinds),
    }
    (directory / "meta").mkdir(parents=True, exist_ok=True)
    (directory / "meta" / "info.json").write_text(json.dumps(info | more))


def write_v21(directory: Path, kinds: dict[str, str], codec: str = "libx264", lengths: Sequence[int] = LENGTHS) -> Path:
    """Writes a dataset with a file an episode."""
    data = "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet"
    video = "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4"
    _info(directory, "v2.1", kinds, lengths, data_path=data, video_path=video)
    images = [key for key, kind in kinds.items() if kind == "image"]
    for number, length in enumerate(lengths):
        of = dict(episode_chunk=0, episode_index=number)
        path = directory / data.format(**of)
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table([number], [length], images), path)
        for key in kinds.keys() - set(images):
            encode(directory / video.format(video_key=key, **of), pictures(number, length, key == WRIST), codec)
    with (directory / "meta" / "episodes.jsonl").open("w") as file:
        for number, length in enumerate(lengths):
            file.write(json.dumps({"episode_index": number, "tasks": [TASKS[number % 2]], "length": length}) + "\n")
    with (directory / "meta" / "tasks.jsonl").open("w") as file:
        for number, task in enumerate(TASKS):
            file.write(json.dumps({"task_index": number, "task": task}) + "\n")
    return directory


def write_v30(
    directory: Path, kinds: dict[str, str], codec: str = "libx264", lengths: Sequence[int] = LENGTHS, **parquet: Any
) -> Path:
    """Writes a dataset with two episodes a table and three a video. parquet: options of its writer."""
    file = "/chunk-{chunk_index:03d}/file-{file_index:03d}"
    data, video = f"data{file}.parquet", "videos/{video_key}" + f"{file}.mp4"
    _info(directory, "v3.0", kinds, lengths, data_path=data, video_path=video)
    images = [key for key, kind in kinds.items() if kind == "image"]
    numbers = range(len(lengths))
    meta: dict[str, list[Any]] = {
        "episode_index": list(numbers),
        "length": list(lengths),
        "tasks": [[TASKS[n % 2]] for n in numbers],
        "data/chunk_index": [0 for _ in numbers],
        "data/file_index": [n // 2 for n in numbers],
    }
    for first in range(0, len(lengths), 2):
        path = directory / data.format(chunk_index=0, file_index=first // 2)
        path.parent.mkdir(parents=True, exist_ok=True)
        of = table(range(first, min(first + 2, len(lengths))), lengths[first : first + 2], images)
        pq.write_table(of, path, **({"row_group_size": 8} | parquet))
    for key in kinds.keys() - set(images):
        for name in ("chunk_index", "file_index", "from_timestamp", "to_timestamp"):
            meta[f"videos/{key}/{name}"] = []
        for first in range(0, len(lengths), 3):
            numbers = range(first, min(first + 3, len(lengths)))
            frames = np.concatenate([pictures(n, lengths[n], key == WRIST) for n in numbers])
            path = directory / video.format(video_key=key, chunk_index=0, file_index=first // 3)
            encode(path, frames, codec)
            ends = np.cumsum([0, *(lengths[n] for n in numbers)]) / FPS
            meta[f"videos/{key}/chunk_index"] += [0] * len(numbers)
            meta[f"videos/{key}/file_index"] += [first // 3] * len(numbers)
            meta[f"videos/{key}/from_timestamp"] += ends[:-1].tolist()
            meta[f"videos/{key}/to_timestamp"] += ends[1:].tolist()
    episodes = directory / "meta" / "episodes" / "chunk-000"
    episodes.mkdir(parents=True)
    pq.write_table(pa.table(meta), episodes / "file-000.parquet")
    texts = pa.table({"task_index": [0, 1], "__index_level_0__": list(TASKS)})
    pq.write_table(texts, directory / "meta" / "tasks.parquet")
    return directory


WRITERS: dict[str, Callable[..., Path]] = {"v2.1": write_v21, "v3.0": write_v30}
MIXED = {FRONT: "video", WRIST: "image"}
VIDEO_SPAN = f"videos/{FRONT}"  # what columns of meta/episodes begin with
EPISODES = "meta/episodes/chunk-000/file-000.parquet"  # of version 3


# ---- Changing them ---------------------------------------------------------------------------------------------------


def edit(path: Path, change: Callable[[pa.Table], pa.Table]) -> None:
    pq.write_table(change(pq.read_table(path)), path)


def change_info(directory: Path, **values: Any) -> None:
    path = directory / "meta" / "info.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def tables(directory: Path) -> list[Path]:
    return sorted((directory / "data").rglob("*.parquet"))


def videos(directory: Path) -> list[Path]:
    return sorted((directory / "videos").rglob("*.mp4"))


def set_column(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[pa.Table], pa.Table]:
    def edited(table: pa.Table) -> pa.Table:
        at = table.column_names.index(name)
        return table.set_column(at, name, pa.array(change(table[name].to_numpy().copy())))

    return edited


def put_column(name: str, change: Callable[[list[Any]], list[Any]]) -> Callable[[pa.Table], pa.Table]:
    """Returns what replaces a column by other values, of the type that fits these."""

    def edited(table: pa.Table) -> pa.Table:
        return table.set_column(table.column_names.index(name), name, pa.array(change(table[name].to_pylist())))

    return edited
