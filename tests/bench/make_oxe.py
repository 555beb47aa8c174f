"""Makes the datasets that bench_oxe.py and bench_kill.py read, out of real Bridge records and camera photos:

    python tests/bench/make_oxe.py --bridge ../shared/data/bridge_dataset/1.0.0 --photos ../shared/data/camera_frames \\
        --out /tmp/oxe

    b64/1.0.0    Bridge as it is, 10 steps of 64 x 64 pixels an episode, repeated
    b256/1.0.0   the same fields in episodes of 40 steps, with images of 256 x 256 as JPEG 4:2:0 of quality 95
    mix/...      24 of each, for mixtures; their shards are links to those above

States and actions get noise of their own in every episode, so that any frame can be told from its state. Images repeat
from shard to shard, which helps no reader: each decodes all it delivers.
"""

import dataclasses
import json
import os
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import simplejpeg
import tyro
from PIL import Image
from rich.console import Console
from tensorflow_datasets.proto import tf_example_pb2

from openpi_like.data.tfrecord import masked_crc, read_records

STATES = ("steps/observation/state", "steps/action")
NOISE = 1e-3  # of states and actions
MIXED = 24


@dataclasses.dataclass(frozen=True)
class Args:
    """See the file's head. b64, b256: episodes. pixel_noise: of 256 x 256 images; it decides their size in bytes."""

    bridge: Path
    photos: Path
    out: Path
    b64: int = 2000
    b256: int = 1000
    shards: int = 40
    quality: int = 95
    pixel_noise: float = 3.2
    seed: int = 0


def steps(example: Any) -> int:
    return len(example.features.feature["steps/is_first"].int64_list.value)


def values(feature: Any) -> Any:
    """The list of a Feature, whatever its kind."""
    return getattr(feature, feature.WhichOneof("kind")).value


def joined(examples: list[Any], length: int) -> Any:
    """One episode of `length` steps out of the steps of several; what is of the whole episode is that of the first."""
    out = tf_example_pb2.Example()
    out.CopyFrom(examples[0])
    for key, feature in out.features.feature.items():
        if not key.startswith("steps/"):
            continue
        each = len(values(feature)) // steps(examples[0])
        for other in examples[1:]:
            values(feature).extend(values(other.features.feature[key]))
        del values(feature)[length * each :]
    for key, at in (("steps/is_first", 0), ("steps/is_last", length - 1)):
        values(out.features.feature[key])[:] = [int(i == at) for i in range(length)]
    return out


def scene(photo: np.ndarray, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """A camera that drifts over a photo: endless 256 x 256 crops."""
    side = int(rng.uniform(0.75, 0.98) * min(photo.shape[:2]))
    room = np.array(photo.shape[:2]) - side
    at = rng.uniform(0, 1, 2) * room
    while True:
        at = np.clip(at + rng.normal(0, 1, 2), 0, room)
        top, left = at.astype(int)
        yield cv2.resize(photo[top : top + side, left : left + side], (256, 256), interpolation=cv2.INTER_CUBIC)


def enlarge(example: Any, photos: list[np.ndarray], args: Args, rng: np.random.Generator) -> list[int]:
    """Replaces every image that is not black by a scene with the image in it; returns the sizes in bytes."""
    sizes = []
    for key, feature in example.features.feature.items():
        if "/image_" not in key or not key.startswith("steps/"):
            continue
        crops, out = scene(photos[rng.integers(len(photos))], rng), []
        for data in values(feature):
            small = simplejpeg.decode_jpeg(data)
            large = cv2.resize(small, (256, 256), interpolation=cv2.INTER_CUBIC).astype(np.float32)
            if small.any():
                large = 0.75 * next(crops) + 0.25 * large + rng.normal(0, args.pixel_noise, large.shape)
            image = np.clip(large.round(), 0, 255).astype(np.uint8)
            out.append(simplejpeg.encode_jpeg(image, quality=args.quality, colorsubsampling="420"))
            if small.any():
                sizes.append(len(out[-1]))
        values(feature)[:] = out
    return sizes


def record(example: Any, number: int, rng: np.random.Generator) -> bytes:
    """An episode with noise and number of its own, as a TFRecord."""
    features = example.features.feature
    kept = {key: list(values(features[key])) for key in STATES}
    for key, numbers in kept.items():
        values(features[key])[:] = np.array(numbers) + rng.normal(0, NOISE, len(numbers))
    values(features["episode_metadata/episode_id"])[:] = [number]
    payload = example.SerializeToString()
    for key, numbers in kept.items():
        values(features[key])[:] = numbers
    length = struct.pack("<Q", len(payload))
    return b"".join([length, struct.pack("<I", masked_crc(length)), payload, struct.pack("<I", masked_crc(payload))])


def describe(directory: Path, source: Path, splits: dict[str, tuple[list[int], int]]) -> None:
    """Writes features.json and dataset_info.json; splits: name -> (episodes of each shard, bytes)."""
    directory.mkdir(parents=True, exist_ok=True)
    info = json.loads((source / "dataset_info.json").read_text())
    template = info["splits"][0]["filepathTemplate"]
    info["name"] = directory.parent.name
    info["splits"] = [
        {"name": n, "filepathTemplate": template, "shardLengths": [str(k) for k in lengths], "numBytes": str(size)}
        for n, (lengths, size) in splits.items()
    ]
    (directory / "dataset_info.json").write_text(json.dumps(info, indent=2))
    shutil.copy(source / "features.json", directory)
    (directory / "features.json").chmod(0o644)


def write(directory: Path, args: Args, splits: dict[str, tuple[list[Any], int, int]]) -> None:
    """Writes a dataset; splits: name -> (episodes to repeat, how many episodes, how many shards)."""
    rng, number, written = np.random.default_rng(args.seed), 0, {}
    directory.mkdir(parents=True)
    for split, (examples, count, shards) in splits.items():
        lengths = [count * (i + 1) // shards - count * i // shards for i in range(shards)]
        size = 0
        for i, length in enumerate(lengths):
            path = directory / f"{directory.parent.name}-{split}.tfrecord-{i:05d}-of-{shards:05d}"
            with path.open("wb") as file:
                for _ in range(length):
                    size += file.write(record(examples[number % len(examples)], number, rng))
                    number += 1
        written[split] = (lengths, size)
    describe(directory, args.bridge, written)


def main(args: Args, console: Console) -> None:
    (shard,) = args.bridge.glob("*-train.tfrecord-*")
    records = [payload for _, payload in read_records(shard) if isinstance(payload, bytes)]
    source = [tf_example_pb2.Example.FromString(payload) for payload in records]
    photos = [np.asarray(Image.open(path).convert("RGB")) for path in sorted(args.photos.glob("*.png"))]
    rng = np.random.default_rng(args.seed)

    small = args.out / "b64" / "1.0.0"
    if not small.exists():
        write(small, args, {"train": (source, args.b64, args.shards), "val": (source, len(source), 1)})

    large = args.out / "b256" / "1.0.0"
    if not large.exists():
        episodes, sizes = [], []
        for i in range(len(source)):
            episode = joined([source[(i + k) % len(source)] for k in range(4)], 40)
            sizes += enlarge(episode, photos, args, rng)
            episodes.append(episode)
        write(large, args, {"train": (episodes, args.b256, args.shards), "val": (episodes, len(episodes), 1)})
        console.print(f"{large}: images have {np.mean(sizes) / 1e3:.1f} kB on average")

    for source_dir in (small, large):
        name = source_dir.parent.name
        splits = {
            s["name"]: ([int(n) for n in s["shardLengths"]], int(s["numBytes"]))
            for s in json.loads((source_dir / "dataset_info.json").read_text())["splits"]
        }
        for i in range(MIXED):
            directory = args.out / "mix" / f"{name}_{i:02d}" / "1.0.0"
            describe(directory, args.bridge, splits)
            for path in source_dir.glob("*.tfrecord-*"):
                link = directory / path.name.replace(name, directory.parent.name)
                if not link.exists():
                    os.symlink(path.resolve(), link)
    for directory in (small, large):
        size = sum(p.stat().st_size for p in directory.glob("*.tfrecord-*"))
        console.print(f"{directory}: {size / 1e6:,.0f} MB")


if __name__ == "__main__":
    main(tyro.cli(Args), Console(highlight=False))
