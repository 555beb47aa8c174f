"""The processes of a run together: they agree, stop at the same step, and notice that one of them is lost."""

import contextlib
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from openpi_like.train.hosts.agreement import describe_differences, software
from openpi_like.train.hosts.places import HostsError
from openpi_like.train.hosts.process_group import ProcessGroup, own_device
from openpi_like.train.hosts.rendezvous import Member
from openpi_like.train.hosts.stopping import ALL, EACH, Stopping

REPOSITORY = Path(__file__).resolve().parents[3]


# ---- Stopping --------------------------------------------------------------------------------------------------------


@pytest.fixture
def handlers() -> Iterator[None]:
    """Puts the signal handlers of the test runner back."""
    before = {signum: signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGINT)}
    yield
    for signum, handler in before.items():
        signal.signal(signum, handler)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_process_by_itself_stops_after_its_step(handlers, signum):
    stopping = ProcessGroup().stopping(3)
    assert not stopping.at(4)
    os.kill(os.getpid(), signum)
    os.kill(os.getpid(), signal.SIGTERM)  # the first one counts
    assert stopping.at(5)
    assert stopping.signal == signum


def test_processes_at_other_steps_stop_at_the_same_one(handlers):
    store: dict[str, str] = {}
    group = [Stopping(10, rank=rank, count=3) for rank in range(3)]

    def settle(rank: int) -> None:
        everyone, each = (
            {k.removeprefix(f"{root}/"): v for k, v in store.items() if k.startswith(f"{root}/")}
            for root in (ALL, EACH)
        )
        group[rank].settle(everyone, each if rank == 0 else {}, store.__setitem__)

    assert not any(stopping.at(11) for stopping in group)
    os.kill(os.getpid(), signal.SIGTERM)  # which the last of them gets
    settle(0)
    assert not store
    settle(2)
    settle(0)  # has heard of it, and goes no further than step 11
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(group[0].at, 12)
        assert not group[1].at(12)
        assert not group[1].at(13)  # has not heard of it, and goes on
        for rank in (1, 2):
            settle(rank)
        assert not waiting.done()
        settle(0)  # knows all three: 11, 13, 11
        settle(0)
        assert waiting.result(timeout=5) is False
    for rank in (1, 2):
        settle(rank)
    for stopping in group:
        assert not stopping.at(13)
        assert stopping.at(14)
        assert stopping.signal == signal.SIGTERM


@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        (None, [[0], [1], None]),
        ("4,5", [[0], [1], None]),  # of those that are visible
        ("4", [None, None, None]),  # each process sees a GPU of its own already
    ],
)
def test_processes_on_one_host_share_its_gpus(monkeypatch, visible, expected):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    # The third has the same name and is another host, as containers made from one image may be.
    members = tuple(Member(rank, 3, "node", rank, boot) for rank, boot in enumerate(("a", "a", "b")))
    assert [own_device(members, rank) for rank in range(3)] == expected


# ---- Agreement -------------------------------------------------------------------------------------------------------


def test_differences_are_named_with_both_values():
    mine = {"steps": 5, "data": {"entries": [{"path": "/a", "weight": 1.0}, {"path": "/b"}]}, "seed": 0, "keep": None}
    theirs = {"steps": 5, "data": {"entries": [{"path": "/c", "weight": 1.0}, {"path": "/b"}]}, "seed": 1}
    assert describe_differences(mine, mine) == ""
    assert describe_differences(mine, theirs) == (
        "data.entries.0.path: '/a' here, '/c' there; seed: 0 here, 1 there; keep: None here, absent there"
    )
    assert describe_differences([1, 2], [1, 2, 3]) == "value: [1, 2] here, [1, 2, 3] there"
    many = {str(i): i for i in range(9)}
    assert describe_differences(many, {}).endswith("4: 4 here, absent there; and 4 more")


def test_software_names_what_results_depend_on():
    found = software()
    assert {"python", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "devices"} <= found.keys()
    assert found["devices"] == "4 x cpu"
    assert re.fullmatch("[0-9a-f]{12}", found["sources of openpi_like"])


@pytest.mark.parametrize(("seconds", "message"), [(3, None), (-60, "60.0 s ahead of that of host 0"), (9, "behind")])
def test_clocks_that_differ_are_named(monkeypatch, seconds, message):
    members = tuple(Member(rank, 2, "node", 7) for rank in range(2))
    group = ProcessGroup(members, 1)
    monkeypatch.setattr(ProcessGroup, "_barrier", lambda self, name: None)
    monkeypatch.setattr(ProcessGroup, "broadcast", lambda self, name, text: repr(float(text) + seconds))
    if message is None:
        group.check_clocks()
    else:
        with pytest.raises(HostsError, match=message):
            group.check_clocks()


# ---- Processes -------------------------------------------------------------------------------------------------------

PEER_TIMEOUT_S = 3.0
HOST = r"host {} of 2 \(\S+, pid \d+\)"


def line(rank: int, other: int, what: str) -> str:
    """The one line that `rank` prints when it ends because of `other`, as a regular expression."""
    return rf"{HOST.format(rank)}: {HOST.format(other)} {what}.*; this run stops\. .* it goes on from step 7\n"


@dataclasses.dataclass
class Process:
    """A started program. out, err: what it prints."""

    popen: subprocess.Popen
    out: Path
    err: Path

    def wait_for(self, text: str, *, seconds: float = 120) -> None:
        until = time.monotonic() + seconds
        while text not in self.out.read_text():
            assert self.popen.poll() is None, self.err.read_text()
            assert time.monotonic() < until, f"no {text!r} in {self.out.read_text()!r}"
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.popen.wait(timeout=0.02)

    def end(self, *, seconds: float = 60) -> tuple[int, str, str]:
        """Returns the exit code and what it has printed, once it has ended by itself."""
        code = self.popen.wait(timeout=seconds)
        return code, self.out.read_text(), self.err.read_text()


@contextlib.contextmanager
def programs(
    tmp_path: Path, address: str, *settings: dict[str, Any], environ: dict[str, str] | None = None
) -> Iterator[list[Process]]:
    """Starts host_program.py once for each settings, with two devices each; environ: of the last one."""
    # Without what hides C++ messages in the tests, so that they see what a user sees.
    plain = {k: v for k, v in os.environ.items() if k != "TF_CPP_MIN_LOG_LEVEL"}
    plain |= {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "PYTHONPATH": str(REPOSITORY)}
    started = []
    try:
        for rank, given in enumerate(settings):
            hosts = {"coordinator": address, "count": len(settings), "rank": rank, "peer_timeout_s": PEER_TIMEOUT_S}
            files = tmp_path / f"out{rank}", tmp_path / f"err{rank}"
            argument = json.dumps({"hosts": hosts, "seed": 0, "fail_at": None} | given)
            with files[0].open("w") as out, files[1].open("w") as err:
                popen = subprocess.Popen(
                    [sys.executable, str(REPOSITORY / "tests/train/hosts/host_program.py"), argument],
                    env=plain | (environ or {} if rank == len(settings) - 1 else {}),
                    stdout=out,
                    stderr=err,
                )
            started.append(Process(popen, *files))
        yield started
    finally:
        for process in started:
            process.popen.kill()
            process.popen.wait()


def test_all_processes_stop_at_the_same_step_when_one_is_told_to(tmp_path, address):
    # gRPC would ask a proxy for the coordinator; this one does not exist.
    proxy = {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}
    with programs(tmp_path, address, {}, {}, environ=proxy) as both:
        for process in both:
            process.wait_for("running")
        both[1].popen.send_signal(signal.SIGTERM)
        ends = [process.end() for process in both]
    (stopped,) = {re.search(r"stopped at (\d+) by SIGTERM with 4 devices", out)[0] for _, out, _ in ends}  # type: ignore[index]
    assert int(stopped.split()[2]) > 5
    assert [(code, err) for code, _, err in ends] == [(143, ""), (143, "")]
    assert "hosts: 2 processes, found by hosts.coordinator, count and rank, coordinator localhost:" in ends[0][1]
    assert "hosts:" not in ends[1][1]


@pytest.mark.parametrize(
    ("victim", "signum", "what"),
    [
        (1, signal.SIGKILL, r"(is gone \(here: .*|has not been heard of for 3 s)"),  # gloo may report it, or hang
        (0, signal.SIGKILL, "is gone"),  # JAX's coordinator with it
        (0, signal.SIGSTOP, "has not been heard of for 3 s"),  # a host that hangs, and holds all connections
    ],
)
def test_when_a_process_is_lost_the_other_ends_in_time_with_one_line(tmp_path, address, victim, signum, what):
    with programs(tmp_path, address, {}, {}) as both:
        for process in both:
            process.wait_for("running")
        both[victim].popen.send_signal(signum)
        begun = time.monotonic()
        code, _, err = both[1 - victim].end()
        seconds = time.monotonic() - begun
    assert code == 1
    assert re.fullmatch(line(1 - victim, victim, what), err), err
    assert seconds < PEER_TIMEOUT_S + 10  # for a busy machine


def test_the_error_of_one_process_ends_all_and_is_shown_once(tmp_path, address):
    with programs(tmp_path, address, {}, {"fail_at": 30}) as both:
        (code, _, err), (failed, _, trace) = (process.end() for process in both)
    assert (code, failed) == (1, 1)
    assert re.fullmatch(line(0, 1, "stopped: OSError: no batch 30"), err), err
    assert re.match(r"host 1 of 2 \(\S+, pid \d+\):\nTraceback ", trace)
    assert trace.endswith("OSError: no batch 30\nin the second line\n")


def test_configs_that_differ_are_refused_on_all_hosts(tmp_path, address):
    with programs(tmp_path, address, {}, {"seed": 1}) as both:
        (code, _, err), (differs, _, own) = (process.end() for process in both)
    assert (code, differs) == (1, 1)
    said = r"its config is not that of host 0 of 2 \(\S+, pid \d+\): optimizer\.seed: 1 here, 0 there"
    assert re.fullmatch(rf"host 1 of 2 \(\S+, pid \d+\): {said}\n", own), own
    assert re.match(rf"host 0 of 2 \(\S+, pid \d+\): host 1 of 2 \(\S+, pid \d+\) stopped: {said};", err), err
    assert err.count("\n") == 1


def test_the_trainer_ends_in_time_when_a_host_never_arrives(address):
    hosts = [f"hosts.coordinator={address}", "hosts.count=2", "hosts.rank=0", "hosts.start_timeout_s=1"]
    done = subprocess.run(
        [sys.executable, "train/train.py", "configs/demo_pretrain.py", *hosts],
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1
    assert re.fullmatch(r"host 0 of 2 \(\S+, pid \d+\): host 1 did not arrive in 1 s; .*\n", done.stderr), done.stderr
