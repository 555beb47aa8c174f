"""PaliGemma: SigLIP and Gemma, images before a prefix of text that sees all of it (Beyer et al. 2024)."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxtyping import Array, Float, Key

from openpi_like.draws import named_key
from openpi_like.models.backbone import Backbone
from openpi_like.models.formats import Format
from openpi_like.models.gemma import Gemma, GemmaConfig
from openpi_like.models.paligemma_names import paligemma_formats
from openpi_like.models.siglip import Siglip, SiglipConfig


@dataclasses.dataclass(frozen=True)
class PaliGemmaConfig:
    """Sizes of the two towers."""

    vision: SiglipConfig
    vlm: GemmaConfig

    @staticmethod
    def released_fields() -> dict[str, Any]:
        """Returns the fields of a model's config that all released PaliGemma-3B and pi0 weights have in common."""
        return {
            "backbone": PaliGemmaConfig(SiglipConfig.so400m_14(), GemmaConfig.gemma_2b()),
            "vocab_size": 257_152,
            "resize": "pillow",
            "dtype": "bfloat16",
            "remat": "nothing_saveable",
        }

    @staticmethod
    def tiny_fields(*, patch_size: int = 16) -> dict[str, Any]:
        """Returns fields of a model's config that trains on two CPU cores."""
        return {"backbone": PaliGemmaConfig(SiglipConfig.tiny(patch_size), GemmaConfig.tiny()), "unroll": True}

    @property
    def language(self) -> GemmaConfig:
        """Sizes of the language model."""
        return self.vlm

    def problems(self, image_size: tuple[int, int]) -> list[str]:
        """Returns what does not fit images of this many pixels."""
        patch = self.vision.patch_size
        if any(size % patch for size in image_size):
            return [f"image_size={image_size}, expected multiples of vision.patch_size={patch}"]
        return []

    def image_tokens(self, image_size: tuple[int, int]) -> int:
        """Returns P, the tokens of one image of this many pixels."""
        return self.vision.tokens(image_size)

    def create(self, config: Any, key: Key[Array, ""]) -> "PaliGemma":
        """Returns the module with fresh weights."""
        return PaliGemma(config, key)

    def formats(self, vocab_size: int) -> Mapping[str, Format]:
        """Returns the published layouts that hold its weights."""
        return paligemma_formats(self.vision.depth, self.vlm)


class PaliGemma(Backbone):
    """`vision` and `vlm`."""

    vision: Siglip
    vlm: Gemma

    def __init__(self, config: Any, key: Key[Array, ""]) -> None:
        """config: of the model that it is a part of, a `VisionLanguageConfig`."""
        self.config = c = config
        sizes: PaliGemmaConfig = c.backbone
        run = {"dtype": c.dtype, "unroll": c.unroll, "remat": c.remat}
        self.vision = Siglip(
            sizes.vision, named_key(key, "vision"), image_size=c.image_size, out_width=sizes.vlm.width, **run
        )
        self.vlm = Gemma(sizes.vlm, named_key(key, "vlm"), vocab_size=c.vocab_size, **run)

    def embed_images(
        self, images_BHWC: Float[Array, "B height width 3"], language_BD: Float[Array, "B D"] | None
    ) -> tuple[Float[Array, "B P D"], tuple[Float[Array, "B P D"], ...]]:
        """Returns one token per patch."""
        return self.vision(images_BHWC), ()
