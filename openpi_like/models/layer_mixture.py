"""A head that reads a frozen model layer by layer, block i the tokens behind layer i (VLA-Adapter, M2-VLA).

A chunk starts as one token per step and passes as many blocks as the language model has layers. In each, its tokens
look at themselves, at the learned queries and the robot's state, and at the images, as that layer has them. How the
three are put together is a block's `attend`.

Letters: B batch, L layers, A steps of the chunk, T tokens of one source, Q queries, P visual tokens, D width, N heads,
H head dim, J action dims.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Key

from openpi_like.batch import Array as Leaf
from openpi_like.draws import named_key
from openpi_like.models.attention import attention
from openpi_like.models.gemma import rope, rotate
from openpi_like.models.param import Linear, linear, linear_parts, map_weight, use, weight, zeros
from openpi_like.models.stack import run_layers
from openpi_like.models.vit import LayerNorm
from openpi_like.partition import pin

SOURCES = ("self", "asked", "seen")
"""What a block looks at: its own tokens; queries and state; images."""


class LayerFeatures(NamedTuple):
    """What the language model has behind each of its layers. asked: (L, B, Q, D). seen: (L, B, P, D).

    seen_mask: (B, P), patches of cameras that there are.
    """

    asked: Leaf
    seen: Leaf
    seen_mask: Leaf


class Source(NamedTuple):
    """Keys and values of what is looked at, (B, T, N, H), and which are there, (B, T); None: all."""

    keys: Any
    values: Any
    mask: Any = None


def rotate_as_released(x_BTNH: Float[Array, "B T N H"]) -> Float[Array, "B T N H"]:
    """Returns what the released code makes of positions 0 .. T-1, which is no rotation.

    It takes pairs (2i, 2i + 1), and angles as if they were (i, i + H / 2). Weights that were trained with it need it.
    """
    T, H = x_BTNH.shape[1], x_BTNH.shape[-1]
    sin, cos = (jnp.concatenate([x, x], axis=-1)[0, :, None] for x in rope(jnp.arange(T)[None], H))
    x = x_BTNH.astype(jnp.float32)
    turned = jnp.stack([-x[..., 1::2], x[..., ::2]], axis=-1).reshape(x.shape)
    return (x * cos + turned * sin).astype(x_BTNH.dtype)


def rotated(x_BTNH: Float[Array, "B T N H"], *, as_released: bool) -> Float[Array, "B T N H"]:
    """Returns queries or keys of positions 0 .. T-1, rotated (base 10,000). Positions of each source begin anew."""
    if as_released:
        return rotate_as_released(x_BTNH)
    return rotate(x_BTNH, rope(jnp.arange(x_BTNH.shape[1])[None], x_BTNH.shape[-1])[:, :, :, None])


class LayerBlock(nnx.Module):
    """Attention to the three sources, with keys and values of its own for each, and one map behind it.

    There is no residual around the block: x = ReLU(map(norm(attended + x))), as in the released code of both.
    Declared for all layers at once.
    """

    def __init__(self, key: Key[Array, ""], layers: int, width: int, heads: int) -> None:
        L, D, N, H = layers, width, heads, width // heads
        axes = ("layers", "heads", "embed", "head_dim")
        self.q = map_weight(key, "q", (L, N, D, H), axes, inputs=(2,))
        self.q_bias = weight(key, "q_bias", (L, N, H), ("layers", "heads", "head_dim"), zeros)
        for name in SOURCES:
            kv_axes = ("layers", "stack", "heads", "embed", "head_dim")
            setattr(self, f"kv_{name}", map_weight(key, f"kv_{name}", (L, 2, N, D, H), kv_axes, inputs=(3,)))
            bias_axes = ("layers", "stack", "heads", "head_dim")
            setattr(self, f"kv_{name}_bias", weight(key, f"kv_{name}_bias", (L, 2, N, H), bias_axes, zeros))
        self.out = map_weight(key, "out", (L, N, H, D), ("layers", "heads", "head_dim", "embed"), inputs=(1, 2))
        self.out_bias = weight(key, "out_bias", (L, D), ("layers", "norm"), zeros)
        # Of the images: 0 makes all patches equal, or leaves them out, see `attend`.
        self.gate = weight(key, "gate", (L,), ("layers",), zeros)
        self.norm = LayerNorm(named_key(key, "norm"), D, layers=L, epsilon=1e-5)
        self.map = Linear(named_key(key, "map"), "BTD,DE->BTE", (D, D), ("embed", "mlp"), layers=L)

    def attend(
        self, q_BTNH: Float[Array, "B T N H"], sources: dict[str, Source], asked_BTD: Float[Array, "B T2 D"]
    ) -> Float[Array, "B T N H"]:
        """Returns what the chunk's tokens make of the sources, by name. asked: the tokens behind "asked"."""
        raise NotImplementedError

    def source(
        self, name: str, x_BTD: Float[Array, "B T D"], mask_BT: Bool[Array, "B T"] | None, *, as_released: bool
    ) -> Source:
        """Returns the keys, rotated, and values of a source."""
        k, v = linear_parts(self, f"kv_{name}", "BTD,NDH->BTNH", x_BTD)
        bias = use(getattr(self, f"kv_{name}_bias"), k.dtype)
        return Source(rotated(k + bias[0], as_released=as_released), v + bias[1], mask_BT)

    def __call__(
        self,
        x_BAD: Float[Array, "B A D"],
        asked_BTD: Float[Array, "B T D"],
        seen_BPD: Float[Array, "B P D"],
        seen_mask_BP: Bool[Array, "B P"],
        recalled_BRAD: Float[Array, "B R A D"] | None,
        *,
        as_released: bool,
    ) -> Float[Array, "B A D"]:
        """Returns the chunk's tokens behind one block. asked: queries and state. recalled: see `skill_memory`."""
        x_BAD = pin(x_BAD, "batch", None, None)
        q = linear(self, "q", "BTD,NDH->BTNH", x_BAD) + use(self.q_bias, x_BAD.dtype)
        tokens = {"self": (x_BAD, None), "asked": (asked_BTD, None), "seen": (seen_BPD, seen_mask_BP)}
        sources = {name: self.source(name, *of, as_released=as_released) for name, of in tokens.items()}
        seen = self.attend(rotated(q, as_released=as_released), sources, asked_BTD)
        attended = linear(self, "out", "BTNH,NHD->BTD", seen) + use(self.out_bias, x_BAD.dtype)
        if recalled_BRAD is not None:
            attended = attended + recall(x_BAD, recalled_BRAD)
        return jax.nn.relu(self.map(self.norm(attended + x_BAD)))


class SeparateBlock(LayerBlock):
    """Each source has a softmax of its own, and the three are averaged (M2-VLA's mixture of layers).

    What was asked is gated head by head, by its own tokens. Images begin as the mean over all patches.
    """

    def __init__(self, key: Key[Array, ""], layers: int, width: int, heads: int) -> None:
        super().__init__(key, layers, width, heads)
        shape = (layers, heads, width)
        self.head_gate = map_weight(key, "head_gate", shape, ("layers", "heads", "embed"), inputs=(2,))
        self.head_gate_bias = weight(key, "head_gate_bias", (layers, heads), ("layers", "heads"), zeros)

    def attend(
        self, q_BTNH: Float[Array, "B T N H"], sources: dict[str, Source], asked_BTD: Float[Array, "B T2 D"]
    ) -> Float[Array, "B T N H"]:
        """As `LayerBlock.attend`."""
        scale = {"seen": jnp.tanh(use(self.gate, q_BTNH.dtype))}
        found = {name: _attention(q_BTNH * scale.get(name, 1), source) for name, source in sources.items()}
        logits_BTN = linear(self, "head_gate", "BTD,ND->BTN", asked_BTD) + use(self.head_gate_bias, q_BTNH.dtype)
        found["asked"] *= jax.nn.sigmoid(logits_BTN.mean(1))[:, None, :, None]
        return (found["self"] + found["asked"] + found["seen"]) / 3


class JointBlock(LayerBlock):
    """One softmax over all sources (VLA-Adapter). Scores of images begin at 0."""

    def attend(
        self, q_BTNH: Float[Array, "B T N H"], sources: dict[str, Source], asked_BTD: Float[Array, "B T2 D"]
    ) -> Float[Array, "B T N H"]:
        """As `LayerBlock.attend`."""
        scale = {"seen": jnp.tanh(use(self.gate, q_BTNH.dtype))}
        keys = [source.keys * scale.get(name, 1) for name, source in sources.items()]
        there = [jnp.ones(s.keys.shape[:2], bool) if s.mask is None else s.mask for s in sources.values()]
        values = [source.values for source in sources.values()]
        return _attention(q_BTNH, Source(*(jnp.concatenate(x, axis=1) for x in (keys, values, there))))


def _attention(q_BTNH: Float[Array, "B T N H"], source: Source) -> Float[Array, "B T N H"]:
    """Returns zeros where nothing is there."""
    q, mask = q_BTNH.swapaxes(1, 2), source.mask
    if mask is None:
        return attention(q, source.keys, source.values, None).swapaxes(1, 2)
    mask_BTS = jnp.broadcast_to(mask[:, None], (*q_BTNH.shape[:2], mask.shape[1]))
    found = attention(q, source.keys, source.values, mask_BTS).swapaxes(1, 2)
    return jnp.where(mask.any(1)[:, None, None, None], found, 0)


def recall(x_BAD: Float[Array, "B A D"], recalled_BRAD: Float[Array, "B R A D"]) -> Float[Array, "B A D"]:
    """Returns a mean of recalled chunks, by how near they are to the chunk as it is: softmax of x . m / sqrt(A D)."""
    B, R = recalled_BRAD.shape[:2]
    m_BRE, x_BE = recalled_BRAD.reshape(B, R, -1), x_BAD.reshape(B, -1)
    scores_BR = jnp.einsum("BE,BRE->BR", x_BE, m_BRE, preferred_element_type=jnp.float32) / m_BRE.shape[-1] ** 0.5
    weights_BR = jax.nn.softmax(scores_BR, axis=-1).astype(m_BRE.dtype)
    return jnp.einsum("BR,BRE->BE", weights_BR, m_BRE).reshape(x_BAD.shape)


class LayerHead(nnx.Module):
    """All blocks, and the norm and the map behind them."""

    def __init__(
        self,
        key: Key[Array, ""],
        block: type[LayerBlock],
        *,
        layers: int,
        width: int,
        heads: int,
        action_dim: int,
        as_released: bool,
        unroll: bool,
        remat: str | None,
    ) -> None:
        """as_released: see `rotate_as_released`. unroll, remat: see `run_layers`."""
        self.as_released, self.unroll, self.remat = as_released, unroll, remat
        self.blocks = block(named_key(key, "blocks"), layers, width, heads)
        self.norm_out = LayerNorm(named_key(key, "norm_out"), width, epsilon=1e-5)
        self.map_out = Linear(named_key(key, "map_out"), "BAD,DJ->BAJ", (width, action_dim), ("embed", "action"))

    def __call__(
        self,
        start_BAD: Float[Array, "B A D"],
        features: LayerFeatures,
        state_BTD: Float[Array, "B T D"],
        recalled_BRAD: Float[Array, "B R A D"] | None = None,
    ) -> Float[Array, "B A J"]:
        """Returns what is said of each step, float32. start: the chunk's tokens. state: tokens beside the queries."""

        def body(x: jax.Array, inputs: tuple[LayerBlock, jax.Array, jax.Array]) -> tuple[jax.Array, None]:
            block, asked, seen = inputs
            asked = jnp.concatenate([asked, state_BTD.astype(asked.dtype)], axis=1)
            more = {"as_released": self.as_released}
            return block(x, asked, seen, features.seen_mask, recalled_BRAD, **more), None

        x = start_BAD.astype(features.seen.dtype)
        layers = (self.blocks, features.asked, features.seen)
        x, _ = run_layers(body, x, layers, unroll=self.unroll, remat=self.remat)
        return self.map_out(self.norm_out(x.astype(jnp.float32)))
