"""Tiny HDF5 files as ALOHA, robomimic and LIBERO write them, and robots that fit them."""

import json
from pathlib import Path
from typing import Any

import cv2
import h5py
import numpy as np
import simplejpeg

from openpi_like.robots import ActionField, Camera, Gripper, Robot, StateField

# Twelve episodes, so that the order of numbers is not that of their texts.
ALOHA_LENGTHS = (5, 3, 7, 4, 6, 1, 8, 2, 5, 9, 3, 6)
DEMO_LENGTHS = (6, 4, 9, 3, 5, 7, 2, 8, 4, 6, 5, 3)
CAMERAS = ("cam_high", "cam_low", "cam_left_wrist")  # not in the order of the alphabet

ALOHA = Robot(
    name="aloha",
    cameras=(
        Camera("base", "observations/images/cam_high", 12, 16),
        Camera("wrist", "observations/images/cam_left_wrist", channel_order="bgr"),
    ),
    state=(StateField("joints", "observations/qpos", 4, unit="rad"),),
    action=(ActionField("joints", "action", 4, unit="rad", relative_to="joints"),),
    control_hz=50.0,
    action_horizon=6,
    execute_steps=3,
    language_key=None,
    default_prompt="transfer the cube",
)
PANDA = Robot(
    name="panda",
    cameras=(Camera("base", "obs/agentview_image", 8, 10, upside_down=True),),
    state=(
        StateField("hand", "obs/robot0_eef_pos", 3, unit="m"),
        StateField("gripper", "obs/robot0_gripper_qpos", 1, gripper=Gripper(open=0.04, closed=0.0)),
    ),
    action=(
        ActionField("hand", "actions", 3, command="delta"),
        ActionField("gripper", "actions", 1, start=6, gripper=Gripper(open=-1.0, closed=1.0)),
    ),
    control_hz=20.0,
    action_horizon=4,
    execute_steps=2,
    language_key="env_name",
)

ENV_ARGS = {"env_name": "Lift", "type": 1, "env_kwargs": {"control_freq": 20, "robots": ["Panda"]}}


def pictures(rng: np.random.Generator, steps: int, height: int = 12, width: int = 16) -> np.ndarray:
    """Frames of noise on a plane of colour, of which no two are the same."""
    plane = rng.integers(0, 200, (steps, 1, 1, 3), np.uint8)
    return plane + rng.integers(0, 56, (steps, height, width, 3), np.uint8)


def jpegs(frames: np.ndarray) -> list[bytes]:
    return [simplejpeg.encode_jpeg(frame, quality=90) for frame in frames]


def pngs(frames: np.ndarray) -> list[bytes]:
    return [cv2.imencode(".png", frame)[1].tobytes() for frame in frames]


def padded(encoded: list[bytes], width: int | None = None) -> np.ndarray:
    """Rows of bytes that end with zeros, (T, n)."""
    width = width or max(map(len, encoded))
    return np.stack([np.frombuffer(e.ljust(width, b"\0"), np.uint8) for e in encoded])


def write_images(group: h5py.Group, name: str, frames: np.ndarray, stored: str) -> None:
    """Writes pictures in one of the ways that are found."""
    encoded = pngs(frames) if stored == "png" else jpegs(frames)
    rows = padded(encoded)
    if stored == "contiguous":
        group[name] = frames
    elif stored == "frames":  # as ALOHA's recorder, a chunk per frame
        group.create_dataset(name, frames.shape, np.uint8, chunks=(1, *frames.shape[1:]))[...] = frames
    elif stored == "unwritten":  # chunks that are not there are zeros
        group.create_dataset(name, frames.shape, np.uint8, chunks=(1, *frames.shape[1:]))[: len(frames) // 2] = 7
    elif stored == "gzip_frames":
        group.create_dataset(name, data=frames, chunks=(1, *frames.shape[1:]), compression="gzip")
    elif stored == "gzip":  # as robomimic with --compress, chunks as h5py guesses them
        group.create_dataset(name, data=frames, compression="gzip")
    elif stored in ("jpeg", "png"):
        group.create_dataset(name, data=rows, chunks=(1, rows.shape[1]))
    elif stored == "jpeg_whole":
        group[name] = rows
    elif stored == "jpeg_gzip":
        group.create_dataset(name, data=rows, compression="gzip")
    elif stored == "jpeg_text":
        group[name] = np.array(encoded, f"S{rows.shape[1]}")
    elif stored == "jpeg_lists":
        data = group.create_dataset(name, len(frames), h5py.vlen_dtype(np.uint8))
        for i, e in enumerate(encoded):
            data[i] = np.frombuffer(e, np.uint8)
    else:
        raise ValueError(stored)


def write_aloha(directory: Path, stored: str = "frames", lengths: tuple[int, ...] = ALOHA_LENGTHS) -> Path:
    """Writes a file per episode; `compress_len` and its order of cameras are those of ALOHA's recorder."""
    directory.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(11)
    for e, n in enumerate(lengths):
        with h5py.File(directory / f"episode_{e}.hdf5", "w") as file:
            file.attrs["sim"] = e % 2 == 0
            file.attrs["compress"] = "jpeg" in stored
            images = file.create_group("observations").create_group("images")
            frames = {camera: pictures(rng, n) for camera in CAMERAS}
            for camera in CAMERAS:
                write_images(images, camera, frames[camera], stored)
            for name in ("qpos", "qvel", "effort"):
                file[f"observations/{name}"] = rng.normal(size=(n, 4))
            file["action"] = rng.normal(size=(n, 4)).astype(np.float32)
            if "jpeg" in stored:
                file["compress_len"] = np.array([[len(j) for j in jpegs(frames[c])] for c in CAMERAS], np.float32)
    return directory


def write_robomimic(
    path: Path,
    lengths: tuple[int, ...] = DEMO_LENGTHS,
    *,
    masks: dict[str, list[int]] | None = None,
    stored: str = "contiguous",
    seed: int = 12,
    env_args: dict[str, Any] | None = None,
) -> Path:
    """Writes demonstrations with pictures into one file, as robomimic's dataset_states_to_obs.py does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        data.attrs["total"] = sum(lengths)
        data.attrs["env_args"] = json.dumps(env_args or ENV_ARGS)
        for d, n in enumerate(lengths):
            demo = data.create_group(f"demo_{d}")
            demo.attrs["num_samples"] = n
            demo.attrs["model_file"] = "<mujoco>" * 1000
            write_images(demo.create_group("obs"), "agentview_image", pictures(rng, n, 8, 10), stored)
            for level in ("obs", "next_obs"):
                demo[f"{level}/robot0_eef_pos"] = rng.normal(size=(n, 3))
                demo[f"{level}/robot0_gripper_qpos"] = rng.uniform(0, 0.04, size=(n, 2))
            demo["actions"] = rng.uniform(-1, 1, size=(n, 7))
            demo["rewards"] = (np.arange(n) == n - 1).astype(np.float64)
            demo["dones"] = (np.arange(n) == n - 1).astype(np.int64)
            demo["states"] = rng.normal(size=(n, 32 + seed))
        for key, numbers in (masks or {}).items():
            file[f"mask/{key}"] = np.array([f"demo_{i}" for i in numbers], dtype="S8")
    return path


def write_libero(directory: Path) -> Path:
    """Writes a file per task, whose simulators have states of different sizes, with the instruction in JSON."""
    for task, (words, seed) in enumerate(
        {"open the drawer": 3, "put the bowl on the plate": 5, "turn on the stove": 7}.items()
    ):
        path = write_robomimic(directory / f"task_{task}_demo.hdf5", (4, 2, 3), seed=seed)
        with h5py.File(path, "r+") as file:
            # some files of LIBERO have the instruction as a list
            told: Any = list(words) if task == 1 else words
            file["data"].attrs["problem_info"] = json.dumps({"language_instruction": told, "domain_name": "robosuite"})
            file["data"].attrs["macros_image_convention"] = "opengl"
            for demo in file["data"].values():
                demo.attrs["init_state"] = demo["states"][0]
    return directory
