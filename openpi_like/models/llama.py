"""Language models of the Llama family: Llama 2 (Touvron et al. 2023), Qwen2 and Qwen2.5 (biases of queries, keys and
values), Qwen3 (queries and keys are normalised), SmolLM2; and the rotations of the Qwen-VL models, in three axes.

Letters: B batch, S tokens, T keys (cached and own), D width, N query heads, K kv heads, H head dim, F mlp width,
V vocabulary, L layers.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from openpi_like.draws import named_key
from openpi_like.models.attention import attention
from openpi_like.models.gemma import PackedLayer, rope, rotate
from openpi_like.models.language import KVCache, LanguageModel, MapsLayer, Step
from openpi_like.models.param import fan_in, linear, linear_parts, map_weight, ones, use, weight, zeros
from openpi_like.models.stack import kept
from openpi_like.partition import lookup, pin


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """Sizes and variants of one stack.

    rope_base, norm_eps: as "rope_theta" and "rms_norm_eps" of published files.
    qkv_bias: queries, keys and values have biases (Qwen2). qk_norm: heads of queries and keys are normalised (Qwen3).
    tied: logits are products with the embedding table; otherwise with a table of their own.
    rope_sections: how many rotary pairs turn with time, height and width, where positions have these three; None
        where positions are numbers. rope_interleaved: these pairs take turns (Qwen3-VL), as long as there are some of
        height and width; otherwise they follow each other (Qwen2.5-VL).
    """

    width: int
    depth: int
    mlp_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_base: float
    norm_eps: float
    qkv_bias: bool = False
    qk_norm: bool = False
    tied: bool = False
    rope_sections: tuple[int, ...] | None = None
    rope_interleaved: bool = False

    def __post_init__(self) -> None:
        problems = []
        if self.num_heads % self.num_kv_heads:
            problems.append(f"num_heads={self.num_heads}, expected a multiple of num_kv_heads={self.num_kv_heads}")
        if self.head_dim % 2:
            problems.append(f"head_dim={self.head_dim}, expected an even number (rotary pairs)")
        if not self.rope_base > 1:
            problems.append(f"rope_base={self.rope_base}, expected a number above 1")
        if not self.norm_eps > 0:
            problems.append(f"norm_eps={self.norm_eps}, expected a number above 0")
        sections, pairs = self.rope_sections, self.head_dim // 2
        if sections is None and self.rope_interleaved:
            problems.append("rope_interleaved=True, expected rope_sections to interleave")
        elif sections is not None and (len(sections) != 3 or min(sections) < 0 or sum(sections) != pairs):
            problems.append(f"rope_sections={sections}, expected three numbers that sum to head_dim / 2 = {pairs}")
        elif sections is not None and self.rope_interleaved and max(sections[1:]) * 3 > pairs:
            problems.append(f"rope_sections={sections}, expected height and width to have a third of {pairs} at most")
        if problems:
            raise ValueError("LlamaConfig: " + "; ".join(problems))

    def rope_axes(self) -> np.ndarray:
        """Returns, for every rotary pair, which of time (0), height (1) and width (2) it turns with: (H / 2,)."""
        assert self.rope_sections is not None
        if not self.rope_interleaved:
            return np.repeat(np.arange(3), self.rope_sections)
        pair = np.arange(self.head_dim // 2)
        axis = pair % 3
        return np.where(pair < 3 * np.asarray(self.rope_sections)[axis], axis, 0)

    @classmethod
    def tiny(cls, **changes: Any) -> "LlamaConfig":
        """Returns sizes that train on two CPU cores; changes: other values of any fields."""
        sizes = {"width": 96, "depth": 3, "mlp_dim": 256, "num_heads": 4, "num_kv_heads": 2, "head_dim": 24}
        return cls(**{**sizes, "rope_base": 10_000.0, "norm_eps": 1e-6, **changes})

    @classmethod
    def llama_2_7b(cls) -> "LlamaConfig":
        """Returns Llama-2-7B, 32,000 tokens; the language model of OpenVLA."""
        return cls(4096, 32, 11_008, 32, 32, 128, rope_base=10_000.0, norm_eps=1e-5)

    @classmethod
    def qwen2_vl_2b(cls) -> "LlamaConfig":
        """Returns the language model of Qwen2-VL-2B, 151,936 tokens."""
        sections = (16, 24, 24)
        return cls(1536, 28, 8960, 12, 2, 128, 1e6, 1e-6, qkv_bias=True, tied=True, rope_sections=sections)

    @classmethod
    def qwen2_5_0_5b(cls) -> "LlamaConfig":
        """Returns Qwen2.5-0.5B, 151,936 tokens."""
        return cls(896, 24, 4864, 14, 2, 64, 1e6, 1e-6, qkv_bias=True, tied=True)

    @classmethod
    def qwen2_5_3b(cls) -> "LlamaConfig":
        """Returns Qwen2.5-3B, 151,936 tokens."""
        return cls(2048, 36, 11_008, 16, 2, 128, 1e6, 1e-6, qkv_bias=True, tied=True)

    @classmethod
    def qwen2_5_vl_3b(cls) -> "LlamaConfig":
        """Returns the language model of Qwen2.5-VL-3B, 151,936 tokens."""
        return dataclasses.replace(cls.qwen2_5_3b(), rope_sections=(16, 24, 24))

    @classmethod
    def qwen2_5_7b(cls) -> "LlamaConfig":
        """Returns Qwen2.5-7B, 152,064 tokens."""
        return cls(3584, 28, 18_944, 28, 4, 128, 1e6, 1e-6, qkv_bias=True)

    @classmethod
    def qwen2_5_vl_7b(cls) -> "LlamaConfig":
        """Returns the language model of Qwen2.5-VL-7B, 152,064 tokens."""
        return dataclasses.replace(cls.qwen2_5_7b(), rope_sections=(16, 24, 24))

    @classmethod
    def qwen3_1_7b(cls) -> "LlamaConfig":
        """Returns Qwen3-1.7B, 151,936 tokens."""
        return cls(2048, 28, 6144, 16, 8, 128, 1e6, 1e-6, qk_norm=True, tied=True)

    @classmethod
    def qwen3_4b(cls) -> "LlamaConfig":
        """Returns Qwen3-4B, 151,936 tokens."""
        return cls(2560, 36, 9728, 32, 8, 128, 1e6, 1e-6, qk_norm=True, tied=True)

    @classmethod
    def qwen3_vl_2b(cls) -> "LlamaConfig":
        """Returns the language model of Qwen3-VL-2B, 151,936 tokens."""
        return cls.qwen3_1_7b()._qwen3_vl()

    @classmethod
    def qwen3_vl_4b(cls) -> "LlamaConfig":
        """Returns the language model of Qwen3-VL-4B, 151,936 tokens."""
        return cls.qwen3_4b()._qwen3_vl()

    def _qwen3_vl(self) -> "LlamaConfig":
        return dataclasses.replace(self, rope_base=5e6, rope_sections=(24, 20, 20), rope_interleaved=True)

    @classmethod
    def smollm2_135m(cls, *, tied: bool = True) -> "LlamaConfig":
        """Returns SmolLM2-135M, 49,152 tokens; not tied, the language model of SmolVLM-256M, 49,280 tokens."""
        return cls(576, 30, 1536, 9, 3, 64, 1e5, 1e-5, tied=tied)

    @classmethod
    def smollm2_360m(cls, *, tied: bool = True) -> "LlamaConfig":
        """Returns SmolLM2-360M, 49,152 tokens; not tied, the language model of SmolVLM-500M, 49,280 tokens."""
        return cls(960, 32, 2560, 15, 5, 64, 1e5, 1e-5, tied=tied)

    @classmethod
    def smollm2_1_7b(cls, *, tied: bool = True) -> "LlamaConfig":
        """Returns SmolLM2-1.7B, 49,152 tokens; not tied, the language model of SmolVLM-2.2B, 49,280 tokens."""
        return cls(2048, 24, 8192, 32, 32, 64, 130_000.0, 1e-5, tied=tied)


class LlamaNorm(nnx.Module):
    """RMS normalisation over the last axis, with a weight that starts at one; statistics in float32."""

    def __init__(self, key: Key[Array, ""], width: int, *, eps: float, layers: int | None = None) -> None:
        shape, axes = ((width,), ("norm",)) if layers is None else ((layers, width), ("layers", "norm"))
        self.eps = eps
        self.scale = weight(key, "scale", shape, axes, ones)

    def __call__(self, x: Float[Array, "*any W"]) -> Float[Array, "*any W"]:
        """Returns the normalised vectors."""
        x32 = x.astype(jnp.float32)
        normed = x32 * jax.lax.rsqrt(jnp.square(x32).mean(-1, keepdims=True) + self.eps)
        return (normed * use(self.scale, jnp.float32)).astype(x.dtype)


class LlamaLayer(MapsLayer):
    """Attention and gated MLP. Declared for all layers at once; `run_layer` takes one layer's weights of it."""

    activation = staticmethod(jax.nn.silu)

    def __init__(self, config: LlamaConfig, key: Key[Array, ""], *, kv_width: int | None = None) -> None:
        """kv_width: of what keys and values are maps of; None where that is the tokens."""
        L, D, F = config.depth, config.width, config.mlp_dim
        N, K, H = config.num_heads, config.num_kv_heads, config.head_dim

        def norm(name: str, width: int) -> LlamaNorm:
            return LlamaNorm(named_key(key, name), width, eps=config.norm_eps, layers=L)

        self.attn_norm, self.mlp_norm = norm("attn_norm", D), norm("mlp_norm", D)
        self.q = map_weight(key, "q", (L, N, D, H), ("layers", "heads", "embed", "head_dim"), inputs=(2,))
        map_axes = ("layers", "stack", "kv_heads", "embed", "head_dim")
        self.kv = map_weight(key, "kv", (L, 2, K, kv_width or D, H), map_axes, inputs=(3,))
        self.out = map_weight(key, "out", (L, N, H, D), ("layers", "heads", "head_dim", "embed"), inputs=(1, 2))
        self.gate_up = map_weight(key, "gate_up", (L, 2, D, F), ("layers", "stack", "embed", "mlp"), inputs=(2,))
        self.down = map_weight(key, "down", (L, F, D), ("layers", "mlp", "embed"), inputs=(1,))
        bias, norms = config.qkv_bias, config.qk_norm
        q_axes, kv_axes = ("layers", "heads", "head_dim"), ("layers", "stack", "kv_heads", "head_dim")
        self.q_bias = weight(key, "q_bias", (L, N, H), q_axes, zeros) if bias else None
        self.kv_bias = weight(key, "kv_bias", (L, 2, K, H), kv_axes, zeros) if bias else None
        self.q_norm, self.k_norm = (norm(name, H) if norms else None for name in ("q_norm", "k_norm"))

    def packed(self, config: LlamaConfig, dtype: str) -> "LlamaLayer | PackedLlamaLayer":
        """Returns these layers packed; as they are where they are not plain."""
        return PackedLlamaLayer(self, config, dtype) if self.is_plain else self

    @jax.named_scope("projections")
    def queries(self, y_BSD: Float[Array, "B S D"], rope_2BSh: Float[Array, "2 B S half"]) -> Float[Array, "B N S H"]:
        """Returns the queries of normalised tokens."""
        q_BNSH = linear(self, "q", "BSD,NDH->BNSH", y_BSD)
        if self.q_bias is not None:
            q_BNSH = q_BNSH + use(self.q_bias, q_BNSH.dtype)[:, None]
        if self.q_norm is not None:
            q_BNSH = self.q_norm(q_BNSH)
        return kept(pin(rotate(q_BNSH, rope_2BSh[:, :, None]), "batch", "heads", None, None), "queries")

    @jax.named_scope("projections")
    def keys_and_values(self, y_BSD: Float[Array, "B S D"], rope_2BSh: Float[Array, "2 B S half"]) -> KVCache:
        """Returns the keys and values of normalised tokens, (B, S, K, H)."""
        k, v = linear_parts(self, "kv", "BSD,KDH->BSKH", y_BSD)
        if self.kv_bias is not None:
            bias = use(self.kv_bias, k.dtype)
            k, v = k + bias[0], v + bias[1]
        if self.k_norm is not None:
            k = self.k_norm(k)
        k, v = (pin(x, "batch", None, "kv_heads", None) for x in (rotate(k, rope_2BSh[:, :, :, None]), v))
        return KVCache(k=kept(k, "keys_values"), v=kept(v, "keys_values"))


class PackedLlamaLayer(PackedLayer):
    """The projections of `LlamaLayer` as one matrix each, see `PackedLayer`; qkv_bias: (N + 2K, H)."""

    activation = staticmethod(LlamaLayer.activation)

    def __init__(self, layer: LlamaLayer, config: LlamaConfig, dtype: str, *, own_keys: bool = True) -> None:
        super().__init__(layer, config, dtype, own_keys=own_keys)
        self.q_norm, self.k_norm = layer.q_norm, layer.k_norm
        self.qkv_bias = None
        if layer.q_bias is not None and layer.kv_bias is not None:
            kv_bias = layer.kv_bias[...].reshape(config.depth, -1, config.head_dim)
            bias = jnp.concatenate([layer.q_bias[...], kv_bias], axis=1).astype(dtype)
            self.qkv_bias = nnx.data(nnx.Param(bias, axes=("layers", None, "head_dim")))

    def project(
        self, y_BSD: Float[Array, "B S D"], rope_2BSh: Float[Array, "2 B S half"]
    ) -> tuple[Float[Array, "B N S H"], KVCache]:
        """As `LlamaLayer.project`."""
        B, S = y_BSD.shape[:2]
        N, K, H = self.config.num_heads, self.config.num_kv_heads, self.config.head_dim
        heads = linear(self, "qkv", "BSD,DE->BSE", y_BSD).reshape(B, S, N + 2 * K, H)
        if self.qkv_bias is not None:
            heads = heads + use(self.qkv_bias, heads.dtype)
        q, k, v = jnp.split(heads, [N, N + K], axis=2)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = (rotate(x, rope_2BSh[:, :, :, None]) for x in (q, k))
        return q.swapaxes(1, 2), KVCache(k=k, v=v)


def run_layer(
    layer: LlamaLayer | PackedLlamaLayer,
    x_BSD: Float[Array, "B S D"],
    mask_BST: Bool[Array, "B S T"],
    rope_2BSh: Float[Array, "2 B S half"],
    past: KVCache | None,
) -> tuple[Float[Array, "B S D"], KVCache]:
    """Returns the tokens after one layer, and their own keys and values (without those of `past`)."""
    x_BSD = pin(x_BSD, "batch", None, None)
    q_BNSH, own = layer.project(layer.attn_norm(x_BSD), rope_2BSh)
    every = own.after(past)
    x_BSD = x_BSD + layer.project_out(kept(attention(q_BNSH, every.k, every.v, mask_BST), "attention"))
    return pin(x_BSD + layer.mlp(layer.mlp_norm(x_BSD)), "batch", None, None), own


class Llama(LanguageModel):
    """A language model of the Llama family: a table, stacked layers and the final norm; another table if not tied."""

    head: nnx.Param  # only where not tied

    def __init__(
        self, config: LlamaConfig, key: Key[Array, ""], *, dtype: str, unroll: bool, remat: str | None, vocab_size: int
    ) -> None:
        self.config, self.dtype, self.unroll, self.remat = config, dtype, unroll, remat
        tables = ("embedding",) if config.tied else ("embedding", "head")
        for name in tables:
            shape = (vocab_size, config.width)
            setattr(self, name, weight(key, name, shape, ("vocab", "embed"), fan_in(1), table=True))
        self.layers: LlamaLayer | PackedLlamaLayer = LlamaLayer(config, named_key(key, "layers"))
        self.final_norm = LlamaNorm(named_key(key, "final_norm"), config.width, eps=config.norm_eps)

    def table(self) -> nnx.Param:
        """Returns the table (V, D) that logits are products with."""
        return self.embedding if self.config.tied else self.head

    @jax.named_scope("embed")
    def embed(self, tokens_BS: Int[Array, "B S"]) -> Float[Array, "B S D"]:
        """Returns token embeddings."""
        x_BSD = lookup(self.embedding[...], self.embedding.get_metadata()["axes"], tokens_BS)
        return x_BSD.astype(self.dtype)

    def rope(self, positions: Int[Array, "B S"] | Int[Array, "3 B S"]) -> Float[Array, "2 B S half"]:
        """Returns the rotations of tokens at these positions: numbers, or time, height and width.

        A number is a position whose time, height and width are that number.
        """
        if positions.ndim == 2:
            return rope(positions, self.config.head_dim, self.config.rope_base)
        if self.config.rope_sections is None:
            raise ValueError(f"positions {positions.shape}: this model has no rope_sections, expected (B, S)")
        by_axis = jnp.stack([rope(p, self.config.head_dim, self.config.rope_base) for p in positions])
        axes = self.config.rope_axes()
        return jnp.moveaxis(by_axis[axes, ..., np.arange(len(axes))], 0, -1)

    def step(
        self,
        mask_BST: Bool[Array, "B S T"],
        rope_2BSh: Float[Array, "2 B S half"],
        *,
        deepstack: tuple[Float[Array, "B S D"], ...] | None = None,
    ) -> Step:
        """Returns what one layer does.

        deepstack: element i is added to the tokens after layer i (Qwen3-VL: features of images, zeros elsewhere).
        """
        added = jnp.stack(deepstack).astype(self.dtype) if deepstack else None

        def step(x: jax.Array, inputs: tuple[Any, jax.Array, KVCache | None]) -> tuple[jax.Array, KVCache]:
            layer, i, past = inputs
            x, own = run_layer(layer, x, mask_BST, rope_2BSh, past)
            if added is not None:
                here = jax.lax.dynamic_index_in_dim(added, i, keepdims=False)  # of the last, if i is beyond it
                x = x + jnp.where(i < len(added), here, 0)
            return x, own

        return step

    def own_keys(self, layer: Any, x_BSD: Float[Array, "B S D"], rope_2BSh: Float[Array, "2 B S half"]) -> KVCache:
        """Returns the keys and values of the inputs of a layer."""
        return layer.keys_and_values(layer.attn_norm(x_BSD), rope_2BSh)

    def last_norm(self, x_BSD: Float[Array, "B S D"], **given: Any) -> Float[Array, "B S D"]:
        """Returns the tokens after the final norm."""
        return self.final_norm(x_BSD)
