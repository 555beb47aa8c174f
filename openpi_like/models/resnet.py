"""ResNet with bottlenecks (He et al. 2015) whose blocks a language vector changes (FiLM, Perez et al. 2018).

As an image encoder that begins from nothing, in small batches: groups are normalised, not batches (Wu and He 2018). The
strides are those of torchvision, in the 3 x 3 convolution.

Letters: B batch, C channels, D width of the vector that comes out, E width of a language vector.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Key

from openpi_like.draws import named_key
from openpi_like.models.param import Linear, normal, ones, use, weight, zeros
from openpi_like.models.vision import IMAGENET, normalized

EXPANSION = 4
"""Channels that come out of a bottleneck, beside those inside."""


@dataclasses.dataclass(frozen=True)
class ResNetConfig:
    """blocks: of each stage; every stage has twice the channels and half the side of the one before it.

    stem: channels before the first stage. groups: that are normalised together.
    """

    blocks: tuple[int, ...] = (3, 4, 6, 3)
    stem: int = 64
    groups: int = 32

    def __post_init__(self) -> None:
        problems = []
        if not self.blocks or min(self.blocks) < 1:
            problems.append(f"blocks={self.blocks}, expected at least 1 in each stage")
        if self.groups < 1 or self.stem < 1 or self.stem % self.groups:
            problems.append(f"stem={self.stem}, expected a multiple of groups={self.groups}")
        if problems:
            raise ValueError("ResNetConfig: " + "; ".join(problems))

    @classmethod
    def resnet50(cls) -> "ResNetConfig":
        """Returns ResNet-50."""
        return cls()

    @classmethod
    def tiny(cls) -> "ResNetConfig":
        """Returns sizes that train on two CPU cores."""
        return cls(blocks=(1, 1), stem=16, groups=4)

    @property
    def width(self) -> int:
        """D."""
        return EXPANSION * self.stem * 2 ** (len(self.blocks) - 1)

    def problems(self, image_size: tuple[int, int]) -> list[str]:
        """Returns what does not fit images of this many pixels."""
        least = 4 * 2 ** (len(self.blocks) - 1)
        return [f"image_size={image_size}, expected at least {least} pixels a side"] * (min(image_size) < least)


class GroupNorm(nnx.Module):
    """Normalises groups of channels over all places; statistics in float32, epsilon 1e-5."""

    def __init__(self, key: Key[Array, ""], channels: int, groups: int) -> None:
        self.groups = groups
        self.scale = weight(key, "scale", (channels,), ("norm",), ones)
        self.bias = weight(key, "bias", (channels,), ("norm",), zeros)

    def __call__(self, x_BHWC: Float[Array, "B h w C"]) -> Float[Array, "B h w C"]:
        """Applies it."""
        B, h, w, C = x_BHWC.shape
        x = x_BHWC.astype(jnp.float32).reshape(B, h * w, self.groups, C // self.groups)
        centred = x - x.mean((1, 3), keepdims=True)
        x = (centred * jax.lax.rsqrt(jnp.square(centred).mean((1, 3), keepdims=True) + 1e-5)).reshape(B, h, w, C)
        return (x * use(self.scale, jnp.float32) + use(self.bias, jnp.float32)).astype(x_BHWC.dtype)


class Convolution(nnx.Module):
    """A convolution without bias, and the norm behind it. Padded as in torch: by half of the kernel on each side."""

    def __init__(
        self, key: Key[Array, ""], side: int, channels: tuple[int, int], groups: int, *, stride: int = 1
    ) -> None:
        self.stride, self.pad = stride, side // 2
        shape, axes = (side, side, *channels), (None, None, "embed", "mlp")
        he = normal(float(np.sqrt(2 / (side * side * channels[1]))))  # by fan-out, as torchvision
        self.kernel = weight(key, "kernel", shape, axes, he)
        self.norm = GroupNorm(named_key(key, "norm"), channels[1], groups)

    def __call__(self, x_BHWC: Float[Array, "B h w C"]) -> Float[Array, "B h2 w2 C2"]:
        """Applies both."""
        pad = [(self.pad, self.pad)] * 2
        layout = ("NHWC", "HWIO", "NHWC")
        kernel = use(self.kernel, x_BHWC.dtype)
        strides = (self.stride, self.stride)
        return self.norm(jax.lax.conv_general_dilated(x_BHWC, kernel, strides, pad, dimension_numbers=layout))


class Bottleneck(nnx.Module):
    """Three convolutions beside a shortcut; a language vector scales and shifts what they add. Fresh, it does not."""

    def __init__(
        self, key: Key[Array, ""], inputs: int, inside: int, groups: int, *, stride: int, language_dim: int
    ) -> None:
        out = EXPANSION * inside
        self.reduce = Convolution(named_key(key, "reduce"), 1, (inputs, inside), groups)
        self.middle = Convolution(named_key(key, "middle"), 3, (inside, inside), groups, stride=stride)
        self.expand = Convolution(named_key(key, "expand"), 1, (inside, out), groups)
        same = stride == 1 and inputs == out
        self.shortcut: Any = (
            None if same else Convolution(named_key(key, "shortcut"), 1, (inputs, out), groups, stride=stride)
        )
        film = lambda name: Linear(  # noqa: E731
            named_key(key, name), "BE,EC->BC", (language_dim, out), ("embed", "norm"), zero=True
        )
        self.scale, self.shift = film("scale"), film("shift")

    def __call__(self, x_BHWC: Float[Array, "B h w C"], language_BE: Float[Array, "B E"]) -> Float[Array, "B h2 w2 C2"]:
        """Returns what is behind the block."""
        y = jax.nn.relu(self.middle(jax.nn.relu(self.reduce(x_BHWC))))
        y = self.expand(y)
        language = language_BE.astype(y.dtype)
        y = y * (1 + self.scale(language)[:, None, None]) + self.shift(language)[:, None, None]
        return jax.nn.relu(y + (x_BHWC if self.shortcut is None else self.shortcut(x_BHWC)))


class ResNet(nnx.Module):
    """Images and a language vector to one vector: the mean of the last stage over all places."""

    def __init__(self, key: Key[Array, ""], config: ResNetConfig, *, language_dim: int, dtype: str) -> None:
        self.config, self.dtype = config, dtype
        self.stem = Convolution(named_key(key, "stem"), 7, (3, config.stem), config.groups, stride=2)
        channels = config.stem
        for stage, count in enumerate(config.blocks):
            inside = config.stem * 2**stage
            for i in range(count):
                name, stride = f"stage_{stage}_{i}", 2 if stage and not i else 1
                block = Bottleneck(
                    named_key(key, name), channels, inside, config.groups, stride=stride, language_dim=language_dim
                )
                setattr(self, name, block)
                channels = EXPANSION * inside

    def __call__(
        self, images_BHWC: Float[Array, "B height width 3"], language_BE: Float[Array, "B E"]
    ) -> Float[Array, "B D"]:
        """Returns the vectors. images: float32 in [-1, 1], RGB."""
        with jax.named_scope("resnet"):
            x = jax.nn.relu(self.stem(normalized(images_BHWC, IMAGENET).astype(self.dtype)))
            least = np.array(-np.inf, x.dtype)  # a constant also while it is traced: else it has no gradient
            x = jax.lax.reduce_window(
                x, least, jax.lax.max, (1, 3, 3, 1), (1, 2, 2, 1), [(0, 0), (1, 1), (1, 1), (0, 0)]
            )
            for stage, count in enumerate(self.config.blocks):
                for i in range(count):
                    x = getattr(self, f"stage_{stage}_{i}")(x, language_BE)
            return x.mean((1, 2))
