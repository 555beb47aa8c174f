"""How weights are declared: shape, logical axes and initialiser in one row each.

Every weight is an `nnx.Param` in float32 with the metadata `axes`, one logical axis name per dimension; the rules in
`openpi_like.train.sharding` map these names to a mesh. Weights of stacked layers have the layer as axis 0.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

from openpi_like.draws import named_key

Initializer = Callable[[jax.Array, tuple[int, ...]], jax.Array]
Axes = tuple[str | None, ...]


def weight(key: Key[Array, ""], name: str, shape: tuple[int, ...], axes: Axes, init: Initializer) -> nnx.Param:
    """Returns a float32 weight. axes: one logical axis name (or None) per dimension of `shape`."""
    if len(shape) != len(axes):
        raise ValueError(f"weight {name!r} of shape {shape}: got logical axes {axes}, expected {len(shape)} of them")
    return nnx.Param(init(named_key(key, name), shape), axes=axes)


def normal(stddev: float) -> Initializer:
    """Returns an initialiser N(0, stddev^2)."""
    return lambda key, shape: stddev * jax.random.normal(key, shape, jnp.float32)


def fan_in(*in_axes: int) -> Initializer:
    """Returns an initialiser N(0, 1 / fan-in); in_axes: the dimensions that are summed over when the weight is used."""
    return lambda key, shape: normal(1 / math.sqrt(math.prod(shape[a] for a in in_axes)))(key, shape)


def zeros(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Initialiser: zeros."""
    return jnp.zeros(shape, jnp.float32)


def ones(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Initialiser: ones."""
    return jnp.ones(shape, jnp.float32)


class Linear(nnx.Module):
    """An affine map y = einsum(equation, x, kernel) + bias, computed in the dtype of x."""

    def __init__(
        self,
        key: Key[Array, ""],
        equation: str,
        shape: tuple[int, ...],
        axes: Axes,
        *,
        layers: int | None = None,
        zero: bool = False,
    ) -> None:
        """equation: for one layer, e.g. "BSD,DF->BSF"; the kernel's letters that are not in the output are its inputs.

        shape, axes: of one layer's kernel. layers: number of stacked layers, None for a single map without that axis.
        zero: start at zero instead of N(0, 1 / fan-in).
        """
        self.equation = equation
        terms, output = equation.split("->")
        letters = terms.split(",")[1]
        outer = 0 if layers is None else 1
        lead = () if layers is None else (layers,)
        lead_axes: Axes = () if layers is None else ("layers",)
        inputs = [i + outer for i, c in enumerate(letters) if c not in output]
        kept = [i for i, c in enumerate(letters) if c in output]
        init = zeros if zero else fan_in(*inputs)
        self.kernel = weight(key, "kernel", lead + shape, lead_axes + axes, init)
        bias_shape, bias_axes = tuple(shape[i] for i in kept), tuple(axes[i] for i in kept)
        self.bias = weight(key, "bias", lead + bias_shape, lead_axes + bias_axes, zeros)

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """Applies the map of one layer."""
        return jnp.einsum(self.equation, x, self.kernel[...].astype(x.dtype)) + self.bias[...].astype(x.dtype)
