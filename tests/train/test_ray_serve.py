"""Replicas on Ray Serve: a checkpoint behind one address, each connection with one replica, and one that dies."""

import contextlib
import http.client
import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from websockets.exceptions import WebSocketException

from openpi_like.models.pi0 import Pi0Config
from openpi_like.robots.sawyer import SAWYER
from openpi_like.serve.client import PolicyClient, ServerError
from openpi_like.serve.policy import Policy
from openpi_like.train.checkpoints.checkpoint import save_policy
from openpi_like.train.checkpoints.contract import Contract
from openpi_like.train.state import ModelDef
from tests.conftest import REPOSITORY

if importlib.util.find_spec("ray") is None:
    pytest.skip("Ray is not installed, see `make ray`", allow_module_level=True)

OBSERVATION = {
    "images": {SAWYER.cameras[0].name: np.full((64, 64, 3), 90, np.uint8)},
    "state": np.zeros(SAWYER.robot_state_size, np.float32),
    "prompt": "go",
    "seed": 3,
}


@contextlib.contextmanager
def replicas(checkpoint: Path, log: Path) -> Iterator[tuple[int, subprocess.Popen]]:
    """Starts Ray with two replicas; returns the port, and the process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "serve/deploy/ray_serve.py", str(checkpoint), "--replicas", "2", "--port", str(port)]
    command += ["--max-batch", "1", "--cpus", "0.5"]
    environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "PYTHONPATH": str(REPOSITORY)}
    with log.open("w") as out:
        process = subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=out, stderr=out)
        try:
            yield port, process
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(60)


def _connected(port: int, process: subprocess.Popen, log: Path) -> PolicyClient:
    give_up = time.monotonic() + 240
    while True:
        try:
            return PolicyClient(port=port, timeout_s=60.0, reconnect_s=1.0)
        except (OSError, ServerError, WebSocketException):
            assert process.poll() is None and time.monotonic() < give_up, log.read_text()[-4000:]  # noqa: PT018
            time.sleep(0.5)


def _status(port: int, host: str) -> int:
    """What a browser is answered that believes to talk to `host`, when it wants a websocket."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    upgrade = {"Upgrade": "websocket", "Connection": "Upgrade", "Sec-WebSocket-Version": "13"}
    connection.request("GET", "/", headers={"Host": host, "Sec-WebSocket-Key": "AAAAAAAAAAAAAAAAAAAAAA==", **upgrade})
    status = connection.getresponse().status
    connection.close()
    return status


@pytest.mark.slow
def test_two_replicas_answer_alike_and_one_that_dies_is_replaced(
    tmp_path: Path, policy: Pi0Config, contract_of: Callable[[Any], Contract]
) -> None:
    params = jax.device_get(jax.jit(ModelDef(policy).init)(jax.random.key(3)))
    save_policy(tmp_path / "run", params, contract=contract_of(policy), origin="a test")
    expected = Policy.load(tmp_path / "run").infer(OBSERVATION)["actions"]
    log = tmp_path / "log"
    with replicas(tmp_path / "run", log) as (port, process):
        clients = [_connected(port, process, log)]
        while len({c.metadata["replica"] for c in clients}) < 2:
            assert len(clients) < 30
            clients.append(_connected(port, process, log))
        for client in clients:
            np.testing.assert_allclose(client.infer(OBSERVATION)["actions"], expected, rtol=0, atol=1e-6)
        assert [_status(port, host) for host in (f"127.0.0.1:{port}", "elsewhere.example")] == [101, 403]
        with pytest.raises(ServerError, match="invalid: observation does not fit"):
            clients[0].infer({**OBSERVATION, "state": np.zeros(1, np.float32)})
        first = clients[0].metadata
        os.kill(first["pid"], signal.SIGKILL)
        again = _connected(port, process, log)
        np.testing.assert_allclose(again.infer(OBSERVATION)["actions"], expected, rtol=0, atol=1e-6)
        others = [c for c in clients if c.metadata["pid"] != first["pid"]]
        for client in others:  # whoever was with the other replica has noticed nothing
            assert client._connection is not None
            np.testing.assert_allclose(client.infer(OBSERVATION)["actions"], expected, rtol=0, atol=1e-6)
        for client in (*clients, again):
            client.close()
