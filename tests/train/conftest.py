"""What tests of several processes share, and those of checkpoints; the toy dataset of the data tests."""

import dataclasses
import socket
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from openpi_like.data.normalize import FieldStats, Normalization
from openpi_like.data.text import fit_text_tokenizer
from openpi_like.models.pi0 import Pi0Config
from openpi_like.models.weights import flatten, unflatten
from openpi_like.robots.sawyer import SAWYER
from openpi_like.train.contract import Contract, encode_tokenizer
from openpi_like.train.optimizer import OptimizerConfig
from openpi_like.train.state import ModelDef, TrainState
from tests.data.conftest import tfds, toy  # noqa: F401  fixtures

ORDER = {"seed": 3, "group_episodes": None, "entries": [{"robot": "sawyer_sim", "frames": 7}]}


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


@pytest.fixture(scope="session")
def policy(tiny_policy: Pi0Config) -> Pi0Config:
    """The tiny one, with room for Sawyer."""
    return dataclasses.replace(
        tiny_policy,
        cameras=tuple(c.name for c in SAWYER.cameras),
        state_dim=SAWYER.state_size,
        action_dim=SAWYER.action_size,
        action_horizon=SAWYER.action_horizon,
    )


@pytest.fixture(scope="session")
def small(contract_of: Callable[[Any], Contract], tiny_policy: Pi0Config) -> Callable[..., dict[str, Any]]:
    """Returns a function that makes a state of a step with hardly any weights, and what is saved with it."""

    def make(step: int, size: int = 4, config: Any = OptimizerConfig()) -> dict[str, Any]:
        weights = {"w": jnp.full(size, float(step))}
        state = TrainState(np.int32(step), weights, {}, None, {"count": jnp.int32(step)})
        rest = {"order": ORDER, "contract": contract_of(tiny_policy), "config": config}
        return {"state": state, "position": 8 * step, **rest}

    return make


@pytest.fixture(scope="session")
def random_state() -> Callable[..., TrainState]:
    """Returns a function that makes a state of random weights, which compiles no model."""

    def make(model: ModelDef, optimizer: optax.GradientTransformation, *, step: int, seed: int = 0) -> TrainState:
        rng = np.random.default_rng(seed)
        weights = {k: jnp.asarray(rng.normal(size=v.shape), jnp.float32) for k, v in flatten(model.shapes).items()}
        params = unflatten({k: v for k, v in weights.items() if k in model.trained})
        frozen = unflatten({k: model.hold(k, v) for k, v in weights.items() if k not in model.trained})
        ema = unflatten({k: v + 1 for k, v in flatten(params).items()})
        return TrainState(np.int32(step), params, frozen, ema, optimizer.init(params))

    return make
