"""DistilBERT (Sanh et al. 2019): a text encoder whose tokens all see each other, normalised behind each sum.

Letters: B batch, S tokens, D width, N heads, H head dim, F mlp width, L layers.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from openpi_like.draws import named_key
from openpi_like.models.attention import attention
from openpi_like.models.formats import Row, torch_linear
from openpi_like.models.param import Linear, normal, use, weight
from openpi_like.models.stack import run_layers
from openpi_like.models.vit import LayerNorm

EPSILON = 1e-12


@dataclasses.dataclass(frozen=True)
class DistilBertConfig:
    """Sizes. positions: tokens that a text can have."""

    width: int = 768
    depth: int = 6
    num_heads: int = 12
    mlp_dim: int = 3072
    positions: int = 512

    def __post_init__(self) -> None:
        if self.width % self.num_heads:
            raise ValueError(f"DistilBertConfig: width={self.width}, expected a multiple of num_heads={self.num_heads}")

    @classmethod
    def base(cls) -> "DistilBertConfig":
        """Returns distilbert-base-uncased, 30,522 tokens."""
        return cls()

    @classmethod
    def tiny(cls) -> "DistilBertConfig":
        """Returns sizes that train on two CPU cores."""
        return cls(width=64, depth=2, num_heads=4, mlp_dim=128, positions=64)


class DistilBertLayer(nnx.Module):
    """Attention and MLP. Declared for all layers at once; called with one layer's weights."""

    def __init__(self, key: Key[Array, ""], config: DistilBertConfig) -> None:
        L, D, N, F = config.depth, config.width, config.num_heads, config.mlp_dim
        H, heads = D // N, ("embed", "heads", "head_dim")
        make = lambda name, *of: Linear(named_key(key, name), *of, layers=L)  # noqa: E731
        for name in ("query", "key", "value"):
            setattr(self, name, make(name, "BSD,DNH->BSNH", (D, N, H), heads))
        self.out = make("out", "BNSH,NHD->BSD", (N, H, D), ("heads", "head_dim", "embed"))
        self.attn_norm = LayerNorm(named_key(key, "attn_norm"), D, layers=L, epsilon=EPSILON)
        self.mlp_up = make("mlp_up", "BSD,DF->BSF", (D, F), ("embed", "mlp"))
        self.mlp_down = make("mlp_down", "BSF,FD->BSD", (F, D), ("mlp", "embed"))
        self.mlp_norm = LayerNorm(named_key(key, "mlp_norm"), D, layers=L, epsilon=EPSILON)

    def __call__(self, x_BSD: Float[Array, "B S D"], mask_BSS: Bool[Array, "B S S"]) -> Float[Array, "B S D"]:
        """Returns the tokens behind one layer."""
        self_: Any = self
        q, k, v = self_.query(x_BSD), self_.key(x_BSD), self_.value(x_BSD)
        x_BSD = self.attn_norm(x_BSD + self.out(attention(q.swapaxes(1, 2), k, v, mask_BSS)))
        hidden = jax.nn.gelu(self.mlp_up(x_BSD), approximate=False)
        return self.mlp_norm(x_BSD + self.mlp_down(hidden))


class DistilBert(nnx.Module):
    """Token ids to tokens."""

    def __init__(
        self, key: Key[Array, ""], config: DistilBertConfig, *, vocab_size: int, dtype: str, unroll: bool
    ) -> None:
        self.config, self.dtype, self.unroll = config, dtype, unroll
        D = config.width
        self.embedding = weight(key, "embedding", (vocab_size, D), ("vocab", "embed"), normal(0.02), table=True)
        self.position = weight(key, "position", (config.positions, D), ("position", "embed"), normal(0.02))
        self.norm = LayerNorm(named_key(key, "norm"), D, epsilon=EPSILON)
        self.layers = DistilBertLayer(named_key(key, "layers"), config)

    def __call__(self, tokens_BS: Int[Array, "B S"], mask_BS: Bool[Array, "B S"]) -> Float[Array, "B S D"]:
        """Returns the tokens; those that are masked are seen by nobody, and stand behind the others."""
        with jax.named_scope("text"):
            x = use(self.embedding, jnp.float32)[tokens_BS] + use(self.position, jnp.float32)[: tokens_BS.shape[1]]
            x = self.norm(x).astype(self.dtype)
            seen = jnp.broadcast_to(mask_BS[:, None], (*mask_BS.shape, mask_BS.shape[1]))
            body = lambda x, layer: (layer(x, seen), None)  # noqa: E731
            return run_layers(body, x, self.layers, unroll=self.unroll, remat=None)[0]


def distilbert_rows(config: DistilBertConfig, ours: str, theirs: str) -> list[Row]:
    """Returns the names of its weights in Hugging Face's files, behind these prefixes."""

    def norm(mine: str, name: str, at: tuple[int, ...] = ()) -> list[Row]:
        return [Row(f"{mine}/scale", f"{name}.weight", at=at), Row(f"{mine}/bias", f"{name}.bias", at=at)]

    rows = [
        Row(f"{ours}embedding", f"{theirs}embeddings.word_embeddings.weight"),
        Row(f"{ours}position", f"{theirs}embeddings.position_embeddings.weight"),
        *norm(f"{ours}norm", f"{theirs}embeddings.LayerNorm"),
    ]
    for i in range(config.depth):
        block, mine, at = f"{theirs}transformer.layer.{i}", f"{ours}layers", (i,)
        for part, name in (("query", "q_lin"), ("key", "k_lin"), ("value", "v_lin")):
            kernel, bias = "(N H) D -> D N H", "(N H) -> N H"
            rows += torch_linear(f"{mine}/{part}", f"{block}.attention.{name}", kernel, bias, at=at)
        rows += torch_linear(f"{mine}/out", f"{block}.attention.out_lin", "D (N H) -> N H D", "", at=at)
        rows += norm(f"{mine}/attn_norm", f"{block}.sa_layer_norm", at)
        rows += torch_linear(f"{mine}/mlp_up", f"{block}.ffn.lin1", "F D -> D F", "", at=at)
        rows += torch_linear(f"{mine}/mlp_down", f"{block}.ffn.lin2", "D F -> F D", "", at=at)
        rows += norm(f"{mine}/mlp_norm", f"{block}.output_layer_norm", at)
    return rows
