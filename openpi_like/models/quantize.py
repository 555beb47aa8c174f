"""Weights of linear maps in 8 or 4 bits, by qwix: for a frozen base in training, and for sampling.

One scale for each output of a map (8 bits), or for each output and group of inputs (4 bits): as many as divide the last
axis of inputs, from `SMALL` to `GROUP`, or else all of that axis. Activations are not quantised: weights are what a
small batch reads.
"""

from typing import Any

import jax
import jax.numpy as jnp
import qwix
from flax import nnx

from openpi_like.config import near_names
from openpi_like.models.lora import linear_maps
from openpi_like.partition import Axes

SMALL, GROUP = 16, 128  # inputs that share a scale in 4 bits: scales of fewer would take more than they save
# Name -> the type that weights are held in, and the number of inputs that share a scale (None: all of them).
QUANTIZED: dict[str, tuple[Any, int | None]] = {
    "int8": (jnp.int8, None),
    "int4": (jnp.int4, GROUP),
    "float8_e4m3fn": (jnp.float8_e4m3fn, None),
}


def quantize(value: jax.Array, inputs: tuple[int, ...], dtype: str) -> qwix.QArray:
    """Returns the weight of a linear map in fewer bits; inputs: the dimensions that are summed over.

    Raises:
        ValueError: no such dtype.
    """
    if dtype not in QUANTIZED:
        raise ValueError(f"quantised dtype {dtype!r} is unknown; {near_names(dtype, list(QUANTIZED))}")
    held, group = QUANTIZED[dtype]
    last = inputs[-1]
    tiled, alone = {}, [i for i in range(value.ndim) if i not in inputs]
    if group is not None:
        n = value.shape[last]
        tiled = {last: next((size for size in range(min(group, n), SMALL - 1, -1) if n % size == 0), n)}
        alone += inputs[:-1]
    return qwix.quantize(value.astype(jnp.float32), held, channelwise_axes=sorted(alone), tiled_axes=tiled)


def quantized_model(model: Any, dtype: str) -> Any:
    """Returns the same model with the maps of its stacked layers in fewer bits; for sampling.

    Raises:
        ValueError: no such dtype.
    """
    copy = nnx.merge(*nnx.split(model))
    for _, module, attribute, weight in linear_maps(copy):
        metadata = weight.get_metadata()
        if is_stacked(metadata["axes"]):
            held = jax.jit(quantize, static_argnums=(1, 2))(weight[...], tuple(metadata["inputs"]), dtype)
            setattr(module, attribute, nnx.Param(held, **metadata))
    return copy


def is_stacked(axes: Axes) -> bool:
    """Says whether a weight belongs to a stack of layers: nearly all weights do; the others are used in float32."""
    return bool(axes) and axes[0] == "layers"
