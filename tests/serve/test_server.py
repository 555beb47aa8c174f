"""The server over real sockets, with the unmodified PyPI client and with ours."""

import socket
import subprocess
import sys
import threading
import urllib.request

import numpy as np
import pytest
from openpi_client.action_chunk_broker import ActionChunkBroker
from openpi_client.websocket_client_policy import WebsocketClientPolicy
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from openpi_like.serve.client import DeadlineError, PolicyClient, ServerError
from openpi_like.serve.protocol import MAX_MESSAGE_BYTES, unpack
from tests.conftest import REPOSITORY
from tests.serve.running import WrongObservationError, serving


def _echo(observation):
    """Answers actions that count up from the state; the prompt can ask for trouble."""
    if observation.get("prompt") == "refuse":
        raise WrongObservationError("state: got shape (3,), expected (2,)")
    if observation.get("prompt") == "crash":
        raise RuntimeError("secret path /home/somebody")
    return {"actions": np.arange(8, dtype=np.float32).reshape(4, 2) + observation["state"]}


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


OBSERVATION = {"state": np.array([10.0, 20.0], np.float32), "prompt": "go"}
ACTIONS = np.array([[10, 21], [12, 23], [14, 25], [16, 27]], np.float32)


def test_the_pypi_client_gets_one_action_at_a_time(server):
    policy = WebsocketClientPolicy(host="127.0.0.1", port=server.port)
    assert policy.get_server_metadata() == {"robots": ["r"]}
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
        assert unpack(connection.recv(decode=False)) == {"robots": ["r"]}
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


def test_the_loop_answers_while_inference_runs_and_the_queue_is_bounded():
    started, go_on = threading.Event(), threading.Event()

    def slow(observation):
        started.set()
        assert go_on.wait(10)
        return {"actions": np.zeros((1, 1), np.float32)}

    with serving(slow, max_pending=1) as server:
        first, second = PolicyClient(port=server.port), PolicyClient(port=server.port)
        answers = []
        thread = threading.Thread(target=lambda: answers.append(first.infer(OBSERVATION)))
        thread.start()
        assert started.wait(10)
        with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/healthz", timeout=5) as response:
            assert response.read() == b"ok, 1 requests pending\n"
        with pytest.raises(ServerError, match="busy: 1 requests are waiting"):
            second.infer(OBSERVATION)
        go_on.set()
        thread.join()
        assert answers[0]["actions"].shape == (1, 1)
        first.close()
        second.close()


def test_a_late_answer_is_never_taken_for_the_next():
    go_on = threading.Event()

    def slow(observation):
        if observation["prompt"] == "wait":
            assert go_on.wait(10)
        return {"actions": observation["state"][None]}

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


def test_api_keys_are_checked():
    with serving(_echo, api_key="open sesame") as server:
        for key in (None, "wrong"):
            with pytest.raises(InvalidStatus, match="401"):
                PolicyClient(port=server.port, api_key=key)
        client = PolicyClient(port=server.port, api_key="open sesame")
        np.testing.assert_array_equal(client.infer(OBSERVATION)["actions"], ACTIONS)
        client.close()
        with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/readyz", timeout=5) as response:
            assert response.status == 200


def test_the_client_imports_neither_jax_nor_simulators():
    code = (
        "import sys, openpi_like.serve.client\n"
        "loaded = {m.split('.')[0] for m in sys.modules}\n"
        "wrong = loaded & {'jax', 'flax', 'optax', 'orbax', 'grain', 'tensorflow', 'mujoco', 'scipy', 'cv2'}\n"
        "assert not wrong, wrong\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
