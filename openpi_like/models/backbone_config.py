"""What a model needs to know of its backbone's sizes, before there is a module."""

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Array, Key

from openpi_like.models.formats import Format


@runtime_checkable
class StackSizes(Protocol):
    """What others need to know of a language model's layers."""

    @property
    def width(self) -> int: ...
    @property
    def depth(self) -> int: ...
    @property
    def num_heads(self) -> int: ...
    @property
    def num_kv_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...


@runtime_checkable
class BackboneConfig(Protocol):
    """Sizes of a backbone; a frozen dataclass of this package, so that a checkpoint can hold it."""

    @property
    def language(self) -> StackSizes:
        """Sizes of the language model, which action experts read keys and values of."""
        ...

    def problems(self, image_size: tuple[int, int]) -> list[str]:
        """Returns what does not fit images of this many pixels."""
        ...

    def image_tokens(self, image_size: tuple[int, int]) -> int:
        """Returns P, the tokens of one image of this many pixels."""
        ...

    def create(self, config: Any, key: Key[Array, ""]) -> Any:
        """Returns the `Backbone` with fresh weights. config: of the model it is a part of, a `VisionLanguageConfig`."""
        ...

    def formats(self, vocab_size: int) -> Mapping[str, Format]:
        """Returns the published layouts that hold its weights."""
        ...
