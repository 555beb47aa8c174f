"""What tests of several processes share; a contract, which every checkpoint has; the toy dataset of the data tests."""

import socket
from collections.abc import Callable
from typing import Any

import pytest

from openpi_like.data.normalize import FieldStats, Normalization
from openpi_like.data.text import fit_text_tokenizer
from openpi_like.robots.sawyer import SAWYER
from openpi_like.train.contract import Contract, encode_tokenizer
from tests.data.conftest import tfds, toy  # noqa: F401  fixtures


@pytest.fixture
def address() -> str:
    """A free port of this machine, as the coordinator's address."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"localhost:{server.getsockname()[1]}"


@pytest.fixture(scope="session")
def contract_of() -> Callable[[Any], Contract]:
    """Returns a function that makes the contract of a policy for Sawyer."""

    def stats(names: tuple[str, ...]) -> FieldStats:
        n = len(names)
        return FieldStats(names, (0.5,) * n, (2.0,) * n, (-1.0,) * n, (1.0,) * n, (-3.0,) * n, (3.0,) * n, 10)

    normalization = Normalization(SAWYER.name, "zscore", stats(SAWYER.state_names), stats(SAWYER.action_names))
    tokenizer = encode_tokenizer(fit_text_tokenizer(["press the button"], 300))

    def make(policy: Any) -> Contract:
        return Contract(
            policy=policy,
            robots=(SAWYER,),
            normalizations={SAWYER.name: normalization},
            tokenizer=tokenizer,
            renderers={SAWYER.name: "raycast"},
        )

    return make
