"""What becomes of a policy server, and of its other clients, when things go wrong:

    python tests/bench/bench_faults.py runs/demo/pretrain

One client asks the same all the time, and compares every answer with the first one. Meanwhile each fault happens; the
table says what the server answered, and what that client noticed: its answers, those that were wrong, errors, and the
longest wait.
"""

import contextlib
import dataclasses
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table
from websockets.sync.client import connect

from openpi_like.serve.client import PolicyClient
from openpi_like.serve.keys import Key, Keys, hash_of
from openpi_like.serve.options import PolicyOptions
from openpi_like.serve.policies import Policies
from openpi_like.serve.policy import Policy
from openpi_like.serve.protocol import pack, unpack
from openpi_like.serve.server_limits import ServerLimits
from tests.serve.running import get, serving

ROOT = Path(__file__).resolve().parents[2]


@dataclasses.dataclass(frozen=True)
class Args:
    """checkpoint: run to serve. seconds: how long the other client is watched after each fault."""

    checkpoint: Annotated[Path, tyro.conf.Positional]
    seconds: float = 2.0


class Faulty:
    """A policy that fails, or hangs, when it is told to."""

    def __init__(self, policy: Policy) -> None:
        self._policy, self.go_on = policy, threading.Event()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._policy, name)

    def sample(self, requests: Any) -> Any:
        for request in requests:
            if request.state[0] == np.float32(0.01234):
                raise RuntimeError("the device is on fire")
            if request.state[0] == np.float32(0.04321):
                self.go_on.wait(60)
        return self._policy.sample(requests)


class Bystander:
    """Asks the same all the time, in a thread."""

    def __init__(self, port: int, observation: dict[str, Any], key: str | None = None) -> None:
        self._client = PolicyClient(port=port, reconnect_s=20, api_key=key)
        self._observation = {**observation, "seed": 7}
        self._first = self._client.infer(self._observation)["actions"]
        self._stop, self._thread = threading.Event(), threading.Thread(target=self._run)
        self.answers, self.wrong, self.errors, self.longest_s = 0, 0, list[str](), 0.0
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.is_set():
            asked = time.monotonic()
            try:
                actions = self._client.infer(self._observation)["actions"]
                self.answers += 1
                # Bit for bit in a batch of the same size, to rounding in another one.
                self.wrong += not np.allclose(actions, self._first, rtol=0, atol=1e-4 * np.abs(self._first).max())
            except Exception as e:
                self.errors.append(str(e))
            self.longest_s = max(self.longest_s, time.monotonic() - asked)
            time.sleep(0.02)

    def close(self) -> None:
        self._stop.set()
        self._thread.join()
        self._client.close()


def observation_of(about: dict[str, Any], **changes: Any) -> dict[str, Any]:
    name, robot = next(iter(about["robots"].items()))
    images = {c: np.full((*(size or (64, 64)), 3), 90, np.uint8) for c, size in robot["cameras"].items()}
    state = np.zeros(sum(n for _, n, _ in robot["state"]), np.float32)
    return {"images": images, "state": state, "prompt": "go", "robot": name, **changes}


def said(port: int, message: Any) -> str:
    """Returns what a client of its own is answered."""
    with connect(f"ws://127.0.0.1:{port}", compression=None, max_size=None) as connection:
        connection.recv()
        connection.send(message)
        try:
            reply = connection.recv(timeout=20)
        except Exception as e:
            return str(e)
    return reply if isinstance(reply, str) else f"actions {unpack(reply)['actions'].shape}"


def raw(port: int, *parts: bytes) -> socket.socket:
    """Returns a connection past its handshake, to which these bytes were sent."""
    s = socket.create_connection(("127.0.0.1", port))
    s.sendall(
        b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
    )
    s.recv(4096)
    for part in parts:
        s.sendall(part)
    return s


def connections(server: Any) -> str:
    lines = get(server, "/metrics")[1].splitlines()
    return next(line.split()[1] for line in lines if line.startswith("policy_server_connections"))


def faults(args: Args, policy: Policy, server: Any) -> Iterator[tuple[str, Callable[[], str]]]:
    """Yields a name and what makes the fault, and returns what the server says to it."""
    about, port = policy.metadata(), server.port
    sound = pack(observation_of(about))
    # A frame of 1 MB, masked, of which half a second one's header and bytes come.
    header = b"\x82\xff" + (1_000_000).to_bytes(8, "big") + b"\x00" * 4

    def killed() -> str:
        raw(port, header, b"\x00" * 1000).close()
        return "connection dropped, nothing to answer"

    def slow_writer() -> str:
        s = raw(port, header)
        for _ in range(int(10 * args.seconds)):
            s.sendall(b"\x00" * 100)
            time.sleep(0.1)
        s.close()
        return "waited for, in its own connection"

    def half_open() -> str:
        held = [raw(port, header, b"\x00" * 10) for _ in range(20)]
        time.sleep(args.seconds)
        known = connections(server)
        for s in held:
            s.close()
        return f"{known} connections held until a ping is not answered (20 s)"

    def slow_reader() -> str:
        s = raw(port)
        s.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        frame = b"\x82\xff" + len(sound).to_bytes(8, "big") + b"\x00" * 4 + sound
        s.settimeout(args.seconds)
        sent = 0
        with contextlib.suppress(TimeoutError, OSError):
            for _ in range(2000):
                s.sendall(frame)
                sent += 1
        s.close()
        return f"took {sent} requests, then no more until replies are read"

    def late() -> str:
        return said(port, pack(observation_of(about, deadline_ms=0.001)))

    def nan() -> str:
        state = observation_of(about)["state"] * np.nan
        return said(port, pack(observation_of(about, state=state)))

    def marked(value: float) -> bytes:
        state = observation_of(about)["state"].copy()
        state[0] = value
        return pack(observation_of(about, state=state))

    yield "client killed in the middle of a message", killed
    yield "20 half-open connections", half_open
    yield "slow writer, 1 kB/s", slow_writer
    yield "slow reader, never reads", slow_reader
    yield "garbage bytes", lambda: said(port, os.urandom(5000))
    yield "a text message", lambda: said(port, "hello")
    yield "a frame of 65 MiB", lambda: said(port, bytes(65 * 2**20))
    yield "state of NaN", nan
    yield "a deadline that is past", late
    yield "an exception in the policy", lambda: said(port, marked(0.01234))


def watch(name: str, fault: Callable[[], str], bystander: Bystander, seconds: float) -> list[str]:
    before = bystander.answers, len(bystander.errors), bystander.wrong
    bystander.longest_s = 0.0
    what = fault()
    time.sleep(seconds)
    noticed = [bystander.answers - before[0], bystander.wrong - before[2], len(bystander.errors) - before[1]]
    return [name, " ".join(what.split())[:110], *map(str, noticed), f"{1e3 * bystander.longest_s:.0f}"]


def under_sigterm(args: Args, checkpoint: Path) -> list[list[str]]:
    """A server of its own, whose checkpoint is deleted, and which is then asked to stop while eight clients ask."""
    with tempfile.TemporaryDirectory() as directory:
        port_file = Path(directory) / "port"
        command = [sys.executable, "serve/policy_server.py", str(checkpoint), "--port", "0", "--port-file"]
        process = subprocess.Popen([*command, str(port_file)], cwd=ROOT, stderr=subprocess.PIPE, text=True)
        while not port_file.exists():
            assert process.poll() is None
            time.sleep(0.1)
        port = int(port_file.read_text())
        client = PolicyClient(port=port)
        observation = observation_of(client.metadata)
        bystander = Bystander(port, observation)

        def deleted() -> str:
            shutil.rmtree(checkpoint)
            process.send_signal(signal.SIGHUP)
            time.sleep(args.seconds)
            assert process.stderr is not None
            return next(line.partition(": ")[2].strip() for line in process.stderr if "stays as it is" in line)

        rows = [watch("checkpoint deleted while serving, SIGHUP", deleted, bystander, args.seconds)]
        bystander.close()
        outcomes = []

        def ask() -> None:
            mine = PolicyClient(port=port, reconnect_s=0.1)
            asked = 0
            try:
                while True:
                    mine.infer(observation)
                    asked += 1
            except Exception as e:
                outcomes.append((asked, type(e).__name__, str(e)))

        threads = [threading.Thread(target=ask) for _ in range(8)]
        for thread in threads:
            thread.start()
        time.sleep(args.seconds)
        process.send_signal(signal.SIGTERM)
        began = time.monotonic()
        for thread in threads:
            thread.join()
        status = process.wait(30)
        took = time.monotonic() - began
        client.close()
        kinds = sorted({kind for _, kind, _ in outcomes})
        answered = sum(n for n, _, _ in outcomes)
        what = f"exit {status} after {took:.1f} s; clients: {', '.join(kinds)} ({outcomes[0][2]})"
        rows.append(["SIGTERM under load of 8 clients", " ".join(what.split())[:110], str(answered), "0", "-", "-"])
        return rows


def main(args: Args, console: Console) -> None:
    policy = Policy.load(args.checkpoint, PolicyOptions(max_batch=4))
    policy.warm_up()
    faulty = Faulty(policy)
    observation = observation_of(policy.metadata())
    rows = []
    limits = ServerLimits(connections=40, send_s=1.0)
    with serving(Policies({"default": faulty}), limits=limits) as server:
        bystander = Bystander(server.port, observation)
        for name, fault in faults(args, policy, server):
            rows.append(watch(name, fault, bystander, args.seconds))
        many = []

        def exhausted() -> str:
            try:
                while True:
                    many.append(PolicyClient(port=server.port, reconnect_s=0.1))
            except Exception as e:
                return f"{len(many) + 1} connections, then {e}"

        rows.append(watch("more connections than there may be", exhausted, bystander, args.seconds))
        for client in many:
            client.close()
        bystander.close()
    keys = Keys([Key("robot", hash_of("right")), Key("slow", hash_of("slow"), requests_per_s=5)])
    with serving(Policies({"default": faulty}), keys=keys, stuck_s=2.0) as server:
        bystander = Bystander(server.port, observation, key="right")

        def wrong_key() -> str:
            try:
                PolicyClient(port=server.port, api_key="guessed")
            except Exception as e:
                return str(e)
            raise AssertionError("a wrong key was taken")

        def too_many() -> str:
            slow = PolicyClient(port=server.port, api_key="slow")
            try:
                while True:
                    slow.infer(observation)
            except Exception as e:
                slow.close()
                return str(e)

        rows.append(watch("a wrong key", wrong_key, bystander, args.seconds))
        rows.append(watch("more requests than a key may send", too_many, bystander, args.seconds))
        state = observation["state"].copy()
        state[0] = 0.04321

        def hang() -> str:
            client = PolicyClient(port=server.port, api_key="right")
            try:
                client.infer({**observation, "state": state})
            except Exception as e:
                return f"{e}; /healthz {get(server, '/healthz')[0]}"
            finally:
                client.close()
            raise AssertionError("a device that hangs has answered")

        rows.append(watch("the device hangs (given up after 2 s)", hang, bystander, 0.0))
        faulty.go_on.set()
        bystander.close()
    with tempfile.TemporaryDirectory() as directory:
        copy = Path(directory) / "run"
        shutil.copytree(args.checkpoint, copy)
        rows += under_sigterm(args, copy)
    table = Table("fault", "what the server says", "answers", "wrong", "errors", "longest, ms")
    for row in rows:
        table.add_row(*row)
    console.print(table)


if __name__ == "__main__":
    main(tyro.cli(Args), Console(highlight=False, width=200))
