"""What a vision encoder is to a model that has one: images in, tokens out, whatever is inside.

Letters: B batch, P tokens (patches, or merged patches), D width of the tokens, E width of a language vector.
"""

import math
from typing import Any, Protocol, runtime_checkable

import jax.numpy as jnp
from jaxtyping import Array, Float, Key

# Mean and standard deviation per colour, of images in [0, 1].
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))

# Which tokens are returned: those of the last block, or those of the block before it, without the final norm.
SELECT = ("last", "second_to_last")


@runtime_checkable
class VisionEncoderConfig(Protocol):
    """Sizes of an encoder, for any size of images.

    patch_size: in pixels. width: D, of the tokens that come out.
    """

    @property
    def patch_size(self) -> int: ...

    @property
    def width(self) -> int: ...

    def tokens(self, image_size: tuple[int, int]) -> int:
        """Returns P, the tokens of an image of this (height, width) in pixels."""
        ...

    def problems(self, image_size: tuple[int, int]) -> list[str]:
        """Returns what is wrong with this size of images, a line each; empty where nothing is."""
        ...

    def create(
        self, key: Key[Array, ""], *, image_size: tuple[int, int], dtype: str, unroll: bool, remat: str | None
    ) -> Any:
        """Returns a `VisionEncoder` with fresh weights. dtype, unroll, remat: as in `VisionLanguageConfig`."""
        ...


@runtime_checkable
class VisionEncoder(Protocol):
    """Images of one size to tokens. Each encoder normalises images itself, as its published weights expect it."""

    @property
    def config(self) -> VisionEncoderConfig: ...

    def __call__(self, images_BHWC: Float[Array, "B height width 3"]) -> Float[Array, "B P D"]:
        """Returns tokens, row by row. images: float32 in [-1, 1], RGB."""
        ...


def normalized(
    images_BHWC: Float[Array, "B height width 3"], mean_std: tuple[tuple[float, ...], tuple[float, ...]]
) -> Float[Array, "B height width 3"]:
    """Returns images in [-1, 1] as (images in [0, 1] - mean) / std per colour."""
    mean, std = (jnp.asarray(values, images_BHWC.dtype) for values in mean_std)
    return images_BHWC / (2 * std) + (0.5 - mean) / std


class PatchTower:
    """What configs of plain transformers over patches share; they have the fields that are named here."""

    width: int
    depth: int
    num_heads: int
    patch_size: int
    select: str

    def tower_problems(self) -> list[str]:
        """Returns what is wrong with the sizes."""
        problems = select_problems(self.select)
        if self.width % self.num_heads:
            problems.append(f"vision width {self.width}: expected a multiple of num_heads={self.num_heads}")
        return problems

    @property
    def layers(self) -> int:
        """L, the layers that are computed."""
        return self.depth - (self.select == "second_to_last")

    def tokens(self, image_size: tuple[int, int]) -> int:
        """Returns P, see `VisionEncoderConfig`."""
        return math.prod(side // self.patch_size for side in image_size)

    def problems(self, image_size: tuple[int, int]) -> list[str]:
        """Returns what is wrong with this size of images, see `VisionEncoderConfig`."""
        return size_problems(image_size, self.patch_size, "patch_size")


def size_problems(image_size: tuple[int, int], unit: int, what: str) -> list[str]:
    """Returns a line if a side of the images is no positive multiple of `unit` pixels; what: the unit, in words."""
    if all(side > 0 and side % unit == 0 for side in image_size):
        return []
    return [f"image_size={image_size}, expected multiples of {what}={unit}"]


def select_problems(select: str) -> list[str]:
    """Returns a line if it is not one of `SELECT`."""
    return [] if select in SELECT else [f"select={select!r}, expected one of {SELECT}"]
