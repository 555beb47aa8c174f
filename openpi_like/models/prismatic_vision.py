"""DINOv2 and SigLIP side by side, as in Prismatic VLMs with two encoders (Karamcheti et al. 2024), such as OpenVLA.

Letters: B batch, P patches, D width of both together, E width of a language vector.
"""

import dataclasses

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

from openpi_like.draws import named_key
from openpi_like.models.dino import DinoConfig
from openpi_like.models.siglip import SiglipConfig


@dataclasses.dataclass(frozen=True)
class PrismaticVisionConfig:
    """Sizes of both encoders, which have one patch size."""

    dino: DinoConfig
    siglip: SiglipConfig

    def __post_init__(self) -> None:
        if self.dino.patch_size != self.siglip.patch_size:
            raise ValueError(
                f"PrismaticVisionConfig: patch sizes {self.dino.patch_size} and {self.siglip.patch_size}, "
                "expected one for both encoders"
            )

    @classmethod
    def openvla(cls) -> "PrismaticVisionConfig":
        """Returns the encoders of OpenVLA-7B: 256 patches of 2176 numbers for 224 pixels."""
        return cls(DinoConfig.vit_l_14_reg4(), SiglipConfig.openvla())

    @classmethod
    def tiny(cls, patch_size: int = 16) -> "PrismaticVisionConfig":
        """Returns sizes that train on two CPU cores."""
        siglip = dataclasses.replace(SiglipConfig.tiny(patch_size), select="second_to_last", gelu="erf")
        return cls(DinoConfig.tiny(patch_size), siglip)

    @property
    def patch_size(self) -> int:
        """In pixels."""
        return self.dino.patch_size

    @property
    def width(self) -> int:
        """D, of both together."""
        return self.dino.width + self.siglip.width

    def tokens(self, image_size: tuple[int, int]) -> int:
        """Returns P, see `vision.VisionEncoderConfig`."""
        return self.dino.tokens(image_size)

    def problems(self, image_size: tuple[int, int]) -> list[str]:
        """Returns what is wrong with this size of images, see `vision.VisionEncoderConfig`."""
        return self.dino.problems(image_size)

    def create(
        self,
        key: Key[Array, ""],
        *,
        image_size: tuple[int, int],
        dtype: str,
        unroll: bool,
        remat: str | None,
        film_width: int | None = None,
    ) -> "PrismaticVision":
        """Returns both encoders, see `vision.VisionEncoderConfig`. film_width: see `VitLayer`."""
        return PrismaticVision(
            self, key, image_size=image_size, dtype=dtype, unroll=unroll, remat=remat, film_width=film_width
        )


class PrismaticVision(nnx.Module):
    """Images to the patches of both encoders, joined by channel: DINOv2 first."""

    def __init__(
        self,
        config: PrismaticVisionConfig,
        key: Key[Array, ""],
        *,
        image_size: tuple[int, int],
        dtype: str,
        unroll: bool,
        remat: str | None,
        film_width: int | None = None,
    ) -> None:
        """image_size: (height, width) in pixels, multiples of the patch size."""
        self.config = config
        create = lambda of, name: of.create(  # noqa: E731
            named_key(key, name),
            image_size=image_size,
            dtype=dtype,
            unroll=unroll,
            remat=remat,
            film_width=film_width,
        )
        self.dino, self.siglip = create(config.dino, "dino"), create(config.siglip, "siglip")

    def __call__(
        self, images_BHWC: Float[Array, "B height width 3"], language_BE: Float[Array, "B E"] | None = None
    ) -> Float[Array, "B P D"]:
        """Returns one token per patch, row by row. images: float32 in [-1, 1], RGB. language: for FiLM."""
        parts = [encoder(images_BHWC, language_BE) for encoder in (self.dino, self.siglip)]
        return jnp.concatenate(parts, axis=-1)
