"""Answers whose ids are made on the device: how well they are predicted, behind a prompt and what stands with it.

Letters: B batch, S tokens of cameras and text, T tokens to be written, D width.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from openpi_like.models.backbone import Backbone
from openpi_like.models.sequences import Embedded, answers


def written_errors(
    backbone: Backbone, inputs: Any, ids_BT: Int[Array, "B T"], real_BT: Bool[Array, "B T"]
) -> tuple[Float[Array, "B T"], Float[Array, "B S D"]]:
    """Returns the cross-entropy of every token to be written, and the tokens before them after the final norm.

    inputs: an observation, or a batch whose text has an answer too, which then stands before these tokens.
    real: which tokens there are; the others are seen by nobody, and what is returned for them means nothing.
    """
    prefix = backbone.embed_prefix(inputs)
    said = backbone.vlm.embed(ids_BT[:, :-1])
    tokens = jnp.concatenate([prefix.tokens, said], axis=1)
    valid = jnp.concatenate([prefix.valid, real_BT[:, :-1]], axis=1)
    S, T = prefix.valid.shape[1], ids_BT.shape[1]
    deep = tuple(jnp.pad(x, ((0, 0), (0, T - 1), (0, 0))) for x in prefix.deep)
    starts = jnp.pad(backbone.text_slots(answers(inputs), S), ((0, 0), (0, T - 1)), constant_values=True)
    rope = backbone.vlm.rope(backbone.positions(valid))
    with jax.named_scope("vlm"):
        out, _ = backbone.run(Embedded(tokens, valid, deep), backbone.mask(valid, starts), rope)
    # Each token is read off the last real one before it.
    at = jnp.where(valid, jnp.arange(S + T - 1), -1)
    before = jax.lax.cummax(at, axis=1)[:, S - 1 :]
    x_BTD = jnp.take_along_axis(out, jnp.maximum(before, 0)[..., None], axis=1)
    return backbone.vlm.token_losses(x_BTD, ids_BT), out[:, :S]
