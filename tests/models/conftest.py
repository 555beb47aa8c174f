"""Modules with weights drawn by numpy, which compiles nothing."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from openpi_like.models.pi0 import Pi0Config
from openpi_like.models.weights import flat_weights
from tests.models.weight_arrays import Arrays, exported


@pytest.fixture(scope="session")
def filled() -> Callable[[Callable[[], Any]], Any]:
    """Returns a function that builds a module abstractly and fills every weight with N(0, 1 / 9) draws."""

    def fill(create: Callable[[], Any]) -> Any:
        rng = np.random.default_rng(0)
        graph, state = nnx.split(nnx.eval_shape(create))
        weights = jax.tree.map(lambda w: jnp.asarray(rng.normal(size=w.shape) / 3, jnp.float32), state)
        return nnx.merge(graph, weights)

    return fill


@pytest.fixture(scope="session")
def batch(tiny_batch: Any) -> Any:
    """`tiny_batch` on the device, for calls that are not compiled."""
    return jax.tree.map(jnp.asarray, tiny_batch)


@pytest.fixture(scope="session")
def weights(filled: Any) -> Callable[[Any], Arrays]:
    """Returns a function from a config to flat random weights on the host."""
    return lambda config: {
        k: np.asarray(v) for k, v in flat_weights(filled(lambda: config.create(jax.random.key(0)))).items()
    }


@pytest.fixture
def openpi_arrays(tiny_policy: Pi0Config, weights: Any) -> Arrays:
    """Weights of the smallest pi0 as openpi names them."""
    return exported(tiny_policy, weights(tiny_policy), "openpi")
