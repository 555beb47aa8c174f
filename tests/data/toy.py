"""A small dataset as TFDS writes it, with every kind of field that the index reads, and two robots that fit it."""

import dataclasses
import os
import struct
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from openpi_like.batch import ActionTokens, EntityTokens
from openpi_like.data import tfrecord
from openpi_like.data.prompts import FastPrompt, Pi0Prompt, PromptFormat
from openpi_like.data.selection import Selection
from openpi_like.data.sentencepiece_model import SentencePieceTokenizer
from openpi_like.data.text import TextTokenizer
from openpi_like.robots import ActionField, Camera, Gripper, Robot, StateField

LENGTHS = {"train": (7, 1, 12, 5, 9, 3, 20, 16, 11, 8, 4, 14), "val": (6, 10, 3)}
PROMPTS = ("pick up the red block", "open the drawer", "push_the T onto the target", "")

ARM = Robot(
    name="arm",
    cameras=(Camera("base", "observation/image", 12, 16), Camera("wrist", "observation/wrist")),
    state=(
        StateField("hand", "observation/state", 2, unit="cm"),
        StateField("gripper", "observation/state", 1, start=3, gripper=Gripper(open=0.0, closed=2.0)),
        StateField("joints", "observation/joints", 3, unit="deg"),
    ),
    action=(
        ActionField("hand", "action", 2, unit="cm", relative_to="hand"),
        ActionField("gripper", "action", 1, start=2, gripper=Gripper(open=-1.0, closed=1.0)),
    ),
    control_hz=10.0,
    action_horizon=5,
    execute_steps=2,
)
# The same data as a robot with one camera, a shorter horizon, no language, and another normalisation.
CART = Robot(
    name="cart",
    cameras=(Camera("base", "observation/image"),),
    state=(StateField("x", "observation/state", 1),),
    action=(ActionField("x", "action", 1, start=1),),
    control_hz=10.0,
    action_horizon=3,
    execute_steps=3,
    normalization="quantile",
    language_key=None,
    default_prompt="roll",
)

# The first one, told what to do in one of two ways, and what of its data is read: 9 of 12 episodes.
TOLD = dataclasses.replace(ARM, language_alternatives=("episode_metadata/file_path",))
SOME = Selection(success="episode_metadata/noise", min_length=4, skip_first=1, skip_last=1)


@dataclasses.dataclass(frozen=True)
class Shapes:
    """What a loader needs of a policy."""

    cameras: tuple[str, ...] = ("base", "wrist", "third")
    image_size: tuple[int, int] = (12, 16)
    state_dim: int = 8
    action_dim: int = 5
    action_horizon: int = 6
    prompt_len: int = 40
    vocab_size: int = 512
    resize: str = "cubic"
    prompt_format: PromptFormat = Pi0Prompt()
    image_slots: tuple[int, ...] = ()
    action_tokens: ActionTokens | None = None
    reads_episodes: bool = False
    thought_len: int = 0
    robots: tuple[str, ...] = ()
    entities: tuple[EntityTokens, ...] = ()
    perception: None = None

    @property
    def answer_len(self) -> int:
        """As in `PolicyConfig`."""
        return self.thought_len if self.action_tokens is None else self.action_tokens.max_len


# A policy that writes actions as tokens.
WRITES = Shapes(
    prompt_len=80,
    prompt_format=FastPrompt(),
    vocab_size=600,
    action_tokens=ActionTokens(max_len=60, count=200, skip=0),
)


def write_toy(tfds: Any, directory: Path) -> None:
    """Writes 110 training steps in three shards, and a validation split."""
    f = tfds.features
    features = f.FeaturesDict(
        {
            "steps": f.Dataset(
                {
                    "observation": {
                        "image": f.Image(shape=(12, 16, 3), encoding_format="png"),
                        "wrist": f.Image(shape=(None, None, 3), encoding_format="jpeg"),
                        "state": f.Tensor(shape=(4,), dtype=np.float32),
                        "joints": f.Tensor(shape=(3,), dtype=np.float64, encoding="zlib"),
                        "grid": f.Tensor(shape=(2, 3), dtype=np.uint8, encoding="bytes"),
                        "present/x": f.Scalar(np.float32),
                    },
                    "action": f.Tensor(shape=(3,), dtype=np.float32),
                    "count": f.Scalar(np.int64),
                    "label": f.ClassLabel(num_classes=300),
                    "embedding": f.Tensor(shape=(300,), dtype=np.float32),
                    "is_last": f.Scalar(np.bool_),
                    "language_instruction": f.Text(),
                }
            ),
            "episode_metadata": {
                "file_path": f.Text(),
                "success": f.Scalar(np.bool_),
                "noise": f.Scalar(np.float32),
                "renderer": f.Text(),
            },
        }
    )
    rng = np.random.default_rng(7)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        identity = tfds.core.DatasetIdentity(
            name="toy_arm", version=tfds.core.Version("1.0.0"), data_dir=os.fspath(directory), module_name=__name__
        )
        info = tfds.core.DatasetInfo(builder=identity, features=features)
        writer = tfds.core.SequentialWriter(info, 5, file_format="tfrecord")
        writer.initialize_splits(list(LENGTHS))
        for split, lengths in LENGTHS.items():
            writer.add_examples({split: [_episode(rng, i, n) for i, n in enumerate(lengths)]})
        writer.close_all()


def _episode(rng: np.random.Generator, number: int, length: int) -> dict[str, Any]:
    def step(t: int) -> dict[str, Any]:
        return {
            "observation": {
                "image": rng.integers(0, 256, (12, 16, 3), np.uint8),
                # one colour, which survives JPEG
                "wrist": np.broadcast_to(rng.integers(0, 256, 3).astype(np.uint8), (24, 16, 3)).copy(),
                "state": rng.normal(size=4).astype(np.float32),
                "joints": rng.normal(size=3),
                "grid": rng.integers(0, 256, (2, 3), np.uint8),
                "present/x": np.float32(rng.normal()),
            },
            "action": rng.normal(size=3).astype(np.float32),
            "count": int(rng.integers(-(2**62), 2**62)),
            "label": int(rng.integers(300)),
            "embedding": rng.normal(size=300).astype(np.float32),
            "is_last": t == length - 1,
            "language_instruction": PROMPTS[number % len(PROMPTS)],
        }

    metadata = {
        "file_path": f"é/{number}",
        "success": number % 2 == 0,
        "noise": np.float32(number / 8),
        "renderer": "ray",
    }
    return {"steps": [step(t) for t in range(length)], "episode_metadata": metadata}


def model_of(tokenizer: TextTokenizer) -> bytes:
    """The file's content of the SentencePiece model that a tokenizer uses."""
    assert isinstance(tokenizer.tokenizer, SentencePieceTokenizer)
    return tokenizer.tokenizer.content()


def shard(directory: Path, number: int = 0, split: str = "train") -> Path:
    """One shard file of the toy dataset."""
    (path,) = directory.glob(f"*-{split}.tfrecord-{number:05d}*")
    return path


def change_record(path: Path, number: int, change: Callable[[bytes], bytes]) -> None:
    """Replaces a record's payload, with checksums that are right."""
    records = [payload for _, payload in tfrecord.read_records(path)]
    out = bytearray()
    for i, payload in enumerate(records):
        assert isinstance(payload, bytes)
        payload = change(payload) if i == number else payload
        length = struct.pack("<Q", len(payload))
        out += length + struct.pack("<I", tfrecord.masked_crc(length))
        out += payload + struct.pack("<I", tfrecord.masked_crc(payload))
    path.write_bytes(out)
