"""The weights of a policy with its overlay merged, all at once; the library merges them one at a time as it reads."""

from typing import Any

from openpi_like.models.lora import SUFFIX, is_lora, overlays
from openpi_like.models.weights import flatten, unflatten
from openpi_like.train.state import ModelDef


def merged(model: ModelDef, weights: Any) -> Any:
    """Returns nested weights of the policy without overlays, of those with them."""
    flat = flatten(weights)
    kept = {name: value for name, value in flat.items() if not is_lora(name)}
    for name, overlay in overlays(model.abstract).items():
        kept[name] = overlay.merge(kept[name], *(flat[f"{name}{SUFFIX}/{end}"] for end in "ab"))
    return unflatten(kept)
