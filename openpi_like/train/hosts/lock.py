"""One run per directory: a lock that other hosts see too, and that never outlives its run."""

import contextlib
import dataclasses
import datetime
import errno
import fcntl
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from openpi_like.train.hosts.places import HostsError, boot_id
from openpi_like.train.hosts.process_group import ProcessGroup

LOCK, OWNER = "run.lock", "running.json"
BEAT_S = 10.0
STALE_S = 90.0  # a run that has not written for so long is over; file systems may show a minute-old file to other hosts
LONG_AGO_S = 3600.0  # a run that wrote before that is over, unless the clocks of two hosts are this far apart
VISIBLE_S = 120.0  # shared file systems show a new file to other hosts after their caches' lifetime


class RunLockedError(HostsError):
    """Another run uses the directory, or this run's hosts do not share it."""


@dataclasses.dataclass(frozen=True)
class Owner:
    """Who uses a run directory. started, seen: seconds since 1970, by that host's clock. token: of this use, drawn at
    random. boot: see `boot_id`."""

    host: str
    pid: int
    started: float
    seen: float
    token: str
    boot: str = ""

    @property
    def is_here(self) -> bool:
        """Whether it runs, or ran, on this host since that was started."""
        return (self.host, self.boot) == (socket.gethostname(), boot_id())

    def __str__(self) -> str:
        since = datetime.datetime.fromtimestamp(self.started).astimezone().isoformat(sep=" ", timespec="seconds")
        return f"host {self.host}, pid {self.pid}, since {since}"


class RunLock:
    """Holds a run directory for one run, in a `with` block in the lead process.

    An advisory lock on `run.lock` refuses a second run at once, and ends with the process, however that ends. Some
    shared file systems (buckets mounted by gcsfuse, NFS without its lock service) keep such locks to one host, others
    have none. So the owner also writes `running.json` again every few seconds: who finds that of another host waits to
    see whether it changes, by its own clock.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        lost: Callable[[str], None],
        say: Callable[[str], None],
        beat_s: float = BEAT_S,
        stale_s: float = STALE_S,
    ) -> None:
        """lost: is told, in a thread, that another run has taken the directory. say: prints a line."""
        self.token = secrets.token_hex(8)
        self._run_dir, self._lost, self._say = run_dir, lost, say
        self._beat_s, self._stale_s = beat_s, stale_s
        self._started = time.time()
        self._closing, self._writing = threading.Event(), threading.Lock()
        self._thread = threading.Thread(target=self._beat, name="run lock", daemon=True)

    def __enter__(self) -> "RunLock":
        """
        Raises:
            RunLockedError: another run has the directory.
        """
        self._run_dir.mkdir(parents=True, exist_ok=True)
        self._file = (self._run_dir / LOCK).open("a")
        try:
            alone_here = self._try_lock()
            self._check_owner(alone_here)
            self._write()
        except BaseException:
            self._file.close()
            raise
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def release(self) -> None:
        """Ends the use of the directory; may be called twice."""
        with self._writing:
            self._closing.set()
            owner = read_owner(self._run_dir)
            if owner is not None and owner.token == self.token:
                (self._run_dir / OWNER).unlink(missing_ok=True)
            self._file.close()  # which unlocks

    def _try_lock(self) -> bool:
        """Takes the advisory lock; returns False where the file system has none."""
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise self._refusal(read_owner(self._run_dir)) from None
        except OSError as e:
            self._say(f"{self._run_dir}: no file locks here ({e.strerror}); only {OWNER} shows another run")
            return False
        return True

    def _check_owner(self, alone_here: bool) -> None:
        owner = read_owner(self._run_dir)
        if owner is None or time.time() - owner.seen > LONG_AGO_S:
            return
        if owner.is_here and (alone_here or not _is_running(owner.pid)):
            return  # it was killed here
        self._say(
            f"{self._run_dir} was not given back by its last run ({owner}); waiting {self._stale_s:g} s to see whether "
            "that still runs"
        )
        until = time.monotonic() + self._stale_s
        while time.monotonic() < until:
            time.sleep(self._beat_s / 10)
            now = read_owner(self._run_dir)
            if now is None:
                return
            if now != owner:
                raise self._refusal(now)

    def _refusal(self, owner: Owner | None) -> RunLockedError:
        who = owner or "which has not said yet who it is"
        return RunLockedError(
            f"{self._run_dir} is in use by another run ({who}); wait for its end or stop it, or give this one another "
            "run_dir"
        )

    def _beat(self) -> None:
        while not self._closing.wait(self._beat_s):
            # A file system that fails for a while is not another run.
            with contextlib.suppress(OSError):
                owner = read_owner(self._run_dir)
                if owner is not None and owner.token != self.token:
                    self._lost(f"another run has taken {self._run_dir} ({owner})")
                    return
                with self._writing:
                    if not self._closing.is_set():
                        self._write()

    def _write(self) -> None:
        owner = Owner(socket.gethostname(), os.getpid(), self._started, time.time(), self.token, boot_id())
        temporary = self._run_dir / f"{OWNER}.new"
        temporary.write_text(json.dumps(dataclasses.asdict(owner)))
        os.replace(temporary, self._run_dir / OWNER)


def read_owner(run_dir: Path) -> Owner | None:
    """Returns who uses a run directory, or used it until it was killed; None for nobody."""
    for _ in range(3):
        try:
            return Owner(**json.loads((run_dir / OWNER).read_text()))
        except (FileNotFoundError, TypeError, ValueError):
            return None
        except OSError as e:
            if e.errno != errno.ESTALE:  # NFS: it was written anew while this host opened it
                raise
    return None


def wait_for_token(run_dir: Path, token: str, *, timeout_s: float = VISIBLE_S) -> None:
    """Waits until this host sees in the directory what the lead, which holds its lock, has written there.

    Raises:
        RunLockedError: it does not; the hosts have directories of the same name, and not the same directory.
    """
    until = time.monotonic() + timeout_s
    while True:
        owner = read_owner(run_dir)
        if owner is not None and owner.token == token:
            return
        if time.monotonic() > until:
            raise RunLockedError(
                f"{run_dir} on this host is not that of host 0, whose {OWNER} did not appear in {timeout_s:g} s; "
                "run_dir has to be on a file system that all hosts share"
            )
        time.sleep(0.1)


@contextlib.contextmanager
def run_directory(run_dir: str | Path, group: ProcessGroup, say: Callable[[str], None]) -> Iterator[None]:
    """Keeps a run directory for the processes of a group: the lead holds its lock, the others see that they share it.

    Raises:
        RunLockedError: another run has it, or the hosts do not share it.
    """
    if group.lead:
        with RunLock(Path(run_dir), lost=group.stop_all, say=say) as lock:
            group.before_exit(lock.release)
            group.broadcast("run directory", lock.token)
            yield
    else:
        wait_for_token(Path(run_dir), group.broadcast("run directory", ""))
        yield


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
