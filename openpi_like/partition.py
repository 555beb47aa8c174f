"""Where arrays lie on the device mesh, stated once for weights and activations.

Mesh axes: `data` and `fsdp` split the batch, `fsdp` and `tensor` split the weights. A weight is kept in parts, is
gathered over `fsdp` where a layer computes with it, in the compute dtype, and its gradient goes back into parts
(`gathered`). The batch stays where it is (`pin`), from the images to the loss. Models say which of their axes is what;
nothing here says anything about a model. Outside of `placed` all of these do nothing.
"""

import contextlib
import contextvars
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, Shaped

from openpi_like.config import near_names

Axes = tuple[str | None, ...]
Target = str | tuple[str, ...] | None
MESH_AXES = ("data", "fsdp", "tensor")
BATCH = ("data", "fsdp")  # what the batch is split over
# Axes that are taken apart one element at a time, so they are never split: a loop over layers, q/k/v, gate/up.
WHOLE = ("layers", "stack")


@dataclasses.dataclass(frozen=True)
class ShardingRules:
    """Logical axis -> mesh axis (None: not split). The field names are all logical axes there are, besides "batch", an
    axis of activations, which is split over `BATCH`. heads, kv_heads, mlp and vocab are axes of both.
    """

    layers: None = None
    stack: None = None  # small fixed axes: q/k/v, gate/up
    embed: str | None = "fsdp"
    heads: str | None = "tensor"
    kv_heads: str | None = None
    head_dim: str | None = None
    mlp: str | None = "tensor"
    vocab: str | None = "tensor"
    patch: str | None = None
    position: str | None = None
    action: str | None = None
    norm: str | None = None
    rank: str | None = None
    memory: str | None = "fsdp"  # rows of what a policy keeps

    def __post_init__(self) -> None:
        problems = [
            f"{f.name}={value!r}; {near_names(str(value), MESH_AXES)}"
            for f in dataclasses.fields(self)
            if (value := getattr(self, f.name)) not in (None, *MESH_AXES)
        ]
        if problems:
            raise ValueError("ShardingRules: " + "; ".join(problems))

    def target(self, axis: str | None) -> Target:
        """Returns the mesh axis (or axes) of a logical axis.

        Raises:
            ValueError: there is no such logical axis.
        """
        if axis == "batch":
            return BATCH
        known = [f.name for f in dataclasses.fields(self)]
        if axis is not None and axis not in known:
            raise ValueError(f"logical axis {axis!r} has no rule; {near_names(axis, known)}")
        return None if axis is None else getattr(self, axis)

    def spec(self, axes: Axes, shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> PartitionSpec:
        """Returns the partition of one weight.

        Where a mesh axis does not divide the axis it belongs to, it takes the largest other one that it divides; only
        where there is none is the weight whole on all devices of that mesh axis, see `replication`. Mesh axes of one
        device take nothing.

        Raises:
            ValueError: unknown logical axis, wrong number of axes, or two axes of one weight on one mesh axis.
        """
        if len(axes) != len(shape):
            raise ValueError(f"weight of shape {shape}: got logical axes {axes}, expected {len(shape)} of them")
        targets = [self.target(axis) for axis in axes]
        named = [t for t in targets if t is not None]
        if len(named) != len(set(named)):
            raise ValueError(f"weight with axes {axes}: rules put two axes on one mesh axis, got {targets}")
        targets = [t if _size(mesh, t) > 1 else None for t in targets]
        wanted = [t for t in targets if t is not None]
        fits = lambda i, target: shape[i] % _size(mesh, target) == 0  # noqa: E731
        placed = [t if t is not None and fits(i, t) else None for i, t in enumerate(targets)]
        for target in wanted:
            free = [i for i, axis in enumerate(axes) if placed[i] is None and axis not in WHOLE and fits(i, target)]
            if target not in placed and free:
                placed[max(free, key=lambda i: (shape[i], -i))] = target
        return PartitionSpec(*placed)

    def activation_spec(self, axes: Axes, shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> PartitionSpec:
        """Returns the partition of an activation; an axis that is not divided stays whole."""
        targets = [self.target(axis) for axis in axes]
        return PartitionSpec(
            *(t if t is not None and n % _size(mesh, t) == 0 else None for t, n in zip(targets, shape, strict=True))
        )


def _size(mesh: Mesh | AbstractMesh, target: Target) -> int:
    names = (target,) if isinstance(target, str) else target or ()
    return math.prod(mesh.shape[name] for name in names)


def replication(sharding: NamedSharding) -> int:
    """Returns how many devices hold the same part of an array that is meant to be split over `fsdp` and `tensor`."""
    used = {name for part in sharding.spec if part for name in ((part,) if isinstance(part, str) else part)}
    return math.prod(n for name, n in sharding.mesh.shape.items() if name not in used and name != "data")


# ---- In models -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Placement:
    mesh: Mesh
    rules: ShardingRules


_placement: contextvars.ContextVar[_Placement | None] = contextvars.ContextVar("placement", default=None)


@contextlib.contextmanager
def placed(mesh: Mesh, rules: ShardingRules) -> Iterator[None]:
    """While a function is traced: where its arrays are to lie. A mesh of one device says nothing."""
    token = _placement.set(_Placement(mesh, rules) if mesh.size > 1 else None)
    try:
        # Part of the key under which jax remembers what it has traced.
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            yield
    finally:
        _placement.reset(token)


def pin(x: Shaped[Array, "..."], *axes: str | None) -> Shaped[Array, "..."]:
    """Returns an activation that stays where the rules put its axes; its gradient does too."""
    place = _placement.get()
    if place is None:
        return x
    spec = place.rules.activation_spec(axes, x.shape, place.mesh)
    return jax.lax.with_sharding_constraint(x, NamedSharding(place.mesh, spec))


def on_each_device(function: Callable[..., jax.Array], axes: Sequence[Axes]) -> Callable[..., jax.Array]:
    """Returns a function of activations that each device computes of its own part, where the rules put their axes.

    For kernels that the compiler cannot split. Axes that are not divided are whole on every device. The result is
    shaped like the first argument, and lies like it.
    """
    place = _placement.get()
    if place is None:
        return function

    def mapped(*args: jax.Array) -> jax.Array:
        specs = tuple(place.rules.activation_spec(of, x.shape, place.mesh) for of, x in zip(axes, args, strict=True))
        on_all = jax.shard_map(function, mesh=place.mesh, in_specs=specs, out_specs=specs[0], check_vma=False)
        return on_all(*args)

    return mapped


def of_parts(function: Callable[..., Any], whole: Sequence[jax.Array], rows: Sequence[jax.Array], axis: str) -> Any:
    """Returns function(first, *whole, *rows) of each device's part of the rows, on every device, one behind the other.

    rows: arrays that lie like weights whose axis 0 is `axis`. first: the number of the first row of a part. What is
    returned has a new axis 0, of the parts: 1 where the rows are not split.
    """
    place = _placement.get()
    target = None if place is None else place.rules.target(axis)
    if place is None or target is None or len(rows[0]) % _size(place.mesh, target):
        return jax.tree.map(lambda x: x[None], function(jnp.int32(0), *whole, *rows))

    def local(*args: jax.Array) -> Any:
        first = jax.lax.axis_index(target) * len(args[len(whole)])
        return jax.tree.map(lambda x: jax.lax.all_gather(x, target), function(first, *args))

    specs = (*[PartitionSpec()] * len(whole), *[PartitionSpec(target)] * len(rows))
    return jax.shard_map(local, mesh=place.mesh, in_specs=specs, out_specs=PartitionSpec(), check_vma=False)(
        *whole, *rows
    )


def by_element(function: Callable[[jax.Array], jax.Array], w: Shaped[Array, "..."], axes: Axes) -> Shaped[Array, "..."]:
    """Returns function(w) for what is laid out like a weight with these axes: a gradient, a moment. So is the result.

    function: (elements, ...) -> the same shape; it takes each element for itself, and zeros to zeros.

    The axes in `WHOLE` are one stack in front of the others. Where its elements are split over devices, each device
    gives its parts for whole elements, and they go back the same way. Zeros are added where there are fewer elements
    than devices, or they are not divided; replicas (over `data`) all do the same.
    """
    stacks = [i for i, axis in enumerate(axes) if axis in WHOLE]
    others = [i for i in range(w.ndim) if i not in stacks]
    order, back = (*stacks, *others), [(*stacks, *others).index(i) for i in range(w.ndim)]

    def stacked(part: jax.Array) -> jax.Array:
        """Without the sizes of the stack: of a device's part or of all."""
        return part.transpose(order).reshape(-1, *(part.shape[i] for i in others))

    def unstacked(elements: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        return elements.reshape([shape[i] for i in order]).transpose(back)

    place = _placement.get()
    if place is None:
        return unstacked(function(stacked(w)), w.shape)
    spec = place.rules.spec(axes, w.shape, place.mesh)
    split = [(target, others.index(i) + 1) for i, target in enumerate(spec) if target is not None]

    def local(part: jax.Array) -> jax.Array:
        elements = stacked(part)
        count = len(elements)
        more = -count % math.prod(_size(place.mesh, target) for target, _ in split)
        elements = jnp.pad(elements, [(0, more)] + [(0, 0)] * (elements.ndim - 1))
        for target, i in split:
            elements = jax.lax.all_to_all(elements, target, 0, i, tiled=True)
        elements = function(elements)
        for target, i in reversed(split):
            elements = jax.lax.all_to_all(elements, target, i, 0, tiled=True)
        return unstacked(elements[:count], part.shape)

    return jax.shard_map(local, mesh=place.mesh, in_specs=spec, out_specs=spec, check_vma=False)(w)


def gathered(w: Shaped[Array, "..."], axes: Axes, dtype: Any) -> Shaped[Array, "..."]:
    """Returns a weight as a layer computes with it: in `dtype`, and split over `tensor` alone.

    It is cast before it is gathered. Its gradient is summed over the batch straight into the parts that are kept.
    """
    place = _placement.get()
    if place is None:
        return w.astype(dtype)
    kept = place.rules.spec(axes, w.shape, place.mesh)
    used = PartitionSpec(*(t if t == "tensor" else None for t in kept))
    there, here = (NamedSharding(place.mesh, spec) for spec in (kept, used))
    return _gathered(w, jnp.dtype(dtype), w.dtype, there, here)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3, 4))
def _gathered(w: jax.Array, dtype: Any, stored: Any, kept: NamedSharding, used: NamedSharding) -> jax.Array:
    """stored: the dtype of w, and of its gradient."""
    cast = jax.lax.with_sharding_constraint(w.astype(dtype), kept)
    return jax.lax.with_sharding_constraint(cast, used)


def _gathered_forward(
    w: jax.Array, dtype: Any, stored: Any, kept: NamedSharding, used: NamedSharding
) -> tuple[jax.Array, None]:
    return _gathered(w, dtype, stored, kept, used), None


def _gathered_backward(
    dtype: Any, stored: Any, kept: NamedSharding, used: NamedSharding, _: None, g: jax.Array
) -> tuple[jax.Array]:
    return (jax.lax.with_sharding_constraint(g, kept).astype(stored),)


_gathered.defvjp(_gathered_forward, _gathered_backward)


def lookup(table_VD: Float[Array, "V D"], axes: Axes, ids_BS: Int[Array, "B S"]) -> Float[Array, "B S D"]:
    """Returns rows of a table, table[ids]; the batch is split and so is the table.

    Where the width is split over `fsdp`, a device reads its columns for the ids of all of them, and each gets its own
    rows back: what moves is as much as the rows, where gathering the table would move all of it, and its gradient. Rows
    of ids that are not in the table are NaN.
    """
    place = _placement.get()
    if place is None:
        return jnp.take(table_VD, ids_BS, axis=0)
    mesh, spec = place.mesh, place.rules.spec(axes, table_VD.shape, place.mesh)
    batch = place.rules.activation_spec(("batch", None), ids_BS.shape, mesh)
    columns = "fsdp" if mesh.shape["fsdp"] > 1 else None
    if spec[1] != columns or spec[0] not in (None, "tensor") or batch[0] is None:
        return pin(jnp.take(gathered(table_VD, axes, table_VD.dtype), ids_BS, axis=0), "batch", None, None)

    def local(table: jax.Array, ids: jax.Array) -> jax.Array:
        """table: (V / tensor, D / fsdp). ids: (b, S) of this device. Returns (b, S, D)."""
        every = jax.lax.all_gather(ids.reshape(-1), "fsdp")  # (fsdp, b * S)
        if spec[0] == "tensor":
            every = every - jax.lax.axis_index("tensor") * table.shape[0]
            here = (every >= 0) & (every < table.shape[0])
            rows = jnp.where(here[..., None], jnp.take(table, every, axis=0, mode="clip"), 0)
        else:
            rows = jnp.take(table, every, axis=0)
        mine = jax.lax.all_to_all(rows, "fsdp", split_axis=0, concat_axis=0)  # (fsdp, b * S, D / fsdp)
        if spec[0] == "tensor":  # one of them has the row, the others have zeros
            mine = jax.lax.psum(mine, "tensor")
        there = (ids >= 0) & (ids < table_VD.shape[0])
        return jnp.where(there[..., None], mine.swapaxes(0, 1).reshape(*ids.shape, table_VD.shape[1]), jnp.nan)

    mapped = jax.shard_map(local, mesh=mesh, in_specs=(spec, batch), out_specs=PartitionSpec(*batch, None))
    return mapped(table_VD, ids_BS)
