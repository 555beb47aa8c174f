"""DINOv2 image tower with registers (Oquab et al. 2023, Darcet et al. 2023), sizes and layout as in timm.

A class token and the registers come before the patches, without positions; only patches are returned.

Letters: B batch, P patches, D width, R registers, L layers, E width of a language vector.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from openpi_like.draws import named_key
from openpi_like.models.param import Linear, normal, use, weight
from openpi_like.models.vision import IMAGENET, PatchTower, normalized
from openpi_like.models.vit import LayerNorm, VitLayer, VitTower, run_vit, to_patches


@dataclasses.dataclass(frozen=True)
class DinoConfig(PatchTower):
    """Sizes of the tower; patch_size in pixels.

    select: which tokens are returned, see `vision.SELECT`; layers behind them are not there.
    """

    width: int
    depth: int
    mlp_dim: int
    num_heads: int
    patch_size: int
    registers: int = 4
    select: str = "second_to_last"

    def __post_init__(self) -> None:
        problems = self.tower_problems()
        if problems:
            raise ValueError("DinoConfig: " + "; ".join(problems))

    @classmethod
    def tiny(cls, patch_size: int = 16) -> "DinoConfig":
        """Returns sizes that train on two CPU cores."""
        return cls(width=96, depth=4, mlp_dim=256, num_heads=4, patch_size=patch_size)

    @classmethod
    def vit_l_14_reg4(cls) -> "DinoConfig":
        """Returns ViT-L/14 with 4 registers as OpenVLA uses it: patches of the block before the last."""
        return cls(width=1024, depth=24, mlp_dim=4096, num_heads=16, patch_size=14)

    def create(
        self,
        key: Key[Array, ""],
        *,
        image_size: tuple[int, int],
        dtype: str,
        unroll: bool,
        remat: str | None,
        film_width: int | None = None,
    ) -> "Dino":
        """Returns a tower, see `vision.VisionEncoderConfig`. film_width: see `VitLayer`."""
        return Dino(self, key, image_size=image_size, dtype=dtype, unroll=unroll, remat=remat, film_width=film_width)


class Dino(VitTower):
    """Images to one token per patch."""

    def __init__(
        self,
        config: DinoConfig,
        key: Key[Array, ""],
        *,
        image_size: tuple[int, int],
        dtype: str,
        unroll: bool,
        remat: str | None,
        film_width: int | None = None,
    ) -> None:
        """image_size: (height, width) in pixels, multiples of the patch size."""
        self.config, self.dtype, self.unroll, self.remat = config, dtype, unroll, remat
        p, D, R = config.patch_size, config.width, config.registers
        axes = ("patch", "patch", None, "embed")
        self.patch = Linear(named_key(key, "patch"), "BhpwqC,pqCD->BhwD", (p, p, 3, D), axes)
        table = lambda name, rows: weight(  # noqa: E731
            key, name, (1, rows, D), (None, "position", "embed"), normal(0.02)
        )
        self.class_token, self.registers = table("class_token", 1), table("registers", R)
        self.position = table("position", config.tokens(image_size))
        self.layers = VitLayer(
            named_key(key, "layers"),
            depth=config.layers,
            width=D,
            num_heads=config.num_heads,
            mlp_dim=config.mlp_dim,
            gelu="erf",
            layer_scale=1e-5,
            film_width=film_width,
        )
        self.final_norm = LayerNorm(named_key(key, "final_norm"), D) if config.select == "last" else None

    def __call__(
        self, images_BHWC: Float[Array, "B height width 3"], language_BE: Float[Array, "B E"] | None = None
    ) -> Float[Array, "B P D"]:
        """Returns one token per patch, row by row. images: float32 in [-1, 1], RGB. language: for FiLM."""
        with jax.named_scope("dino"):
            # Patches and positions are summed in float32, as in `Siglip`.
            patches = self.patch(to_patches(normalized(images_BHWC, IMAGENET), self.config.patch_size))
            B, h, w, D = patches.shape
            x_BPD = patches.reshape(B, h * w, D) + use(self.position, patches.dtype)
            before = jnp.concatenate([use(t, patches.dtype) for t in (self.class_token, self.registers)], axis=1)
            x_BPD = jnp.concatenate([jnp.broadcast_to(before, (B, *before.shape[1:])), x_BPD], axis=1)
            x_BPD = run_vit(self.layers, x_BPD.astype(self.dtype), language_BE, unroll=self.unroll, remat=self.remat)
            x_BPD = x_BPD[:, before.shape[1] :]
            return x_BPD if self.final_norm is None else self.final_norm(x_BPD)
