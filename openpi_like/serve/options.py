"""How a policy is served, whatever its checkpoint."""

import dataclasses
from typing import Literal

from openpi_like.models.chunking import Guidance
from openpi_like.models.quantize import QUANTIZED
from openpi_like.serve.ranges import Ranges


@dataclasses.dataclass(frozen=True)
class PolicyOptions:
    """How a policy is served.

    robot: serve this one only. seed: of the sampling noise. dtype: of the weights in memory, default as stored;
    bfloat16 halves them, and is what a model of the released size is served with; int8, int4 and float8_e4m3fn hold the
    linear maps in fewer bits, at the cost of some accuracy. temperature: of the tokens that pi0-FAST writes, default
    the likeliest ones. max_batch: requests that are answered together at most. devices: of this machine, which share
    the rows of each batch (max_batch is rounded up to a multiple), but for a request that comes alone; each has all
    weights. real_time_chunking: take what is left of the chunk before. guidance: how policies that were not trained
    for that are led to it. think_every: chunks for which a policy that writes text before it acts keeps what it wrote,
    for one session and prompt; 0: it writes nothing unless a client asks for it. ranges: what is said, and what is
    refused, of states and actions that training has not seen.
    """

    robot: str | None = None
    seed: int = 0
    dtype: Literal["float32", "bfloat16", "int8", "int4", "float8_e4m3fn"] | None = None
    temperature: float | None = None
    max_batch: int = 1
    devices: int = 1
    real_time_chunking: bool = False
    guidance: Guidance = Guidance()
    think_every: int = 1
    ranges: Ranges = Ranges()

    def __post_init__(self) -> None:
        problems = [
            f"{name}={getattr(self, name)}, expected at least {least}"
            for name, least in (("max_batch", 1), ("devices", 1), ("think_every", 0))
            if getattr(self, name) < least
        ]
        if self.temperature is not None and not self.temperature >= 0:
            problems.append(f"temperature={self.temperature}, expected 0 or more, or none")
        if problems:
            raise ValueError("PolicyOptions: " + "; ".join(problems))

    @property
    def quantize(self) -> str | None:
        """What the linear maps are held in, of `QUANTIZED`, or None."""
        return self.dtype if self.dtype in QUANTIZED else None

    @property
    def sizes(self) -> tuple[int, ...]:
        """Sizes of batches that are compiled: one alone, and on each device powers of two and the largest."""
        most = -(-self.max_batch // self.devices)
        shared = (self.devices * n for n in (*(2**i for i in range((most - 1).bit_length())), most))
        return (*((1,) if self.devices > 1 else ()), *shared)
