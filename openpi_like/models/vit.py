"""The transformer block that image towers share: pre-norm attention and MLP over all patches of an image.

Letters: B batch, P patches, D width, N heads, H head dim, F mlp width, L layers, E width of a language vector.
"""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key
from qwix import QArray

from openpi_like.draws import named_key
from openpi_like.models.attention import attention
from openpi_like.models.gemma import rotate
from openpi_like.models.param import Initializer, Linear, linear, ones, use, weight, zeros
from openpi_like.models.stack import kept, run_layers
from openpi_like.partition import pin

GELU: dict[str, Callable[[jax.Array], jax.Array]] = {
    "tanh": functools.partial(jax.nn.gelu, approximate=True),
    "erf": functools.partial(jax.nn.gelu, approximate=False),
    "quick": lambda x: x * jax.nn.sigmoid(1.702 * x),
}
"""By tanh; exact; and as CLIP has it."""


class LayerNorm(nnx.Module):
    """Layer normalisation with scale and bias; statistics in float32, where bfloat16 would lose the variance."""

    def __init__(self, key: Key[Array, ""], width: int, *, layers: int | None = None, epsilon: float = 1e-6) -> None:
        self.epsilon = epsilon
        shape, axes = ((width,), ("norm",)) if layers is None else ((layers, width), ("layers", "norm"))
        self.scale = weight(key, "scale", shape, axes, ones)
        self.bias = weight(key, "bias", shape, axes, zeros)

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        """Normalises over the last axis."""
        x32 = x.astype(jnp.float32)
        centred = x32 - x32.mean(-1, keepdims=True)
        normed = centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + self.epsilon)
        return (normed * use(self.scale, jnp.float32) + use(self.bias, jnp.float32)).astype(x.dtype)


class Film(nnx.Module):
    """Scale and shift of all tokens by a language vector (Perez et al. 2018), as in OpenVLA-OFT.

    Both maps start at zero, so that a fresh one changes nothing; OFT draws them, and disturbs pretrained weights.
    """

    def __init__(self, key: Key[Array, ""], film_width: int, width: int, *, layers: int) -> None:
        make = lambda name: Linear(  # noqa: E731
            named_key(key, name), "BE,ED->BD", (film_width, width), ("embed", "norm"), layers=layers, zero=True
        )
        self.scale, self.shift = make("scale"), make("shift")

    def __call__(self, x_BPD: Float[Array, "B P D"], language_BE: Float[Array, "B E"]) -> Float[Array, "B P D"]:
        """Returns x * (1 + gamma) + beta, with gamma and beta from the language."""
        gamma_BD, beta_BD = self.scale(language_BE.astype(x_BPD.dtype)), self.shift(language_BE.astype(x_BPD.dtype))
        return x_BPD * (1 + gamma_BD[:, None]) + beta_BD[:, None]


class VitLayer(nnx.Module):
    """Pre-norm transformer block. Declared for all layers at once; its methods apply one layer (see `run_layers`)."""

    def __init__(
        self,
        key: Key[Array, ""],
        *,
        depth: int,
        width: int,
        num_heads: int,
        mlp_dim: int,
        gelu: str = "tanh",
        norm: Callable[..., Any] = LayerNorm,
        layer_scale: float | None = None,
        film_width: int | None = None,
    ) -> None:
        """gelu: one of `GELU`. norm: class of the norms.

        layer_scale: what both branches are multiplied by at first, a weight per channel (Touvron et al. 2021).
        film_width: E, where a language vector changes the tokens between attention and MLP.
        """
        L, D, N, F = depth, width, num_heads, mlp_dim
        H = D // N
        self.gelu = gelu
        self.attn_norm = norm(named_key(key, "attn_norm"), D, layers=L)
        heads = ("embed", "heads", "head_dim")
        self.query = Linear(named_key(key, "query"), "BPD,DNH->BPNH", (D, N, H), heads, layers=L)
        self.key = Linear(named_key(key, "key"), "BPD,DNH->BPNH", (D, N, H), heads, layers=L)
        self.value = Linear(named_key(key, "value"), "BPD,DNH->BPNH", (D, N, H), heads, layers=L)
        out = ("heads", "head_dim", "embed")
        self.out = Linear(named_key(key, "out"), "BNPH,NHD->BPD", (N, H, D), out, layers=L)
        self.mlp_norm = norm(named_key(key, "mlp_norm"), D, layers=L)
        self.mlp_up = Linear(named_key(key, "mlp_up"), "BPD,DF->BPF", (D, F), ("embed", "mlp"), layers=L)
        self.mlp_down = Linear(named_key(key, "mlp_down"), "BPF,FD->BPD", (F, D), ("mlp", "embed"), layers=L)

        def scale(name: str) -> nnx.Param | None:
            axes = ("layers", "norm")
            return None if layer_scale is None else weight(key, name, (L, D), axes, _constant(layer_scale))

        self.attn_scale, self.mlp_scale = scale("attn_scale"), scale("mlp_scale")
        self.film = None if film_width is None else Film(named_key(key, "film"), film_width, D, layers=L)

    def projected(self, y_BPD: Float[Array, "B P D"]) -> tuple[Float[Array, "B P N H"], ...]:
        """Returns queries, keys and values of normalised tokens."""
        return self.query(y_BPD), self.key(y_BPD), self.value(y_BPD)

    def attention(
        self,
        x_BPD: Float[Array, "B P D"],
        rope_2Ph: Float[Array, "2 P half"] | None = None,
        attend: Callable[..., Any] = lambda q, k, v: attention(q, k, v, None),
    ) -> Float[Array, "B P D"]:
        """Returns x plus its self-attention; every patch sees every patch.

        rope: sine and cosine of the rotation of queries and keys, where there is one.
        attend: of queries (B, N, P, H), keys and values (B, P, N, H).
        """
        y = self.attn_norm(x_BPD)
        with jax.named_scope("projections"):
            q, k, v = self.projected(y)
            q_BNPH = q.swapaxes(1, 2)
            if rope_2Ph is not None:
                q_BNPH, k = rotate(q_BNPH, rope_2Ph[:, None, None]), rotate(k, rope_2Ph[:, None, :, None])
            q_BNPH = pin(q_BNPH, "batch", "heads", None, None)
            k, v = (pin(x, "batch", None, "heads", None) for x in (k, v))
            q_BNPH, k, v = kept(q_BNPH, "queries"), kept(k, "keys_values"), kept(v, "keys_values")
        seen = kept(attend(q_BNPH, k, v), "attention")
        with jax.named_scope("projections"):
            return x_BPD + _scaled(self.out(seen), self.attn_scale)

    @jax.named_scope("mlp")
    def mlp(self, x_BPD: Float[Array, "B P D"]) -> Float[Array, "B P D"]:
        """Returns x plus its MLP."""
        hidden_BPF = GELU[self.gelu](self.mlp_up(self.mlp_norm(x_BPD)))
        down = self.mlp_down(kept(pin(hidden_BPF, "batch", None, "mlp"), "mlp"))
        return x_BPD + _scaled(down, self.mlp_scale)


class PackedVitLayer(VitLayer):
    """The same with the three projections as one product; weights in the compute dtype. For sampling."""

    def __init__(self, layer: VitLayer, dtype: str) -> None:
        self.gelu, self.heads = layer.gelu, layer.query.bias[...].shape[-2]
        self.attn_norm, self.mlp_norm, self.out = layer.attn_norm, layer.mlp_norm, layer.out
        self.mlp_up, self.mlp_down = layer.mlp_up, layer.mlp_down
        self.attn_scale, self.mlp_scale, self.film = layer.attn_scale, layer.mlp_scale, layer.film
        three = (layer.query, layer.key, layer.value)
        flat = lambda w: w.reshape(*w.shape[:-2], -1).astype(dtype)  # noqa: E731
        kernels, biases = ([flat(getattr(m, name)[...]) for m in three] for name in ("kernel", "bias"))
        self.qkv = nnx.Param(jnp.concatenate(kernels, -1), axes=("layers", "embed", None), inputs=(1,))
        self.qkv_bias = nnx.Param(jnp.concatenate(biases, -1), axes=("layers", None))

    def projected(self, y_BPD: Float[Array, "B P D"]) -> tuple[Float[Array, "B P N H"], ...]:
        """As `VitLayer.projected`."""
        B, P, D = y_BPD.shape
        every = linear(self, "qkv", "BPD,DE->BPE", y_BPD) + use(self.qkv_bias, y_BPD.dtype)
        three = every.reshape(B, P, 3, self.heads, D // self.heads)
        return three[:, :, 0], three[:, :, 1], three[:, :, 2]


T = TypeVar("T", bound="VitTower")


class VitTower(nnx.Module):
    """What towers of these blocks share. layers: `VitLayer`; for sampling a list of its packed form."""

    dtype: str
    layers: Any

    def packed(self: T) -> T:
        """Returns the same tower for sampling; one whose maps have overlays or fewer bits stays as it is."""
        if type(self.layers) is not VitLayer:
            return self
        maps = (self.layers.query, self.layers.key, self.layers.value)
        if any(hasattr(m, "kernel_lora") or isinstance(m.kernel[...], QArray) for m in maps):
            return self
        packed = nnx.merge(*nnx.split(self))
        packed.layers = PackedVitLayer(self.layers, self.dtype)
        return packed


def _constant(value: float) -> Initializer:
    return lambda key, shape: jnp.full(shape, value, jnp.float32)


def _scaled(branch: jax.Array, scale: nnx.Param | None) -> jax.Array:
    return branch if scale is None else branch * use(scale, branch.dtype)


def run_vit(
    layers: Any,
    x_BPD: Float[Array, "B P D"],
    language_BE: Float[Array, "B E"] | None,
    *,
    unroll: bool,
    remat: str | None,
) -> Float[Array, "B P D"]:
    """Returns the output of the last block, before any final norm. layers: see `VitTower`.

    Raises:
        ValueError: there is a language vector without FiLM, or the other way round.
    """
    every = list(layers) if isinstance(layers, nnx.List) else layers
    film = every[0].film if isinstance(every, list) else every.film
    if (language_BE is None) != (film is None):
        raise ValueError(
            "language_BE: expected a vector per image with film_width, and None without; "
            f"got {'None with' if language_BE is None else 'one without'} film_width"
        )

    def body(x: jax.Array, layer: VitLayer) -> tuple[jax.Array, None]:
        x = layer.attention(pin(x, "batch", None, None))
        x = x if layer.film is None or language_BE is None else layer.film(x, language_BE)
        return pin(layer.mlp(x), "batch", None, None), None

    return run_layers(body, x_BPD, every, unroll=unroll, remat=remat)[0]


def to_patches(
    images_BHWC: Float[Array, "B height width 3"], patch_size: int
) -> Float[Array, "B rows {patch_size} columns {patch_size} 3"]:
    """Returns images cut into patches: a convolution without overlap is a linear map of these."""
    B, height, width, C = images_BHWC.shape
    p = patch_size
    return images_BHWC.reshape(B, height // p, p, width // p, p, C)
