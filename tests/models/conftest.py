"""Modules with weights drawn by numpy, which compiles nothing."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx


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
