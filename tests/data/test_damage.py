"""Images that do not decode under checksums that are right: all are found, recorded with the index, and only they."""

import json
import pickle
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import simplejpeg

from openpi_like.data import damage
from openpi_like.data.damage import check_images, image_problem
from openpi_like.data.images import decode
from openpi_like.data.index import FrameIndex, open_index
from openpi_like.data.schema import DatasetError
from tests.conftest import REPOSITORY
from tests.data.toy import change_record, shard

_PIXELS = cv2.resize(np.random.default_rng(5).integers(0, 256, (8, 8, 3), np.uint8), (32, 32))
JPEG = simplejpeg.encode_jpeg(_PIXELS, quality=90)
PNG = cv2.imencode(".png", _PIXELS)[1].tobytes()


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 0x10]) + data[at + 1 :]


# what is stored, and what is said of it; None where it is an image like any other
STORED: dict[str, tuple[bytes, str | None]] = {
    "whole JPEG": (JPEG, None),
    "whole PNG": (PNG, None),
    "bytes behind the end": (JPEG + b"xxxx", None),
    "cut": (JPEG[: len(JPEG) // 2], "Premature end of JPEG file"),
    "without its end marker": (JPEG[:-2], "Premature end of JPEG file"),
    "zeros at the end": (JPEG[: len(JPEG) // 2] + bytes(len(JPEG) // 2), "Premature end of JPEG file"),
    "bytes of the scan": (JPEG[:-60] + b"Z" * 40 + JPEG[-20:], "Corrupt JPEG data"),
    "flipped bit in a table": (flipped(JPEG, JPEG.index(b"\xff\xc4") + 5), "Could not determine"),
    "flipped bit that nobody can tell": (flipped(JPEG, JPEG.index(b"\xff\xda") + 100), None),
    "header only": (JPEG[:20], "Could not determine"),
    "empty": (b"", "not an image: 0 bytes"),
    "two bytes": (JPEG[:2], "not an image: 2 bytes"),
    "a text": (b"no camera", "not an image: 9 bytes that begin with b'no camer'"),
    "cut PNG": (PNG[: len(PNG) // 2], "not an image"),
    "flipped bit in a PNG": (flipped(PNG, len(PNG) // 2), "not an image"),
    "header of a PNG": (PNG[:33], "not an image"),
}
KEY, OTHER = "observation/wrist", "observation/image"
FIRST = 37  # step at which episode 6, which has 20 steps, begins


def store(tfds: Any, directory: Path, images: dict[int, bytes], key: str = KEY) -> None:
    """Replaces images of episode 6: step in it -> bytes. The length of a record changes, its checksums are right."""
    import tensorflow as tf

    def change(payload: bytes) -> bytes:
        example = tf.train.Example.FromString(payload)
        values = example.features.feature[f"steps/{key}"].bytes_list.value
        for step, data in images.items():
            values[step] = data
        return example.SerializeToString()

    change_record(shard(directory, 1), 1, change)


@pytest.fixture
def damaged(tfds: Any, copy: Path) -> Path:
    """The toy dataset with all of `STORED` in one episode, and one damaged image of the other camera."""
    store(tfds, copy, dict(enumerate(data for data, _ in STORED.values())))
    store(tfds, copy, {3: PNG[:-20]}, OTHER)
    return copy


def expected() -> list[int]:
    return [FIRST + i for i, (_, why) in enumerate(STORED.values()) if why is not None]


def found(index: FrameIndex) -> dict[str, list[int]]:
    return {key: steps.tolist() for key, steps in index.damaged.items()}


# ---- What is damage --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(STORED))
def test_what_is_damage(name: str) -> None:
    data, why = STORED[name]
    if why is None:
        assert decode(data).shape == (32, 32, 3)
    else:
        with pytest.raises(ValueError, match=why):
            decode(data)


@pytest.mark.parametrize("whole", [JPEG, PNG], ids=["jpeg", "png"])
def test_an_image_that_is_cut_anywhere_is_damage(whole: bytes) -> None:
    """Decoders would fill what is missing with grey."""
    for length in [*range(0, len(whole), 7), *range(len(whole) - 12, len(whole))]:
        with pytest.raises(ValueError, match=r"."):
            decode(whole[:length])


def test_a_flipped_bit_is_damage_or_a_picture() -> None:
    """PNG has a checksum of its pixels, so it is never another picture; neither raises anything but ValueError."""
    data = PNG.index(b"IDAT") + 4
    for at in range(data, len(PNG) - 12, 11):
        with pytest.raises(ValueError, match="not an image"):
            decode(flipped(PNG, at))
    scan = JPEG.index(b"\xff\xda") + 14
    complaints = 0
    for at in range(scan, len(JPEG) - 2, 3):
        try:
            assert decode(flipped(JPEG, at)).shape == (32, 32, 3)
        except ValueError:
            complaints += 1
    assert complaints > 0


# ---- What is recorded ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 3])
def test_all_damaged_images_and_only_they_are_recorded(
    damaged: Path, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(damage, "BLOCK", 9)
    before = open_index(damaged, "train")
    assert (before.checked, before.damaged) == (False, {})
    seen: list[tuple[int, int]] = []
    index = check_images(before, workers=workers, progress=lambda *at: seen.append(at))
    assert found(index) == {KEY: expected(), OTHER: [FIRST + 3]}
    assert index.checked
    total = sum(int(spans[:, 1].sum()) for spans in index.images.values())
    assert (seen[0], seen[-1]) == ((0, total), (total, total))
    assert seen == sorted(seen)
    for again in (open_index(damaged, "train"), pickle.loads(pickle.dumps(index))):
        assert (again.checked, found(again)) == (True, found(index))
        assert isinstance(again.damaged[KEY].base, np.memmap)
    assert {p.name for p in index.path.iterdir()} == {
        "damaged", "episode", "image", "index.json", "place", "step",
    }  # fmt: skip
    for step, (name, (_, why)) in enumerate(STORED.items()):
        problem = image_problem(index, FIRST + step, KEY)
        if why is None:
            assert problem is None, name
        else:
            assert problem is not None
            place = f"episode 6, step {step} (toy_arm-train.tfrecord-00001, record 1): cannot decode {KEY}: "
            assert place in problem
            assert why in problem


def test_a_dataset_without_damage(toy: Path, odd: Path, odd_arrays: Path, tmp_path: Path) -> None:
    """Depth images and ArrayRecord among them."""
    for directory in (toy, odd, odd_arrays):
        index = check_images(open_index(directory, "train", index_dir=tmp_path / directory.parents[1].name))
        assert (index.checked, index.damaged) == (True, {})


def test_damaged_depth(tfds: Any, odd: Path, tmp_path: Path) -> None:
    """A picture of another kind where depth is announced is damage too."""
    index = open_index(odd, "train", index_dir=tmp_path)
    key = "observation/depth_16"
    assert image_problem(index, 0, key) is None
    index.images[key] = index.images["observation/undeclared"]
    problem = image_problem(index, 0, key)
    assert problem is not None
    assert f"cannot decode {key}: an image of shape (8, 10, 3) and type uint8; expected" in problem


def test_a_changed_file_was_not_checked(tfds: Any, damaged: Path) -> None:
    old = check_images(open_index(damaged, "train"))
    store(tfds, damaged, {0: b""})
    new = open_index(damaged, "train")
    assert (new.checked, new.damaged) == (False, {})
    assert not old.path.exists()
    assert found(check_images(new))[KEY] == [FIRST, *expected()]


_KILLED = """
import os, signal
from openpi_like.data import damage
from openpi_like.data.index import open_index

def progress(done, total):
    if done > 0.5 * total:
        os.kill(os.getpid(), signal.SIGKILL)

damage.BLOCK = 9
damage.check_images(open_index({directory!r}, "train"), workers={workers}, progress=progress)
"""


@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_check_goes_on_where_it_was(
    damaged: Path, workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = _KILLED.format(directory=str(damaged), workers=workers)
    done = subprocess.run([sys.executable, "-c", program], env={"PYTHONPATH": str(REPOSITORY)}, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    index = open_index(damaged, "train")
    assert (index.checked, index.damaged) == (False, {})
    (notes,) = index.path.glob("*.jsonl")
    kept = {tuple(json.loads(line)[:2]) for line in notes.read_text().splitlines() if line}
    assert 0 < len(kept) < 13
    with notes.open("a") as file:
        file.write("[99, 108, {")  # as a kill in the middle of a line leaves it
    decoded: set[int] = set()

    def noted(index: FrameIndex, step: int, key: str) -> str | None:
        decoded.add(step)
        return image_problem(index, step, key)

    monkeypatch.setattr(damage, "BLOCK", 9)
    monkeypatch.setattr(damage, "image_problem", noted)
    seen: list[int] = []
    index = check_images(index, progress=lambda done, total: seen.append(done))
    assert decoded == set(range(110)) - {step for start, stop in kept for step in range(start, stop)}
    assert seen[0] > 0
    assert found(index) == {KEY: expected(), OTHER: [FIRST + 3]}
    assert not notes.exists()


def test_two_checks_at_once(damaged: Path) -> None:
    """The one that is later takes what the other recorded."""
    index = open_index(damaged, "train")
    first = check_images(index)
    assert found(check_images(index)) == found(first)  # `index` was opened before
    assert not list(index.path.glob("tmp*"))


# ---- What may go wrong -----------------------------------------------------------------------------------------------


def test_what_cannot_be_read_is_no_damage(damaged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(damage, "BLOCK", 9)
    index = open_index(damaged, "train")
    path = shard(damaged, 2)
    whole = path.read_bytes()
    path.unlink()
    with pytest.raises(DatasetError, match=r"\(toy_arm-train.tfrecord-00002.*, record 0\): cannot read observation/"):
        check_images(index)
    assert not pickle.loads(pickle.dumps(index)).checked
    path.write_bytes(whole)
    seen: list[int] = []
    assert found(check_images(index, progress=lambda done, _: seen.append(done)))[KEY] == expected()
    assert seen[0] > 0  # of the two shards before


def test_an_index_that_cannot_be_written(damaged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = open_index(damaged, "train")

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError("not for you")

    monkeypatch.setattr(np, "save", refuse)
    with pytest.raises(
        DatasetError, match=r"cannot record the damaged images of .*not for you; give another index_dir"
    ):
        check_images(index)
    assert not pickle.loads(pickle.dumps(index)).checked
    assert not list(index.path.glob("tmp*"))
