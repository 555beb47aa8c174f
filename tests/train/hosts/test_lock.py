"""The lock of a run directory: it refuses a second run, and never the next one."""

import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from openpi_like.train.hosts.lock import OWNER, RunLock, RunLockedError, read_owner, run_directory, wait_for_token
from openpi_like.train.hosts.places import boot_id
from openpi_like.train.hosts.process_group import ProcessGroup

REPOSITORY = Path(__file__).resolve().parents[3]
HOLD = """
import sys
from pathlib import Path
from openpi_like.train.hosts.lock import RunLock

with RunLock(Path(sys.argv[1]), lost=print, say=print):
    print("held", flush=True)
    sys.stdin.read()
"""


def never(text: str) -> None:
    raise AssertionError(text)


def lock(run_dir: Path, **options: Any) -> RunLock:
    defaults: dict[str, Any] = {"lost": never, "say": never, "beat_s": 0.05, "stale_s": 0.6}
    return RunLock(run_dir, **defaults | options)


def write_owner(run_dir: Path, *, host: str | None = None, pid: int = 1, seen: float = 0.0, boot: str = "") -> None:
    """As a run has left it that was killed `seen` seconds ago, by the clock of its host."""
    owner = {"host": host or socket.gethostname(), "pid": pid, "started": 1.7e9, "token": "other"}
    owner |= {"seen": time.time() - seen, "boot": boot or boot_id()}
    run_dir.mkdir(parents=True, exist_ok=True)
    whole = run_dir / f"{OWNER}.other"  # as the lock writes it: a reader never sees half of it
    whole.write_text(json.dumps(owner))
    os.replace(whole, run_dir / OWNER)


def test_a_second_run_is_refused_while_the_first_lives_and_started_after_it_was_killed(tmp_path):
    run_dir = tmp_path / "runs" / "a"
    command = [sys.executable, "-c", HOLD, str(run_dir)]
    first = subprocess.Popen(command, cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert first.stdin is not None
    assert first.stdout is not None
    try:
        assert first.stdout.readline() == "held\n"
        begun = time.monotonic()
        with pytest.raises(RunLockedError) as e, lock(run_dir):
            pass
        assert time.monotonic() - begun < 1  # it need not wait
        year = time.strftime("%Y-%m-%d")
        assert f"in use by another run (host {socket.gethostname()}, pid {first.pid}, since {year}" in str(e.value)
        with pytest.raises(RunLockedError), run_directory(run_dir, ProcessGroup(), never):
            pass
    finally:
        first.send_signal(signal.SIGKILL)
        first.wait()
        first.stdin.close()
        first.stdout.close()
    owner = read_owner(run_dir)
    assert owner is not None
    assert owner.pid == first.pid  # left behind, and in nobody's way
    with lock(run_dir) as second:
        now = read_owner(run_dir)
        assert now is not None
        assert now.token == second.token
    assert read_owner(run_dir) is None
    with lock(run_dir):
        pass


def test_a_run_shows_that_it_lives_and_notices_that_another_took_its_directory(tmp_path):
    taken = threading.Event()
    said: list[str] = []

    def lost(text: str) -> None:
        said.append(text)
        taken.set()

    with lock(tmp_path, lost=lost):
        first = read_owner(tmp_path)
        assert first is not None
        until = time.monotonic() + 10
        while read_owner(tmp_path) == first:
            assert time.monotonic() < until
            time.sleep(0.01)
        write_owner(tmp_path, host="elsewhere", pid=77)
        assert taken.wait(10)
    assert "another run has taken" in said[0]
    assert "host elsewhere, pid 77, since 2023-11-1" in said[0]
    assert (tmp_path / OWNER).exists()  # that of the other run


@pytest.mark.parametrize(
    ("host", "boot", "behind"),
    [
        ("elsewhere", "", 0.0),
        ("", "another machine of that name", 0.0),
        ("elsewhere", "", 5.0),
        ("elsewhere", "", -1e5),
    ],
    ids=["other-name", "same-name", "late-clock", "early-clock"],
)
def test_a_run_on_another_host_whose_lock_cannot_be_seen_is_noticed(tmp_path, host, boot, behind):
    """As on a bucket mounted on two hosts: each host has locks of its own, and a clock of its own."""
    said: list[str] = []
    other: dict[str, Any] = {"host": host or socket.gethostname(), "boot": boot, "seen": behind}
    write_owner(tmp_path, **other)
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(0.05):
            write_owner(tmp_path, **other)

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with (
            pytest.raises(RunLockedError, match=r"in use by another run \(host .*, pid 1,"),
            lock(tmp_path, say=said.append),
        ):
            pass
    finally:
        ended.set()
        thread.join()
    assert "waiting 0.6 s to see whether that still runs" in said[0]
    # It is killed: the directory is free when it has not been written for a while, and not before.
    begun = time.monotonic()
    with lock(tmp_path, say=said.append):
        assert 0.3 < time.monotonic() - begun < 5
    write_owner(tmp_path, host="elsewhere", seen=7200)
    with lock(tmp_path):  # without waiting
        pass


def test_a_file_system_without_locks_is_named_and_the_owner_still_counts(tmp_path, monkeypatch):
    def unsupported(file: object, operation: int) -> None:
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    said: list[str] = []
    with lock(tmp_path, say=said.append):
        assert "no file locks here (Operation not supported)" in said[0]
        with pytest.raises(RunLockedError, match="in use by another run"), lock(tmp_path, say=said.append):
            pass
    write_owner(tmp_path, pid=2**22 + 1)  # higher than any process has: it was killed on this host
    begun = time.monotonic()
    with lock(tmp_path, say=said.append):
        assert time.monotonic() - begun < 0.3


def test_hosts_that_do_not_share_the_directory_are_refused(tmp_path):
    with lock(tmp_path / "a") as held:
        wait_for_token(tmp_path / "a", held.token)
        with pytest.raises(RunLockedError, match=r"is not that of host 0, .* in 0\.2 s; run_dir has to be"):
            wait_for_token(tmp_path / "b", held.token, timeout_s=0.2)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"host": "a"}'])
def test_an_owner_that_cannot_be_read_is_nobody(tmp_path, text):
    (tmp_path / OWNER).write_text(text)
    assert read_owner(tmp_path) is None
    with lock(tmp_path):
        assert read_owner(tmp_path) is not None
