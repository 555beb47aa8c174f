"""How weights are declared and used: shape, logical axes and initialiser in one row each.

Every weight is an `nnx.Param` in float32 with the metadata `axes`, one logical axis name per dimension; the rules in
`openpi_like.partition` map these names to a mesh. Weights of stacked layers have the layer as axis 0. Weights of linear
maps have the metadata `inputs`, the dimensions that are summed over; these can have an overlay (`models.lora`) and be
held in fewer bits (`models.quantize`).
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import qwix
from flax import nnx
from jaxtyping import Array, Float, Key

from openpi_like.draws import named_key
from openpi_like.partition import WHOLE, Axes, gathered

Initializer = Callable[[jax.Array, tuple[int, ...]], jax.Array]
HEADS = ("heads", "kv_heads")  # logical axes
BACKBONE = "backbone"  # the part of a policy that is no part of its weights' names


def weight_name(path: Sequence[Any]) -> str:
    """Returns the name of a weight, "vlm/layers/q", for its path in a model; without the level "backbone".

    So a backbone's weights have the same names in a policy as when it stands alone.
    """
    return "/".join(str(part) for part in path if part != BACKBONE)


# ---- Declaring -------------------------------------------------------------------------------------------------------


def weight(
    key: Key[Array, ""], name: str, shape: tuple[int, ...], axes: Axes, init: Initializer, **metadata: Any
) -> nnx.Param:
    """Returns a float32 weight. axes: one logical axis name (or None) per dimension of `shape`."""
    if len(shape) != len(axes):
        raise ValueError(f"weight {name!r} of shape {shape}: got logical axes {axes}, expected {len(shape)} of them")
    return nnx.Param(init(named_key(key, name), shape), axes=axes, **metadata)


def memory(shape: tuple[int, ...], axes: Axes) -> nnx.Param:
    """Returns what a policy keeps of what it has seen, and no gradient trains: zeros, float32, see `Model.remember`.

    The optimiser does not know of it, and there is no average of it. It is a weight in all else: it has a name, lies on
    the mesh, and is saved, loaded and served like one.
    """
    if len(shape) != len(axes):
        raise ValueError(f"memory of shape {shape}: got logical axes {axes}, expected {len(shape)} of them")
    return nnx.Param(jnp.zeros(shape, jnp.float32), axes=axes, memory=True)


def map_weight(
    key: Key[Array, ""],
    name: str,
    shape: tuple[int, ...],
    axes: Axes,
    *,
    inputs: tuple[int, ...],
    per_head: bool = False,
    zero: bool = False,
    init: Initializer | None = None,
) -> nnx.Param:
    """Returns the weight of a linear map, drawn from N(0, 1 / fan-in). inputs: the dimensions that are summed over.

    per_head: each head is a map of its own. zero: start at zero instead. init: start as this says instead.
    """
    init = init or (zeros if zero else fan_in(*inputs))
    return weight(key, name, shape, axes, init, inputs=inputs, per_head=per_head)


@dataclasses.dataclass(frozen=True)
class MapDims:
    """Which dimensions of a linear map's weight are what: stacks, heads that are maps of their own, inputs, outputs.

    axes: their logical axes.
    """

    axes: Axes
    stacks: tuple[int, ...]
    heads: tuple[int, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]

    @classmethod
    def of(cls, axes: Axes, inputs: Sequence[int], *, per_head: bool) -> "MapDims":
        """Returns those of a weight. axes, inputs: as declared. per_head: heads are maps of their own."""
        every = range(len(axes))
        stacks = tuple(i for i in every if axes[i] in WHOLE)
        heads = tuple(i for i in every if per_head and axes[i] in HEADS and i not in inputs)
        outputs = tuple(i for i in every if i not in (*stacks, *heads, *inputs))
        return cls(axes, stacks, heads, tuple(inputs), outputs)


def normal(stddev: float) -> Initializer:
    """Returns an initialiser N(0, stddev^2)."""
    return lambda key, shape: stddev * jax.random.normal(key, shape, jnp.float32)


def fan_in(*in_axes: int) -> Initializer:
    """Returns an initialiser N(0, 1 / fan-in); in_axes: the dimensions that are summed over when the weight is used."""
    return lambda key, shape: normal(1 / math.sqrt(math.prod(shape[a] for a in in_axes)))(key, shape)


def xavier(inputs: int, outputs: int) -> Initializer:
    """Returns an initialiser: uniform, of variance 2 / (inputs + outputs) (Glorot and Bengio 2010)."""
    bound = np.sqrt(6 / (inputs + outputs)).astype(np.float32)
    return lambda key, shape: jax.random.uniform(key, shape, minval=-1.0, maxval=1.0) * bound


def zeros(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Initialiser: zeros."""
    return jnp.zeros(shape, jnp.float32)


def ones(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Initialiser: ones."""
    return jnp.ones(shape, jnp.float32)


# ---- Using -----------------------------------------------------------------------------------------------------------


def use(w: nnx.Param, dtype: Any) -> Any:
    """Returns a weight as it is computed with: in `dtype` and gathered from its parts, see `partition.gathered`.

    Of a stack, `w` may be one layer. A weight in fewer bits (`qwix.QArray`) stays in them.
    """
    value, axes = w[...], w.get_metadata()["axes"]
    axes = axes[len(axes) - value.ndim :]  # without the layer, inside of it
    if isinstance(value, qwix.QArray):
        return jax.tree.map(lambda x: gathered(x, axes, x.dtype), value)
    return gathered(value, axes, dtype)


def _product(equation: str, x: jax.Array, w: Any) -> jax.Array:
    if not isinstance(w, qwix.QArray):
        return jnp.einsum(equation, x, w)
    letters, out = equation.split(",")[1].split("->")
    grouped = any(n > 1 for n, letter in zip(w.scale.shape, letters, strict=True) if letter not in out)
    if grouped:  # each group of inputs would be a product of its own, and their results would be kept
        return jnp.einsum(equation, x, qwix.dequantize(w).astype(x.dtype))
    # 8 bits are exact in every compute dtype. Scales are float32: weights times these would be products in float32.
    y = jnp.einsum(equation, x, w.qvalue.astype(x.dtype))
    kept = [letter for letter in letters if letter in out]
    scale = w.scale.squeeze(tuple(i for i, letter in enumerate(letters) if letter not in out))
    scale = scale.transpose([kept.index(letter) for letter in out if letter in kept])
    return (y * jnp.expand_dims(scale, [i for i, letter in enumerate(out) if letter not in kept])).astype(x.dtype)


def linear(module: nnx.Module, name: str, equation: str, x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Returns einsum(equation, x, weight `name` of the module), in the dtype of x, with the weight's overlay."""
    y = _product(equation, x, use(getattr(module, name), x.dtype))
    overlay = getattr(module, f"{name}_lora", None)
    return y if overlay is None else y + overlay(equation, x)


def linear_parts(
    module: nnx.Module, name: str, equation: str, x: Float[Array, "..."] | Sequence[Float[Array, "..."]]
) -> tuple[Float[Array, "..."], ...]:
    """As `linear`, once for each element of the weight's first axis, of which the equation says nothing.

    x: of all of them, or a list of one for each.
    """
    stacked = getattr(module, name)
    each = [x] * stacked[...].shape[0] if isinstance(x, jax.Array) else x
    w = use(stacked, each[0].dtype)
    overlay = getattr(module, f"{name}_lora", None)
    every = [_product(equation, x, w[i]) for i, x in enumerate(each)]
    return tuple(y if overlay is None else y + overlay(equation, each[i], part=i) for i, y in enumerate(every))


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
        init: Initializer | None = None,
    ) -> None:
        """equation: for one layer, e.g. "BSD,DF->BSF"; the kernel's letters that are not in the output are its inputs.

        shape, axes: of one layer's kernel. layers: number of stacked layers, None for a single map without that axis.
        zero: start at zero instead of N(0, 1 / fan-in). init: start as this says; the bias is zero in any case.
        """
        self.equation = equation
        terms, output = equation.split("->")
        letters = terms.split(",")[1]
        outer = 0 if layers is None else 1
        lead = () if layers is None else (layers,)
        lead_axes: Axes = () if layers is None else ("layers",)
        inputs = tuple(i + outer for i, c in enumerate(letters) if c not in output)
        kept = [i for i, c in enumerate(letters) if c in output]
        self.kernel = map_weight(key, "kernel", lead + shape, lead_axes + axes, inputs=inputs, zero=zero, init=init)
        bias_shape, bias_axes = tuple(shape[i] for i in kept), tuple(axes[i] for i in kept)
        self.bias = weight(key, "bias", lead + bias_shape, lead_axes + bias_axes, zeros)

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """Applies the map of one layer."""
        return linear(self, "kernel", self.equation, x) + use(self.bias, x.dtype)
