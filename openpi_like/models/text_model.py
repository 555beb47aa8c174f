"""A vision-language model that is trained on text alone: captions, answers, pointing."""

import dataclasses

from jaxtyping import Array, Float, Key

from openpi_like.batch import TextBatch
from openpi_like.models.paligemma import PaliGemmaConfig
from openpi_like.models.policy import Model, VisionLanguageConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextModelConfig(VisionLanguageConfig):
    """A backbone in its own right."""

    @classmethod
    def paligemma(cls, *, image_size: int = 224, prompt_len: int = 48) -> "TextModelConfig":
        """Returns the sizes of the released PaliGemma-3B weights; image_size: 224, 448 or 896 pixels."""
        fields = PaliGemmaConfig.released_fields()
        return cls(**fields, cameras=("image",), image_size=(image_size, image_size), prompt_len=prompt_len)

    def create(self, key: Key[Array, ""]) -> "TextModel":
        """Returns a model with fresh weights; every weight's draw depends on `key` and its own name only."""
        return TextModel(self, key)


class TextModel(Model):
    """`loss` to train it; its backbone writes text."""

    config: TextModelConfig

    def loss(
        self, key: Key[Array, ""], batch: TextBatch, *, counts: dict[str, Float[Array, ""]] | None = None
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, "B"]]]:
        """Returns `Backbone.text_loss`; `key` is not used, nothing is drawn. counts: see `loss_counts`."""
        return self.backbone.text_loss(batch, samples=None if counts is None else counts["text"])

    def loss_counts(self, batch: TextBatch) -> dict[str, Float[Array, ""]]:
        """Returns what `loss` divides by. A part of a batch, with the counts of all of it, has its part of the loss."""
        return {"text": self.backbone.text_samples(batch)}
