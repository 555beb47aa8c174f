"""SigLIP image tower without pooling: one token per patch (Zhai et al. 2023; the vision part of PaliGemma).

Letters: B batch, P patches, D width, L layers, E width of the language model, or of a language vector for FiLM.
"""

import dataclasses
import math
from typing import Any

import jax
from jaxtyping import Array, Float, Key

from openpi_like.draws import named_key
from openpi_like.models.param import Linear, normal, use, weight
from openpi_like.models.vision import PatchTower
from openpi_like.models.vit import GELU, LayerNorm, VitLayer, VitTower, run_vit, to_patches


@dataclasses.dataclass(frozen=True)
class SiglipConfig(PatchTower):
    """Sizes of the tower; patch_size in pixels.

    select: which tokens are returned, see `vision.SELECT`; layers behind them are not there.
    gelu: one of `vit.GELU`. SigLIP was trained with "tanh"; OpenVLA fine-tuned it with "erf", as its version of timm
        had it.
    """

    width: int
    depth: int
    mlp_dim: int
    num_heads: int
    patch_size: int
    select: str = "last"
    gelu: str = "tanh"

    def __post_init__(self) -> None:
        problems = self.tower_problems()
        if self.gelu not in GELU:
            problems.append(f"gelu={self.gelu!r}, expected one of {tuple(GELU)}")
        if problems:
            raise ValueError("SiglipConfig: " + "; ".join(problems))

    @classmethod
    def tiny(cls, patch_size: int = 16) -> "SiglipConfig":
        """Returns sizes that train on two CPU cores."""
        return cls(width=96, depth=3, mlp_dim=256, num_heads=4, patch_size=patch_size)

    @classmethod
    def so400m_14(cls) -> "SiglipConfig":
        """Returns the shape-optimised 400 M model of PaliGemma and pi0."""
        return cls(width=1152, depth=27, mlp_dim=4304, num_heads=16, patch_size=14)

    @classmethod
    def openvla(cls) -> "SiglipConfig":
        """Returns the same model as OpenVLA uses it."""
        return dataclasses.replace(cls.so400m_14(), select="second_to_last", gelu="erf")

    @classmethod
    def base_16(cls) -> "SiglipConfig":
        """Returns the base model of SmolVLM-256M and 500M, for images of 512 pixels."""
        return cls(width=768, depth=12, mlp_dim=3072, num_heads=12, patch_size=16)

    def create(
        self,
        key: Key[Array, ""],
        *,
        image_size: tuple[int, int],
        dtype: str,
        unroll: bool,
        remat: str | None,
        film_width: int | None = None,
    ) -> "Siglip":
        """Returns a tower without a head, see `vision.VisionEncoderConfig`. film_width: see `VitLayer`."""
        return Siglip(
            self,
            key,
            image_size=image_size,
            out_width=None,
            dtype=dtype,
            unroll=unroll,
            remat=remat,
            film_width=film_width,
        )


class Siglip(VitTower):
    """Images to tokens of the language model's width, or of its own."""

    def __init__(
        self,
        config: SiglipConfig,
        key: Key[Array, ""],
        *,
        image_size: tuple[int, int],
        out_width: int | None,
        dtype: str,
        unroll: bool,
        remat: str | None,
        film_width: int | None = None,
    ) -> None:
        """image_size: (height, width) in pixels, multiples of the patch size. out_width: E; None without a head."""
        self.config, self.dtype, self.unroll, self.remat = config, dtype, unroll, remat
        p, D = config.patch_size, config.width
        axes = ("patch", "patch", None, "embed")
        self.patch = Linear(named_key(key, "patch"), "BhpwqC,pqCD->BhwD", (p, p, 3, D), axes)
        init, shape = normal(1 / math.sqrt(D)), (1, config.tokens(image_size), D)
        self.position = weight(key, "position", shape, (None, "position", "embed"), init)
        self.layers = VitLayer(
            named_key(key, "layers"),
            depth=config.layers,
            width=D,
            num_heads=config.num_heads,
            mlp_dim=config.mlp_dim,
            gelu=config.gelu,
            film_width=film_width,
        )
        last = config.select == "last"
        self.final_norm: Any = LayerNorm(named_key(key, "final_norm"), D) if last else None
        # openpi starts this map at zero because it always loads a checkpoint; from scratch that would delay the tower,
        # so it starts like every other map.
        head = lambda width: Linear(named_key(key, "head"), "BPD,DE->BPE", (D, width), (None, "embed"))  # noqa: E731
        self.head: Any = None if out_width is None else head(out_width)

    def stem(self, images_BHWC: Float[Array, "B height width 3"]) -> Float[Array, "B h w D"]:
        """Returns the projected patches, in float32: a strided convolution without overlap."""
        return self.patch(to_patches(images_BHWC, self.config.patch_size))

    def encode(
        self, x_BPD: Float[Array, "B P D"], language_BE: Float[Array, "B E"] | None = None
    ) -> Float[Array, "B P D"]:
        """Returns the transformer's output for patches with positions, after the final norm where there is one."""
        # Patches and positions stay float32 (as in openpi): pixels and the position table are summed at full precision.
        x_BPD = run_vit(self.layers, x_BPD.astype(self.dtype), language_BE, unroll=self.unroll, remat=self.remat)
        return x_BPD if self.final_norm is None else self.final_norm(x_BPD)

    def __call__(
        self, images_BHWC: Float[Array, "B height width 3"], language_BE: Float[Array, "B E"] | None = None
    ) -> Float[Array, "B P D"]:
        """Returns one token per patch, row by row. images: float32 in [-1, 1], RGB. language: for FiLM."""
        with jax.named_scope("siglip"):
            stem = self.stem(images_BHWC)
            B, h, w, D = stem.shape
            x_BPD = self.encode(stem.reshape(B, h * w, D) + use(self.position, stem.dtype), language_BE)
            return x_BPD if self.head is None else self.head(x_BPD)
