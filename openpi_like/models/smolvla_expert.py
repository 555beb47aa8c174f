"""SmolVLA's action expert: layers that attend to themselves and the VLM, and layers that read the VLM alone, in turns
(SmolVLA paper, section 3.1: "Interleaved cross and causal self-attention layers").

A block is one joint layer, whose tokens see the keys and values of the same layer of the VLM and each other, and then
cross layers, whose tokens see keys and values that are maps of the VLM's: these do not change with flow time, so they
are computed once per observation.

Letters: B batch, S prefix tokens, T own tokens, D width, N query heads, K kv heads, H head dim, E = K * H,
L layers, G blocks, n layers of a block.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Key

from openpi_like.draws import named_key
from openpi_like.models.attention import attention
from openpi_like.models.gemma import rotate
from openpi_like.models.language import KVCache, LanguageModel, Step
from openpi_like.models.llama import LlamaConfig, LlamaLayer, LlamaNorm, PackedLlamaLayer, run_layer
from openpi_like.models.param import linear, linear_parts
from openpi_like.models.stack import kept, run_layers, unstacked
from openpi_like.partition import pin


@dataclasses.dataclass(frozen=True)
class ExpertConfig:
    """Sizes of the expert; heads and number of layers are those of the language model that it reads.

    self_every: n, layers of a block, of which the first is joint and the others are cross layers.
    """

    width: int
    mlp_dim: int
    self_every: int = 2

    def __post_init__(self) -> None:
        problems = []
        if self.width < 2 or self.width % 2:
            problems.append(f"width={self.width}, expected an even number above 0 (sine and cosine of the time)")
        if self.mlp_dim < 1:
            problems.append(f"mlp_dim={self.mlp_dim}, expected at least 1")
        if self.self_every < 2:
            problems.append(f"self_every={self.self_every}, expected at least 2: one joint and one cross layer")
        if problems:
            raise ValueError("ExpertConfig: " + "; ".join(problems))

    @classmethod
    def beside(cls, language: LlamaConfig, *, factor: float = 0.75, self_every: int = 2) -> "ExpertConfig":
        """Returns LeRobot's sizes for a language model: of `factor` times its width, and an MLP of 8 / 3 of that."""
        width = int(factor * language.width)
        mlp_dim = -(-4 * int(2 * width / 3) // 256) * 256
        return cls(width, mlp_dim, self_every)

    def layers(self, language: LlamaConfig) -> LlamaConfig:
        """Returns the sizes of the layers of one place in a block: as many as there are blocks."""
        depth = language.depth // self.self_every
        return dataclasses.replace(language, width=self.width, mlp_dim=self.mlp_dim, depth=depth)


class CrossLayer(LlamaLayer):
    """A layer whose keys and values are maps of those of the VLM, which are rotated already."""

    def __init__(self, config: LlamaConfig, key: Key[Array, ""]) -> None:
        super().__init__(config, key, kv_width=config.num_kv_heads * config.head_dim)

    def packed(self, config: LlamaConfig, dtype: str) -> "CrossLayer | PackedCrossLayer":
        """As `LlamaLayer.packed`."""
        return PackedCrossLayer(self, config, dtype) if self.is_plain else self

    def read(self, vlm: KVCache) -> KVCache:
        """Returns the keys and values of the prefix, (B, S, K, H), for those of the VLM."""
        return _mapped(self, vlm)


class PackedCrossLayer(PackedLlamaLayer):
    """The projections of `CrossLayer` as one matrix each; keys and values have theirs as it has."""

    def __init__(self, layer: CrossLayer, config: LlamaConfig, dtype: str) -> None:
        super().__init__(layer, config, dtype, own_keys=False)
        self.kv = nnx.Param(layer.kv[...].astype(dtype), **layer.kv.get_metadata())

    def queries(self, y_BTD: Float[Array, "B T D"], rope_2BTh: Float[Array, "2 B T half"]) -> Float[Array, "B N T H"]:
        """As `LlamaLayer.queries`."""
        q_BTE = linear(self, "qkv", "BSD,DE->BSE", y_BTD)
        q_BTNH = q_BTE.reshape(*q_BTE.shape[:2], self.config.num_heads, self.config.head_dim)
        return rotate(q_BTNH, rope_2BTh[:, :, :, None]).swapaxes(1, 2)

    def read(self, vlm: KVCache) -> KVCache:
        """As `CrossLayer.read`."""
        return _mapped(self, vlm)


def _mapped(layer: CrossLayer | PackedCrossLayer, vlm: KVCache) -> KVCache:
    B, S = vlm.k.shape[:2]
    k, v = linear_parts(layer, "kv", "BSE,KEH->BSKH", [vlm.k.reshape(B, S, -1), vlm.v.reshape(B, S, -1)])
    k, v = (pin(x, "batch", None, "kv_heads", None) for x in (k, v))
    return KVCache(k=kept(k, "keys_values"), v=kept(v, "keys_values"))


def run_cross_layer(
    layer: CrossLayer | PackedCrossLayer,
    x_BTD: Float[Array, "B T D"],
    mask_BTS: Bool[Array, "B T S"],
    rope_2BTh: Float[Array, "2 B T half"],
    seen: KVCache,
) -> Float[Array, "B T D"]:
    """Returns the tokens after one layer. seen: what `CrossLayer.read` returned."""
    x_BTD = pin(x_BTD, "batch", None, None)
    q_BNTH = layer.queries(layer.attn_norm(x_BTD), rope_2BTh)
    x_BTD = x_BTD + layer.project_out(kept(attention(q_BNTH, seen.k, seen.v, mask_BTS), "attention"))
    return pin(x_BTD + layer.mlp(layer.mlp_norm(x_BTD)), "batch", None, None)


class Blocks(nnx.Module):
    """All blocks at once: `joint`, and `cross_1` to `cross_<n-1>`, each a stack of G layers."""

    def __init__(self, config: LlamaConfig, self_every: int, key: Key[Array, ""]) -> None:
        self.crosses = tuple(f"cross_{i}" for i in range(1, self_every))
        self.joint: LlamaLayer | PackedLlamaLayer = LlamaLayer(config, named_key(key, "joint"))
        for name in self.crosses:
            setattr(self, name, CrossLayer(config, named_key(key, name)))

    def packed(self, config: LlamaConfig, dtype: str) -> "Blocks":
        """Returns these layers packed, see `LlamaLayer.packed`; itself where none can be."""
        stacks = {name: getattr(self, name) for name in ("joint", *self.crosses)}
        packed = {name: stack.packed(config, dtype) for name, stack in stacks.items()}
        if all(packed[name] is stack for name, stack in stacks.items()):
            return self
        blocks = nnx.merge(*nnx.split(self))
        for name, stack in packed.items():
            setattr(blocks, name, stack)
        return blocks

    def read(self, vlm: KVCache) -> KVCache:
        """Returns what the layers of one block see of the prefix, (n, B, S, K, H), for the VLM's keys and values."""
        at = unstacked(vlm)
        seen = [at[0], *(getattr(self, name).read(kv) for name, kv in zip(self.crosses, at[1:], strict=True))]
        return jax.tree.map(lambda *x: jnp.stack(x), *seen)


class Expert(LanguageModel):
    """The stack of blocks and the final norm. What it sees of the prefix comes from `read`."""

    layers: Any  # Blocks, or one of each, see `is_taken_apart`

    def __init__(
        self,
        config: ExpertConfig,
        language: LlamaConfig,
        key: Key[Array, ""],
        *,
        dtype: str,
        unroll: bool,
        remat: str | None,
    ) -> None:
        """language: sizes of the language model that it reads."""
        self.config: LlamaConfig = config.layers(language)
        self.dtype, self.unroll, self.remat = dtype, unroll, remat
        self.layers = Blocks(self.config, config.self_every, named_key(key, "layers"))
        self.final_norm = LlamaNorm(named_key(key, "final_norm"), config.width, eps=language.norm_eps)

    @jax.named_scope("projections")
    def read(self, vlm: KVCache) -> KVCache:
        """Returns what the layers see of the prefix, (G, n, B, S, K, H).

        vlm: keys and values of its layers, (L, B, S, K, H).
        """
        G = self.config.depth
        vlm = jax.tree.map(lambda x: x.reshape(G, -1, *x.shape[1:]), vlm)
        inputs: Any = list(zip(self.layers, unstacked(vlm), strict=True)) if self.is_taken_apart else (self.layers, vlm)

        def read(carry: None, inputs: tuple[Blocks, KVCache]) -> tuple[None, KVCache]:
            block, vlm = inputs
            return None, block.read(vlm)

        return run_layers(read, None, inputs, unroll=self.unroll, remat=None)[1]

    def step(
        self,
        mask_BTU: Bool[Array, "B T U"],
        rope_2BTh: Float[Array, "2 B T half"],
        *,
        cross_rope: Float[Array, "2 B T half"],
    ) -> Step:
        """Returns what one block does. cross_rope: rotations of the tokens in cross layers."""

        def step(x: jax.Array, inputs: tuple[Blocks, jax.Array, KVCache | None]) -> tuple[jax.Array, KVCache]:
            block, _, past = inputs
            seen = unstacked(past)
            x, own = run_layer(block.joint, x, mask_BTU, rope_2BTh, seen[0])
            prefix_mask = mask_BTU[:, :, : seen[0].k.shape[1]]
            for name, kv in zip(block.crosses, seen[1:], strict=True):
                x = run_cross_layer(getattr(block, name), x, prefix_mask, cross_rope, kv)
            return x, own

        return step

    def last_norm(self, x_BTD: Float[Array, "B T D"], **given: Any) -> Float[Array, "B T D"]:
        """Returns the tokens after the final norm."""
        return self.final_norm(x_BTD)
