"""What lies between a vision encoder and a language model of another width.

Letters: B batch, P patches, D width of the patches, E width of the language model, F width between maps.
"""

import math

import einops
import jax
from flax import nnx
from jaxtyping import Array, Float, Key

from openpi_like.draws import named_key
from openpi_like.models.param import Linear, linear, map_weight


class PrismaticProjector(nnx.Module):
    """Three maps with exact GELU between them, of Prismatic VLMs with two encoders (Karamcheti et al. 2024), OpenVLA.

    The first goes to four times the width of both encoders together. Behind one encoder there are two maps.
    """

    def __init__(self, key: Key[Array, ""], width: int, out_width: int, *, fused: bool = True) -> None:
        """width: D, 2176 in OpenVLA. out_width: E, 4096 there. fused: there are two encoders."""
        E = out_width
        F = 4 * width if fused else E
        self.first = Linear(named_key(key, "first"), "BPD,DF->BPF", (width, F), ("embed", "mlp"))
        self.second = Linear(named_key(key, "second"), "BPF,FE->BPE", (F, E), ("mlp", "embed"))
        third = lambda: Linear(named_key(key, "third"), "BPD,DE->BPE", (E, E), (None, "embed"))  # noqa: E731
        self.third = third() if fused else None

    @jax.named_scope("projector")
    def __call__(self, patches_BPD: Float[Array, "B P D"]) -> Float[Array, "B P E"]:
        """Returns one token of the language model per patch."""
        hidden_BPE = self.second(jax.nn.gelu(self.first(patches_BPD), approximate=False))
        return hidden_BPE if self.third is None else self.third(jax.nn.gelu(hidden_BPE, approximate=False))


class PixelShuffle(nnx.Module):
    """Joins `scale` x `scale` neighbouring patches into one token by a linear map without bias (SmolVLM, Idefics 3)."""

    def __init__(self, key: Key[Array, ""], width: int, out_width: int, *, grid: tuple[int, int], scale: int) -> None:
        """width: D. out_width: E. grid: rows and columns of patches, multiples of `scale`; 4 in SmolVLM-256M and 500M.

        Raises:
            ValueError: the grid is not divided by the scale.
        """
        if any(n % scale for n in grid):
            raise ValueError(f"grid={grid}, expected multiples of scale={scale}")
        self.grid, self.scale = grid, scale
        shape = (scale**2 * width, out_width)
        self.kernel = map_weight(key, "kernel", shape, (None, "embed"), inputs=(0,))

    @property
    def tokens(self) -> int:
        """Tokens that come out."""
        return math.prod(self.grid) // self.scale**2

    @jax.named_scope("projector")
    def __call__(self, patches_BPD: Float[Array, "B P D"]) -> Float[Array, "B T E"]:
        """Returns T = P / scale^2 tokens, row by row."""
        order, (rows, s) = "B (h p w q) D -> B (h w) (p q D)", (self.grid[0], self.scale)
        joined = einops.rearrange(patches_BPD, order, h=rows // s, p=s, q=s)
        return linear(self, "kernel", "BTD,DE->BTE", joined)
