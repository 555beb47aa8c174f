"""The device mesh, and what of a run lies where on it; `openpi_like.partition` has the rules."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from openpi_like.partition import BATCH, MESH_AXES, ShardingRules


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh axes; -1, for one of them, takes all devices that the others leave.

    The batch is split over `data` and `fsdp`, the weights over `fsdp` and `tensor`.
    slices: groups of devices, with slow links between the groups: slices of TPUs, or hosts of GPUs. `data` goes over
        them first, which then moves nothing between groups but sums of gradients.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    slices: int = 1

    def __post_init__(self) -> None:
        sizes = (self.data, self.fsdp, self.tensor)
        if any(size < 1 and size != -1 for size in sizes) or sizes.count(-1) > 1 or self.slices < 1:
            raise ValueError(
                f"mesh: got data={self.data}, fsdp={self.fsdp}, tensor={self.tensor}, slices={self.slices}; expected "
                "sizes of at least 1, and -1 for one of data, fsdp and tensor at most"
            )

    @classmethod
    def replicated(cls) -> "MeshConfig":
        """Returns a mesh whose devices all hold all weights."""
        return cls()

    @classmethod
    def fully_sharded(cls) -> "MeshConfig":
        """Returns a mesh whose devices hold a part of every weight each."""
        return cls(data=1, fsdp=-1)

    @classmethod
    def hybrid(cls, slices: int) -> "MeshConfig":
        """Returns a mesh whose slices hold all weights each, split over the devices inside."""
        return cls(data=slices, fsdp=-1, slices=slices)

    @classmethod
    def fsdp_and_tensor(cls, tensor: int) -> "MeshConfig":
        """Returns a mesh where `tensor` neighbours compute each layer together."""
        return cls(data=1, fsdp=-1, tensor=tensor)

    def shape(self, count: int) -> tuple[int, int, int]:
        """Returns the sizes of data, fsdp and tensor for so many devices.

        Raises:
            ValueError: they do not multiply to it, or `slices` does not divide `data`.
        """
        sizes = [self.data, self.fsdp, self.tensor]
        if -1 in sizes:
            rest = math.prod(size for size in sizes if size != -1)
            sizes[sizes.index(-1)] = max(count // rest, 1)
        if math.prod(sizes) != count:
            raise ValueError(
                f"mesh: got data={self.data}, fsdp={self.fsdp}, tensor={self.tensor} for {count} devices; "
                "expected sizes whose product is the number of devices (-1 takes what is left)"
            )
        if sizes[0] % self.slices:
            raise ValueError(f"mesh: data={sizes[0]}, expected a multiple of slices={self.slices}, which it goes over")
        return sizes[0], sizes[1], sizes[2]

    def create(self, devices: Sequence[jax.Device] | None = None) -> Mesh:
        """Returns the mesh over all devices of all processes, or over the given ones.

        Raises:
            ValueError: as `shape`; or the devices are of another number of slices.
        """
        devices = jax.devices() if devices is None else devices
        data, fsdp, tensor = self.shape(len(devices))
        auto, names = (jax.sharding.AxisType.Auto,) * 3, MESH_AXES
        # Where slices do not tell devices apart, processes do.
        by_slice = len({getattr(d, "slice_index", None) for d in devices}) > 1
        groups = {d.slice_index if by_slice else d.process_index for d in devices}
        # Slow links may be ignored, but not those between the slices of TPUs, which are tori of their own.
        if self.slices == 1 and not (by_slice and devices[0].platform == "tpu"):
            # A mesh axis may take a part of an axis of the torus: 2 x 64 of 4 x 4 x 8 chips.
            grid = mesh_utils.create_device_mesh((data, fsdp, tensor), devices, allow_split_physical_axes=True)
            return Mesh(grid, names, axis_types=auto)
        if len(groups) != self.slices:
            kind = "slices" if by_slice else "processes"
            raise ValueError(f"mesh: slices={self.slices}, expected {len(groups)}: so many {kind} these devices are of")
        grid = mesh_utils.create_hybrid_device_mesh(
            (data // self.slices, fsdp, tensor),
            (self.slices, 1, 1),
            devices,
            process_is_granule=not by_slice,
            allow_split_physical_axes=True,
        )
        return Mesh(grid, names, axis_types=auto)


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
    return NamedSharding(mesh, PartitionSpec(BATCH))


def check_batch(batch_size: int, accumulate: int, mesh: Mesh, *, name: str = "batch_size") -> None:
    """Checks that every device gets as many samples as any other, in every part of a step. name: of the option.

    Raises:
        ValueError: it does not, with the nearest sizes that do.
    """
    unit = math.prod(mesh.shape[axis] for axis in BATCH) * accumulate
    if batch_size % unit:
        near = sorted({max(unit, batch_size // unit * unit), -(-batch_size // unit) * unit})
        raise ValueError(
            f"{name}={batch_size} on a mesh of data={mesh.shape['data']} x fsdp={mesh.shape['fsdp']} devices in "
            f"{accumulate} part(s): expected a multiple of {unit}, such as {' or '.join(map(str, near))}"
        )


def put_batch(batch: Any, mesh: Mesh) -> Any:
    """Makes global arrays of this process' part of a batch (a dict of numpy arrays with leading axis B)."""
    sharding = batch_sharding(mesh)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), batch)
