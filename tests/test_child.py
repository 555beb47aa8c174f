"""A program that is stopped lets the one that it runs save, and leaves none behind."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from openpi_like.child import run_program

CHILD = """
import pathlib, signal, sys, time
said = pathlib.Path(sys.argv[1])
def save(signum, frame):
    time.sleep(1)  # longer than a parent that is in a hurry waits
    said.write_text(f"saved after {signum}")
    sys.exit(3)
signal.signal(signal.SIGTERM, save)
signal.signal(signal.SIGINT, save)
said.write_text("started")
while True:
    time.sleep(0.01)
"""


def test_the_status_is_that_of_the_program() -> None:
    assert run_program(["-c", "raise SystemExit(5)"]) == 5
    assert run_program(["-c", ""]) == 0


@pytest.mark.parametrize(("signum", "to_group", "status"), [("SIGTERM", False, 143), ("SIGINT", True, -signal.SIGINT)])
def test_a_signal_ends_it_after_it_has_saved(tmp_path: Path, signum: str, to_group: bool, status: int) -> None:
    said, number = tmp_path / "said", signal.Signals[signum]
    # A shell's background jobs ignore SIGINT, and so would what they start.
    call = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    call += f"from openpi_like.child import run_program; run_program(['-c', {CHILD!r}, {str(said)!r}])"
    parent = subprocess.Popen([sys.executable, "-c", call], start_new_session=True, stderr=subprocess.DEVNULL)
    while not (said.is_file() and said.read_text() == "started"):
        assert parent.poll() is None
        try:
            parent.wait(timeout=0.02)
        except subprocess.TimeoutExpired:
            continue
    (os.killpg if to_group else os.kill)(parent.pid, number)  # its group has its number
    assert parent.wait(timeout=60) == status
    assert said.read_text() == f"saved after {int(number)}"
    with pytest.raises(ProcessLookupError):
        os.killpg(parent.pid, 0)  # nobody is left
