"""ScaleDP: a diffusion transformer over the steps of a chunk, told what to do by one vector (Zhu et al. 2024, arXiv
2409.14411; as the action expert of DexVLA, arXiv 2502.05855).

What the robot sees and is told, its state, and the step of diffusion become one vector; it scales, shifts and gates
every block (adaLN-Zero, Peebles and Xie 2023). All steps of a chunk see each other. Each robot has maps of its own into
the transformer and out of it.

Letters: B batch, A action horizon, J action dims, C width of the condition, W width, N heads, H head dim, F mlp width,
L layers, E robots.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from openpi_like.draws import named_key
from openpi_like.models.attention import attention
from openpi_like.models.ddim import step_embedding
from openpi_like.models.param import Linear, linear_parts, map_weight, normal, use, weight, xavier, zeros
from openpi_like.models.stack import run_layers
from openpi_like.partition import pin

STEP_DIM = 256
"""Numbers that say which step of diffusion it is, before their map."""


@dataclasses.dataclass(frozen=True)
class ScaleDpConfig:
    """Sizes. combined: width of the maps that bring condition and state together."""

    width: int
    depth: int
    heads: int
    mlp_ratio: int = 4
    combined: int = 1024

    def __post_init__(self) -> None:
        problems = [
            f"{name}={getattr(self, name)}, expected at least 1"
            for name in ("width", "depth", "heads", "mlp_ratio", "combined")
            if getattr(self, name) < 1
        ]
        if not problems and self.width % self.heads:
            problems.append(f"width={self.width}, expected a multiple of heads={self.heads}")
        if problems:
            raise ValueError("ScaleDpConfig: " + "; ".join(problems))

    @classmethod
    def large(cls) -> "ScaleDpConfig":
        """Returns ScaleDP-L: 453 million weights in its blocks."""
        return cls(width=1024, depth=24, heads=16)

    @classmethod
    def huge(cls) -> "ScaleDpConfig":
        """Returns ScaleDP-H: 944 million weights in its blocks, DexVLA's "one billion"."""
        return cls(width=1280, depth=32, heads=16)

    @classmethod
    def tiny(cls) -> "ScaleDpConfig":
        """Returns sizes that train on two CPU cores."""
        return cls(width=96, depth=3, heads=4, combined=96)


class ScaleDpLayer(nnx.Module):
    """Attention and MLP over the steps of a chunk. Declared for all layers at once; called with one layer's weights."""

    def __init__(self, key: Key[Array, ""], config: ScaleDpConfig) -> None:
        L, W, N, F = config.depth, config.width, config.heads, config.mlp_ratio * config.width
        H, three = W // N, ("stack", "embed", "heads", "head_dim")
        qkv = xavier(W, 3 * W)  # one matrix in the released code
        self.qkv = map_weight(key, "qkv", (L, 3, W, N, H), ("layers", *three), inputs=(2,), init=qkv)
        self.qkv_bias = weight(key, "qkv_bias", (L, 3, N, H), ("layers", "stack", "heads", "head_dim"), zeros)
        linear = lambda name, *of, **options: Linear(named_key(key, name), *of, layers=L, **options)  # noqa: E731
        self.out = linear("out", "BANH,NHW->BAW", (N, H, W), ("heads", "head_dim", "embed"), init=xavier(W, W))
        self.mlp_up = linear("mlp_up", "BAW,WF->BAF", (W, F), ("embed", "mlp"), init=xavier(W, F))
        self.mlp_down = linear("mlp_down", "BAF,FW->BAW", (F, W), ("mlp", "embed"), init=xavier(F, W))
        self.modulation = linear("modulation", "BW,WGD->BGD", (W, 6, W), ("embed", "stack", "mlp"), zero=True)

    def __call__(self, x_BAW: Float[Array, "B A W"], told_BW: Float[Array, "B W"]) -> Float[Array, "B A W"]:
        """Returns the chunk's steps behind one block. told: SiLU of the condition."""
        x_BAW = pin(x_BAW, "batch", None, None)
        parts = jnp.moveaxis(self.modulation(told_BW), 1, 0)[:, :, None]
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = parts
        y = normalised(x_BAW) * (1 + scale) + shift
        bias = use(self.qkv_bias, y.dtype)
        q, k, v = (x + b for x, b in zip(linear_parts(self, "qkv", "BAW,WNH->BANH", y), bias, strict=True))
        seen = attention(q.swapaxes(1, 2), k, v, None).swapaxes(1, 2)
        x_BAW = x_BAW + gate * self.out(seen)
        y = normalised(x_BAW) * (1 + mlp_scale) + mlp_shift
        hidden = jax.nn.gelu(pin(self.mlp_up(y), "batch", None, "mlp"), approximate=True)
        return x_BAW + mlp_gate * self.mlp_down(hidden)


def normalised(x: Float[Array, "*B W"]) -> Float[Array, "*B W"]:
    """Returns x with mean 0 and variance 1 over the last axis, epsilon 1e-6; statistics in float32."""
    x32 = x.astype(jnp.float32)
    centred = x32 - x32.mean(-1, keepdims=True)
    return (centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + 1e-6)).astype(x.dtype)


class ScaleDp(nnx.Module):
    """The transformer, from noised actions to the noise in them. Fresh, it says zeros, whatever it is told."""

    def __init__(
        self,
        key: Key[Array, ""],
        config: ScaleDpConfig,
        *,
        condition_dim: int,
        state_dim: int,
        action_dim: int,
        horizon: int,
        robots: int,
        dtype: str,
        unroll: bool,
        remat: str | None,
    ) -> None:
        """robots: E. dtype: of activations. unroll, remat: see `run_layers`."""
        self.dtype, self.unroll, self.remat = dtype, unroll, remat
        C, W, M, J, E = condition_dim, config.width, config.combined, action_dim, robots
        linear = lambda name, *of, **options: Linear(named_key(key, name), "BD,DE->BE", *of, **options)  # noqa: E731
        for name, widths in (("combine_0", (C + state_dim, M)), ("combine_1", (M, M)), ("combine_2", (M, C))):
            setattr(self, name, linear(name, widths, (None, "embed"), init=xavier(*widths)))
        self.condition_in = linear("condition_in", (C, W), ("embed", "mlp"), init=normal(0.02))
        self.step_0 = linear("step_0", (STEP_DIM, W), (None, "embed"), init=normal(0.02))
        self.step_1 = linear("step_1", (W, W), ("embed", "mlp"), init=normal(0.02))
        self.action_in = weight(key, "action_in", (E, J, W), (None, "action", "embed"), xavier(J, W))
        self.action_in_bias = weight(key, "action_in_bias", (E, W), (None, "norm"), zeros)
        self.position = weight(key, "position", (horizon, W), ("position", "embed"), normal(0.02))
        self.layers = ScaleDpLayer(named_key(key, "layers"), config)
        self.last_modulation = Linear(
            named_key(key, "last_modulation"), "BW,WGD->BGD", (W, 2, W), ("embed", "stack", "mlp"), zero=True
        )
        self.action_out = weight(key, "action_out", (E, W, J), (None, "embed", "action"), zeros)
        self.action_out_bias = weight(key, "action_out_bias", (E, J), (None, "action"), zeros)

    def told(self, condition_BC: Float[Array, "B C"], state_BS: Float[Array, "B S"]) -> Float[Array, "B W"]:
        """Returns what does not change with the step of diffusion: condition and state as one vector."""
        x: Any = jnp.concatenate([condition_BC.astype(self.dtype), state_BS.astype(self.dtype)], axis=-1)
        for i in range(3):
            x = getattr(self, f"combine_{i}")(x if i == 0 else jax.nn.relu(x))
        return self.condition_in(x)

    def __call__(
        self,
        x_BAJ: Float[Array, "B A J"],
        step_B: Int[Array, "B"],
        told_BW: Float[Array, "B W"],
        robot_B: Int[Array, "B"],
    ) -> Float[Array, "B A J"]:
        """Returns the noise that is in x at a step, float32. told: of `told`. robot: whose maps are used, of E."""
        step = self.step_1(jax.nn.silu(self.step_0(step_embedding(step_B, STEP_DIM).astype(self.dtype))))
        told_BW = jax.nn.silu(step + told_BW)
        kernel, bias = use(self.action_in, self.dtype)[robot_B], use(self.action_in_bias, self.dtype)[robot_B]
        x = jnp.einsum("BAJ,BJW->BAW", x_BAJ.astype(self.dtype), kernel) + bias[:, None]
        x = x + use(self.position, self.dtype)
        body = lambda x, layer: (layer(x, told_BW), None)  # noqa: E731
        x, _ = run_layers(body, x, self.layers, unroll=self.unroll, remat=self.remat)
        shift, scale = jnp.moveaxis(self.last_modulation(told_BW), 1, 0)[:, :, None]
        y = (normalised(x) * (1 + scale) + shift).astype(jnp.float32)
        kernel, bias = use(self.action_out, jnp.float32)[robot_B], use(self.action_out_bias, jnp.float32)[robot_B]
        return jnp.einsum("BAW,BWJ->BAJ", y, kernel) + bias[:, None]
