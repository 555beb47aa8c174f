"""A dataset with each odd kind of field that published datasets have, as TFDS writes it; see `FIELDS`."""

import io
import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

LENGTHS = (5, 1, 8, 3, 6)
INSTRUCTIONS = ("push the red star", "", "schiebe das Dreieck über ★", "x" * 512)
# The folder has another name than the dataset and its files, as that of DROID.
FOLDER, NAME = "odd", "r2d2_odd"
DEPTH, DEPTH_16 = "observation/image_with_depth", "observation/depth_16"
# Image fields and the formats that they are stored in.
IMAGES = {
    "observation/undeclared": "png",
    "observation/undeclared_jpeg": "jpeg",
    "observation/image/front": "jpeg",
    DEPTH: "depth",
    DEPTH_16: "depth",
}
LEFT_OUT = {
    "embedding": "it has 512 values, more than 256",
    "observation/point_cloud": "fields of kind float32 and shape (None, 3) cannot be read here",
    "observation/tags": "fields of kind Sequence and shape () cannot be read here",
    "names": "fields of kind string and shape (2,) cannot be read here",
    "thumbnail": "images of whole episodes cannot be read here",
}


def _features(tfds: Any) -> Any:
    f = tfds.features
    return f.FeaturesDict(
        {
            "steps": f.Dataset(
                {
                    "observation": {
                        "undeclared": f.Image(shape=(8, 10, 3)),
                        "undeclared_jpeg": f.Image(shape=(16, 16, 3)),
                        # A name with a slash in it, which is not a dictionary.
                        "image/front": f.Image(shape=(None, None, 3), encoding_format="jpeg"),
                        "image_with_depth": f.Image(shape=(6, 7, 1), dtype=np.float32),
                        "depth_16": f.Image(shape=(6, 7, 1), dtype=np.uint16, encoding_format="png"),
                        "instruction": f.Tensor(shape=(512,), dtype=np.int32),
                        "state": f.Tensor(shape=(3,), dtype=np.float64),
                        "zipped": f.Tensor(shape=(2, 2), dtype=np.float32, encoding="zlib"),
                        "packed": f.Tensor(shape=(3,), dtype=np.int16, encoding="bytes"),
                        "half": f.Tensor(shape=(2,), dtype=np.float16),
                        "point_cloud": f.Tensor(shape=(None, 3), dtype=np.float32, encoding="zlib"),
                        "tags": f.Sequence(f.Scalar(np.float32)),
                    },
                    "action": {
                        "world_vector": f.Tensor(shape=(3,), dtype=np.float32),
                        "gripper": f.Scalar(np.float32),
                        "terminate_episode": f.Tensor(shape=(3,), dtype=np.int32),
                    },
                    "clip_function_input/base_pose": f.Tensor(shape=(2,), dtype=np.float32),
                    "offset": f.Tensor(shape=(2,), dtype=np.int8),
                    "wide": f.Scalar(np.uint64),
                    "flag": f.Scalar(np.bool_),
                    "embedding": f.Tensor(shape=(512,), dtype=np.float32),
                    "names": f.Tensor(shape=(2,), dtype=np.str_),
                    "language_instruction": f.Text(),
                }
            ),
            "thumbnail": f.Image(shape=(4, 4, 3), encoding_format="png"),
            "success": f.Scalar(np.bool_),
            "language": f.Tensor(shape=(100,), dtype=np.int64),
        }
    )


def code_points(text: str, length: int, dtype: Any) -> np.ndarray:
    """Text as language_table stores it."""
    return np.array([*map(ord, text), *[0] * (length - len(text))], dtype)


def episode(number: int, length: int) -> dict[str, Any]:
    """One episode, before TFDS encodes it."""
    rng = np.random.default_rng(number)
    instruction = INSTRUCTIONS[number % len(INSTRUCTIONS)]

    def jpeg(height: int, width: int) -> bytes:
        buffer = io.BytesIO()
        smooth = np.add.outer(np.arange(height), np.arange(width))[..., None] * rng.integers(1, 4, 3)
        Image.fromarray(smooth.astype(np.uint8)).save(buffer, "jpeg", quality=95)
        return buffer.getvalue()

    def step(t: int) -> dict[str, Any]:
        return {
            "observation": {
                "undeclared": rng.integers(0, 256, (8, 10, 3), np.uint8),
                "undeclared_jpeg": io.BytesIO(jpeg(16, 16)),
                "image/front": io.BytesIO(jpeg(16, 24)),
                "image_with_depth": rng.exponential(2, (6, 7, 1)).astype(np.float32),
                "depth_16": rng.integers(0, 2**16, (6, 7, 1), np.uint16),
                "instruction": code_points(instruction, 512, np.int32),
                "state": rng.normal(size=3).astype(np.float32).astype(np.float64),
                "zipped": rng.normal(size=(2, 2)).astype(np.float32),
                "packed": rng.integers(-(2**15), 2**15, 3, np.int16),
                "half": rng.normal(size=2).astype(np.float16),
                "point_cloud": rng.normal(size=(t + 1, 3)).astype(np.float32),
                "tags": [1.0] * t,
            },
            "action": {
                "world_vector": rng.normal(size=3).astype(np.float32),
                "gripper": np.float32(rng.normal()),
                "terminate_episode": np.eye(3, dtype=np.int32)[t % 3],
            },
            "clip_function_input/base_pose": rng.normal(size=2).astype(np.float32),
            "offset": rng.integers(-128, 128, 2, np.int8),
            "wide": np.uint64(2**64 - 1 - t),
            "flag": t % 2 == 0,
            "embedding": rng.normal(size=512).astype(np.float32),
            "names": ["a", "b"],
            "language_instruction": instruction[:20],
        }

    return {
        "steps": [step(t) for t in range(length)],
        "thumbnail": rng.integers(0, 256, (4, 4, 3), np.uint8),
        "success": number % 2 == 0,
        "language": code_points(instruction[:100], 100, np.int64),
    }


def write(tfds: Any, directory: Path, features: Any, episodes: list[dict[str, Any]], file_format: str) -> None:
    """Writes episodes as split "train", in shards of two."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        identity = tfds.core.DatasetIdentity(
            name=NAME, version=tfds.core.Version("1.0.0"), data_dir=os.fspath(directory), module_name=__name__
        )
        info = tfds.core.DatasetInfo(builder=identity, features=features)
        writer = tfds.core.SequentialWriter(info, 2, file_format=file_format)
        writer.initialize_splits(["train"])
        writer.add_examples({"train": episodes})
        writer.close_all()


def write_odd(tfds: Any, directory: Path, file_format: str = "tfrecord") -> None:
    """Writes the odd dataset."""
    write(tfds, directory, _features(tfds), [episode(i, n) for i, n in enumerate(LENGTHS)], file_format)


def copied(directory: Path, to: Path) -> Path:
    """Copies the dataset below a directory, without its index."""
    return Path(shutil.copytree(directory, to / FOLDER / "1.0.0", ignore=shutil.ignore_patterns(".openpi*")))
