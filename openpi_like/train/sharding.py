"""The device mesh, and one table from logical axes of weights to its axes: changing strategy never touches a model."""

import dataclasses
import hashlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from openpi_like.config import near_names


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh axes; `data=-1` takes all devices that `fsdp` and `tensor` leave.

    The batch is split over `data` and `fsdp`, the weights over `fsdp` and `tensor`.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1

    def create(self, devices: Sequence[jax.Device] | None = None) -> Mesh:
        """Returns the mesh over all devices of all processes, or over the given ones.

        Raises:
            ValueError: the sizes do not multiply to the number of devices.
        """
        count = jax.device_count() if devices is None else len(devices)
        data = count // (self.fsdp * self.tensor) if self.data == -1 else self.data
        if data * self.fsdp * self.tensor != count:
            raise ValueError(
                f"mesh: got data={self.data}, fsdp={self.fsdp}, tensor={self.tensor} for {count} devices; "
                "expected sizes whose product is the number of devices (data=-1 takes what is left)"
            )
        auto = (jax.sharding.AxisType.Auto,) * 3
        shape, names = (data, self.fsdp, self.tensor), ("data", "fsdp", "tensor")
        return jax.make_mesh(shape, names, axis_types=auto, devices=devices)


@dataclasses.dataclass(frozen=True)
class ShardingRules:
    """Logical axis of a weight -> mesh axis (None: replicated). The field names are all logical axes there are."""

    layers: str | None = None
    embed: str | None = "fsdp"
    heads: str | None = "tensor"
    kv_heads: str | None = None
    head_dim: str | None = None
    mlp: str | None = "tensor"
    vocab: str | None = "tensor"
    stack: str | None = None  # small fixed axes: q/k/v, gate/up
    patch: str | None = None
    position: str | None = None
    action: str | None = None
    norm: str | None = None

    def spec(self, axes: tuple[str | None, ...], shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
        """Returns the partition of one weight. An axis that its mesh axis does not divide is replicated.

        Raises:
            ValueError: unknown logical axis, wrong number of axes, or two axes of one weight on one mesh axis.
        """
        known = [f.name for f in dataclasses.fields(self)]
        if len(axes) != len(shape):
            raise ValueError(f"weight of shape {shape}: got logical axes {axes}, expected {len(shape)} of them")
        mesh_axes: list[str | None] = []
        for axis, size in zip(axes, shape, strict=True):
            if axis is not None and axis not in known:
                raise ValueError(f"logical axis {axis!r} has no rule; {near_names(axis, known)}")
            target = None if axis is None else getattr(self, axis)
            mesh_axes.append(target if target is not None and size % mesh.shape[target] == 0 else None)
        used = [a for a in mesh_axes if a is not None]
        if len(used) != len(set(used)):
            raise ValueError(f"weight with axes {axes}: rules put two axes on one mesh axis, got {mesh_axes}")
        return PartitionSpec(*mesh_axes)


def weight_shardings(axes: Any, shapes: Any, mesh: Mesh, rules: ShardingRules) -> Any:
    """Returns the tree of `NamedSharding` for a nested dict of weights.

    axes: nested dict of tuples of logical axis names. shapes: nested dict of arrays or ShapeDtypeStruct.
    """
    return jax.tree.map(
        lambda shape, axis: NamedSharding(mesh, rules.spec(axis, shape.shape, mesh)),
        shapes,
        axes,
        is_leaf=lambda x: hasattr(x, "shape"),
    )


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of values that every device holds."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of batches: the first axis over `data` and `fsdp`."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def put_batch(batch: Any, mesh: Mesh) -> Any:
    """Makes global arrays of this process' part of a batch (a dict of numpy arrays with leading axis B)."""
    sharding = batch_sharding(mesh)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), batch)


def check_hosts_agree(text: str, what: str) -> None:
    """Compares a text between the processes of a run.

    Raises:
        ValueError: on every process, where any two of them have another one.
    """
    if jax.process_count() == 1:
        return
    digest = np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint8)
    every = np.asarray(multihost_utils.process_allgather(digest))
    others = np.flatnonzero((every != every[0]).any(axis=1)).tolist()
    if others:
        raise ValueError(f"processes {others} of {len(every)} differ from the first in {what}")
