"""Before the processes of a run are connected: the roll call, and the relay to the coordinator."""

import contextlib
import os
import re
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from openpi_like.train.hosts.places import HostsError, Place
from openpi_like.train.hosts.rendezvous import Relay, call_roll


def roll(*places: Place, timeout_s: float = 5.0) -> list[Any]:
    """What each of the processes learns, its members or an error's text; all of them are threads of this one."""

    def call(place: Place) -> Any:
        try:
            return call_roll(place, timeout_s=timeout_s, say=lambda _: None)
        except HostsError as e:
            return str(e)

    with ThreadPoolExecutor(len(places)) as pool:
        return list(pool.map(call, places))


def test_all_processes_learn_who_is_there(address):
    told = roll(*(Place("test", address, 3, rank) for rank in (2, 0, 1)))
    assert told[0] == told[1] == told[2]
    assert [m.rank for m in told[0]] == [0, 1, 2]
    assert str(told[0][2]) == f"host 2 of 3 ({socket.gethostname()}, pid {os.getpid()})"


def test_those_that_wait_learn_in_bounded_time_who_is_missing(address):
    begun = time.monotonic()
    told = roll(*(Place("test", address, 5, rank) for rank in (0, 3)), timeout_s=1.5)
    assert time.monotonic() - begun < 3
    for text in told:
        assert "hosts 1, 2, 4 did not arrive in 1.5 s" in text
        assert "hosts.start_timeout_s" in text
        assert "\n" not in text


def test_a_coordinator_that_cannot_be_reached_is_named(address):
    (alone,) = roll(Place("Slurm", address, 2, 1), timeout_s=1.0)
    assert f"host 0 cannot be reached at {address} in 1 s" in alone
    assert "Connection refused" in alone
    assert "(from Slurm)" in alone


@pytest.mark.parametrize(
    ("others", "message"),
    [
        ([(3, 1), (3, 1)], "host 1 of 3 .* came where host 1 of 3 .* is already"),
        ([(4, 2)], "host 2 of 4 .* was started for another number of processes than host 0 of 3"),
    ],
)
def test_processes_that_contradict_each_other_stop_at_once(address, others, message):
    told = roll(*(Place("test", address, count, rank) for count, rank in ((3, 0), *others)), timeout_s=20.0)
    assert all(re.search(message, text) for text in told), told


def test_a_port_in_use_is_named_and_what_else_calls_there_is_ignored(address):
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        (text,) = roll(Place("test", f"localhost:{port}", 2, 0))
        assert f"cannot listen on port {port} (Address already in use)" in text
    port = int(address.rpartition(":")[2])

    def scan() -> None:
        until = time.monotonic() + 5
        while time.monotonic() < until:
            with contextlib.suppress(ConnectionRefusedError), socket.create_connection(("localhost", port)) as line:
                line.sendall(b"GET / HTTP/1.1\r\n\r\n" + b"x" * 5000)
                return

    places = [Place("test", address, 2, rank) for rank in (0, 1)]
    with ThreadPoolExecutor(3) as pool:
        lead = pool.submit(roll, places[0])
        pool.submit(scan).result()
        assert len(roll(places[1])[0]) == len(lead.result()[0]) == 2


def test_a_relay_outlives_the_coordinator_and_says_so():
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        relay = Relay(f"127.0.0.1:{server.getsockname()[1]}", timeout_s=1.0)
        stack.callback(relay.close)

        def connect() -> tuple[socket.socket, socket.socket]:
            host, port = relay.address.split(":")
            near = stack.enter_context(socket.create_connection((host, int(port)), timeout=5))
            return near, stack.enter_context(server.accept()[0])

        near, far = connect()
        sent = os.urandom(300_000)
        for source, sink in ((near, far), (far, near)):
            source.sendall(sent)
            got = b""
            while len(got) < len(sent):
                got += sink.recv(1 << 16)
            assert got == sent
        # JAX closes its end: the coordinator sees that, and nothing is broken.
        near.close()
        far.settimeout(5)
        assert far.recv(1) == b""
        assert not relay.broken.is_set()
        # The coordinator is killed: JAX sees nothing of it, on this connection or on later ones.
        near, far = connect()
        far.close()
        assert relay.broken.wait(5)
        server.close()
        host, port = relay.address.split(":")
        again = stack.enter_context(socket.create_connection((host, int(port)), timeout=5))
        for line in (near, again):
            line.settimeout(0.2)
            with pytest.raises(TimeoutError):
                line.recv(1)
