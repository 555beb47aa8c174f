"""Gemma-1 transformer stacks, used as the language model and as the action expert of a policy.

A policy's experts have separate weights and attend to each other's tokens through keys and values (a mixture of
transformers, pi0 paper section IV). No token of an earlier expert ever sees a later one, so the joint attention is
computed one expert after the other: each gets the keys and values of those before it as a cache. Training and
sampling therefore run the same code.

Letters: B batch, S tokens, T keys (cached and own), D width, N query heads, K kv heads, G = N / K, H head dim,
F mlp width, V vocabulary, L layers.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from openpi_like.draws import named_key
from openpi_like.models.attention import attention
from openpi_like.models.language import KVCache, LanguageModel, MapsLayer, Step
from openpi_like.models.param import Linear, fan_in, linear, linear_parts, map_weight, use, weight, zeros
from openpi_like.models.stack import kept
from openpi_like.partition import lookup, pin


@dataclasses.dataclass(frozen=True)
class GemmaConfig:
    """Sizes of one stack."""

    width: int
    depth: int
    mlp_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int

    def __post_init__(self) -> None:
        problems = []
        if self.num_heads % self.num_kv_heads:
            problems.append(f"num_heads={self.num_heads}, expected a multiple of num_kv_heads={self.num_kv_heads}")
        if self.head_dim % 2:
            problems.append(f"head_dim={self.head_dim}, expected an even number (rotary pairs)")
        if problems:
            raise ValueError("GemmaConfig: " + "; ".join(problems))

    @classmethod
    def gemma_2b(cls) -> "GemmaConfig":
        """Returns the language model of PaliGemma-3B."""
        return cls(width=2048, depth=18, mlp_dim=16_384, num_heads=8, num_kv_heads=1, head_dim=256)

    @classmethod
    def tiny(cls, *, width: int = 96, mlp_dim: int = 256) -> "GemmaConfig":
        """Returns sizes that train on two CPU cores."""
        return cls(width=width, depth=3, mlp_dim=mlp_dim, num_heads=4, num_kv_heads=1, head_dim=24)

    @classmethod
    def gemma_300m(cls) -> "GemmaConfig":
        """Returns the action expert of pi0."""
        return cls(width=1024, depth=18, mlp_dim=4096, num_heads=8, num_kv_heads=1, head_dim=256)


def attention_mask(valid_BS: Bool[Array, "B S"], starts_S: Bool[Array, "*B S"]) -> Bool[Array, "B S S"]:
    """Returns which token sees which: all valid ones in its own block and in earlier blocks.

    starts: (S,) or (B, S), True where a token starts a new block. Rows of invalid queries are all False.
    """
    block = jnp.broadcast_to(jnp.cumsum(starts_S.astype(jnp.int32), axis=-1), valid_BS.shape)
    return (block[:, None, :] <= block[:, :, None]) & valid_BS[:, None, :] & valid_BS[:, :, None]


def token_positions(valid_BS: Bool[Array, "B S"]) -> Int[Array, "B S"]:
    """Returns the positions of tokens: padding takes none, and repeats the one before it."""
    return jnp.cumsum(valid_BS.astype(jnp.int32), axis=-1) - 1


def rope(positions_BS: Int[Array, "B S"], head_dim: int, base: float = 10_000.0) -> Float[Array, "2 B S half"]:
    """Returns sine and cosine of the rotary angles p * base^(-2i/H) (Su et al. 2021, eq. 15).

    In float32: bfloat16 angles lose far tokens. Computed once for all layers.
    """
    timescale = base ** (2.0 / head_dim * jnp.arange(head_dim // 2, dtype=jnp.float32))
    angles = positions_BS[..., None].astype(jnp.float32) / timescale
    return jnp.stack([jnp.sin(angles), jnp.cos(angles)])


def rotate(x: Float[Array, "*any H"], sin_cos: Float[Array, "2 *#any half"]) -> Float[Array, "*any H"]:
    """Rotates pairs made of the first and second half of the head dim, in float32."""
    sin, cos = sin_cos
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


class RMSNorm(nnx.Module):
    """RMS normalisation with weight 1 + scale, or adaptive: scale, shift and gate are a linear map of a condition.

    Statistics in float32, where bfloat16 would lose them. The adaptive map starts at zero, so that a fresh expert is
    the identity (adaLN-zero of Peebles and Xie 2022; used by pi0.5).
    """

    def __init__(self, key: Key[Array, ""], width: int, *, adaptive: bool, layers: int | None = None) -> None:
        if adaptive:
            axes = ("embed", "norm")
            self.modulation = Linear(key, "BSD,DE->BSE", (width, 3 * width), axes, layers=layers, zero=True)
        else:
            shape, norm_axes = ((width,), ("norm",)) if layers is None else ((layers, width), ("layers", "norm"))
            self.scale = weight(key, "scale", shape, norm_axes, zeros)

    def __call__(
        self, x_BSD: Float[Array, "B S D"], cond_BSD: Float[Array, "B #S D"] | None
    ) -> tuple[Float[Array, "B S D"], Float[Array, "B #S D"] | None]:
        """Returns the normalised tokens, and the gate of the branch behind them when adaptive.

        cond: one vector per example (S = 1) or per token; None when not adaptive.
        """
        x32 = x_BSD.astype(jnp.float32)
        normed = x32 * jax.lax.rsqrt(jnp.square(x32).mean(-1, keepdims=True) + 1e-6)
        if cond_BSD is None:
            return (normed * (1 + use(self.scale, jnp.float32))).astype(x_BSD.dtype), None
        scale, shift, gate = jnp.split(self.modulation(cond_BSD.astype(x_BSD.dtype)), 3, axis=-1)
        return (normed * (1 + scale) + shift).astype(x_BSD.dtype), gate


def _residual(x: jax.Array, branch: jax.Array, gate: jax.Array | None) -> jax.Array:
    return x + branch if gate is None else x + gate * branch


class GemmaLayer(MapsLayer):
    """Attention and gated MLP. Declared for all layers at once; `run_layer` takes one layer's weights of it."""

    activation = staticmethod(functools.partial(jax.nn.gelu, approximate=True))

    def __init__(self, config: GemmaConfig, key: Key[Array, ""], *, adaptive: bool) -> None:
        L, D, F = config.depth, config.width, config.mlp_dim
        N, K, H = config.num_heads, config.num_kv_heads, config.head_dim
        self.attn_norm = RMSNorm(named_key(key, "attn_norm"), D, adaptive=adaptive, layers=L)
        self.q = map_weight(key, "q", (L, N, D, H), ("layers", "heads", "embed", "head_dim"), inputs=(2,))
        kv_axes = ("layers", "stack", "kv_heads", "embed", "head_dim")
        self.kv = map_weight(key, "kv", (L, 2, K, D, H), kv_axes, inputs=(3,))
        self.out = map_weight(key, "out", (L, N, H, D), ("layers", "heads", "head_dim", "embed"), inputs=(1, 2))
        self.mlp_norm = RMSNorm(named_key(key, "mlp_norm"), D, adaptive=adaptive, layers=L)
        self.gate_up = map_weight(key, "gate_up", (L, 2, D, F), ("layers", "stack", "embed", "mlp"), inputs=(2,))
        self.down = map_weight(key, "down", (L, F, D), ("layers", "mlp", "embed"), inputs=(1,))

    def packed(self, config: GemmaConfig, dtype: str) -> "GemmaLayer | PackedLayer":
        """Returns these layers packed; as they are where maps have overlays, or are in fewer bits."""
        return PackedLayer(self, config, dtype) if self.is_plain else self

    @jax.named_scope("projections")
    def queries(self, y_BSD: Float[Array, "B S D"], rope_2BSh: Float[Array, "2 B S half"]) -> Float[Array, "B N S H"]:
        """Returns the queries of normalised tokens."""
        q_BNSH = rotate(linear(self, "q", "BSD,NDH->BNSH", y_BSD), rope_2BSh[:, :, None])
        return kept(pin(q_BNSH, "batch", "heads", None, None), "queries")

    @jax.named_scope("projections")
    def keys_and_values(self, y_BSD: Float[Array, "B S D"], rope_2BSh: Float[Array, "2 B S half"]) -> KVCache:
        """Returns the keys and values of normalised tokens, (B, S, K, H)."""
        k, v = linear_parts(self, "kv", "BSD,KDH->BSKH", y_BSD)
        k, v = (pin(x, "batch", None, "kv_heads", None) for x in (rotate(k, rope_2BSh[:, :, :, None]), v))
        return KVCache(k=kept(k, "keys_values"), v=kept(v, "keys_values"))


class PackedLayer(nnx.Module):
    """The projections of `GemmaLayer` as one matrix each, in the compute dtype.

    Sampling calls an expert on a few tokens again and again: there the number of products counts.
    qkv: (D, (N + 2K) * H). out: (N * H, D). gate_up: (D, 2F). down: (F, D); stacked with L in front.
    """

    activation = staticmethod(GemmaLayer.activation)

    def __init__(self, layer: Any, config: Any, dtype: str, *, own_keys: bool = True) -> None:
        """layer, config: `GemmaLayer`'s, or others with the same maps and sizes.

        own_keys: False where keys and values are no maps of the tokens: then qkv is (D, N * H), of queries alone.
        """
        self.config = config
        L, D, N, H = config.depth, config.width, config.num_heads, config.head_dim
        qkv = layer.q[...].swapaxes(1, 2).reshape(L, D, N * H)
        if own_keys:
            kv = jnp.moveaxis(layer.kv[...], 3, 1).reshape(L, D, -1)
            qkv = jnp.concatenate([qkv, kv], axis=-1)
        self.attn_norm, self.mlp_norm = layer.attn_norm, layer.mlp_norm
        packed = {
            "qkv": (qkv, ("layers", "embed", None)),
            "out": (layer.out[...].reshape(L, N * H, D), ("layers", None, "embed")),
            "gate_up": (layer.gate_up[...].swapaxes(1, 2).reshape(L, D, -1), ("layers", "embed", "mlp")),
            "down": (layer.down[...], ("layers", "mlp", "embed")),
        }
        for name, (value, axes) in packed.items():
            setattr(self, name, nnx.Param(value.astype(dtype), axes=axes, inputs=(1,)))

    def packed(self, config: Any, dtype: str) -> "PackedLayer":
        """Returns itself."""
        return self

    def project(
        self, y_BSD: Float[Array, "B S D"], rope_2BSh: Float[Array, "2 B S half"]
    ) -> tuple[Float[Array, "B N S H"], KVCache]:
        """As `GemmaLayer.project`."""
        B, S = y_BSD.shape[:2]
        N, K, H = self.config.num_heads, self.config.num_kv_heads, self.config.head_dim
        heads = linear(self, "qkv", "BSD,DE->BSE", y_BSD).reshape(B, S, N + 2 * K, H)
        turned = rotate(heads[:, :, : N + K], rope_2BSh[:, :, :, None])
        return turned[:, :, :N].swapaxes(1, 2), KVCache(k=turned[:, :, N:], v=heads[:, :, N + K :])

    def keys_and_values(self, y_BSD: Float[Array, "B S D"], rope_2BSh: Float[Array, "2 B S half"]) -> KVCache:
        """As `GemmaLayer.keys_and_values`."""
        return self.project(y_BSD, rope_2BSh)[1]

    def project_out(self, seen_BNSH: Float[Array, "B N S H"]) -> Float[Array, "B S D"]:
        """As `GemmaLayer.project_out`."""
        B, _, S, _ = seen_BNSH.shape
        return linear(self, "out", "BSE,ED->BSD", seen_BNSH.swapaxes(1, 2).reshape(B, S, -1))

    def mlp(self, y_BSD: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        """As `GemmaLayer.mlp`."""
        gate, up = jnp.split(linear(self, "gate_up", "BSD,DF->BSF", y_BSD), 2, axis=-1)
        return linear(self, "down", "BSF,FD->BSD", self.activation(gate) * up)


def run_layer(
    layer: GemmaLayer | PackedLayer,
    x_BSD: Float[Array, "B S D"],
    mask_BST: Bool[Array, "B S T"],
    rope_2BSh: Float[Array, "2 B S half"],
    past: KVCache | None,
    cond_BSD: Float[Array, "B #S D"] | None,
) -> tuple[Float[Array, "B S D"], KVCache]:
    """Returns the tokens after one layer, and their own keys and values (without those of `past`)."""
    x_BSD = pin(x_BSD, "batch", None, None)
    y, gate = layer.attn_norm(x_BSD, cond_BSD)
    q_BNSH, own = layer.project(y, rope_2BSh)
    every = own.after(past)
    seen_BNSH = kept(attention(q_BNSH, every.k, every.v, mask_BST), "attention")
    x_BSD = _residual(x_BSD, layer.project_out(seen_BNSH), gate)
    y, gate = layer.mlp_norm(x_BSD, cond_BSD)
    return pin(_residual(x_BSD, layer.mlp(y), gate), "batch", None, None), own


class Gemma(LanguageModel):
    """One expert: stacked layers and the final norm; with an embedding table if it reads text."""

    def __init__(
        self,
        config: GemmaConfig,
        key: Key[Array, ""],
        *,
        dtype: str,
        unroll: bool,
        remat: str | None,
        vocab_size: int | None = None,
        adaptive: bool = False,
    ) -> None:
        """adaptive: norms take a condition (pi0.5's action expert). vocab_size: None for an expert without text."""
        self.config, self.dtype, self.unroll, self.remat = config, dtype, unroll, remat
        if vocab_size is not None:
            self.embedding = weight(
                key, "embedding", (vocab_size, config.width), ("vocab", "embed"), fan_in(1), table=True
            )
        self.layers: GemmaLayer | PackedLayer = GemmaLayer(config, named_key(key, "layers"), adaptive=adaptive)
        self.final_norm = RMSNorm(named_key(key, "final_norm"), config.width, adaptive=adaptive)

    @jax.named_scope("embed")
    def embed(self, tokens_BS: Int[Array, "B S"]) -> Float[Array, "B S D"]:
        """Returns token embeddings times sqrt(D)."""
        x_BSD = lookup(self.embedding[...], self.embedding.get_metadata()["axes"], tokens_BS)
        # In float32: 45.25 for 45.2548 would be wrong for all tokens alike.
        return (x_BSD.astype(jnp.float32) * math.sqrt(self.config.width)).astype(self.dtype)

    def rope(self, positions_BS: Int[Array, "B S"]) -> Float[Array, "2 B S half"]:
        """Returns the rotations of tokens at these positions, see `rope`."""
        return rope(positions_BS, self.config.head_dim)

    def step(
        self,
        mask_BST: Bool[Array, "B S T"],
        rope_2BSh: Float[Array, "2 B S half"],
        *,
        cond_BSD: Float[Array, "B #S D"] | None = None,
    ) -> Step:
        """Returns what one layer does. cond: the condition of adaptive norms."""
        return lambda x, inputs: run_layer(inputs[0], x, mask_BST, rope_2BSh, inputs[2], cond_BSD)

    def own_keys(self, layer: Any, x_BSD: Float[Array, "B S D"], rope_2BSh: Float[Array, "2 B S half"]) -> KVCache:
        """Returns the keys and values of the inputs of a layer without a condition."""
        return layer.keys_and_values(layer.attn_norm(x_BSD, None)[0], rope_2BSh)

    def last_norm(
        self, x_BSD: Float[Array, "B S D"], *, cond_BSD: Float[Array, "B #S D"] | None = None
    ) -> Float[Array, "B S D"]:
        """Returns the tokens after the final norm."""
        return self.final_norm(x_BSD, cond_BSD)[0]
