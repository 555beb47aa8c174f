"""What policies share that predict the noise in a chunk: loss, validation, sampling; the schedule is `ddim.Ddim`.

Letters: B batch, A action horizon, J action dims.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from openpi_like.batch import Batch
from openpi_like.draws import RowKeys, row_keys, sample_keys
from openpi_like.models.backbone import masked_means
from openpi_like.models.flow import draw_noise
from openpi_like.models.policy import Model

_VALIDATED = 10  # steps of the schedule that validation looks at


class DiffusionPolicy(Model):
    """A policy whose network predicts noise. Its config has `diffusion`, a `Ddim`.

    given: what the network is told of a batch, which does not change with the step of diffusion.
    """

    config: Any

    def noise(self, given: Any, x_BAJ: Float[Array, "B A J"], step_B: Int[Array, "B"]) -> Float[Array, "B A J"]:
        """Returns the noise that is in x at a step, as the network predicts it."""
        raise NotImplementedError

    def loss_counts(self, batch: Batch) -> dict[str, Float[Array, ""]]:
        """Returns what `noise_loss` divides by. A part of a batch, with the counts of all of it, has its part of the
        loss."""
        return {"actions": batch["action_mask"].any((1, 2)).sum().astype(jnp.float32)}

    def _errors(self, given: Any, batch: Batch, noise_BAJ: jax.Array, step_B: jax.Array) -> jax.Array:
        actions = jnp.where(batch["action_mask"], batch["actions"], 0.0)
        x = self.config.diffusion.noised(actions, noise_BAJ, step_B)
        return jnp.square(self.noise(given, x, step_B) - noise_BAJ)

    def noise_loss(
        self, key: Key[Array, ""], given: Any, batch: Batch, *, samples: Float[Array, ""] | None = None
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, "B"]]]:
        """Returns the mean squared error of the noise at random steps, as `masked_means`.

        A sample's draws depend on `key` and its position alone. Entries that are masked are not there: the released
        code of DexVLA counts them in what it divides by.
        """
        keys = sample_keys(key, batch["position"])
        noise, step = draw_noise(keys, batch["actions"].shape[1:]), self.config.diffusion.draw_steps(keys)
        return masked_means(self._errors(given, batch, noise, step), batch["action_mask"], samples)

    def validation_noise_loss(self, key: Key[Array, ""], given: Any, batch: Batch) -> Float[Array, ""]:
        """Returns the same at steps spread over the schedule."""
        noise = draw_noise(sample_keys(key, batch["position"]), batch["actions"].shape[1:])
        n = self.config.diffusion.train_steps
        steps = jnp.linspace(0, n - 1, min(_VALIDATED, n)).astype(jnp.int32)
        at = lambda step: self._errors(given, batch, noise, jnp.broadcast_to(step, len(noise)))  # noqa: E731
        return masked_means(jax.lax.map(at, steps).mean(0), batch["action_mask"])[0]

    def denoised(
        self, key: RowKeys, given: Any, rows: int, action_mask: Bool[Array, "B A J"] | None
    ) -> Float[Array, "B A J"]:
        """Returns normalised actions, from noise that `key` draws, row i from its own of `row_keys(key, rows)`.

        action_mask: which entries of the chunk this robot has (None: all); the others follow the path of padding, whose
        noise is all there is, and are 0.
        """
        c = self.config
        start = draw_noise(row_keys(key, rows), (c.action_horizon, c.action_dim))
        there = jnp.ones_like(start, bool) if action_mask is None else action_mask.any(1, keepdims=True)

        def predict(x: jax.Array, step: jax.Array) -> jax.Array:
            padding = x / jnp.sqrt(1 - jnp.asarray(c.diffusion.kept())[step])[:, None, None]
            return jnp.where(there, self.noise(given, x, step), padding)

        actions = c.diffusion.sample(predict, start)
        return actions if action_mask is None else jnp.where(action_mask, actions, 0.0)
