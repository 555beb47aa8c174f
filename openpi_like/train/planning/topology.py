"""Machines to plan for: slices of TPUs that are not there, GPUs by their published figures, or this machine.

TPUs need no TPU: libtpu (the extra `plan`) compiles for them on any machine. Programs for GPUs can only be compiled
where there is one; elsewhere they are compiled for as many TPUs v5p, the largest memory there is, as a stand-in.
"""

import dataclasses
import importlib.util
import math
import re
from typing import Any

import jax
import psutil
from jax.experimental import topologies

from openpi_like.config import near_names
from openpi_like.train.planning.chips import CHIPS, GPU_PART, Chip, find_chip

GIB = 2**30
STAND_IN = "v5p"
# Slices of chips with a two-dimensional topology, as they are offered.
_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")


class TopologyError(ValueError):
    """There is no such machine; the text says what is near."""


@dataclasses.dataclass(frozen=True)
class Target:
    """What a program is planned for.

    chip: whose peaks count, None where they are not known. limit: bytes of a chip's memory that a program may take,
    None where the compiler knows. compiled_for: the chips that the compiler takes, where these are others.
    """

    name: str
    devices: tuple[Any, ...]
    chip: Chip | None
    limit: int | None
    compiled_for: str | None = None

    @property
    def count(self) -> int:
        return len(self.devices)

    def domain(self, device: Any, position: int) -> int:
        """Returns which of the linked domains a device belongs to. position: of the device in the mesh."""
        if self.chip is not None and self.chip.domain is not None:
            return position // self.chip.domain
        return getattr(device, "slice_index", None) or 0


def this_machine() -> Target:
    """Returns the devices that jax has here; the memory of CPU devices is their part of the machine's."""
    devices = tuple(jax.devices())
    statistics = devices[0].memory_stats() or {}
    limit = statistics.get("bytes_limit") or psutil.virtual_memory().total / jax.local_device_count()
    return Target("this machine", devices, find_chip(devices[0]), int(limit))


def find_target(topology: str | None, *, slices: int = 1) -> Target:
    """Returns a machine. topology: "v5e:16x16", "h100:8", or None for this one. slices: of TPUs, of that size each.

    Raises:
        TopologyError: there is no such topology, or it cannot be compiled for here.
    """
    if slices < 1 or (topology is None and slices > 1):
        raise TopologyError(f"slices={slices}, expected at least 1, and more than that of a topology only")
    if topology is None:
        return this_machine()
    name, _, shape = topology.partition(":")
    chip = find_chip(name)
    plannable = [c for c in CHIPS if c.torus or c.domain]
    if chip is None or chip not in plannable:
        raise TopologyError(
            f"topology {topology!r}: no chip {name!r}; {near_names(name, [c.name for c in plannable])}; "
            "write for example v5e:16x16, v5p:4x4x8 or h100:8"
        )
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape):
        raise TopologyError(f"topology {topology!r}: expected {chip.name}:{_example(chip)} or the like")
    sizes = tuple(map(int, shape.split("x")))
    if not chip.torus:
        return _gpus(topology, chip, sizes, slices)
    return _tpus(topology, chip, sizes, slices)


def _example(chip: Chip) -> str:
    return {0: "8", 2: "4x4", 3: "2x2x4"}[chip.torus]


def _tpus(topology: str, chip: Chip, sizes: tuple[int, ...], slices: int) -> Target:
    shape = "x".join(map(str, sizes))
    if chip.torus == 2 and shape not in _FLAT:
        raise TopologyError(f"topology {topology!r}: there is no such slice; {near_names(shape, _FLAT)}")
    if len(sizes) != chip.torus or math.prod(sizes) > chip.largest:
        raise TopologyError(
            f"topology {topology!r}: expected {chip.torus} axes and at most {chip.largest:,} chips, such as "
            f"{chip.name}:{_example(chip)}"
        )
    return Target(topology if slices == 1 else f"{slices} x {topology}", _describe(topology, sizes, slices), chip, None)


def _gpus(topology: str, chip: Chip, sizes: tuple[int, ...], slices: int) -> Target:
    count = math.prod(sizes)
    if len(sizes) != 1 or slices > 1:
        raise TopologyError(f"topology {topology!r}, {slices} slices: expected the number of GPUs, {chip.name}:8")
    assert chip.domain is not None
    if chip.network_gbps is None and count > chip.domain:
        raise TopologyError(f"topology {topology!r}: no network is known between these; expected at most {chip.domain}")
    if count > 2 and count % 4:
        raise TopologyError(f"topology {topology!r}: expected 1, 2 or a multiple of 4 GPUs")
    # As near to a cube as it goes, of whole hosts of 2 x 2 chips.
    stand_in: tuple[int, ...] = (count, 1, 1)
    if count > 2:
        quarter = count // 4
        cubes = [(a, b, quarter // a // b) for a in range(1, quarter + 1) if quarter % a == 0
                 for b in range(1, quarter // a + 1) if quarter // a % b == 0]  # fmt: skip
        a, b, c = min(cubes, key=lambda s: 2 * s[0] + 2 * s[1] + s[2])
        stand_in = (2 * a, 2 * b, c)
    name = f"{STAND_IN}:{'x'.join(map(str, stand_in))}"
    return Target(
        topology, _describe(name, stand_in, 1), chip, int(GPU_PART * chip.memory_gib * GIB), f"{count} TPUs {STAND_IN}"
    )


def _describe(topology: str, sizes: tuple[int, ...], slices: int) -> tuple[Any, ...]:
    """Returns the devices of TPU slices."""
    if importlib.util.find_spec("libtpu") is None:
        raise TopologyError(f"topology {topology!r}: needs libtpu to compile for; pip install -e '.[plan]'")
    options: dict[str, Any] = {"num_slices": slices} if slices > 1 else {}
    if math.prod(sizes) < 4:
        options["chips_per_host_bounds"] = (*sizes, 1, 1)[:3]  # a part of a host
    try:
        described = topologies.get_topology_desc(platform="tpu", topology_name=topology, **options)
    except jax.errors.JaxRuntimeError as e:
        line = str(e).splitlines()[0]
        raise TopologyError(f"topology {topology!r}: the TPU compiler does not know it: {line}") from e
    return tuple(described.devices)
