"""Gemma 2 (Gemma team 2024), the language model of PaliGemma 2.

Beside Gemma 1: logits, of attention and of the vocabulary, are capped; every other layer, from the first, sees the last
`window` keys only; what attention and MLP add is normalised too.

Letters: B batch, S tokens, T keys (cached and own), D width, N query heads, K kv heads, H head dim, L layers.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key

from openpi_like.draws import named_key
from openpi_like.models.attention import attention
from openpi_like.models.gemma import Gemma, GemmaConfig, GemmaLayer, PackedLayer, RMSNorm
from openpi_like.models.language import KVCache, Step
from openpi_like.models.param import fan_in, weight
from openpi_like.models.stack import kept
from openpi_like.partition import pin


@dataclasses.dataclass(frozen=True)
class Gemma2Config(GemmaConfig):
    """Sizes of one stack.

    query_scalar: queries are divided by its square root ("query_pre_attn_scalar"); None: the head dim.
    attention_cap, final_cap: of the logits of attention and of the vocabulary, see `cross_entropy.capped`; None: none.
    window: how many keys a local layer sees, the token's own among them; keys after the token do not count, nor those
        that are masked.
    """

    query_scalar: float | None = None
    attention_cap: float | None = 50.0
    final_cap: float | None = 30.0
    window: int = 4096

    def __post_init__(self) -> None:
        super().__post_init__()
        fields = ("query_scalar", "attention_cap", "final_cap", "window")
        given = {name: getattr(self, name) for name in fields}
        problems = [f"{k}={v}, expected a number above 0" for k, v in given.items() if v is not None and not v > 0]
        if problems:
            raise ValueError("Gemma2Config: " + "; ".join(problems))

    @property
    def query_factor(self) -> float:
        """What queries are multiplied by, before attention divides them by the root of the head dim."""
        return 1.0 if self.query_scalar is None else math.sqrt(self.head_dim / self.query_scalar)

    @classmethod
    def tiny(cls, *, width: int = 96, mlp_dim: int = 256) -> "Gemma2Config":
        """Returns sizes that train on two CPU cores, with a window that a prompt exceeds."""
        sizes = GemmaConfig.tiny(width=width, mlp_dim=mlp_dim)
        return cls(**dataclasses.asdict(sizes), window=16)

    @classmethod
    def gemma2_2b(cls) -> "Gemma2Config":
        """Returns the language model of PaliGemma 2 3B; 256,000 tokens without images."""
        return cls(width=2304, depth=26, mlp_dim=9216, num_heads=8, num_kv_heads=4, head_dim=256)

    @classmethod
    def gemma2_9b(cls) -> "Gemma2Config":
        """Returns the language model of PaliGemma 2 10B; 256,000 tokens without images."""
        return cls(width=3584, depth=42, mlp_dim=14_336, num_heads=16, num_kv_heads=8, head_dim=256)


_POST_NORMS = ("attn_post_norm", "mlp_post_norm")


class Gemma2Layer(GemmaLayer):
    """Attention and gated MLP, each between two norms. Declared for all layers at once."""

    def __init__(self, config: Gemma2Config, key: Key[Array, ""]) -> None:
        super().__init__(config, key, adaptive=False)
        for name in _POST_NORMS:
            setattr(self, name, RMSNorm(named_key(key, name), config.width, adaptive=False, layers=config.depth))

    def packed(self, config: GemmaConfig, dtype: str) -> GemmaLayer | PackedLayer:
        """Returns these layers packed; as they are where maps have overlays, or are in fewer bits."""
        layers = super().packed(config, dtype)
        if layers is not self:
            for name in _POST_NORMS:
                setattr(layers, name, getattr(self, name))
        return layers


def run_layer(
    config: Gemma2Config,
    layer: Any,
    x_BSD: Float[Array, "B S D"],
    mask_BST: Bool[Array, "B S T"],
    rope_2BSh: Float[Array, "2 B S half"],
    past: KVCache | None,
) -> tuple[Float[Array, "B S D"], KVCache]:
    """Returns the tokens after one layer, and their own keys and values (without those of `past`)."""
    normed = lambda norm, x: norm(x, None)[0]  # noqa: E731
    x_BSD = pin(x_BSD, "batch", None, None)
    q_BNSH, own = layer.project(normed(layer.attn_norm, x_BSD), rope_2BSh)
    if config.query_factor != 1:
        q_BNSH = q_BNSH * jnp.asarray(config.query_factor, q_BNSH.dtype)
    every = own.after(past)
    seen_BNSH = kept(attention(q_BNSH, every.k, every.v, mask_BST, soft_cap=config.attention_cap), "attention")
    x_BSD = x_BSD + normed(layer.attn_post_norm, layer.project_out(seen_BNSH))
    added = normed(layer.mlp_post_norm, layer.mlp(normed(layer.mlp_norm, x_BSD)))
    return pin(x_BSD + added, "batch", None, None), own


class Gemma2(Gemma):
    """The language model: a table that is also that of the logits, stacked layers and the final norm."""

    config: Gemma2Config

    def __init__(
        self, config: Gemma2Config, key: Key[Array, ""], *, dtype: str, unroll: bool, remat: str | None, vocab_size: int
    ) -> None:
        self.config, self.dtype, self.unroll, self.remat = config, dtype, unroll, remat
        self.soft_cap = config.final_cap
        shape = (vocab_size, config.width)
        self.embedding = weight(key, "embedding", shape, ("vocab", "embed"), fan_in(1), table=True)
        self.layers = Gemma2Layer(config, named_key(key, "layers"))
        self.final_norm = RMSNorm(named_key(key, "final_norm"), config.width, adaptive=False)

    def step(
        self,
        mask_BST: Bool[Array, "B S T"],
        rope_2BSh: Float[Array, "2 B S half"],
        *,
        cond_BSD: Float[Array, "B #S D"] | None = None,
    ) -> Step:
        """Returns what one layer does. There is no condition: norms are not adaptive."""
        if cond_BSD is not None:
            raise ValueError("Gemma 2 has no adaptive norms, expected no condition")
        S, T = mask_BST.shape[1:]
        local_BST = mask_BST
        if self.config.window < T:
            # Counted in keys that are seen: neither padding nor slots of a cache that nothing is in yet take room.
            seen_BST = jnp.cumsum(mask_BST.astype(jnp.int32), axis=-1)
            behind_BST = jnp.diagonal(seen_BST, offset=T - S, axis1=1, axis2=2)[..., None] - seen_BST
            local_BST = mask_BST & (behind_BST < self.config.window)

        def step(x: jax.Array, inputs: tuple[Any, jax.Array, KVCache | None]) -> tuple[jax.Array, KVCache]:
            layer, i, past = inputs
            mask = mask_BST if local_BST is mask_BST else jnp.where(i % 2 == 0, local_BST, mask_BST)
            return run_layer(self.config, layer, x, mask, rope_2BSh, past)

        return step
