"""What the expert of DexVLA learns with before there is a vision-language model: a ResNet for each camera, changed by
what DistilBERT makes of the instruction, as RT-1 does it (Brohan et al. 2022; DexVLA, arXiv 2502.05855, section 3.2).

Letters: B batch, S text tokens, C cameras, D width of the vector that comes out, E width of the text.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

from openpi_like.batch import Batch, Observation
from openpi_like.draws import named_key
from openpi_like.models.backbone import to_float
from openpi_like.models.distilbert import DistilBert, DistilBertConfig, distilbert_rows
from openpi_like.models.formats import Format, Table
from openpi_like.models.param import Linear
from openpi_like.models.resnet import ResNet, ResNetConfig


@dataclasses.dataclass(frozen=True)
class Width:
    """Of what comes out; there is no language model whose layers could be read. width: D."""

    width: int


@dataclasses.dataclass(frozen=True)
class ResNetBertConfig:
    """Sizes. width: D, that of the language model that comes in its place later."""

    resnet: ResNetConfig
    text: DistilBertConfig
    width: int

    @classmethod
    def dexvla(cls) -> "ResNetBertConfig":
        """Returns ResNet-50 and distilbert-base, as wide as Qwen2-VL-2B."""
        return cls(ResNetConfig.resnet50(), DistilBertConfig.base(), width=1536)

    @classmethod
    def tiny(cls, *, width: int = 96) -> "ResNetBertConfig":
        """Returns sizes that train on two CPU cores."""
        return cls(ResNetConfig.tiny(), DistilBertConfig.tiny(), width=width)

    @property
    def language(self) -> Any:
        """What an expert is told of, see `Width`."""
        return Width(self.width)

    def problems(self, image_size: tuple[int, int]) -> list[str]:
        """Returns what does not fit images of this many pixels."""
        return self.resnet.problems(image_size)

    def image_tokens(self, image_size: tuple[int, int]) -> int:
        """Returns 1: an image becomes one vector."""
        return 1

    def create(self, config: Any, key: Key[Array, ""]) -> "ResNetBert":
        """Returns the module with fresh weights. config: of the policy it is a part of."""
        return ResNetBert(config, key)

    def formats(self, vocab_size: int) -> Mapping[str, Format]:
        """Returns the layout of the text encoder in Hugging Face's files; all else begins from nothing."""
        rows = lambda names: Table(tuple(distilbert_rows(self.text, "text/", _root(names))))  # noqa: E731
        return {"huggingface": Format(r"(^|\.)transformer\.layer\.", rows)}


def _root(names: Any) -> str:
    return "distilbert." if any(name.startswith("distilbert.") for name in names) else ""


class ResNetBert(nnx.Module):
    """`text`, and for each camera a `resnet_<camera>` and a map `map_<camera>`."""

    def __init__(self, config: Any, key: Key[Array, ""]) -> None:
        """Use the config's `create`."""
        self.config = c = config
        sizes: ResNetBertConfig = c.backbone
        E, D = sizes.text.width, sizes.width
        self.text = DistilBert(
            named_key(key, "text"), sizes.text, vocab_size=c.vocab_size, dtype=c.dtype, unroll=c.unroll
        )
        for camera in c.cameras:
            resnet = ResNet(named_key(key, f"resnet_{camera}"), sizes.resnet, language_dim=E, dtype=c.dtype)
            setattr(self, f"resnet_{camera}", resnet)
            of = (sizes.resnet.width, D)
            setattr(self, f"map_{camera}", Linear(named_key(key, f"map_{camera}"), "BD,DE->BE", of, ("embed", "mlp")))

    def condition(self, observation: Observation | Batch) -> Float[Array, "B D"]:
        """Returns what is seen and asked: the mean over the cameras that are there."""
        mask_BS = observation["prompt_mask"]
        there = mask_BS[..., None]
        tokens = jnp.where(there, self.text(observation["prompt"], mask_BS).astype(jnp.float32), 0.0)
        language = tokens.sum(1) / jnp.maximum(there.sum(1), 1)
        total: Any = 0.0
        for camera in self.config.cameras:
            image = to_float(observation["images"][camera])
            seen = getattr(self, f"map_{camera}")(getattr(self, f"resnet_{camera}")(image, language))
            total = total + jnp.where(observation["image_mask"][camera][:, None], seen.astype(jnp.float32), 0.0)
        count = sum(observation["image_mask"][camera].astype(jnp.float32) for camera in self.config.cameras)
        return (total / jnp.maximum(jnp.asarray(count), 1)[:, None]).astype(self.config.dtype)
