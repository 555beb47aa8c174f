"""Text that policies with action tokens write before they act: a subtask (pi0.5, Physical Intelligence 2025, arXiv
2504.16054, section 4.1), as the answers that they were trained on have it.

It ends where the actions would begin: at the text that announces them, at an action token, or at the end of the answer.

Letters: B batch, T tokens of a thought, E ids that end one.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from openpi_like.batch import Observation
from openpi_like.models.policy import Model, PolicyConfig


def thought_problems(config: PolicyConfig) -> list[str]:
    """Returns why a policy with action tokens has no room for its thoughts."""
    tokens, T = config.action_tokens, config.thought_len
    if not T or (tokens is not None and tokens.max_len > T):
        return []
    if tokens is None:
        return [f"thought_len={T} without action_tokens, expected 0: nothing teaches it to write"]
    return [f"thought_len={T}, expected less than action_tokens.max_len={tokens.max_len}, which actions share"]


def thought_shapes(config: PolicyConfig) -> dict[str, Any]:
    """Returns the shape of "ends", where the policy thinks, see `thought_options`."""
    return {"ends": jax.ShapeDtypeStruct((2,), "int32")} if config.thought_len else {}


def thought_options(config: PolicyConfig, text: Any) -> dict[str, Any]:
    """Returns "ends", the ids that end a thought, action tokens left aside. text: `TextTokenizer`."""
    if not config.thought_len:
        return {}
    eos, begin = text.tokenizer.required("eos"), text.action_indicator()
    return {"ends": np.array([eos, begin[0] if begin else eos], np.int32)}


class TokenThoughts(Model):
    """A policy with action tokens that can write text before them."""

    config: Any

    def think(self, observation: Observation, **options: Any) -> tuple[Int[Array, "B T"], Bool[Array, "B T"]]:
        """As `Model.think`; what ends a thought is no part of it."""
        tokens, skip = self.config.action_tokens, int(getattr(self.config, "openpi_positions", False))
        first = tokens.first(self.config.vocab_size)

        def ends(ids: jax.Array) -> jax.Array:
            acts = (ids <= first) & (ids > first - tokens.count)
            text = options.get("ends")  # without these, at actions alone
            return acts if text is None else acts | jnp.isin(ids, text)

        key = jax.random.key(0)  # nothing is drawn
        ids, mask = self.backbone.generate(key, observation, max_new=self.config.thought_len, ends=ends, skip=skip)
        mask &= ~ends(ids)
        return jnp.where(mask, ids, 0), mask

    def thinking(self, observation: Observation, ends: Int[Array, "E"] | None) -> Any:
        """Returns an observation with a thought, where the policy thinks and it has none."""
        if not self.config.thought_len or "thought" in observation:
            return observation
        ids, mask = self.think(observation, ends=ends)
        return {**observation, "thought": ids, "thought_mask": mask}
