"""Prismatic VLMs (Karamcheti et al. 2024): patches of DINOv2 and SigLIP, a projector, a causal language model.

The backbone of OpenVLA (Kim et al. 2024), OpenVLA-OFT, MiniVLA and VLA-Adapter. Images stand behind the first token of
the text: `image_slots` of (1, 1, ...).

Letters: B batch, S text tokens, P patches, D width of the language model.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from openpi_like.batch import Batch, Observation, TextBatch
from openpi_like.draws import named_key
from openpi_like.models.backbone import Backbone
from openpi_like.models.dino import Dino, DinoConfig
from openpi_like.models.formats import Format
from openpi_like.models.llama import Llama, LlamaConfig
from openpi_like.models.prismatic_names import prismatic_formats
from openpi_like.models.projectors import PrismaticProjector
from openpi_like.models.sequences import answers
from openpi_like.models.siglip import Siglip, SiglipConfig


@dataclasses.dataclass(frozen=True)
class PrismaticConfig:
    """Sizes of the towers.

    dino: None where SigLIP is alone; then the projector has two maps instead of three.
    film: the prompt changes what the image towers see, as in OpenVLA-OFT with FiLM ("OFT+"), see `vit.Film`.
    """

    dino: DinoConfig | None
    siglip: SiglipConfig
    vlm: LlamaConfig
    film: bool = False

    def __post_init__(self) -> None:
        if self.dino is not None and self.dino.patch_size != self.siglip.patch_size:
            raise ValueError(
                f"PrismaticConfig: patch sizes {self.dino.patch_size} and {self.siglip.patch_size}, "
                "expected one for both towers"
            )

    @classmethod
    def openvla(cls, *, film: bool = False) -> "PrismaticConfig":
        """Returns the sizes of OpenVLA-7B, whose vocabulary has 32,064 rows."""
        return cls(DinoConfig.vit_l_14_reg4(), SiglipConfig.openvla(), LlamaConfig.llama_2_7b(), film)

    @classmethod
    def qwen2_5_0_5b(cls, *, film: bool = False) -> "PrismaticConfig":
        """Returns the sizes of Prismatic Qwen2.5-0.5B (MiniVLA, VLA-Adapter), whose vocabulary has 151,936 rows."""
        return cls(DinoConfig.vit_l_14_reg4(), SiglipConfig.openvla(), LlamaConfig.qwen2_5_0_5b(), film)

    @classmethod
    def tiny(cls, *, patch_size: int = 16, film: bool = False) -> "PrismaticConfig":
        """Returns sizes that train on two CPU cores."""
        siglip = dataclasses.replace(SiglipConfig.tiny(patch_size), select="second_to_last", gelu="erf")
        return cls(DinoConfig.tiny(patch_size), siglip, LlamaConfig.tiny(), film)

    @property
    def language(self) -> LlamaConfig:
        """Sizes of the language model."""
        return self.vlm

    @property
    def patch_width(self) -> int:
        """Numbers of a patch, of all towers together."""
        return self.siglip.width + (0 if self.dino is None else self.dino.width)

    def problems(self, image_size: tuple[int, int]) -> list[str]:
        """Returns what does not fit images of this many pixels."""
        return self.siglip.problems(image_size)

    def image_tokens(self, image_size: tuple[int, int]) -> int:
        """Returns P, the tokens of one image of this many pixels."""
        return self.siglip.tokens(image_size)

    def create(self, config: Any, key: Key[Array, ""]) -> "Prismatic":
        """Returns the module with fresh weights."""
        return Prismatic(config, key)

    def formats(self, vocab_size: int) -> Mapping[str, Format]:
        """Returns the published layouts that hold its weights."""
        return prismatic_formats(self.dino, self.siglip, self.vlm, film=self.film)


class Prismatic(Backbone):
    """`dino`, `siglip`, `projector` and `vlm`."""

    causal = True
    towers = ("dino", "siglip")
    dino: Dino | None
    siglip: Siglip
    projector: PrismaticProjector
    vlm: Llama

    def __init__(self, config: Any, key: Key[Array, ""]) -> None:
        """config: of the model that it is a part of, a `VisionLanguageConfig`."""
        self.config = c = config
        sizes: PrismaticConfig = c.backbone
        run: dict[str, Any] = {"dtype": c.dtype, "unroll": c.unroll, "remat": c.remat}
        tower = {**run, "image_size": c.image_size, "film_width": sizes.vlm.width if sizes.film else None}
        self.dino = None if sizes.dino is None else sizes.dino.create(named_key(key, "dino"), **tower)
        self.siglip = sizes.siglip.create(named_key(key, "siglip"), **tower)
        self.projector = PrismaticProjector(
            named_key(key, "projector"), sizes.patch_width, sizes.vlm.width, fused=sizes.dino is not None
        )
        self.vlm = Llama(sizes.vlm, named_key(key, "vlm"), vocab_size=c.vocab_size, **run)

    @property
    def images_first(self) -> bool:
        """As `Backbone.images_first`: not where the prompt changes what is seen."""
        return super().images_first and not self.config.backbone.film

    def image_condition(self, observation: Observation | TextBatch | Batch) -> Float[Array, "B D"] | None:
        """Returns the mean of the prompt's embeddings, for FiLM."""
        if not self.config.backbone.film:
            return None
        text_BSD, asked_BS = self.vlm.embed(observation["prompt"]), observation["prompt_mask"] & ~answers(observation)
        there_BS1 = asked_BS[..., None].astype(jnp.float32)
        return ((text_BSD * there_BS1).sum(1) / jnp.maximum(there_BS1.sum(1), 1.0)).astype(text_BSD.dtype)

    def embed_images(
        self, images_BHWC: Float[Array, "B height width 3"], language_BD: Float[Array, "B D"] | None
    ) -> tuple[Float[Array, "B P D"], tuple[Float[Array, "B P D"], ...]]:
        """Returns one token per patch."""
        towers = [tower for tower in (self.dino, self.siglip) if tower is not None]
        patches = jnp.concatenate([tower(images_BHWC, language_BD) for tower in towers], axis=-1)
        return self.projector(patches), ()
