"""The device mesh, and what of a run lies where on it; `openpi_like.partition` has the rules."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from openpi_like.partition import ShardingRules


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh axes; `data=-1` takes all devices that `fsdp` and `tensor` leave.

    The batch is split over `data` and `fsdp`, the weights over `fsdp` and `tensor`. Where devices are those of several
    TPU slices, `data` goes over the slices, whose network is slower than what links the chips of one.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1

    def create(self, devices: Sequence[jax.Device] | None = None) -> Mesh:
        """Returns the mesh over all devices of all processes, or over the given ones.

        Raises:
            ValueError: the sizes do not multiply to the number of devices, or `data` to the number of slices.
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
        every = list(jax.devices() if devices is None else devices)
        # GPUs have them too, one per host, but no torus.
        slices = len({getattr(d, "slice_index", None) for d in every}) if every[0].platform == "tpu" else 1
        if data % slices:
            raise ValueError(
                f"mesh: got data={data} for {slices} slices; expected a multiple, data goes over the slices"
            )
        # A mesh axis may take a part of an axis of the chips' torus: 2 x 64 of 4 x 4 x 8.
        if slices == 1:
            placed = mesh_utils.create_device_mesh(shape, every, allow_split_physical_axes=True)
        else:
            within, between = (data // slices, self.fsdp, self.tensor), (slices, 1, 1)
            placed = mesh_utils.create_hybrid_device_mesh(within, between, every, allow_split_physical_axes=True)
        return Mesh(placed, names, axis_types=auto)


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


def check_batch(batch_size: int, accumulate: int, mesh: Mesh) -> None:
    """Checks that every device gets as many samples as any other, in every part of a step.

    Raises:
        ValueError: it does not, with the nearest sizes that do.
    """
    devices = mesh.shape["data"] * mesh.shape["fsdp"]
    unit = devices * accumulate
    if batch_size % unit:
        near = sorted({max(unit, batch_size // unit * unit), -(-batch_size // unit) * unit})
        raise ValueError(
            f"batch_size={batch_size} on a mesh of data={mesh.shape['data']} x fsdp={mesh.shape['fsdp']} devices in "
            f"accumulate={accumulate} parts: expected a multiple of {unit}, such as {' or '.join(map(str, near))}"
        )


def put_batch(batch: Any, mesh: Mesh) -> Any:
    """Makes global arrays of this process' part of a batch (a dict of numpy arrays with leading axis B)."""
    sharding = batch_sharding(mesh)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), batch)
