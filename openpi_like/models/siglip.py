"""SigLIP image tower without pooling: one token per patch (Zhai et al. 2023; the vision part of PaliGemma).

Letters: B batch, P patches, D width, N heads, H head dim, F mlp width, L layers, E width of the language model.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key
from qwix import QArray

from openpi_like.draws import named_key
from openpi_like.models.attention import attention
from openpi_like.models.param import Linear, linear, normal, ones, use, weight, zeros
from openpi_like.models.stack import kept, run_layers
from openpi_like.partition import pin


@dataclasses.dataclass(frozen=True)
class SiglipConfig:
    """Sizes of the tower; patch_size in pixels."""

    width: int
    depth: int
    mlp_dim: int
    num_heads: int
    patch_size: int

    def __post_init__(self) -> None:
        if self.width % self.num_heads:
            raise ValueError(f"vision width {self.width}: expected a multiple of num_heads={self.num_heads}")

    @classmethod
    def tiny(cls, patch_size: int = 16) -> "SiglipConfig":
        """Returns sizes that train on two CPU cores."""
        return cls(width=96, depth=3, mlp_dim=256, num_heads=4, patch_size=patch_size)

    @classmethod
    def so400m_14(cls) -> "SiglipConfig":
        """Returns the shape-optimised 400 M model of PaliGemma and pi0."""
        return cls(width=1152, depth=27, mlp_dim=4304, num_heads=16, patch_size=14)


class LayerNorm(nnx.Module):
    """Layer normalisation with scale and bias; statistics in float32, where bfloat16 would lose the variance."""

    def __init__(self, key: Key[Array, ""], width: int, *, layers: int | None = None) -> None:
        shape, axes = ((width,), ("norm",)) if layers is None else ((layers, width), ("layers", "norm"))
        self.scale = weight(key, "scale", shape, axes, ones)
        self.bias = weight(key, "bias", shape, axes, zeros)

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        """Normalises over the last axis."""
        x32 = x.astype(jnp.float32)
        centred = x32 - x32.mean(-1, keepdims=True)
        normed = centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + 1e-6)
        return (normed * use(self.scale, jnp.float32) + use(self.bias, jnp.float32)).astype(x.dtype)


class SiglipLayer(nnx.Module):
    """Pre-norm transformer block. Declared for all layers at once; its methods apply one layer (see `run_layers`)."""

    def __init__(self, config: SiglipConfig, key: Key[Array, ""]) -> None:
        L, D, N, F = config.depth, config.width, config.num_heads, config.mlp_dim
        H = D // N
        self.attn_norm = LayerNorm(named_key(key, "attn_norm"), D, layers=L)
        heads = ("embed", "heads", "head_dim")
        self.query = Linear(named_key(key, "query"), "BPD,DNH->BPNH", (D, N, H), heads, layers=L)
        self.key = Linear(named_key(key, "key"), "BPD,DNH->BPNH", (D, N, H), heads, layers=L)
        self.value = Linear(named_key(key, "value"), "BPD,DNH->BPNH", (D, N, H), heads, layers=L)
        out = ("heads", "head_dim", "embed")
        self.out = Linear(named_key(key, "out"), "BNPH,NHD->BPD", (N, H, D), out, layers=L)
        self.mlp_norm = LayerNorm(named_key(key, "mlp_norm"), D, layers=L)
        self.mlp_up = Linear(named_key(key, "mlp_up"), "BPD,DF->BPF", (D, F), ("embed", "mlp"), layers=L)
        self.mlp_down = Linear(named_key(key, "mlp_down"), "BPF,FD->BPD", (F, D), ("mlp", "embed"), layers=L)

    def projected(self, y_BPD: Float[Array, "B P D"]) -> tuple[Float[Array, "B P N H"], ...]:
        """Returns queries, keys and values of normalised tokens."""
        return self.query(y_BPD), self.key(y_BPD), self.value(y_BPD)

    def attention(self, x_BPD: Float[Array, "B P D"]) -> Float[Array, "B P D"]:
        """Returns x plus its self-attention; every patch sees every patch."""
        y = self.attn_norm(x_BPD)
        with jax.named_scope("projections"):
            q, k, v = self.projected(y)
            q_BNPH = pin(q.swapaxes(1, 2), "batch", "heads", None, None)
            k, v = (pin(x, "batch", None, "heads", None) for x in (k, v))
            q_BNPH, k, v = kept(q_BNPH, "queries"), kept(k, "keys_values"), kept(v, "keys_values")
        seen = kept(attention(q_BNPH, k, v, None), "attention")
        with jax.named_scope("projections"):
            return x_BPD + self.out(seen)

    @jax.named_scope("mlp")
    def mlp(self, x_BPD: Float[Array, "B P D"]) -> Float[Array, "B P D"]:
        """Returns x plus its MLP with tanh-approximated GELU."""
        hidden_BPF = jax.nn.gelu(self.mlp_up(self.mlp_norm(x_BPD)), approximate=True)
        return x_BPD + self.mlp_down(kept(pin(hidden_BPF, "batch", None, "mlp"), "mlp"))


class PackedSiglipLayer(SiglipLayer):
    """The same with the three projections as one product; weights in the compute dtype. For sampling."""

    def __init__(self, layer: SiglipLayer, config: SiglipConfig, dtype: str) -> None:
        self.heads = config.num_heads
        self.attn_norm, self.mlp_norm, self.out = layer.attn_norm, layer.mlp_norm, layer.out
        self.mlp_up, self.mlp_down = layer.mlp_up, layer.mlp_down
        three = (layer.query, layer.key, layer.value)
        flat = lambda w: w.reshape(*w.shape[:-2], -1).astype(dtype)  # noqa: E731
        kernels, biases = ([flat(getattr(m, name)[...]) for m in three] for name in ("kernel", "bias"))
        self.qkv = nnx.Param(jnp.concatenate(kernels, -1), axes=("layers", "embed", None), inputs=(1,))
        self.qkv_bias = nnx.Param(jnp.concatenate(biases, -1), axes=("layers", None))

    def projected(self, y_BPD: Float[Array, "B P D"]) -> tuple[Float[Array, "B P N H"], ...]:
        """As `SiglipLayer.projected`."""
        B, P, D = y_BPD.shape
        every = linear(self, "qkv", "BPD,DE->BPE", y_BPD) + use(self.qkv_bias, y_BPD.dtype)
        three = every.reshape(B, P, 3, self.heads, D // self.heads)
        return three[:, :, 0], three[:, :, 1], three[:, :, 2]


class Siglip(nnx.Module):
    """Images to tokens of the language model's width."""

    def __init__(
        self,
        config: SiglipConfig,
        key: Key[Array, ""],
        *,
        image_size: tuple[int, int],
        out_width: int,
        dtype: str,
        unroll: bool,
        remat: str | None,
    ) -> None:
        """image_size: (height, width) in pixels, multiples of the patch size. out_width: E."""
        self.config, self.dtype, self.unroll, self.remat = config, dtype, unroll, remat
        p, D = config.patch_size, config.width
        P = math.prod(s // p for s in image_size)
        axes = ("patch", "patch", None, "embed")
        self.patch = Linear(named_key(key, "patch"), "BhpwqC,pqCD->BhwD", (p, p, 3, D), axes)
        init = normal(1 / math.sqrt(D))
        self.position = weight(key, "position", (1, P, D), (None, "position", "embed"), init)
        # SiglipLayer; for sampling a list of its packed form.
        self.layers: Any = SiglipLayer(config, named_key(key, "layers"))
        self.final_norm = LayerNorm(named_key(key, "final_norm"), D)
        # openpi starts this map at zero because it always loads a checkpoint; from scratch that would delay the tower,
        # so it starts like every other map.
        self.head = Linear(named_key(key, "head"), "BPD,DE->BPE", (D, out_width), (None, "embed"))

    def packed(self) -> "Siglip":
        """Returns the same tower for sampling; one whose maps have overlays or fewer bits stays as it is."""
        if type(self.layers) is not SiglipLayer:
            return self
        maps = (self.layers.query, self.layers.key, self.layers.value)
        if any(hasattr(m, "kernel_lora") or isinstance(m.kernel[...], QArray) for m in maps):
            return self
        packed = nnx.merge(*nnx.split(self))
        packed.layers = PackedSiglipLayer(self.layers, self.config, self.dtype)
        return packed

    def stem(self, images_BHWC: Float[Array, "B height width 3"]) -> Float[Array, "B h w D"]:
        """Returns the projected patches, in float32: a strided convolution without overlap."""
        B, height, width, C = images_BHWC.shape
        p = self.config.patch_size
        return self.patch(images_BHWC.reshape(B, height // p, p, width // p, p, C))

    def encode(self, x_BPD: Float[Array, "B P D"]) -> Float[Array, "B P D"]:
        """Returns the transformer's output for patches with positions, after the final norm."""

        def body(x: jax.Array, layer: SiglipLayer) -> tuple[jax.Array, None]:
            x = pin(x, "batch", None, None)
            return pin(layer.mlp(layer.attention(x)), "batch", None, None), None

        # Patches and positions stay float32 (as in openpi): pixels and the position table are summed at full precision.
        x_BPD = x_BPD.astype(self.dtype)
        layers = list(self.layers) if isinstance(self.layers, nnx.List) else self.layers
        return self.final_norm(run_layers(body, x_BPD, layers, unroll=self.unroll, remat=self.remat)[0])

    def __call__(self, images_BHWC: Float[Array, "B height width 3"]) -> Float[Array, "B P E"]:
        """Returns one token per patch, row by row. images: float32 in [-1, 1], RGB."""
        with jax.named_scope("siglip"):
            stem = self.stem(images_BHWC)
            B, h, w, D = stem.shape
            return self.head(self.encode(stem.reshape(B, h * w, D) + use(self.position, stem.dtype)))
