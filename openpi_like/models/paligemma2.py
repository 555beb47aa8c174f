"""PaliGemma 2: SigLIP and Gemma 2, images before a prefix of text that sees all of it (Steiner et al. 2024)."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxtyping import Array, Float, Key

from openpi_like.draws import named_key
from openpi_like.models.backbone import Backbone
from openpi_like.models.formats import Format
from openpi_like.models.gemma2 import Gemma2, Gemma2Config
from openpi_like.models.paligemma_names import paligemma2_formats
from openpi_like.models.siglip import Siglip, SiglipConfig


@dataclasses.dataclass(frozen=True)
class PaliGemma2Config:
    """Sizes of the two towers."""

    vision: SiglipConfig
    vlm: Gemma2Config

    @classmethod
    def paligemma2_3b(cls) -> "PaliGemma2Config":
        """Returns PaliGemma 2 3B, whose vocabulary has 257,152 tokens."""
        return cls(SiglipConfig.so400m_14(), Gemma2Config.gemma2_2b())

    @classmethod
    def paligemma2_10b(cls) -> "PaliGemma2Config":
        """Returns PaliGemma 2 10B, whose vocabulary has 257,152 tokens."""
        return cls(SiglipConfig.so400m_14(), Gemma2Config.gemma2_9b())

    @classmethod
    def tiny(cls, *, patch_size: int = 16) -> "PaliGemma2Config":
        """Returns sizes that train on two CPU cores."""
        return cls(SiglipConfig.tiny(patch_size), Gemma2Config.tiny())

    @property
    def language(self) -> Gemma2Config:
        """Sizes of the language model."""
        return self.vlm

    def problems(self, image_size: tuple[int, int]) -> list[str]:
        """Returns what does not fit images of this many pixels."""
        return self.vision.problems(image_size)

    def image_tokens(self, image_size: tuple[int, int]) -> int:
        """Returns P, the tokens of one image of this many pixels."""
        return self.vision.tokens(image_size)

    def create(self, config: Any, key: Key[Array, ""]) -> "PaliGemma2":
        """Returns the module with fresh weights."""
        return PaliGemma2(config, key)

    def formats(self, vocab_size: int) -> Mapping[str, Format]:
        """Returns the published layouts that hold its weights."""
        return paligemma2_formats(self.vision.depth, self.vlm)


class PaliGemma2(Backbone):
    """`vision` and `vlm`."""

    vision: Siglip
    vlm: Gemma2

    def __init__(self, config: Any, key: Key[Array, ""]) -> None:
        """config: of the model that it is a part of, a `VisionLanguageConfig`."""
        self.config = c = config
        sizes: PaliGemma2Config = c.backbone
        run: dict[str, Any] = {"dtype": c.dtype, "unroll": c.unroll, "remat": c.remat}
        self.vision = Siglip(
            sizes.vision, named_key(key, "vision"), image_size=c.image_size, out_width=sizes.vlm.width, **run
        )
        self.vlm = Gemma2(sizes.vlm, named_key(key, "vlm"), vocab_size=c.vocab_size, **run)

    def embed_images(
        self, images_BHWC: Float[Array, "B height width 3"], language_BD: Float[Array, "B D"] | None
    ) -> tuple[Float[Array, "B P D"], tuple[Float[Array, "B P D"], ...]]:
        """Returns one token per patch."""
        return self.vision(images_BHWC), ()
