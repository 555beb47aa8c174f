"""Image towers of Qwen3-VL (Bai et al. 2025b), Qwen2.5-VL (Bai et al. 2025a) and Qwen2-VL (Wang et al. 2024), sizes and
layout as in transformers.

Images have one size, so that positions, windows and rotations are constants. The towers were made for video: a patch
has two frames, and an image is the same frame twice. Patches are kept in blocks of `merge` x `merge`, which become one
token each.

Letters: B batch, P patches, T tokens, D width of patches, E width of tokens, F mlp width, N heads, H head dim,
L layers, p and q sides of a patch, C colours, t frames.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import einops
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Key

from openpi_like.draws import named_key
from openpi_like.models.attention import attention
from openpi_like.models.param import Linear, linear, map_weight, normal, ones, use, weight
from openpi_like.models.stack import kept, run_layers
from openpi_like.models.vision import CLIP, normalized, size_problems
from openpi_like.models.vit import LayerNorm, VitLayer, to_patches
from openpi_like.partition import pin

FRAMES = 2
PATCH_EQUATION, PATCH_AXES = "BhpwqC,tpqCD->BhwD", (None, "patch", "patch", None, "embed")


# ---- Sizes -----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class QwenVisionConfig:
    """What all of the towers have.

    width: E, of the tokens: that of the language model. hidden: D, of the patches. patch_size: in pixels.
    merge: side of a block of patches that becomes one token.
    """

    width: int
    hidden: int
    depth: int
    mlp_dim: int
    num_heads: int
    patch_size: int
    merge: int = 2

    def __post_init__(self) -> None:
        problems = self._problems()
        if problems:
            raise ValueError(f"{type(self).__name__}: " + "; ".join(problems))

    def _problems(self) -> list[str]:
        if self.hidden % (4 * self.num_heads) == 0:
            return []
        return [f"hidden={self.hidden}, expected a multiple of 4 * num_heads={self.num_heads} (rotary pairs, two axes)"]

    def _layer_problems(self, name: str) -> list[str]:
        layers = getattr(self, name)
        if list(layers) == sorted({i for i in layers if 0 <= i < self.depth}):
            return []
        return [f"{name}={layers}, expected increasing numbers of layers below depth={self.depth}"]

    @property
    def head_dim(self) -> int:
        """H."""
        return self.hidden // self.num_heads

    def grid(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """Returns rows and columns of patches."""
        return image_size[0] // self.patch_size, image_size[1] // self.patch_size

    def tokens(self, image_size: tuple[int, int]) -> int:
        """Returns T, see `vision.VisionEncoderConfig`."""
        return math.prod(n // self.merge for n in self.grid(image_size))

    def problems(self, image_size: tuple[int, int]) -> list[str]:
        """Returns what is wrong with this size of images, see `vision.VisionEncoderConfig`."""
        return size_problems(image_size, self.patch_size * self.merge, "patch_size * merge")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Qwen3VisionConfig(QwenVisionConfig):
    """deepstack: layers whose output becomes features of their own. table: side of the learned table of positions."""

    patch_size: int = 16
    deepstack: tuple[int, ...]
    table: int = 48

    def _problems(self) -> list[str]:
        return super()._problems() + self._layer_problems("deepstack")

    @classmethod
    def qwen3_vl_2b(cls) -> "Qwen3VisionConfig":
        """Returns the tower of Qwen3-VL-2B."""
        return cls(width=2048, hidden=1024, depth=24, mlp_dim=4096, num_heads=16, deepstack=(5, 11, 17))

    @classmethod
    def qwen3_vl_4b(cls) -> "Qwen3VisionConfig":
        """Returns the tower of Qwen3-VL-4B."""
        return dataclasses.replace(cls.qwen3_vl_2b(), width=2560)

    @classmethod
    def tiny(cls, *, width: int = 96) -> "Qwen3VisionConfig":
        """Returns sizes that train on two CPU cores."""
        return cls(width=width, hidden=96, depth=4, mlp_dim=256, num_heads=4, deepstack=(0, 2), table=8)

    def create(
        self, key: Key[Array, ""], *, image_size: tuple[int, int], dtype: str, unroll: bool, remat: str | None
    ) -> "Qwen3Vision":
        """Returns a tower, see `vision.VisionEncoderConfig`."""
        return Qwen3Vision(self, key, image_size=image_size, dtype=dtype, unroll=unroll, remat=remat)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Qwen25VisionConfig(QwenVisionConfig):
    """full: layers where every patch sees every patch. window: side in pixels of what is seen in all others."""

    patch_size: int = 14
    full: tuple[int, ...]
    window: int = 112

    def _problems(self) -> list[str]:
        problems = super()._problems() + self._layer_problems("full")
        unit = self.patch_size * self.merge
        return problems + [f"window={self.window}, expected a multiple of {unit}"] * (self.window % unit != 0)

    @classmethod
    def qwen25_vl_3b(cls) -> "Qwen25VisionConfig":
        """Returns the tower of Qwen2.5-VL-3B."""
        return cls(width=2048, hidden=1280, depth=32, mlp_dim=3420, num_heads=16, full=(7, 15, 23, 31))

    @classmethod
    def tiny(cls, *, width: int = 96) -> "Qwen25VisionConfig":
        """Returns sizes that train on two CPU cores."""
        return cls(width=width, hidden=96, depth=4, mlp_dim=256, num_heads=4, full=(1, 3))

    def create(
        self, key: Key[Array, ""], *, image_size: tuple[int, int], dtype: str, unroll: bool, remat: str | None
    ) -> "Qwen25Vision":
        """Returns a tower, see `vision.VisionEncoderConfig`."""
        return Qwen25Vision(self, key, image_size=image_size, dtype=dtype, unroll=unroll, remat=remat)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Qwen2VisionConfig(QwenVisionConfig):
    """See `QwenVisionConfig`: every patch sees every patch."""

    patch_size: int = 14

    @classmethod
    def qwen2_vl_2b(cls) -> "Qwen2VisionConfig":
        """Returns the tower of Qwen2-VL-2B."""
        return cls(width=1536, hidden=1280, depth=32, mlp_dim=5120, num_heads=16)

    @classmethod
    def tiny(cls, *, width: int = 96) -> "Qwen2VisionConfig":
        """Returns sizes that train on two CPU cores."""
        return cls(width=width, hidden=96, depth=4, mlp_dim=256, num_heads=4)

    def create(
        self, key: Key[Array, ""], *, image_size: tuple[int, int], dtype: str, unroll: bool, remat: str | None
    ) -> "Qwen2Vision":
        """Returns a tower, see `vision.VisionEncoderConfig`."""
        return Qwen2Vision(self, key, image_size=image_size, dtype=dtype, unroll=unroll, remat=remat)


# ---- Constants of an image size --------------------------------------------------------------------------------------


def blocks(grid: tuple[int, int], merge: int) -> np.ndarray:
    """Returns row and column of each patch, (P, 2), block by block, and row by row in a block."""
    places = np.moveaxis(np.indices(grid), 0, -1)
    return einops.rearrange(places, "(h m) (w n) two -> (h w m n) two", m=merge, n=merge)


def axial_rope(places_P2: np.ndarray, head_dim: int) -> np.ndarray:
    """Returns sine and cosine, (2, P, H / 2) in float32: the first half turns by the row, the second by the column."""
    quarter = head_dim // 4
    angles = places_P2[:, :, None] * 10_000.0 ** (-np.arange(quarter) / quarter)
    angles = angles.reshape(len(angles), 2 * quarter)
    return np.stack([np.sin(angles), np.cos(angles)]).astype(np.float32)


def interpolation(table: int, n: int) -> np.ndarray:
    """Returns the matrix (n, table) in float32 that takes n values between `table` ones, the ends onto the ends."""
    at = np.linspace(0, table - 1, n)
    return np.maximum(0, 1 - np.abs(at[:, None] - np.arange(table))).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Windows:
    """Windows of all sizes that an image has: smaller ones lie at its right and lower edge.

    order: the token (row by row) at each place, so that tokens of a window lie together, and windows of one size.
    groups: (windows, tokens in each), in that order.
    """

    order: np.ndarray
    groups: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, grid: tuple[int, int], side: int) -> "Windows":
        """grid: rows and columns of tokens. side: of a window, in tokens."""
        tokens = np.arange(math.prod(grid)).reshape(grid)
        by_size: dict[int, list[np.ndarray]] = {}
        for row in range(0, grid[0], side):
            for column in range(0, grid[1], side):
                window = tokens[row : row + side, column : column + side].ravel()
                by_size.setdefault(len(window), []).append(window)
        order = np.concatenate([window for windows in by_size.values() for window in windows])
        return cls(order, tuple((len(windows), size) for size, windows in by_size.items()))

    def attention(self, merge: int) -> Callable[..., jax.Array]:
        """Returns attention inside of windows, for `VitLayer.attention`; merge: side of the patches of a token."""

        def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            B, N, _, H = q.shape
            seen, start = [], 0
            for windows, tokens in self.groups:
                S = tokens * merge**2
                part = slice(start, start + windows * S)
                start = part.stop
                # Windows join the batch behind its own axis: a batch split over devices stays where it is.
                q_BNSH = q[:, :, part].reshape(B, N, windows, S, H).swapaxes(1, 2).reshape(B * windows, N, S, H)
                k_BSNH, v_BSNH = (x[:, part].reshape(B * windows, S, N, H) for x in (k, v))
                out = attention(q_BNSH, k_BSNH, v_BSNH, None).reshape(B, windows, N, S, H)
                seen.append(out.swapaxes(1, 2).reshape(B, N, windows * S, H))
            return jnp.concatenate(seen, axis=2)

        return attend


# ---- Parts -----------------------------------------------------------------------------------------------------------


class RMSNorm(nnx.Module):
    """RMS normalisation with a scale; statistics in float32."""

    def __init__(self, key: Key[Array, ""], width: int, *, layers: int | None = None) -> None:
        shape, axes = ((width,), ("norm",)) if layers is None else ((layers, width), ("layers", "norm"))
        self.scale = weight(key, "scale", shape, axes, ones)

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        """Normalises over the last axis."""
        x32 = x.astype(jnp.float32)
        normed = x32 * jax.lax.rsqrt(jnp.square(x32).mean(-1, keepdims=True) + 1e-6)
        return (normed * use(self.scale, jnp.float32)).astype(x.dtype)


class Merger(nnx.Module):
    """A block of patches to one token: norm, two maps, exact GELU between them."""

    def __init__(
        self,
        key: Key[Array, ""],
        config: QwenVisionConfig,
        *,
        norm: Callable[..., Any],
        joined_norm: bool = False,
        layers: int | None = None,
    ) -> None:
        """joined_norm: normalise the block as one vector, not its patches. layers: number of stacked mergers."""
        self.joined_norm, self.block = joined_norm, config.merge**2
        D = config.hidden * self.block
        self.norm = norm(named_key(key, "norm"), D if joined_norm else config.hidden, layers=layers)
        self.up = Linear(named_key(key, "up"), "BTD,DF->BTF", (D, D), ("embed", "mlp"), layers=layers)
        self.down = Linear(named_key(key, "down"), "BTF,FE->BTE", (D, config.width), ("mlp", "embed"), layers=layers)

    @jax.named_scope("projector")
    def __call__(self, x_BPD: Float[Array, "B P D"]) -> Float[Array, "B T E"]:
        """Returns the tokens."""
        B, P, D = x_BPD.shape
        joined = (x_BPD if self.joined_norm else self.norm(x_BPD)).reshape(B, P // self.block, self.block * D)
        joined = self.norm(joined) if self.joined_norm else joined
        return self.down(jax.nn.gelu(self.up(joined), approximate=False))


class GatedLayer(VitLayer):
    """Block of Qwen2.5-VL: RMS norms, and an MLP gated by SiLU."""

    def __init__(self, key: Key[Array, ""], config: Qwen25VisionConfig) -> None:
        L, D, F = config.depth, config.hidden, config.mlp_dim
        super().__init__(key, depth=L, width=D, num_heads=config.num_heads, mlp_dim=F, norm=RMSNorm)
        self.mlp_gate = Linear(named_key(key, "mlp_gate"), "BPD,DF->BPF", (D, F), ("embed", "mlp"), layers=L)

    @jax.named_scope("mlp")
    def mlp(self, x_BPD: Float[Array, "B P D"]) -> Float[Array, "B P D"]:
        """Returns x plus its MLP."""
        y_BPD = self.mlp_norm(x_BPD)
        hidden_BPF = jax.nn.silu(self.mlp_gate(y_BPD)) * self.mlp_up(y_BPD)
        return x_BPD + self.mlp_down(kept(pin(hidden_BPF, "batch", None, "mlp"), "mlp"))


def _in_blocks(patches_BhwD: jax.Array, merge: int) -> jax.Array:
    return einops.rearrange(patches_BhwD, "B (h m) (w n) D -> B (h w m n) D", m=merge, n=merge)


# ---- Towers ----------------------------------------------------------------------------------------------------------


class Qwen3Vision(nnx.Module):
    """Images to tokens, and to features that the language model adds to its first layers (DeepStack)."""

    def __init__(
        self,
        config: Qwen3VisionConfig,
        key: Key[Array, ""],
        *,
        image_size: tuple[int, int],
        dtype: str,
        unroll: bool,
        remat: str | None,
    ) -> None:
        """image_size: (height, width) in pixels, multiples of the side of a block."""
        self.config, self.dtype, self.unroll, self.remat = config, dtype, unroll, remat
        c = config
        shape = (FRAMES, c.patch_size, c.patch_size, 3, c.hidden)
        self.patch = Linear(named_key(key, "patch"), PATCH_EQUATION, shape, PATCH_AXES)
        self.position = weight(key, "position", (c.table**2, c.hidden), ("position", "embed"), normal(0.02))
        self.layers = VitLayer(
            named_key(key, "layers"), depth=c.depth, width=c.hidden, num_heads=c.num_heads, mlp_dim=c.mlp_dim
        )
        self.merger = Merger(named_key(key, "merger"), c, norm=LayerNorm)
        mergers = lambda n: Merger(  # noqa: E731
            named_key(key, "deepstack"), c, norm=LayerNorm, joined_norm=True, layers=n
        )
        self.deepstack = mergers(len(c.deepstack)) if c.deepstack else None

    def positions(self, grid: tuple[int, int]) -> Float[Array, "h w D"]:
        """Returns the learned table at each patch of a grid, bilinear between its entries."""
        c = self.config
        table = use(self.position, jnp.float32).reshape(c.table, c.table, c.hidden)
        rows, columns = (jnp.asarray(interpolation(c.table, n)) for n in grid)
        # In full float32: accelerators would take products of float32 in fewer bits.
        return jnp.einsum("hr,wc,rcD->hwD", rows, columns, table, precision="highest")

    def with_features(
        self, images_BHWC: Float[Array, "B height width 3"]
    ) -> tuple[Float[Array, "B T E"], tuple[Float[Array, "B T E"], ...]]:
        """Returns the tokens, and of each layer in `deepstack` one feature per token. images: as in `__call__`."""
        with jax.named_scope("qwen_vision"):
            c = self.config
            # 0.5 / 0.5 is what images in [-1, 1] are already. Patches and positions are summed in float32.
            patches = self.patch(to_patches(images_BHWC, c.patch_size))
            grid = patches.shape[1], patches.shape[2]
            rope = jnp.asarray(axial_rope(blocks(grid, c.merge), c.head_dim))

            def body(x: jax.Array, layer: VitLayer) -> tuple[jax.Array, jax.Array | None]:
                x = pin(layer.mlp(layer.attention(pin(x, "batch", None, None), rope)), "batch", None, None)
                return x, x if c.deepstack else None

            x_BPD = _in_blocks(patches + self.positions(grid), c.merge).astype(self.dtype)
            x_BPD, every_LBPD = run_layers(body, x_BPD, self.layers, unroll=self.unroll, remat=self.remat)
            merger = lambda g: jax.tree.map(lambda w: w[g], self.deepstack)  # noqa: E731
            return self.merger(x_BPD), tuple(merger(g)(every_LBPD[i]) for g, i in enumerate(c.deepstack))

    def __call__(self, images_BHWC: Float[Array, "B height width 3"]) -> Float[Array, "B T E"]:
        """Returns one token per block, row by row. images: float32 in [-1, 1], RGB."""
        return self.with_features(images_BHWC)[0]


class PlainTower(nnx.Module):
    """What the towers of Qwen2-VL and Qwen2.5-VL share: patches without bias, of images normalised as CLIP has them.

    A subclass declares `layers` and `merger`, and says what of them is computed.
    """

    config: Any

    def __init__(
        self,
        config: QwenVisionConfig,
        key: Key[Array, ""],
        *,
        image_size: tuple[int, int],
        dtype: str,
        unroll: bool,
        remat: str | None,
    ) -> None:
        """image_size: (height, width) in pixels, multiples of the side of a block."""
        self.config, self.dtype, self.unroll, self.remat = config, dtype, unroll, remat
        shape = (FRAMES, config.patch_size, config.patch_size, 3, config.hidden)
        self.patch = map_weight(key, "patch", shape, PATCH_AXES, inputs=(0, 1, 2, 3))
        self.declare(key)

    def declare(self, key: Key[Array, ""]) -> None:
        """Declares the layers and the merger."""
        raise NotImplementedError

    def patches(self, images_BHWC: Float[Array, "B height width 3"]) -> Float[Array, "B h w D"]:
        """Returns the patches of images in [-1, 1]."""
        return linear(self, "patch", PATCH_EQUATION, to_patches(normalized(images_BHWC, CLIP), self.config.patch_size))


class Qwen25Vision(PlainTower):
    """Images to tokens; most layers see windows only."""

    config: Qwen25VisionConfig

    def declare(self, key: Key[Array, ""]) -> None:
        """As `PlainTower.declare`."""
        self.layers = GatedLayer(named_key(key, "layers"), self.config)
        self.merger = Merger(named_key(key, "merger"), self.config, norm=RMSNorm)

    def __call__(self, images_BHWC: Float[Array, "B height width 3"]) -> Float[Array, "B T E"]:
        """Returns one token per block, row by row. images: float32 in [-1, 1], RGB."""
        with jax.named_scope("qwen_vision"):
            c = self.config
            patches = self.patches(images_BHWC)
            grid = patches.shape[1], patches.shape[2]
            windows = Windows.of((grid[0] // c.merge, grid[1] // c.merge), c.window // (c.patch_size * c.merge))
            rope = jnp.asarray(axial_rope(_reordered(blocks(grid, c.merge), windows.order, 0), c.head_dim))
            everywhere, inside = (lambda q, k, v: attention(q, k, v, None)), windows.attention(c.merge)
            full = np.isin(np.arange(c.depth), c.full)

            def body(x: jax.Array, layer: tuple[GatedLayer, jax.Array]) -> tuple[jax.Array, None]:
                block, is_full = layer
                attend = lambda q, k, v: jax.lax.cond(is_full, everywhere, inside, q, k, v)  # noqa: E731
                x = block.attention(pin(x, "batch", None, None), rope, attend)
                return pin(block.mlp(x), "batch", None, None), None

            x_BPD = _reordered(_in_blocks(patches, c.merge), windows.order, 1).astype(self.dtype)
            stack = (self.layers, jnp.asarray(full))
            x_BPD = run_layers(body, x_BPD, stack, unroll=self.unroll, remat=self.remat)[0]
            return self.merger(x_BPD)[:, np.argsort(windows.order)]


class Qwen2Vision(PlainTower):
    """Images to tokens."""

    config: Qwen2VisionConfig

    def declare(self, key: Key[Array, ""]) -> None:
        """As `PlainTower.declare`."""
        c = self.config
        sizes: Any = {"depth": c.depth, "width": c.hidden, "num_heads": c.num_heads, "mlp_dim": c.mlp_dim}
        self.layers = VitLayer(named_key(key, "layers"), **sizes, gelu="quick")
        self.merger = Merger(named_key(key, "merger"), c, norm=LayerNorm)

    def __call__(self, images_BHWC: Float[Array, "B height width 3"]) -> Float[Array, "B T E"]:
        """Returns one token per block, row by row. images: float32 in [-1, 1], RGB."""
        with jax.named_scope("qwen_vision"):
            c = self.config
            patches = self.patches(images_BHWC)
            rope = jnp.asarray(axial_rope(blocks((patches.shape[1], patches.shape[2]), c.merge), c.head_dim))

            def body(x: jax.Array, layer: VitLayer) -> tuple[jax.Array, None]:
                return pin(layer.mlp(layer.attention(pin(x, "batch", None, None), rope)), "batch", None, None), None

            x_BPD = _in_blocks(patches, c.merge).astype(self.dtype)
            return self.merger(run_layers(body, x_BPD, self.layers, unroll=self.unroll, remat=self.remat)[0])


def _reordered(x: Any, order: Sequence[int] | np.ndarray, axis: int) -> Any:
    """Returns x with the patches on this axis in the order of their tokens."""
    block = x.shape[axis] // len(order)
    every = (np.asarray(order)[:, None] * block + np.arange(block)).ravel()
    return x[(slice(None),) * axis + (every,)]
