"""Programs that a program runs: a signal reaches them, and is waited for, since they may have something to save."""

import contextlib
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence


@contextlib.contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """Makes SIGTERM an exit of this process with status 143, so that what it has started is ended too."""
    before = signal.signal(signal.SIGTERM, lambda signum, frame: sys.exit(128 + signum))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def run_program(arguments: Sequence[str]) -> int:
    """Runs a Python program to its end and returns its exit status.

    Ctrl-C of a terminal goes to both; the program is waited for, until a second one. SIGTERM is passed on, and the
    program is waited for.
    """
    with ended_by_sigterm():
        process = subprocess.Popen([sys.executable, *arguments])
        try:
            return process.wait()
        except KeyboardInterrupt:
            process.wait()
            raise
        except SystemExit:
            process.terminate()
            process.wait()
            raise
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
