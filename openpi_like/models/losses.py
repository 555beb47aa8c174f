"""Losses that are sums of parts, each a mean over the samples that have it.

Letters: B batch.
"""

from collections.abc import Mapping

import jax.numpy as jnp
from jaxtyping import Array, Float

Metrics = dict[str, Float[Array, "B"]]
Loss = tuple[Float[Array, ""], Metrics]
"""The scalar, and by sample "loss" and "valid" (1.0, or 0.0 for a sample that counts in none)."""


def weighted_sum(parts: Mapping[str, tuple[float, Loss]]) -> Loss:
    """Returns the weighted sum of parts. parts: name -> (weight, loss), at least one.

    Metrics: "loss" is the sum and "valid" whether a sample has any part; and each part, with its own "..._valid".
    """
    every = [(weight, *loss) for weight, loss in parts.values()]
    metrics = {
        "loss": jnp.stack([weight * of["loss"] for weight, _, of in every]).sum(0),
        "valid": jnp.stack([of["valid"] for _, _, of in every]).max(0),
    }
    for name, (_, (_, of)) in parts.items():
        metrics |= {name: of["loss"], f"{name}_valid": of["valid"]}
    return jnp.stack([weight * scalar for weight, scalar, _ in every]).sum(), metrics
