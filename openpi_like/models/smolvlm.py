"""SmolVLM: SigLIP, a pixel shuffle and SmolLM2 (Marafioti et al. 2025, arXiv 2504.05299).

As a model of text all of its tokens, those of images too, see the ones before them only. Images are squares of one
size, without the splitting into tiles that transformers does for large ones; that is how SmolVLA sees them, too.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxtyping import Array, Float, Key

from openpi_like.draws import named_key
from openpi_like.models.backbone import Backbone
from openpi_like.models.formats import Format
from openpi_like.models.llama import Llama, LlamaConfig
from openpi_like.models.projectors import PixelShuffle
from openpi_like.models.siglip import Siglip, SiglipConfig
from openpi_like.models.smolvlm_names import smolvlm_formats


@dataclasses.dataclass(frozen=True)
class SmolVlmConfig:
    """Sizes of the parts.

    vlm: as published. layers: how many of its layers there are, the first ones; None for all. SmolVLA uses half of them
    (SmolVLA paper, section 3.1: layer skipping). shuffle: patches on a side that become one token.
    """

    vision: SiglipConfig
    vlm: LlamaConfig
    layers: int | None = None
    shuffle: int = 4

    def __post_init__(self) -> None:
        if self.layers is not None and not 1 <= self.layers <= self.vlm.depth:
            raise ValueError(f"SmolVlmConfig: layers={self.layers}, expected 1 to vlm.depth={self.vlm.depth}, or None")

    @classmethod
    def smolvlm_500m(cls) -> "SmolVlmConfig":
        """Returns SmolVLM2-500M, for images of 512 pixels, 49,280 tokens."""
        return cls(SiglipConfig.base_16(), LlamaConfig.smollm2_360m(tied=False))

    @classmethod
    def smolvla(cls, *, layers: int = 16) -> "SmolVlmConfig":
        """Returns SmolVLM2-500M as SmolVLA uses it.

        Half of its layers, rotations of base 10,000 instead of 100,000 (as in LeRobot's code), and no table of logits
        beside that of tokens, as no text is written.
        """
        vlm = dataclasses.replace(LlamaConfig.smollm2_360m(tied=True), rope_base=10_000.0)
        return cls(SiglipConfig.base_16(), vlm, layers)

    @classmethod
    def tiny(cls) -> "SmolVlmConfig":
        """Returns sizes that train on two CPU cores: 16 tokens of an image of 64 pixels."""
        return cls(SiglipConfig.tiny(patch_size=8), LlamaConfig.tiny(depth=4, tied=True, norm_eps=1e-5), shuffle=2)

    @property
    def language(self) -> LlamaConfig:
        """Sizes of the language model, of the layers that are there."""
        return self.vlm if self.layers is None else dataclasses.replace(self.vlm, depth=self.layers)

    def grid(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """Returns rows and columns of patches."""
        height, width = image_size
        return height // self.vision.patch_size, width // self.vision.patch_size

    def image_tokens(self, image_size: tuple[int, int]) -> int:
        """Returns P, the tokens of one image of this many pixels."""
        return self.vision.tokens(image_size) // self.shuffle**2

    def problems(self, image_size: tuple[int, int]) -> list[str]:
        """Returns what does not fit images of this many pixels."""
        unit = self.vision.patch_size * self.shuffle
        if all(side > 0 and side % unit == 0 for side in image_size):
            return []
        return [f"image_size={image_size}, expected multiples of vision.patch_size * shuffle = {unit}"]

    def create(self, config: Any, key: Key[Array, ""]) -> "SmolVlm":
        """Returns the module with fresh weights."""
        return SmolVlm(config, key)

    def formats(self, vocab_size: int) -> Mapping[str, Format]:
        """Returns the published layouts that hold its weights."""
        return smolvlm_formats(self.vision, self.vlm, self.language.depth, vocab_size)


class SmolVlm(Backbone):
    """`vision`, `connector` and `vlm`."""

    vision: Siglip
    connector: PixelShuffle
    vlm: Llama
    causal = True

    def __init__(self, config: Any, key: Key[Array, ""]) -> None:
        """config: of the model that it is a part of, a `VisionLanguageConfig`."""
        self.config = c = config
        sizes: SmolVlmConfig = c.backbone
        run = {"dtype": c.dtype, "unroll": c.unroll, "remat": c.remat}
        self.vision = sizes.vision.create(named_key(key, "vision"), image_size=c.image_size, **run)
        self.connector = PixelShuffle(
            named_key(key, "connector"),
            sizes.vision.width,
            sizes.language.width,
            grid=sizes.grid(c.image_size),
            scale=sizes.shuffle,
        )
        self.vlm = Llama(sizes.language, named_key(key, "vlm"), vocab_size=c.vocab_size, **run)

    def embed_images(
        self, images_BHWC: Float[Array, "B height width 3"], language_BD: Float[Array, "B D"] | None
    ) -> tuple[Float[Array, "B P D"], tuple[Float[Array, "B P D"], ...]]:
        """Returns one token for each square of patches."""
        return self.connector(self.vision(images_BHWC)), ()
