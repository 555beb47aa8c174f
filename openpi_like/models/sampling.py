"""Models as a server holds them: the same numbers, in arrays that sampling reads as they are.

What is cut out of a stack of layers is copied before a matrix product reads it, in every call of the layer; so is what
is changed to another dtype. With a few tokens, reading weights is most of the work.
"""

from typing import Any

import jax
from flax import nnx

from openpi_like.models.language import LanguageModel
from openpi_like.models.quantize import quantized_model
from openpi_like.models.stack import unstacked
from openpi_like.models.vit import VitTower


def for_sampling(model: Any, *, quantize: str | None = None) -> Any:
    """Returns the same model with its layers packed, and the weights of each in arrays of their own.

    quantize: hold the maps of layers in fewer bits too, see `openpi_like.models.quantize.QUANTIZED`.

    Raises:
        ValueError: no such `quantize`.
    """

    def layers_of(stack: LanguageModel | VitTower) -> list[Any]:
        layers = stack.packed().layers
        return unstacked(layers if quantize is None else quantized_model(layers, quantize))

    copy = nnx.merge(*nnx.split(model))
    for _, module in list(nnx.iter_modules(copy)):
        if isinstance(module, LanguageModel | VitTower) and not isinstance(module.layers, nnx.List):
            # Compiled, so that there is no third copy of the weights on the way.
            module.layers = nnx.List(jax.jit(layers_of)(module))
    return copy
