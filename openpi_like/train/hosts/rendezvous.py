"""What has to be in order before JAX's runtime connects the processes, and what that runtime must not see afterwards.

The runtime itself is JAX's (`jax.distributed`). It ends a process with a C++ trace, which no Python code can prevent,
when a process is missing at the start and when the coordinator goes away. So the processes first call their roll, which
can say who is missing; and the connection to the coordinator goes through a relay, which does not break.
"""

import contextlib
import dataclasses
import json
import os
import selectors
import socket
import threading
import time
from collections.abc import Callable, Collection, Iterator
from typing import Any

from openpi_like.train.hosts.places import HostsError, Place, boot_id, split_address

UPDATE_S = 1.0  # how often those that wait are told who is missing
SILENCE_S = 10.0  # a coordinator that tells nothing for so long is asked again
MAX_HELLO = 4096  # bytes


@dataclasses.dataclass(frozen=True)
class Member:
    """A process of the run. name: of its host. boot: of that host's system, as two of them may have one name."""

    rank: int
    count: int
    name: str
    pid: int
    boot: str = ""

    def __str__(self) -> str:
        return f"host {self.rank} of {self.count} ({self.name}, pid {self.pid})"


# ---- Roll call -------------------------------------------------------------------------------------------------------


def call_roll(place: Place, *, timeout_s: float, say: Callable[[str], None]) -> tuple[Member, ...]:
    """Returns all processes of the run, in the order of their ranks, once all are there.

    say: is told, after a while, whom this process waits for.

    Raises:
        HostsError: one is missing after `timeout_s`, the coordinator cannot be reached, or two processes have other
            ideas of the run (the same rank, another count).
    """
    me = Member(place.rank, place.count, socket.gethostname(), os.getpid(), boot_id())
    return (_call if place.rank == 0 else _answer)(place, me, timeout_s, say)


def _call(place: Place, me: Member, timeout_s: float, say: Callable[[str], None]) -> tuple[Member, ...]:
    """The lead: listens where JAX's coordinator will be, until all others have said who they are."""
    begun = time.monotonic()
    deadline = begun + timeout_s
    heard: dict[socket.socket, bytes] = {}  # of all that have connected
    here: dict[int, tuple[Member, socket.socket | None]] = {0: (me, None)}
    left: set[int] = set()
    with contextlib.ExitStack() as stack, selectors.DefaultSelector() as selector:
        server = stack.enter_context(_listen(place, me))
        selector.register(server, selectors.EVENT_READ)
        problem, update, told = "", begun + UPDATE_S, False
        while len(here) < place.count and not problem:
            for key, _ in selector.select(timeout=UPDATE_S / 4):
                if key.data is None:
                    line = stack.enter_context(server.accept()[0])
                    line.settimeout(SILENCE_S)
                    selector.register(line, selectors.EVENT_READ, data=line)
                    heard[line] = b""
                    continue
                line = key.data
                more = _receive(line)
                heard[line] += more
                if not more or len(heard[line]) > MAX_HELLO:  # it went away, or is not one of us
                    left |= {rank for rank, of in here.items() if of[1] is line}
                    here = {rank: of for rank, of in here.items() if of[1] is not line}
                    selector.unregister(line)
                    del heard[line]
                    line.close()
                    continue
                member = _parse(heard[line])
                if member is None:
                    continue
                if member.count != place.count:
                    problem = f"{member} was started for another number of processes than {me}"
                elif member.rank in here:
                    problem = f"{member} came where {here[member.rank][0]} is already; every process needs its own rank"
                here[member.rank] = (member, line)
            now = time.monotonic()
            missing = sorted(set(range(place.count)) - set(here))
            if missing and now > deadline:
                problem = problem or _absence(missing, timeout_s, left=left.intersection(missing))
            elif missing and now > update:
                update = now + UPDATE_S
                for line in heard:
                    _send(line, {"missing": missing})
                if not told and now > begun + SILENCE_S:
                    told = True
                    say(f"waiting for {_names(missing)} of {place.count} at {place.coordinator}")
        selector.unregister(server)
        server.close()  # the port is JAX's now
        roster = tuple(here[rank][0] for rank in sorted(here))
        message = {"failed": problem} if problem else {"roster": [dataclasses.asdict(member) for member in roster]}
        for line in heard:
            _send(line, message)
    if problem:
        raise HostsError(f"{me}: {problem}")
    return roster


def _listen(place: Place, me: Member) -> socket.socket:
    port = split_address(place.coordinator)[1]
    dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual else socket.AF_INET
    try:
        return socket.create_server(("", port), family=family, backlog=place.count, dualstack_ipv6=dual)
    except OSError as e:
        raise HostsError(
            f"{me}: cannot listen on port {port} ({os.strerror(e.errno or 0)}), is another run on this host? Give a "
            f"free port in hosts.coordinator (now {place.coordinator}, from {place.found_by})"
        ) from None


def _answer(place: Place, me: Member, timeout_s: float, say: Callable[[str], None]) -> tuple[Member, ...]:
    """The others: tell the lead who they are, and wait until it says that all are there."""
    deadline = time.monotonic() + timeout_s
    missing: list[int] | None = None
    why, told = "no answer", False
    while time.monotonic() < deadline:
        try:
            with socket.create_connection(split_address(place.coordinator), timeout=_left(deadline)) as line:
                _send(line, dataclasses.asdict(me))
                for message in _messages(line, deadline + 2 * UPDATE_S):  # the lead gives up first, and says why
                    if "roster" in message:
                        return tuple(Member(**member) for member in message["roster"])
                    if "failed" in message:
                        raise HostsError(f"{me}: {message['failed']}")
                    missing = message["missing"]
            why = "it closed the connection"
        except (OSError, ValueError) as e:
            why = "what answers there is not the start of a run" if isinstance(e, ValueError) else str(e)
        if not told and time.monotonic() > deadline - timeout_s + SILENCE_S:
            told = True
            say(f"waiting for host 0 of {place.count} at {place.coordinator} ({why})")
        time.sleep(max(0, min(0.2, deadline - time.monotonic())))
    if missing:
        raise HostsError(f"{me}: {_absence(missing, timeout_s)}")
    raise HostsError(
        f"{me}: host 0 cannot be reached at {place.coordinator} in {timeout_s:g} s ({why}); is it started, and is "
        f"that its address (from {place.found_by})?"
    )


def _left(deadline: float) -> float:
    return max(0.1, min(SILENCE_S, deadline - time.monotonic()))


def _send(line: socket.socket, message: Any) -> None:
    with contextlib.suppress(OSError):  # whoever is gone is noticed when its line is read
        line.sendall(json.dumps(message).encode() + b"\n")


def _receive(line: socket.socket, size: int = MAX_HELLO) -> bytes:
    try:
        return line.recv(size)
    except OSError:
        return b""


def _messages(line: socket.socket, deadline: float) -> Iterator[Any]:
    held = b""
    while True:
        line.settimeout(_left(deadline))
        heard = line.recv(1 << 16)
        if not heard:
            return
        *whole, held = (held + heard).split(b"\n")
        yield from map(json.loads, whole)


def _parse(hello: bytes) -> Member | None:
    """Returns who says hello; None while it is incomplete, and for scanners of ports and health checks."""
    try:
        member = Member(**json.loads(hello)) if hello.endswith(b"\n") else None
    except (TypeError, ValueError):
        return None
    return member if member is not None and type(member.rank) is type(member.count) is int else None


def _names(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
    return f"host{'s' * (len(ranks) > 1)} {shown}"


def _absence(missing: list[int], timeout_s: float, *, left: Collection[int] = ()) -> str:
    """left: those of the missing that were there before."""
    never = [rank for rank in missing if rank not in left]
    what = [f"{_names(never)} did not arrive in {timeout_s:g} s"] if never else []
    what += [f"{_names(sorted(left))} arrived and left"] if left else []
    return (
        f"{' and '.join(what)}; start the same command on all hosts within that time, or give more with "
        "hosts.start_timeout_s"
    )


# ---- Relay -----------------------------------------------------------------------------------------------------------


class Relay:
    """Carries the connection of this process to the coordinator, and keeps this end of it open when the other breaks.

    address: where JAX connects to instead. broken: set when the coordinator's end has gone.
    """

    def __init__(self, coordinator: str, *, timeout_s: float) -> None:
        """timeout_s: how long to try for each connection; the coordinator may not listen yet."""
        self._coordinator, self._timeout_s = split_address(coordinator), timeout_s
        self._server = socket.create_server(("127.0.0.1", 0))
        self._ends: list[socket.socket] = []  # referred to, so that they stay open
        self.address = f"127.0.0.1:{self._server.getsockname()[1]}"
        self.broken = threading.Event()
        self._start(self._accept)

    def close(self) -> None:
        """Ends all connections, when JAX has closed its own."""
        for end in (self._server, *self._ends):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def _start(self, target: Callable[..., None], *args: Any) -> None:
        threading.Thread(target=target, args=args, name="relay", daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                near = self._server.accept()[0]
                self._ends.append(near)
                self._start(self._connect, near)

    def _connect(self, near: socket.socket) -> None:
        deadline = time.monotonic() + self._timeout_s
        while not self.broken.is_set():
            try:
                far = socket.create_connection(self._coordinator, timeout=_left(deadline))
            except OSError:
                if time.monotonic() > deadline:
                    self.broken.set()
                time.sleep(0.02)
                continue
            self._ends.append(far)
            for line in (near, far):
                line.settimeout(None)
                line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            finished = threading.Event()
            self._start(self._outward, near, far, finished)
            if _carry(far, near) and not finished.is_set():
                self.broken.set()
            return

    def _outward(self, near: socket.socket, far: socket.socket, finished: threading.Event) -> None:
        if _carry(near, far):  # JAX has closed its end
            finished.set()
            with contextlib.suppress(OSError):
                far.shutdown(socket.SHUT_RDWR)


def _carry(source: socket.socket, sink: socket.socket) -> bool:
    """Carries bytes until one of the two ends; returns whether it was the source."""
    while data := _receive(source, 1 << 16):
        try:
            sink.sendall(data)
        except OSError:
            return False
    return True
