"""A sequence before a language model: tokens of cameras and text, and what of the text sees what is before it alone.

Letters: B batch, C cameras, P tokens of one image, S tokens, D width, T tokens of a thought.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool

from openpi_like.batch import Array as Leaf
from openpi_like.batch import Observation


class Embedded(NamedTuple):
    """A sequence before the language model. tokens: (B, S, D). valid: (B, S).

    deep: what is added to the tokens after the first layers, each (B, S, D); most backbones have none.
    """

    tokens: Leaf
    valid: Leaf
    deep: tuple[Leaf, ...] = ()


class Seen(NamedTuple):
    """What a backbone's image towers make of all cameras, in config order. tokens: (B, C, P, D). there: (B, C).

    deep: as in `Embedded`, each (B, C, P, D).
    """

    tokens: Leaf
    there: Leaf
    deep: tuple[Leaf, ...] = ()


def given_beside(sequence: Embedded) -> dict[str, Any]:
    """Returns what a language model is given besides tokens, masks and rotations."""
    return {"deepstack": sequence.deep} if sequence.deep else {}


def answers(observation: Any) -> Bool[Array, "B S"]:
    """Returns which tokens of the text see those before them only; none where nothing says so."""
    return observation.get("prompt_causal", jnp.zeros(observation["prompt_mask"].shape, bool))


def with_thought(observation: Observation) -> Any:
    """Returns an observation whose prompt goes on with its "thought", if any; such text sees what is before it."""
    if "thought" not in observation:
        return observation
    ids, mask = observation["thought"], observation["thought_mask"]
    nothing = jnp.zeros_like(observation["prompt_mask"])
    return {
        **observation,
        "prompt": jnp.concatenate([observation["prompt"], ids], axis=1),
        "prompt_mask": jnp.concatenate([observation["prompt_mask"], mask], axis=1),
        "prompt_causal": jnp.concatenate([nothing, mask], axis=1),
    }
