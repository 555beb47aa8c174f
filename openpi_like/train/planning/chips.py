"""Published peaks of accelerators, for rooflines and model FLOPs utilisation."""

import dataclasses
from collections.abc import Sequence
from typing import Any

# Of a GPU's memory, what a program may take: the driver, libraries and fragments take the rest.
GPU_PART = 0.9


@dataclasses.dataclass(frozen=True)
class Chip:
    """One accelerator as jax shows it, that is one device.

    name: as in the names of topologies, "v5e:4x4" and "h100:8". kinds: `device_kind` in jax.
    tflops: bfloat16 products of dense matrices, summed in float32, 1e12 FLOP/s. memory_gib: HBM or its like.
    memory_gbps: GB/s of that.
    link_gbps: GB/s that a chip receives from the others of its domain, over all its links together: half of what is
        published for both directions.
    network_gbps: GB/s that a chip receives from other domains, its part of the hosts' network; None: none that comes
        with it, so no more chips than one domain has.
    domain: chips that are linked; None for TPUs, whose slices are linked whatever their size.
    torus, largest: axes of a TPU's topology, and chips of its largest slice; 0 for GPUs.
    """

    name: str
    kinds: tuple[str, ...]
    tflops: float
    memory_gib: float
    memory_gbps: float
    link_gbps: float
    network_gbps: float | None = None
    domain: int | None = None
    torus: int = 0
    largest: int = 0

    def receive_gbps(self, together: int, apart: int) -> float:
        """Returns GB/s that a chip receives at most in a group of `apart` domains with `together` chips of it in each.

        What crosses between domains comes over the network of all chips that the group has in one.

        Raises:
            ValueError: there is no network between domains.
        """
        if apart == 1:
            return self.link_gbps
        if self.network_gbps is None:
            raise ValueError(f"{self.name}: no network is published for it, expected at most {self.domain} of them")
        return min(self.link_gbps, together * self.network_gbps)


# TPUs: cloud.google.com/tpu/docs; links 2,400, 1,600, 4,800 and 3,584 Gbit/s, taken as both directions together, though
# newer pages say that this much goes each way: times of collectives are rather too long. GPUs: NVIDIA's data sheets,
# without sparsity; NVLink 600, 900, 900 and 1,800 GB/s, else PCIe 64 and 128 GB/s; network of DGX and HGX systems.
CHIPS = (
    Chip("v4", ("TPU v4",), 275.0, 32.0, 1_228.0, 150.0, 6.25),
    Chip("v5e", ("TPU v5 lite", "TPU v5e"), 197.0, 16.0, 819.0, 100.0, 3.125, torus=2, largest=256),
    Chip("v5p", ("TPU v5", "TPU v5p"), 459.0, 95.0, 2_765.0, 300.0, 6.25, torus=3, largest=6_144),
    Chip("v6e", ("TPU v6 lite", "TPU v6e"), 918.0, 32.0, 1_640.0, 224.0, 12.5, torus=2, largest=256),
    Chip("a100", ("NVIDIA A100-SXM4-80GB",), 312.0, 80.0, 2_039.0, 300.0, 25.0, domain=8),
    Chip("a100-40gb", ("NVIDIA A100-SXM4-40GB",), 312.0, 40.0, 1_555.0, 300.0, 25.0, domain=8),
    Chip("a100-pcie", ("NVIDIA A100 80GB PCIe",), 312.0, 80.0, 1_935.0, 32.0, domain=8),
    Chip("a100-pcie-40gb", ("NVIDIA A100-PCIE-40GB",), 312.0, 40.0, 1_555.0, 32.0, domain=8),
    Chip("h100", ("NVIDIA H100 80GB HBM3",), 989.0, 80.0, 3_350.0, 450.0, 50.0, domain=8),
    Chip("h100-pcie", ("NVIDIA H100 PCIe",), 756.0, 80.0, 2_000.0, 64.0, domain=8),
    Chip("h100-nvl", ("NVIDIA H100 NVL",), 835.0, 94.0, 3_900.0, 64.0, domain=8),
    Chip("h200", ("NVIDIA H200",), 989.0, 141.0, 4_800.0, 450.0, 50.0, domain=8),
    Chip("b200", ("NVIDIA B200",), 2_250.0, 180.0, 8_000.0, 900.0, 50.0, domain=8),
    Chip("gb200", ("NVIDIA GB200",), 2_500.0, 186.0, 8_000.0, 900.0, 50.0, domain=72),
    Chip("l4", ("NVIDIA L4",), 121.0, 24.0, 300.0, 32.0, domain=8),
    Chip("l40s", ("NVIDIA L40S",), 362.0, 48.0, 864.0, 32.0, domain=8),
    Chip("rtx4090", ("NVIDIA GeForce RTX 4090",), 165.0, 24.0, 1_008.0, 32.0, domain=8),
    Chip("rtx5090", ("NVIDIA GeForce RTX 5090",), 209.0, 32.0, 1_792.0, 64.0, domain=8),
)


def find_chip(name: Any) -> Chip | None:
    """Returns the chip of this name, `device_kind` or jax device; None where its peaks are not known."""
    wanted = str(getattr(name, "device_kind", name)).lower()
    return next((c for c in CHIPS if wanted in (c.name, *(k.lower() for k in c.kinds))), None)


def peak_flops(devices: Sequence[Any]) -> float | None:
    """Returns the FLOP/s at the published peaks of jax devices together; None where those of one are not known."""
    chips = [find_chip(device) for device in devices]
    return None if None in chips else sum(1e12 * chip.tflops for chip in chips if chip is not None)
