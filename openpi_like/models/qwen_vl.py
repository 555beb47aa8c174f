"""Qwen2-VL (Wang et al. 2024), Qwen2.5-VL and Qwen3-VL (Bai et al. 2025a, 2025b): a tower with merged patches and a
causal language model whose positions have three axes (M-RoPE); Qwen3-VL adds features of the tower to the tokens behind
its first layers.

Images stand inside of the chat, between the tokens for the start and the end of an image (`image_slots`).

Letters: B batch, S tokens, P tokens of an image, D width of the language model.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from openpi_like.draws import named_key
from openpi_like.models.backbone import Backbone
from openpi_like.models.formats import Format
from openpi_like.models.llama import Llama, LlamaConfig
from openpi_like.models.qwen_vision import (
    Qwen2Vision,
    Qwen2VisionConfig,
    Qwen3Vision,
    Qwen3VisionConfig,
    Qwen25Vision,
    Qwen25VisionConfig,
)
from openpi_like.models.qwen_vl_names import qwen_vl_formats


@dataclasses.dataclass(frozen=True)
class QwenVlConfig:
    """Sizes of tower and language model; which of the models it is, the class of `vision` says."""

    vision: Qwen2VisionConfig | Qwen25VisionConfig | Qwen3VisionConfig
    vlm: LlamaConfig

    def __post_init__(self) -> None:
        problems = []
        if self.vision.width != self.vlm.width:
            problems.append(f"vision.width={self.vision.width}, expected vlm.width={self.vlm.width}")
        if self.vlm.rope_sections is None:
            problems.append("vlm.rope_sections=None, expected those of positions in three axes")
        if isinstance(self.vision, Qwen3VisionConfig) and len(self.vision.deepstack) > self.vlm.depth:
            problems.append(f"vision.deepstack={self.vision.deepstack}, expected at most vlm.depth={self.vlm.depth}")
        if problems:
            raise ValueError("QwenVlConfig: " + "; ".join(problems))

    @classmethod
    def qwen2_vl_2b(cls) -> "QwenVlConfig":
        """Returns Qwen2-VL-2B, whose vocabulary has 151,936 rows."""
        return cls(Qwen2VisionConfig.qwen2_vl_2b(), LlamaConfig.qwen2_vl_2b())

    @classmethod
    def qwen2_5_vl_3b(cls) -> "QwenVlConfig":
        """Returns Qwen2.5-VL-3B, whose vocabulary has 151,936 rows."""
        return cls(Qwen25VisionConfig.qwen25_vl_3b(), LlamaConfig.qwen2_5_vl_3b())

    @classmethod
    def qwen2_5_vl_7b(cls) -> "QwenVlConfig":
        """Returns Qwen2.5-VL-7B, whose vocabulary has 152,064 rows."""
        vlm = LlamaConfig.qwen2_5_vl_7b()
        return cls(dataclasses.replace(Qwen25VisionConfig.qwen25_vl_3b(), width=vlm.width), vlm)

    @classmethod
    def qwen3_vl_2b(cls) -> "QwenVlConfig":
        """Returns Qwen3-VL-2B, whose vocabulary has 151,936 rows."""
        return cls(Qwen3VisionConfig.qwen3_vl_2b(), LlamaConfig.qwen3_vl_2b())

    @classmethod
    def qwen3_vl_4b(cls) -> "QwenVlConfig":
        """Returns Qwen3-VL-4B, whose vocabulary has 151,936 rows."""
        return cls(Qwen3VisionConfig.qwen3_vl_4b(), LlamaConfig.qwen3_vl_4b())

    @classmethod
    def tiny_2(cls) -> "QwenVlConfig":
        """Returns sizes of a Qwen2-VL that trains on two CPU cores."""
        return cls(Qwen2VisionConfig.tiny(), LlamaConfig.tiny(qkv_bias=True, tied=True, rope_sections=(4, 4, 4)))

    @classmethod
    def tiny_2_5(cls) -> "QwenVlConfig":
        """Returns sizes of a Qwen2.5-VL that trains on two CPU cores."""
        return cls(Qwen25VisionConfig.tiny(), LlamaConfig.tiny(qkv_bias=True, tied=True, rope_sections=(4, 4, 4)))

    @classmethod
    def tiny_3(cls) -> "QwenVlConfig":
        """Returns sizes of a Qwen3-VL that trains on two CPU cores."""
        vlm = LlamaConfig.tiny(qk_norm=True, tied=True, rope_sections=(4, 4, 4), rope_interleaved=True)
        return cls(Qwen3VisionConfig.tiny(), vlm)

    @property
    def language(self) -> LlamaConfig:
        """Sizes of the language model."""
        return self.vlm

    def problems(self, image_size: tuple[int, int]) -> list[str]:
        """Returns what does not fit images of this many pixels."""
        return self.vision.problems(image_size)

    def image_tokens(self, image_size: tuple[int, int]) -> int:
        """Returns P, the tokens of one image of this many pixels."""
        return self.vision.tokens(image_size)

    def create(self, config: Any, key: Key[Array, ""]) -> "QwenVl":
        """Returns the module with fresh weights."""
        return QwenVl(config, key)

    def formats(self, vocab_size: int) -> Mapping[str, Format]:
        """Returns the published layouts that hold its weights."""
        return qwen_vl_formats(self.vision, self.vlm)


class QwenVl(Backbone):
    """`vision` and `vlm`."""

    causal = True
    vision: Qwen2Vision | Qwen25Vision | Qwen3Vision
    vlm: Llama

    def __init__(self, config: Any, key: Key[Array, ""]) -> None:
        """config: of the model that it is a part of, a `VisionLanguageConfig`."""
        self.config = c = config
        sizes: QwenVlConfig = c.backbone
        run: dict[str, Any] = {"dtype": c.dtype, "unroll": c.unroll, "remat": c.remat}
        self.vision = sizes.vision.create(named_key(key, "vision"), image_size=c.image_size, **run)
        self.vlm = Llama(sizes.vlm, named_key(key, "vlm"), vocab_size=c.vocab_size, **run)

    def embed_images(
        self, images_BHWC: Float[Array, "B height width 3"], language_BD: Float[Array, "B D"] | None
    ) -> tuple[Float[Array, "B P D"], tuple[Float[Array, "B P D"], ...]]:
        """Returns one token per block of patches, and Qwen3-VL's features of these."""
        if isinstance(self.vision, Qwen3Vision):
            return self.vision.with_features(images_BHWC)
        return self.vision(images_BHWC), ()

    def positions(self, valid_BS: Bool[Array, "B S"]) -> Int[Array, "3 B S"]:
        """Returns time, height and width of a sequence that begins with cameras and text and may go on after them.

        Text has one number in all three. An image has one time; its rows and columns count on from there, and what is
        behind it goes on after the greatest of all. What is not valid takes no position.
        """
        vision, S = self.config.backbone.vision, valid_BS.shape[1]
        rows, columns = (n // vision.merge for n in vision.grid(self.config.image_size))
        within, steps = np.zeros((3, S), np.int32), np.ones(S, np.int32)
        for start in self.image_starts():
            image = slice(start, start + rows * columns)
            within[1:, image] = np.indices((rows, columns)).reshape(2, -1)
            steps[image] = 0
            steps[image.stop - 1] = max(rows, columns)
        taken_BS = valid_BS * jnp.asarray(steps)
        before_BS = jnp.cumsum(taken_BS, axis=-1) - taken_BS
        return jnp.where(valid_BS, before_BS + jnp.asarray(within)[:, None], before_BS - 1)
