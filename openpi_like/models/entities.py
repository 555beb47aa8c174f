"""Tokens of things around the robot: each of its numbers through a small map of its slot's own, as OpenDriveVLA maps
the features of its agents and of its map into a language model (Zhou et al. 2025, arXiv 2503.23463, section 3.2).

Letters: B batch, N things of a slot, F numbers of one, E things of all slots, D width of the language model.
"""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Key

from openpi_like.batch import EntityTokens
from openpi_like.draws import named_key
from openpi_like.models.param import Linear


class EntityProjector(nnx.Module):
    """Two maps with exact GELU between them, from F numbers to a token."""

    def __init__(self, key: Key[Array, ""], size: int, width: int) -> None:
        """size: F. width: D."""
        self.first = Linear(named_key(key, "first"), "BNF,FD->BND", (size, width), ("action", "embed"))
        self.second = Linear(named_key(key, "second"), "BNF,FD->BND", (width, width), (None, "embed"))

    def __call__(self, values_BNF: Float[Array, "B N F"]) -> Float[Array, "B N D"]:
        """Returns a token of each thing."""
        return self.second(jax.nn.gelu(self.first(values_BNF), approximate=False))


class EntityProjectors(nnx.Module):
    """A projector of each slot, by its name."""

    def __init__(self, key: Key[Array, ""], slots: Sequence[EntityTokens], width: int) -> None:
        """width: D."""
        self.names = tuple(slot.name for slot in slots)
        for slot in slots:
            setattr(self, slot.name, EntityProjector(named_key(key, slot.name), slot.size, width))

    @jax.named_scope("entities")
    def __call__(
        self, values: Mapping[str, Float[Array, "B _ _"]], there: Mapping[str, Bool[Array, "B _"]]
    ) -> tuple[Float[Array, "B E D"], Bool[Array, "B E"]]:
        """Returns the tokens of all slots, one slot behind the other, and which of them there are."""
        tokens = [getattr(self, name)(values[name]) for name in self.names]
        return jnp.concatenate(tokens, axis=1), jnp.concatenate([there[name] for name in self.names], axis=1)
