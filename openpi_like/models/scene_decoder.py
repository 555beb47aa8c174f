"""Queries that read a scene off the tokens of image towers: a small transformer decoder without a language model.

Each query looks at all queries and at all tokens of all cameras, as in DETR (Carion et al. 2020, arXiv 2005.12872).
What a query stands for is its user's: a waypoint (`dima`), a vehicle, a line of the map (`scene_perception`).

Letters: B batch, C cameras, P tokens of one image, S tokens that are looked at, Q queries, D width of the tokens,
W width of the decoder, N heads, H head dim, F mlp width.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Key

from openpi_like.draws import named_key
from openpi_like.models.attention import attention
from openpi_like.models.param import Linear, normal, use, weight
from openpi_like.models.sequences import Seen
from openpi_like.models.stack import kept, run_layers
from openpi_like.models.vit import LayerNorm
from openpi_like.partition import pin


@dataclasses.dataclass(frozen=True)
class SceneDecoderConfig:
    """Sizes of a decoder. width: W. depth: layers. num_heads: N, which divides W. mlp_dim: F."""

    width: int = 256
    depth: int = 3
    num_heads: int = 8
    mlp_dim: int = 1024

    def __post_init__(self) -> None:
        problems = [
            f"{name}={getattr(self, name)}, expected at least 1"
            for name in ("width", "depth", "num_heads", "mlp_dim")
            if getattr(self, name) < 1
        ]
        if not problems and self.width % self.num_heads:
            problems.append(f"width={self.width}, expected a multiple of num_heads={self.num_heads}")
        if problems:
            raise ValueError("SceneDecoderConfig: " + "; ".join(problems))

    @classmethod
    def tiny(cls) -> "SceneDecoderConfig":
        """Returns sizes that train on two CPU cores."""
        return cls(width=96, depth=2, num_heads=4, mlp_dim=192)


class SceneReader(nnx.Module):
    """Tokens of another width to those of the decoder, each with a vector of its camera added to it.

    A tower knows where in its image a patch is; a language model tells cameras by their order, a decoder by this.
    """

    def __init__(self, key: Key[Array, ""], *, cameras: int, token_width: int, width: int) -> None:
        """cameras: C. token_width: D. width: W."""
        self.norm = LayerNorm(named_key(key, "norm"), token_width)
        self.map = Linear(named_key(key, "map"), "BCPD,DW->BCPW", (token_width, width), ("embed", "mlp"))
        self.camera = weight(key, "camera", (cameras, width), (None, "embed"), normal(width**-0.5))

    def __call__(self, seen: Seen) -> tuple[Float[Array, "B S W"], Bool[Array, "B S"]]:
        """Returns the tokens of all cameras, one camera behind the other, and which of them there are."""
        x_BCPW = self.map(self.norm(seen.tokens))
        x_BCPW = x_BCPW + use(self.camera, x_BCPW.dtype)[:, None]
        B, C, P, W = x_BCPW.shape
        there_BCP = jnp.broadcast_to(seen.there[..., None], (B, C, P))
        return x_BCPW.reshape(B, C * P, W), there_BCP.reshape(B, C * P)


class SceneDecoderLayer(nnx.Module):
    """Attention among queries, attention to tokens, and an MLP, each behind a norm and added to what it was given.

    Declared for all layers at once; its methods apply one layer (see `run_layers`).
    """

    def __init__(self, key: Key[Array, ""], config: SceneDecoderConfig) -> None:
        L, W, N, F = config.depth, config.width, config.num_heads, config.mlp_dim
        H, heads = W // N, ("embed", "heads", "head_dim")
        for part in ("own", "seen"):
            for name in ("query", "key", "value"):
                made = Linear(named_key(key, f"{part}_{name}"), "BSW,WNH->BSNH", (W, N, H), heads, layers=L)
                setattr(self, f"{part}_{name}", made)
            out = Linear(
                named_key(key, f"{part}_out"), "BNQH,NHW->BQW", (N, H, W), ("heads", "head_dim", "embed"), layers=L
            )
            setattr(self, f"{part}_out", out)
        self.own_norm = LayerNorm(named_key(key, "own_norm"), W, layers=L)
        self.seen_norm = LayerNorm(named_key(key, "seen_norm"), W, layers=L)
        self.mlp_norm = LayerNorm(named_key(key, "mlp_norm"), W, layers=L)
        self.mlp_up = Linear(named_key(key, "mlp_up"), "BQW,WF->BQF", (W, F), ("embed", "mlp"), layers=L)
        self.mlp_down = Linear(named_key(key, "mlp_down"), "BQF,FW->BQW", (F, W), ("mlp", "embed"), layers=L)

    def _attended(
        self, part: str, x_BQW: Float[Array, "B Q W"], y_BSW: Float[Array, "B S W"], there_BS: Bool[Array, "B S"] | None
    ) -> Float[Array, "B Q W"]:
        """Returns what queries make of tokens. part: "own" or "seen"."""
        of = lambda name: getattr(self, f"{part}_{name}")  # noqa: E731
        q = pin(of("query")(x_BQW).swapaxes(1, 2), "batch", "heads", None, None)
        k, v = (pin(of(name)(y_BSW), "batch", None, "heads", None) for name in ("key", "value"))
        mask = None
        if there_BS is not None:
            mask = jnp.broadcast_to(there_BS[:, None], (*x_BQW.shape[:2], y_BSW.shape[1]))
        found = of("out")(kept(attention(q, k, v, mask), "attention"))
        # Attention to nothing is the mean of what is not there.
        return found if there_BS is None else jnp.where(there_BS.any(1)[:, None, None], found, 0)

    def __call__(
        self, x_BQW: Float[Array, "B Q W"], tokens_BSW: Float[Array, "B S W"], there_BS: Bool[Array, "B S"]
    ) -> Float[Array, "B Q W"]:
        """Returns the queries behind one layer."""
        own = self.own_norm(x_BQW)
        x_BQW = x_BQW + self._attended("own", own, own, None)
        x_BQW = x_BQW + self._attended("seen", self.seen_norm(x_BQW), tokens_BSW, there_BS)
        hidden_BQF = jax.nn.gelu(self.mlp_up(self.mlp_norm(x_BQW)), approximate=False)
        return x_BQW + self.mlp_down(kept(pin(hidden_BQF, "batch", None, "mlp"), "mlp"))


class SceneDecoder(nnx.Module):
    """All layers, and a norm behind them."""

    def __init__(self, key: Key[Array, ""], config: SceneDecoderConfig, *, unroll: bool, remat: str | None) -> None:
        """unroll, remat: see `run_layers`."""
        self.unroll, self.remat = unroll, remat
        self.layers = SceneDecoderLayer(named_key(key, "layers"), config)
        self.final_norm = LayerNorm(named_key(key, "final_norm"), config.width)

    @jax.named_scope("scene_decoder")
    def __call__(
        self, queries_BQW: Float[Array, "B Q W"], tokens_BSW: Float[Array, "B S W"], there_BS: Bool[Array, "B S"]
    ) -> Float[Array, "B Q W"]:
        """Returns what the queries have read of the tokens that are there, float32."""

        def body(x: jax.Array, layer: SceneDecoderLayer) -> tuple[jax.Array, None]:
            return layer(pin(x, "batch", None, None), tokens_BSW, there_BS), None

        x = queries_BQW.astype(tokens_BSW.dtype)
        x, _ = run_layers(body, x, self.layers, unroll=self.unroll, remat=self.remat)
        return self.final_norm(x.astype(jnp.float32))
