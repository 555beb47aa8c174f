"""The processes of a run together: how they start, agree, stop and end. JAX's runtime connects them.

    with join(Hosts(), print) as group:
        group.check_agree("its seed", seed)
        stopping = group.stopping(step)
        while not stopping.at(step):
            ...

A process by itself is a group of one, which starts nothing.
"""

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

import jax
from jax._src import distributed  # the key-value store of the coordination service has no public name

from openpi_like.train.hosts.agreement import describe_differences
from openpi_like.train.hosts.places import Hosts, HostsError, Place, find_place, split_address
from openpi_like.train.hosts.rendezvous import Member, Relay, call_roll
from openpi_like.train.hosts.stopping import KEYS, SIGNALS, Stopping
from openpi_like.train.hosts.watchdog import Watchdog

CLOCK_TOLERANCE_S = 5.0
DIRECT = "no_grpc_proxy"
CONNECT_S = 60  # for JAX's runtime to connect processes that are all there
# Waits for work of unknown length, such as building an index; the watchdog ends them when a process is lost.
UNBOUNDED_MS = 7 * 24 * 3600 * 1000


class SignalError(HostsError):
    """A signal arrived before there was a step to stop after."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"got {signal.Signals(signum).name} before the first step; nothing is lost")
        self.exit_code = 128 + signum


def join(hosts: Hosts, say: Callable[[str], None]) -> "ProcessGroup":
    """Returns the group of this process, once all of its processes are there. Call it before anything else of JAX.

    say: prints a line.

    Raises:
        HostsError: the processes cannot find each other within `hosts.start_timeout_s`, or contradict each other.
    """
    place = find_place(hosts)
    if place is None:
        return ProcessGroup()
    if place.rank == 0:
        say(f"hosts: {place}")
    members = call_roll(place, timeout_s=hosts.start_timeout_s, say=say)
    # JAX ends a process when its connection to the coordinator breaks; with a relay, the watchdog can say why.
    relay = Relay(place.coordinator, timeout_s=CONNECT_S) if place.rank else None
    _connect(place, members, hosts, relay)
    watchdog = Watchdog(
        members,
        place.rank,
        client=distributed.global_state.client,
        relay=relay,
        peer_timeout_s=hosts.peer_timeout_s,
    )
    for signum in SIGNALS:
        signal.signal(signum, _interrupt)
    return ProcessGroup(members, place.rank, watchdog, relay)


def _connect(place: Place, members: tuple[Member, ...], hosts: Hosts, relay: Relay | None) -> None:
    port = split_address(place.coordinator)[1]
    jax.config.update("jax_enable_preemption_service", False)  # `Stopping` takes the signals
    # gRPC would send even these local connections through a proxy; it knows this name in lower case only.
    direct = [os.environ.get(DIRECT) or os.environ.get("no_proxy"), "localhost", "127.0.0.1"]
    os.environ[DIRECT] = ",".join(filter(None, direct))
    jax.config.update("jax_check_proxy_envs", False)

    def give_up() -> None:
        problem = f"JAX's runtime did not connect in {CONNECT_S} s; did one of the processes end meanwhile?"
        os.write(2, f"{members[place.rank]}: {problem}\n".encode())
        os._exit(1)

    timer = threading.Timer(CONNECT_S, give_up)
    timer.daemon = True
    timer.start()
    jax.distributed.initialize(
        relay.address if relay else f"localhost:{port}",
        place.count,
        place.rank,
        local_device_ids=hosts.local_device_ids or own_device(members, place.rank),
        cluster_detection_method="deactivate",
        # JAX ends processes with a C++ trace after these; the timer and the watchdog come first, with a clear line.
        initialization_timeout=2 * CONNECT_S,
        heartbeat_timeout_seconds=int(20 * hosts.peer_timeout_s),
    )
    timer.cancel()


def own_device(members: tuple[Member, ...], rank: int) -> list[int] | None:
    """Returns one GPU for each of several processes on a host; None, all, where a process sees only its own."""
    me = members[rank]
    beside = [m.rank for m in members if (m.name, m.boot) == (me.name, me.boot)]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if len(beside) == 1 or (visible is not None and len(visible.split(",")) < len(beside)):
        return None
    return [beside.index(rank)]


def _interrupt(signum: int, frame: FrameType | None) -> None:
    raise SignalError(signum)


class ProcessGroup:
    """The processes of a run, seen from one of them. Leaving its `with` block ends the run, for all of them alike.

    rank, count: of this process, and of processes. lead: this is the one that prints and writes what is written once.
    """

    def __init__(
        self,
        members: tuple[Member, ...] = (),
        rank: int = 0,
        watchdog: Watchdog | None = None,
        relay: Relay | None = None,
    ) -> None:
        self.rank, self.count = rank, max(len(members), 1)
        self._members, self._watchdog, self._relay = members, watchdog, relay

    @property
    def lead(self) -> bool:
        return self.rank == 0

    def __enter__(self) -> "ProcessGroup":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Waits for the others after a clean end, and ends this process after an error, at once and for all to see."""
        if self._watchdog is None:
            return
        stopping = self._watchdog.stopping
        together = isinstance(error, SystemExit) and stopping is not None and stopping.signal is not None
        if error is not None and not together:
            self._watchdog.fail(error)
        self._barrier("end")
        self._watchdog.close()
        jax.distributed.shutdown()
        if self._relay is not None:
            self._relay.close()

    def goes_on_from(self, resume: Callable[[], str]) -> None:
        """Sets what tells, when a process is lost, where the run will go on: "step 1000"."""
        if self._watchdog is not None:
            self._watchdog.resume = resume

    def before_exit(self, release: Callable[[], None]) -> None:
        """Sets what is to be released when this process has to end in the middle of something."""
        if self._watchdog is not None:
            self._watchdog.release = release

    def stop_all(self, problem: str) -> None:
        """Ends this process from any thread, and thereby the others, with this line."""
        if self._watchdog is not None:
            self._watchdog.fail(HostsError(problem))
        os.write(2, f"{problem}\n".encode())
        os._exit(1)

    def stopping(self, step: int) -> Stopping:
        """Returns what takes SIGTERM and SIGINT from now on; `step` is the last one done."""
        stopping = Stopping(step, rank=self.rank, count=self.count)
        if self._watchdog is not None:
            self._watchdog.stopping = stopping
        return stopping

    # ---- Agreement ---------------------------------------------------------------------------------------------------

    def broadcast(self, name: str, text: str) -> str:
        """Returns the text that the lead has under this name, which nothing else may use."""
        if self.count == 1:
            return text
        if self.lead:
            self._client.key_value_set(f"{KEYS}/said/{name}", text)
            return text
        return self._client.blocking_key_value_get(f"{KEYS}/said/{name}", UNBOUNDED_MS)

    def check_agree(self, what: str, mine: Any) -> None:
        """Compares JSON-ready data with the lead's. what: its name, such as "its config".

        Raises:
            HostsError: they differ; says in which fields, with both values. The other processes stop with that line.
        """
        text = json.dumps(mine, sort_keys=True)
        theirs = self.broadcast(f"agree/{what}", text)
        if theirs != text:
            differences = describe_differences(json.loads(text), json.loads(theirs))
            raise HostsError(f"{what} is not that of {self._members[0]}: {differences}")
        self._barrier(f"agree/{what}")

    def check_clocks(self) -> None:
        """Compares the wall clocks, which logs and file systems depend on.

        Raises:
            HostsError: this one is further than `CLOCK_TOLERANCE_S` from that of the lead.
        """
        self._barrier("clocks")
        now = time.time()  # all of them within milliseconds
        ahead = now - float(self.broadcast("clock", repr(now)))
        if abs(ahead) > CLOCK_TOLERANCE_S:
            where = "ahead of" if ahead > 0 else "behind"
            raise HostsError(
                f"its clock is {abs(ahead):.1f} s {where} that of {self._members[0]}, at most {CLOCK_TOLERANCE_S:g} s "
                "are accepted; set both by NTP"
            )
        self._barrier("clocks checked")

    @property
    def _client(self) -> Any:
        return distributed.global_state.client

    def _barrier(self, name: str) -> None:
        if self.count > 1:
            self._client.wait_at_barrier(f"{KEYS}/{name}", UNBOUNDED_MS)
