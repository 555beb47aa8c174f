"""Building an index in any number of processes, stopped at any point, gives the same bytes."""

import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from openpi_like.data import index_build as module
from openpi_like.data import tfrecord
from openpi_like.data.index import open_index
from openpi_like.data.schema import DatasetError
from tests.conftest import REPOSITORY
from tests.data.toy import LENGTHS, change_record, shard


def contents(path: Path) -> dict[str, bytes]:
    """All files below a directory."""
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


@pytest.fixture
def straight(toy: Path, tmp_path: Path) -> dict[str, bytes]:
    """The files of an index that one process built without interruption."""
    return contents(open_index(toy, "train", index_dir=tmp_path / "straight").path)


@pytest.mark.parametrize("place", ["", "local://"])
def test_two_processes_build_the_same_index(toy: Path, tmp_path: Path, straight: dict[str, bytes], place: str) -> None:
    seen: list[tuple[int, int]] = []
    directory = f"{place}{toy}"
    index = open_index(directory, "train", index_dir=tmp_path / "two", workers=2, progress=lambda *at: seen.append(at))
    found = contents(index.path)
    if place:  # another name of the directory, and a store's times are not those of the disk
        assert found.pop("index.json") != straight.pop("index.json")
    assert found == straight
    total = sum(shard(toy, i).stat().st_size for i in range(3))
    assert [t for _, t in seen] == [total] * 4
    assert [d for d, _ in seen] == sorted({d for d, _ in seen})
    assert (seen[0], seen[-1]) == ((0, total), (total, total))


def test_progress_of_one_process_is_told_record_by_record(toy: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    open_index(toy, "train", index_dir=tmp_path, progress=lambda *at: seen.append(at))
    total = sum(shard(toy, i).stat().st_size for i in range(3))
    assert (seen[0], seen[-1]) == ((0, total), (total, total))
    assert seen == sorted(seen)
    assert len({d for d, _ in seen}) == 1 + len(LENGTHS["train"])


_KILLED = """
import os, signal
from openpi_like.data.index import open_index

def progress(done, total):
    if done > {fraction} * total:
        os.kill(os.getpid(), signal.SIGKILL)

if __name__ == "__main__":
    open_index({directory!r}, "train", index_dir={index_dir!r}, workers={workers}, progress=progress)
"""


@pytest.mark.parametrize(("workers", "fraction", "finished"), [(1, 0.1, 0), (1, 0.6, 1), (1, 0.9, 2), (2, 0.3, 1)])
def test_a_killed_build_goes_on_where_it_was(
    toy: Path,
    tmp_path: Path,
    straight: dict[str, bytes],
    shards_read: list[str],
    workers: int,
    fraction: float,
    finished: int,
) -> None:
    """Shards are finished as often as the process is killed later; those are not read again."""
    root, program = tmp_path / "killed", tmp_path / "build.py"
    program.write_text(_KILLED.format(fraction=fraction, directory=str(toy), index_dir=str(root), workers=workers))
    # Its workers hold the same pipe: `run` returns only when they have ended, too.
    done = subprocess.run(
        [sys.executable, program], env={"PYTHONPATH": str(REPOSITORY)}, capture_output=True, timeout=300
    )
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    parts = list(root.glob(".parts-*/*.npz"))
    assert len(parts) >= finished if workers == 2 else len(parts) == finished
    shards_read.clear()
    index = open_index(toy, "train", index_dir=root)
    kept = {int(p.name[:5]) for p in parts}
    assert shards_read == [shard(toy, i).name for i in range(3) if i not in kept]
    assert contents(index.path) == straight
    assert [p.name for p in root.iterdir()] == [index.path.name]  # the parts are gone


def test_a_part_that_is_cut_is_built_again(
    toy: Path, tmp_path: Path, straight: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> None:
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(module, "_merge", stop)
        with pytest.raises(DatasetError, match=r"cannot build the index .* no space left"):
            open_index(toy, "train", index_dir=tmp_path / "cut")
    part = sorted((tmp_path / "cut").glob(".parts-*/*.npz"))[1]
    part.write_bytes(part.read_bytes()[:-30])
    assert contents(open_index(toy, "train", index_dir=tmp_path / "cut").path) == straight


def test_a_corrected_shard_is_the_only_one_read_again(copy: Path, shards_read: list[str]) -> None:
    path = shard(copy, 1)
    good = path.read_bytes()
    path.write_bytes(good[:-7])
    with pytest.raises(DatasetError, match="1 of 12 records are damaged"):
        open_index(copy, "train")
    path.write_bytes(good)
    shards_read.clear()
    assert open_index(copy, "train").episodes == len(LENGTHS["train"])
    assert shards_read == [path.name]


def test_texts_are_numbered_by_their_first_step(toy: Path, tmp_path: Path) -> None:
    index = open_index(toy, "train", index_dir=tmp_path, workers=2)
    for texts in (*index.texts.values(), *index.episode_texts.values()):
        first = [int(np.argmax(np.asarray(texts.ids) == i)) for i in range(len(texts.table))]
        assert first == sorted(first)
        assert len(set(texts.table)) == len(texts.table)


def test_texts_of_skipped_episodes_are_not_in_the_table(copy: Path) -> None:
    change_record(shard(copy), 1, lambda data: data.replace(b"steps/count", b"steps/coUnt"))
    index = open_index(copy, "train", max_corrupt_fraction=0.1)
    table = index.episode_texts["episode_metadata/file_path"].table
    assert table == tuple(f"é/{i}" for i in range(12) if i != 1)


def test_pickling_shares_the_files(toy: Path, tmp_path: Path) -> None:
    index = open_index(toy, "train", index_dir=tmp_path)
    image = index.read_image(50, "observation/image")
    data = pickle.dumps(index)
    assert len(data) < 5000  # no columns in it
    other = pickle.loads(data)
    assert isinstance(other.columns["action"].base, np.memmap)
    for key, column in index.columns.items():
        np.testing.assert_array_equal(column, other.columns[key])
    index.close()
    assert other.read_image(50, "observation/image") == image


_ELSEWHERE = """
import os, pickle, sys
os.chdir("/")
index = pickle.load(sys.stdin.buffer)
sys.stdout.buffer.write(index.read_image(60, "observation/image"))
"""


@pytest.mark.parametrize("beside", [True, False])
def test_pickling_does_not_depend_on_the_working_directory(
    copy: Path, monkeypatch: pytest.MonkeyPatch, beside: bool
) -> None:
    monkeypatch.chdir(copy.parent)
    index = open_index(copy.name, "train", index_dir=None if beside else "kept")
    done = subprocess.run(
        [sys.executable, "-c", _ELSEWHERE], input=pickle.dumps(index), capture_output=True,
        env={"PYTHONPATH": str(REPOSITORY)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout == index.read_image(60, "observation/image")
    assert index.path.parent == (copy / ".openpi_like_index" if beside else copy.parent / "kept")


def test_a_stale_index_that_another_builder_removes(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = open_index(copy, "train").path
    os.utime(shard(copy), ns=(1, 1))
    read_text = Path.read_text

    def removed(self: Path, *args: Any, **options: Any) -> str:
        if self == old / "index.json":
            shutil.rmtree(old)
        return read_text(self, *args, **options)

    monkeypatch.setattr(Path, "read_text", removed)
    assert open_index(copy, "train").steps == sum(LENGTHS["train"])
    assert not old.exists()


_FEW_FILES = """
import resource, sys
_, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (30, min(hard, int(sys.argv[2]))))
from openpi_like.data import files
from openpi_like.data.index import DatasetError, open_index
print(files.OPEN_FILES, *resource.getrlimit(resource.RLIMIT_NOFILE))
kept = []
try:
    for _ in range(5):
        kept.append(open_index(sys.argv[1], "train"))
        for step in (0, 60, 109):
            kept[-1].read_image(step, "observation/image")
except DatasetError as e:
    print(e)
print(len(kept))
"""


@pytest.mark.parametrize("most", [60, 300])
def test_the_limit_of_open_files_is_raised_or_told(toy: Path, most: int) -> None:
    """Each column that is mapped takes one: twenty of each dataset."""
    open_index(toy, "train")
    done = subprocess.run(
        [sys.executable, "-c", _FEW_FILES, str(toy), str(most)], capture_output=True, text=True,
        env={"PYTHONPATH": str(REPOSITORY)},
    )  # fmt: skip
    first, *rest = done.stdout.splitlines()
    assert first == f"{most // 2} {most} {most}", done.stderr
    if most == 300:
        assert rest == ["5"]
    else:
        assert int(rest[-1]) < 5
        assert re.search(r"Too many open files.*this process may have 60 files open, .* more with `ulimit -n`", rest[0])


def test_images_are_read_by_many_threads(toy: Path) -> None:
    index = open_index(toy, "train")
    keys = [(step, key) for step in range(index.steps) for key in index.images] * 3
    expected = [index.read_image(*key) for key in keys]
    index.close()
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda key: index.read_image(*key), keys)) == expected


# ---- What may go wrong -----------------------------------------------------------------------------------------------


def test_damage_is_located_by_any_number_of_processes(copy: Path, tmp_path: Path) -> None:
    at = []
    for i in (0, 2):
        raw = bytearray(shard(copy, i).read_bytes())
        at.append(next(tfrecord.read_records(shard(copy, i)))[0])
        raw[at[-1] + 50] ^= 1
        shard(copy, i).write_bytes(raw)
    messages = []
    for workers in (1, 2):
        with pytest.raises(DatasetError) as e:
            open_index(copy, "train", index_dir=tmp_path / str(workers), workers=workers)
        messages.append(str(e.value))
    assert messages[0] == messages[1]
    assert "2 of 12 records are damaged" in messages[0]
    for i, offset in zip((0, 2), at, strict=True):
        assert f"{shard(copy, i).name}, record 0, byte {offset}: checksum of the payload" in messages[0]
    indexes = [
        open_index(copy, "train", index_dir=tmp_path / str(w), max_corrupt_fraction=0.2, workers=w) for w in (1, 2)
    ]
    assert contents(indexes[0].path) == contents(indexes[1].path)


@pytest.mark.parametrize("how", ["missing", "empty"])
def test_a_missing_or_empty_shard_is_fatal_or_counted(copy: Path, how: str) -> None:
    path = shard(copy, 1)
    if how == "missing":
        path.unlink()
    else:
        path.write_bytes(b"")
    fatal = "expects 3 shards .* missing: " if how == "missing" else r"5 of 12 .*record 0: missing, the file holds 0"
    with pytest.raises(DatasetError, match=f"(?s){fatal}"):
        open_index(copy, "train")
    with pytest.raises(
        DatasetError, match=rf"(?s)5 of 12 records are damaged, tolerated are 0\.4 .*{path.name}, record 4"
    ):
        open_index(copy, "train", max_corrupt_fraction=0.4)
    index = open_index(copy, "train", max_corrupt_fraction=0.5)
    assert (index.episodes, len(index.skipped)) == (7, 5)
    assert index.episode_shard.tolist() == [0] * 5 + [2] * 2
    last = [index.read_image(i, "observation/image") for i in range(index.steps)]
    assert len(set(last)) == index.steps


def test_all_shards_missing_is_fatal_whatever_is_tolerated(copy: Path) -> None:
    for i in range(3):
        shard(copy, i).unlink()
    with pytest.raises(DatasetError, match="expects 3 shards"):
        open_index(copy, "train", max_corrupt_fraction=1.0)


def test_text_that_is_not_utf8_is_a_located_damage(copy: Path) -> None:
    change_record(shard(copy), 2, lambda data: data.replace("é/2".encode(), b"\xff\xff/2"))
    expected = r"00000.*, record 2, byte \d+: episode_metadata/file_path: the text b'\\xff\\xff/2' is not UTF-8"
    with pytest.raises(DatasetError, match=expected):
        open_index(copy, "train")


@pytest.mark.parametrize("readable", [0, 1])
def test_text_that_is_nowhere_utf8_is_left_out(copy: Path, readable: int) -> None:
    """Then it is no text. One record that can be decoded says that it is, and that the others are damaged."""
    for i in range(len(LENGTHS["train"]) - readable):
        change_record(shard(copy, i // 5), i % 5, lambda data: data.replace("é/".encode(), b"\xff\xff/"))
    if readable:
        with pytest.raises(DatasetError, match=r"11 of 12 records are damaged"):
            open_index(copy, "train")
        return
    index = open_index(copy, "train")
    why = r"it cannot be decoded as text in any record; in the first, the text b'\xff\xff/0' is not UTF-8"
    assert index.left_out["episode_metadata/file_path"] == why
    assert (index.steps, index.skipped) == (sum(LENGTHS["train"]), ())
    assert index.episode_texts.keys() == {"episode_metadata/renderer"}
    with_damage = shard(copy, 2)
    with_damage.write_bytes(with_damage.read_bytes()[:-7])  # such a record counts neither way
    again = open_index(copy, "train", max_corrupt_fraction=0.1)
    assert (again.left_out, again.episodes) == (index.left_out, 11)


def test_a_record_that_is_no_example(copy: Path) -> None:
    change_record(shard(copy), 0, lambda data: bytes.fromhex("0a050a030a01ff"))
    with pytest.raises(DatasetError, match=r"record 0, byte 12: not a tf.train.Example: a name in it is not UTF-8"):
        open_index(copy, "train")


def test_a_program_without_its_guard_is_told(toy: Path, tmp_path: Path) -> None:
    """Its processes run the program again; they must not start more of them."""
    program = tmp_path / "unguarded.py"
    call = f"open_index({str(toy)!r}, 'train', index_dir={str(tmp_path)!r}, workers=2)"
    program.write_text(f"from openpi_like.data.index import open_index\n{call}\n")
    done = subprocess.run(
        [sys.executable, program], env={"PYTHONPATH": str(REPOSITORY)}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 1
    assert 'or because the program has no `if __name__ == "__main__"`' in done.stderr


def test_a_link_to_nothing_is_a_missing_shard(copy: Path) -> None:
    path = shard(copy, 1)
    path.unlink()
    path.symlink_to("nowhere")
    with pytest.raises(DatasetError, match=f"missing: {path.name}"):
        open_index(copy, "train")


def test_a_process_that_dies_says_what_to_do(toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Pool:
        def __init__(self, *_: object) -> None: ...

        def submit(self, *_: object) -> object:
            raise BrokenProcessPool("a process was terminated abruptly")

        def shutdown(self, **_: object) -> None: ...

    monkeypatch.setattr(module, "ProcessPoolExecutor", Pool)
    with pytest.raises(DatasetError, match=r"a process .* died \(a process was terminated abruptly\).* fewer workers"):
        open_index(toy, "train", index_dir=tmp_path, workers=2)
