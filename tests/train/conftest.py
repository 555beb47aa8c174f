"""What tests of several processes share."""

import socket

import pytest


@pytest.fixture
def address() -> str:
    """A free port of this machine, as the coordinator's address."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"localhost:{server.getsockname()[1]}"
