"""The program that builds indexes: what it prints is what the indexes hold."""

import functools
import io
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from openpi_like.data.index import FrameIndex, open_index
from openpi_like.data.schema import DatasetError
from tests.conftest import REPOSITORY
from tests.data.odd import INSTRUCTIONS
from tests.data.odd import LENGTHS as ODD_LENGTHS
from tests.data.toy import LENGTHS, change_record, shard

PROGRAM = REPOSITORY / "data" / "index.py"


@pytest.fixture(scope="module")
def program() -> SimpleNamespace:
    return SimpleNamespace(**runpy.run_path(str(PROGRAM)))


@pytest.fixture
def many(toy: Path, odd: Path, tmp_path: Path) -> Path:
    """A directory of two datasets, one of them with a configuration between name and version."""
    ignore = shutil.ignore_patterns(".openpi*")
    shutil.copytree(toy, tmp_path / "many" / "toy_arm" / "1.0.0", ignore=ignore)
    shutil.copytree(odd, tmp_path / "many" / "odd" / "small" / "1.0.0", ignore=ignore)
    return tmp_path / "many"


def run(program: SimpleNamespace, *data: Path, **options: Any) -> str:
    out = io.StringIO()
    arguments = program.Args(tuple(map(str, data)), **{"workers": 1, **options})
    program.main(arguments, Console(file=out, width=200))
    return out.getvalue()


def cells(text: str, split: str) -> list[str]:
    (line,) = [line for line in text.splitlines() if split in line and "│" in line]
    return [cell.strip() for cell in line.strip("│ \n").split("│")]


def test_a_directory_of_datasets(program: SimpleNamespace, many: Path) -> None:
    text = run(program, many)
    expected = [
        ("toy_arm/1.0.0 split 'train'", LENGTHS["train"]),
        ("toy_arm/1.0.0 split 'val'", LENGTHS["val"]),
        ("r2d2_odd/1.0.0 split 'train'", ODD_LENGTHS),
    ]
    for name, lengths in expected:
        assert cells(text, name)[1:3] == [str(len(lengths)), str(sum(lengths))]
    train = open_index(many / "toy_arm" / "1.0.0", "train")
    sizes = sum(shard(many / "toy_arm" / "1.0.0", i).stat().st_size for i in range(3))
    assert float(cells(text, expected[0][0])[3]) == pytest.approx(sizes / 1e6, abs=0.05)
    index_size = sum(p.stat().st_size for p in train.path.rglob("*"))
    assert cells(text, expected[0][0])[4] == f"{index_size / 110:,.0f}"
    assert "toy_arm/1.0.0 split 'train': embedding is left out: it has 300 values, more than 256" in text
    empty = sum(n for i, n in enumerate(ODD_LENGTHS) if not INSTRUCTIONS[i % len(INSTRUCTIONS)])
    assert f"r2d2_odd/1.0.0 split 'train': observation/instruction is empty in {empty} steps" in text
    again = run(program, many / "toy_arm")
    assert cells(again, "split 'train'")[5] == "was there"


def test_it_runs_with_several_processes(many: Path) -> None:
    arguments = [sys.executable, str(PROGRAM), str(many / "toy_arm" / "1.0.0"), "--workers", "2", "--split", "train"]
    done = subprocess.run(
        arguments, capture_output=True, text=True, env={"PYTHONPATH": str(REPOSITORY), "COLUMNS": "200"}
    )
    assert done.returncode == 0, done.stderr
    assert cells(done.stdout, "split 'train'")[1:3] == ["12", "110"]
    assert "tensorflow" not in done.stderr


def test_damaged_records_are_told(program: SimpleNamespace, many: Path) -> None:
    path = shard(many / "toy_arm" / "1.0.0", 1)
    path.write_bytes(path.read_bytes()[:-7])
    text = run(program, many / "toy_arm" / "1.0.0", split=("train",), max_corrupt_fraction=0.1)
    assert f"1 damaged records are skipped, the first: {path.name}, record 4, byte" in text
    assert cells(text, "split 'train'")[1] == "11"


@pytest.mark.parametrize("workers", [1, 3])
def test_all_images_of_whole_datasets_decode(program: SimpleNamespace, many: Path, workers: int) -> None:
    counts = [("toy_arm/1.0.0 split 'train'", 220), ("r2d2_odd/1.0.0 split 'train'", 5 * sum(ODD_LENGTHS))]
    for before in ("", " before"):
        text = run(program, many, workers=workers, decode=True)
        for name, count in counts:
            assert f"{name}: all {count} images were decoded{before}, 0 of them are damaged" in text


def replaced(data: bytes, old: bytes, new: bytes) -> bytes:
    assert data.count(old) == 1
    return data.replace(old, new)


@pytest.fixture
def damaged(many: Path) -> Path:
    """The toy dataset with damaged images, one of each camera, under checksums that are right."""
    directory = many / "toy_arm" / "1.0.0"
    index = open_index(directory, "train")
    for step, key, number, record in ((3, "observation/image", 0, 0), (40, "observation/wrist", 1, 1)):
        whole = index.read_image(step, key)
        cut = whole[:9] + bytes(len(whole) - 9)
        change_record(shard(directory, number), record, functools.partial(replaced, old=whole, new=cut))
    return directory


def test_damaged_images_under_right_checksums_are_all_named(program: SimpleNamespace, damaged: Path) -> None:
    for before in ("", " before"):  # the second time without decoding all again
        out = io.StringIO()
        with pytest.raises(SystemExit) as e:
            program.main(program.Args((str(damaged),), workers=2, decode=True), Console(file=out, width=200))
        head, first_key, second_key, first, second, *more = str(e.value).splitlines()
        assert more == []
        assert "2 of 110 steps have a damaged image, tolerated are 0 of them (max_corrupt_fraction); copy" in head
        assert first_key == "  observation/image: 1 of 110 are damaged, 0 of these are empty"
        assert second_key == "  observation/wrist: 1 of 110 are damaged, 0 of these are empty"
        place = "episode 0, step 3 (toy_arm-train.tfrecord-00000, record 0): cannot decode observation/image: not"
        assert place in first
        assert "episode 6, step 3 (toy_arm-train.tfrecord-00001, record 1): cannot decode observation/wrist: " in second
        assert f"split 'train': all 220 images were decoded{before}, 2 of them are damaged" in out.getvalue()


def test_damaged_images_may_be_tolerated(program: SimpleNamespace, damaged: Path) -> None:
    program.decode.__globals__["SHOWN"] = 1
    text = run(program, damaged, split=("train",), decode=True, max_corrupt_fraction=0.02)
    assert "step 3 (toy_arm-train.tfrecord-00000, record 0): cannot decode observation/image: not" in text
    assert "  ... and 1 more" in text
    assert "record 1" not in text
    with pytest.raises(SystemExit, match=r"2 of 110 steps have a damaged image, tolerated are 0\.01"):
        run(program, damaged, split=("train",), decode=True, max_corrupt_fraction=0.01)


def test_images_that_cannot_be_read_do_not_stop_the_others(
    program: SimpleNamespace, many: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check = program.decode.__globals__["check_images"]

    def refuse(index: FrameIndex, **options: Any) -> FrameIndex:
        if index.split.name == "val":
            raise DatasetError("the disk is gone")
        return check(index, **options)

    monkeypatch.setitem(program.decode.__globals__, "check_images", refuse)
    out = io.StringIO()
    with pytest.raises(SystemExit, match=r"^the disk is gone$"):
        program.main(program.Args((str(many),), workers=1, decode=True), Console(file=out, width=200))
    assert out.getvalue().count("images were decoded, 0 of them are damaged") == 2


def test_one_dataset_that_fails_does_not_stop_the_others(program: SimpleNamespace, many: Path, tmp_path: Path) -> None:
    path = shard(many / "toy_arm" / "1.0.0", 1)
    path.write_bytes(path.read_bytes()[:-7])
    out = io.StringIO()
    arguments = program.Args((str(tmp_path / "nothing"), str(many)), workers=1)
    with pytest.raises(SystemExit) as e:
        program.main(arguments, Console(file=out, width=200))
    for problem in ("nothing", "1 of 12 records are damaged"):
        assert problem in str(e.value)
    assert cells(out.getvalue(), "r2d2_odd/1.0.0 split 'train'")[2] == str(sum(ODD_LENGTHS))


def test_a_split_that_a_dataset_does_not_have(program: SimpleNamespace, many: Path) -> None:
    with pytest.raises(SystemExit, match="no split 'val'; known: 'train'"):
        run(program, many, split=("val",))
