"""The server over real sockets, with the unmodified PyPI client and with ours."""

import json
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from typing import Any

import numpy as np
import pytest
from openpi_client.action_chunk_broker import ActionChunkBroker
from openpi_client.websocket_client_policy import WebsocketClientPolicy
from websockets.sync.client import connect

from openpi_like.serve.client import DeadlineError, PolicyClient, ServerError
from openpi_like.serve.keys import read_keys
from openpi_like.serve.listeners import Listener
from openpi_like.serve.observation import ObservationError
from openpi_like.serve.policies import Policies
from openpi_like.serve.protocol import MAX_MESSAGE_BYTES, unpack
from openpi_like.serve.server_limits import ServerLimits
from tests.conftest import REPOSITORY
from tests.serve.running import ARM, Row, Stub, get, serving


def _echo(observation):
    """Answers actions that count up from the state; the prompt can ask for trouble."""
    if observation.get("prompt") == "refuse":
        raise ObservationError("state: got shape (3,), expected (2,)")
    if observation.get("prompt") == "crash":
        raise RuntimeError("secret path /home/somebody")
    return np.arange(8, dtype=np.float32).reshape(4, 2) + observation["state"]


def test_the_program_says_when_it_listens():
    """Although Orbax, which it imports, sets up logging first."""
    code = (
        "import logging, runpy; runpy.run_path('serve/policy_server.py')['log_to_stderr'](); "
        "logging.getLogger('jax').info('no TPU'); "
        "logging.getLogger('openpi_like.serve.server').info('listening on port %d', 8000)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stderr.endswith("INFO openpi_like.serve.server: listening on port 8000\n")
    assert "TPU" not in done.stderr


@pytest.fixture(scope="module")
def server():
    with serving(_echo) as server:
        yield server


@pytest.fixture
def client(server):
    client = PolicyClient(port=server.port)
    yield client
    client.close()


OBSERVATION: dict[str, Any] = {"state": np.array([10.0, 20.0], np.float32), "prompt": "go"}
ACTIONS = np.array([[10, 21], [12, 23], [14, 25], [16, 27]], np.float32)


def test_the_pypi_client_gets_one_action_at_a_time(server):
    policy = WebsocketClientPolicy(host="127.0.0.1", port=server.port)
    assert policy.get_server_metadata()["robots"] == {"r": {}}
    broker = ActionChunkBroker(policy, action_horizon=3)
    got = [broker.infer(OBSERVATION)["actions"] for _ in range(4)]
    np.testing.assert_array_equal(got, ACTIONS[[0, 1, 2, 0]])
    policy._ws.close()


def test_the_pypi_client_gets_errors_as_text_and_goes_on(server):
    policy = WebsocketClientPolicy(host="127.0.0.1", port=server.port)
    with pytest.raises(RuntimeError, match=r"got shape \(3,\), expected \(2,\)"):
        policy.infer({**OBSERVATION, "prompt": "refuse"})
    np.testing.assert_array_equal(policy.infer(OBSERVATION)["actions"], ACTIONS)
    policy._ws.close()


def test_our_client_gets_errors_and_goes_on(client):
    with pytest.raises(ServerError, match="got shape"):
        client.infer({**OBSERVATION, "prompt": "refuse"})
    np.testing.assert_array_equal(client.infer(OBSERVATION)["actions"], ACTIONS)


def test_unexpected_errors_stay_in_the_log(client, caplog):
    with pytest.raises(ServerError, match="internal error, incident") as e:
        client.infer({**OBSERVATION, "prompt": "crash"})
    assert "secret" not in str(e.value)
    assert "secret path" in caplog.text
    np.testing.assert_array_equal(client.infer(OBSERVATION)["actions"], ACTIONS)


def test_malformed_messages_are_answered(server):
    with connect(f"ws://127.0.0.1:{server.port}") as connection:
        assert unpack(connection.recv(decode=False))["features"]
        for message, answer in (("text", "got a text message"), (b"\xc1", "not a msgpack message")):
            connection.send(message)
            assert answer in connection.recv()


def test_a_message_that_is_too_large_ends_only_its_own_connection(server, client):
    with connect(f"ws://127.0.0.1:{server.port}") as connection:
        connection.recv()
        connection.send(bytes(MAX_MESSAGE_BYTES + 1))
        with pytest.raises(Exception, match="1009"):
            connection.recv()
    np.testing.assert_array_equal(client.infer(OBSERVATION)["actions"], ACTIONS)


class Gate:
    """Answers when it is told to, with the state of each request."""

    def __init__(self) -> None:
        self.started, self.go_on = threading.Event(), threading.Event()

    def __call__(self, observation):
        self.started.set()
        assert self.go_on.wait(10)
        return observation["state"][None]


def _asking(client, observation):
    """Asks in a thread; returns it, and where its answer or error will be."""
    got = []

    def ask():
        try:
            got.append(client.infer(observation))
        except Exception as e:
            got.append(e)

    thread = threading.Thread(target=ask)
    thread.start()
    return thread, got


def _connection(client):
    assert client._connection is not None
    return client._connection


def _until(condition):
    give_up = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < give_up
        time.sleep(0.005)


def test_the_loop_answers_while_inference_runs_and_the_queue_is_bounded():
    gate = Gate()
    with serving(gate, limits=ServerLimits(waiting=1)) as server:
        clients = [PolicyClient(port=server.port) for _ in range(3)]
        asked = [_asking(clients[0], OBSERVATION)]
        assert gate.started.wait(10)
        asked.append(_asking(clients[1], OBSERVATION))
        _until(lambda: get(server, "/readyz") == (200, "ready, 1 requests wait\n"))
        assert get(server, "/healthz") == (200, "ok\n")
        with pytest.raises(ServerError, match="busy: 1 requests are waiting"):
            clients[2].infer(OBSERVATION)
        gate.go_on.set()
        for thread, got in asked:
            thread.join()
            np.testing.assert_array_equal(got[0]["actions"], OBSERVATION["state"][None])
        for client in clients:
            client.close()


def test_a_late_answer_is_never_taken_for_the_next():
    go_on = threading.Event()

    def slow(observation):
        if observation["prompt"] == "wait":
            assert go_on.wait(10)
        return observation["state"][None]

    with serving(slow) as server:
        client = PolicyClient(port=server.port, timeout_s=0.2)
        with pytest.raises(DeadlineError, match=r"within 0\.2 s"):
            client.infer({"state": np.ones(1, np.float32), "prompt": "wait"})
        go_on.set()
        assert client.infer({"state": np.full(1, 2.0, np.float32), "prompt": "go"})["actions"] == [[2.0]]
        client.close()


def test_the_client_reconnects(server):
    client = PolicyClient(port=server.port)
    assert client._connection is not None
    client._connection.socket.shutdown(socket.SHUT_RDWR)
    np.testing.assert_array_equal(client.infer(OBSERVATION)["actions"], ACTIONS)
    client.close()


def test_no_server_is_said_in_time():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        with pytest.raises(ConnectionError, match=r"no policy server at ws://127\.0\.0\.1"):
            PolicyClient(port=free.getsockname()[1], reconnect_s=0.1)


def test_requests_that_wait_together_are_answered_together():
    """And each gets its own answer."""
    gate = Gate()
    policy = Stub(gate)
    with serving(policy) as server:
        clients = [PolicyClient(port=server.port) for _ in range(8)]
        states = [np.full(2, i, np.float32) for i in range(8)]
        asked = [_asking(clients[0], {**OBSERVATION, "state": states[0]})]
        assert gate.started.wait(10)
        asked += [_asking(c, {**OBSERVATION, "state": s}) for c, s in zip(clients[1:], states[1:], strict=True)]
        _until(lambda: "7 requests wait" in get(server, "/readyz")[1])
        gate.go_on.set()
        for (thread, got), state in zip(asked, states, strict=True):
            thread.join()
            np.testing.assert_array_equal(got[0]["actions"], state[None])
        assert policy.batches == [1, 4, 3]
        _, text = get(server, "/metrics")
        assert 'policy_server_batch_size_bucket{le="4.0"} 3.0' in text
        assert 'policy_server_replies_total{code="ok",policy="default"} 8.0' in text
        for client in clients:
            client.close()


def test_a_request_that_is_late_is_told_so_and_costs_no_inference():
    gate = Gate()
    policy = Stub(gate)
    with serving(policy) as server:
        first, late = PolicyClient(port=server.port), PolicyClient(port=server.port)
        asked = [_asking(first, OBSERVATION)]
        assert gate.started.wait(10)
        asked.append(_asking(late, {**OBSERVATION, "deadline_ms": 1}))
        _until(lambda: "1 requests wait" in get(server, "/readyz")[1])
        gate.go_on.set()
        for thread, _ in asked:
            thread.join()
        assert isinstance(asked[1][1][0], ServerError)
        assert str(asked[1][1][0]).startswith("late: waited ")
        assert policy.batches == [1]
        with pytest.raises(ServerError, match=r"invalid: deadline_ms: got -1, expected milliseconds above 0"):
            late.infer({**OBSERVATION, "deadline_ms": -1})
        assert late.infer({**OBSERVATION, "deadline_ms": 9000, "id": 5})["id"] == 5
        first.close()
        late.close()


def test_one_request_that_fails_spoils_no_other():
    gate = Gate()

    def infer(observation):
        gate(observation)
        return _echo(observation)

    with serving(infer) as server:
        clients = [PolicyClient(port=server.port) for _ in range(4)]
        asked = [_asking(clients[0], OBSERVATION)]
        assert gate.started.wait(10)
        prompts = ("go", "crash", "refuse")
        asked += [_asking(c, {**OBSERVATION, "prompt": p}) for c, p in zip(clients[1:], prompts, strict=True)]
        _until(lambda: "3 requests wait" in get(server, "/readyz")[1])
        gate.go_on.set()
        for thread, _ in asked:
            thread.join()
        got = [got[0] for _, got in asked]
        for fine in got[:2]:
            np.testing.assert_array_equal(fine["actions"], ACTIONS)
        assert str(got[2]).startswith("internal: internal error, incident")
        assert str(got[3]).startswith("invalid: state: got shape")
        for client in clients:
            client.close()


def test_what_was_asked_is_answered_before_the_server_closes():
    gate = Gate()
    stop = threading.Event()

    def run():
        with serving(gate) as server:
            servers.append(server)
            stop.wait(10)

    servers: list[Any] = []
    thread = threading.Thread(target=run)
    thread.start()
    _until(lambda: servers)
    port = servers[0].port
    asking, idle = PolicyClient(port=port), PolicyClient(port=port)
    asked = _asking(asking, OBSERVATION)
    assert gate.started.wait(10)
    stop.set()
    with pytest.raises(Exception, match="1001"):
        _connection(idle).recv(timeout=10)
    with pytest.raises(ConnectionError):
        PolicyClient(port=port, reconnect_s=0.1)
    gate.go_on.set()
    asked[0].join()
    thread.join()
    np.testing.assert_array_equal(asked[1][0]["actions"], OBSERVATION["state"][None])
    asking.close()
    idle.close()


def test_a_device_that_hangs_is_said_and_nobody_waits_for_it():
    gate = Gate()
    with serving(gate, stuck_s=0.1) as server:
        clients = [PolicyClient(port=server.port) for _ in range(2)]
        asked = [_asking(client, OBSERVATION) for client in clients]
        for thread, got in asked:
            thread.join(10)
            assert str(got[0]).startswith("closing: the device does not answer")
        assert get(server, "/healthz") == (503, "stuck\n")
        assert get(server, "/readyz")[0] == 503
        with pytest.raises(ServerError, match="closing: "):
            clients[0].infer(OBSERVATION)
        gate.go_on.set()
        for client in clients:
            client.close()


def test_a_server_that_closes_does_not_wait_for_a_device_that_hangs():
    """Whoever waits is told, and recordings and spans are written."""
    gate, closed = Gate(), threading.Event()

    class Last(Listener):
        def close(self):
            closed.set()

    with serving(gate, listeners=[Last()], grace_s=0.1) as server:
        client = PolicyClient(port=server.port)
        thread, got = _asking(client, OBSERVATION)
        assert gate.started.wait(10)
    assert closed.is_set()
    assert not gate.go_on.is_set()
    thread.join(10)
    assert str(got[0]).startswith("closing: the server is closing")
    gate.go_on.set()
    client.close()


def test_a_session_begins_anew_with_its_own_seed():
    class Numbered(Stub):
        def prepare(self, observation, *, number, seed):
            return Row({"state": np.array([number, -1 if seed is None else seed], np.float32)}, robot=ARM)

    with serving(Numbered(lambda request: request["state"][None])) as server:
        one, other = PolicyClient(port=server.port), PolicyClient(port=server.port)
        numbers = lambda client: client.infer(OBSERVATION)["actions"][0].tolist()  # noqa: E731
        assert [numbers(one), numbers(one), numbers(other)] == [[0, -1], [1, -1], [0, -1]]
        one.infer({"reset": True, "seed": 7})
        assert [numbers(one), numbers(one), numbers(other)] == [[0, 7], [1, 7], [1, -1]]
        with pytest.raises(ServerError, match="reset: 'sed' is not part of it; did you mean 'seed'"):
            one.infer({"reset": True, "sed": 7})
        one.close()
        other.close()


def _connected(server):
    return float(
        next(x for x in get(server, "/metrics")[1].splitlines() if x.startswith("policy_server_conn")).split()[1]
    )


def test_limits_of_connections_and_time():
    with serving(_echo, limits=ServerLimits(connections=2, idle_s=0.3)) as server:
        clients = [PolicyClient(port=server.port) for _ in range(2)]
        _until(lambda: _connected(server) == 2)
        with pytest.raises(ConnectionError, match="503 2 clients are connected, as many as may"):
            PolicyClient(port=server.port, reconnect_s=0.2)
        with pytest.raises(Exception, match="1008"):
            _connection(clients[0]).recv(timeout=10)
        _until(lambda: _connected(server) == 0)
        np.testing.assert_array_equal(clients[1].infer(OBSERVATION)["actions"], ACTIONS)  # connects again
        for client in clients:
            client.close()
    for wrong in ({"connections": 0}, {"idle_s": 0.0}, {"message_bytes": 2**40}, {"send_s": -1.0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            ServerLimits(**wrong)


def test_keys_are_checked_and_have_limits_of_their_own(tmp_path):
    path = tmp_path / "keys.json"
    command = [sys.executable, "serve/api_keys.py", str(path), "--add"]
    add = lambda *more: subprocess.run([*command, *more], cwd=REPOSITORY, capture_output=True, text=True)  # noqa: E731
    robot = add("robot", "--connections", "1", "--requests-per-s", "2").stdout.split()[3]
    other = add("other").stdout.split()[3]
    assert "has a key of 'other' already" in add("other").stderr
    assert robot not in path.read_text()
    assert path.stat().st_mode & 0o077 == 0
    with serving(_echo, keys=read_keys(path)) as server:
        for key in (None, "wrong", robot[:-1]):
            with pytest.raises(ConnectionError, match="HTTP 401 wrong or missing header"):
                PolicyClient(port=server.port, api_key=key)
        client, free = PolicyClient(port=server.port, api_key=robot), PolicyClient(port=server.port, api_key=other)
        with pytest.raises(ConnectionError, match="HTTP 429 this key has 1 connections already"):
            PolicyClient(port=server.port, api_key=robot, reconnect_s=0.2)
        for _ in range(2):
            np.testing.assert_array_equal(client.infer(OBSERVATION)["actions"], ACTIONS)
        with pytest.raises(ServerError, match=r"limit: more requests than this client may send; wait \d+ ms"):
            client.infer(OBSERVATION)
        for _ in range(5):
            np.testing.assert_array_equal(free.infer(OBSERVATION)["actions"], ACTIONS)
        client.close()
        free.close()
        assert get(server, "/readyz")[0] == 200
        assert get(server, "/metrics")[0] == 401
        status, text = get(server, "/metrics", Authorization=f"Bearer {other}")
        assert status == 200
        assert 'refused_connections_total{reason="key"} 4.0' in text
        open_to_prometheus = server.metrics.serve(0, "127.0.0.1")
        with urllib.request.urlopen(f"http://127.0.0.1:{open_to_prometheus}/metrics", timeout=5) as response:
            assert b"policy_server_waiting" in response.read()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not a file of keys"),
        ('{"keys": [{"name": "a", "sha256": "short"}]}', "key 'a': sha256 is not 64 hexadecimal digits"),
        ('{"keys": [{"name": "a", "hash": 1}]}', "sha256"),
        (json.dumps({"keys": [{"name": "a", "sha256": "0" * 64}] * 2}), "more than one key of a"),
        (
            json.dumps({"keys": [{"name": "a", "sha256": "0" * 64, "connections": 0}]}),
            "connections=0, expected at least",
        ),
    ],
)
def test_a_file_of_keys_that_is_wrong_is_refused(tmp_path, content, message):
    (tmp_path / "keys.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        read_keys(tmp_path / "keys.json")


def test_policies_have_names_and_can_be_replaced_and_tried_out():
    def of(value, robots=("r",)):
        return Stub(lambda observation: np.full((1, 1), value, np.float32), {"robots": {r: {"hz": 5} for r in robots}})

    policies = Policies({"new": of(1), "old": of(2)})
    with serving(policies) as server:
        default, old = PolicyClient(port=server.port), PolicyClient(port=server.port, policy="old")
        asked = lambda client: client.infer(OBSERVATION)["actions"].item()  # noqa: E731
        assert (default.metadata["policy"], old.metadata["policies"]) == ("new", ["new", "old"])
        assert default.metadata["server"]["message_bytes"] == MAX_MESSAGE_BYTES
        assert [asked(default), asked(old)] == [1, 2]
        with pytest.raises(ConnectionError, match="HTTP 404 no policy 'odl'; did you mean 'old'"):
            PolicyClient(port=server.port, policy="odl")
        policies["new"].replace(of(3))
        assert [asked(default), asked(old)] == [3, 2]
        policies["new"].try_out(of(4), share=0.25)
        clients = [PolicyClient(port=server.port) for _ in range(8)]
        assert sorted(map(asked, clients)) == [3] * 6 + [4] * 2
        policies["new"].try_out(None, share=0.0)
        assert {asked(client) for client in clients} == {3}
        with pytest.raises(ValueError, match="cannot take the place of policy 'new': it does not serve robot 'r'"):
            policies["new"].replace(of(5, robots=("s",)))
        assert asked(default) == 3
        for client in (default, old, *clients):
            client.close()


def test_the_client_imports_neither_jax_nor_simulators():
    code = (
        "import sys, openpi_like.serve.client\n"
        "loaded = {m.split('.')[0] for m in sys.modules}\n"
        "wrong = loaded & {'jax', 'flax', 'optax', 'orbax', 'grain', 'tensorflow', 'mujoco', 'scipy', 'cv2'}\n"
        "assert not wrong, wrong\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
