"""The first stage of DexVLA: the diffusion expert learns from many robots, without a vision-language model.

What it sees and is asked, a ResNet for each camera and a text encoder say (`resnet_bert`). From here to `dexvla.DexVla`
the expert goes, without what it is told by: `LEFT_BEHIND`.
"""

import dataclasses
from typing import Any

from jaxtyping import Array, Bool, Float, Key

from openpi_like.batch import Batch, Observation
from openpi_like.draws import RowKeys
from openpi_like.models.dexvla import ScaleDpPolicy, ScaleDpPolicyConfig
from openpi_like.models.resnet_bert import ResNetBertConfig
from openpi_like.models.scale_dp import ScaleDpConfig

LEFT_BEHIND = (r"^(text|resnet_\w+|map_\w+)/", r"^expert/(combine_\d|condition_in)/")
"""Weights of this stage that the next has no place for, or begins anew: for `WarmStart.drop`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DexVlaStage1Config(ScaleDpPolicyConfig):
    """Sizes and options; see `ScaleDpPolicyConfig`. Its backbone is a `ResNetBertConfig`."""

    def _problems(self) -> list[str]:
        problems = super()._problems()
        if not isinstance(self.backbone, ResNetBertConfig):
            return [*problems, f"backbone={type(self.backbone).__name__}, expected a ResNetBertConfig"]
        if self.entities:
            problems.append(f"entities={self.entities}, expected (): a ResNet and BERT have no place for them")
        if self.prompt_len > self.backbone.text.positions:
            positions = self.backbone.text.positions
            problems.append(f"prompt_len={self.prompt_len}, expected at most the {positions} positions of the text")
        return problems

    @classmethod
    def tiny(cls, *, image_size: tuple[int, int] = (64, 64), **options: Any) -> "DexVlaStage1Config":
        """Returns a policy that trains on two CPU cores; options: the other fields."""
        sizes: dict[str, Any] = {"backbone": ResNetBertConfig.tiny(), "expert": ScaleDpConfig.tiny()}
        return cls(**{**sizes, "image_size": image_size, **options})

    def create(self, key: Key[Array, ""]) -> "DexVlaStage1":
        """Returns a policy with fresh weights; every weight's draw depends on `key` and its own name only."""
        return DexVlaStage1(self, key)


class DexVlaStage1(ScaleDpPolicy):
    """The policy: `loss` to train it, `sample_actions` to use it."""

    config: DexVlaStage1Config
    backbone: Any  # ResNetBert

    def loss(
        self, key: Key[Array, ""], batch: Batch, *, counts: dict[str, Float[Array, ""]] | None = None
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, "B"]]]:
        """Returns `DiffusionPolicy.noise_loss`; metrics "loss" and "valid". counts: see `loss_counts`."""
        self.config.check_inputs(batch, actions=True)
        told = self.told(self.backbone.condition(batch), batch)
        return self.noise_loss(key, told, batch, samples=None if counts is None else counts["actions"])

    def validation_losses(self, key: Key[Array, ""], batch: Batch) -> dict[str, Float[Array, ""]]:
        """Returns "loss", at steps spread over the schedule."""
        self.config.check_inputs(batch, actions=True)
        return {"loss": self.validation_noise_loss(key, self.told(self.backbone.condition(batch), batch), batch)}

    def outputs(self, key: Key[Array, ""], batch: Batch) -> Float[Array, "B A J"]:
        """Returns actions sampled from noise drawn with `key`."""
        return self.sample_actions(key, self.config.observation(batch))

    def sample_actions(
        self, key: RowKeys, observation: Observation, *, action_mask: Bool[Array, "B A J"] | None = None
    ) -> Float[Array, "B A J"]:
        """Returns normalised actions, see `DiffusionPolicy.denoised`.

        Raises:
            ValueError: the observation does not fit the config; lists everything that does not.
        """
        self.config.check_inputs(observation, actions=False)
        told = self.told(self.backbone.condition(observation), observation)
        return self.denoised(key, told, observation["state"].shape[0], action_mask)
