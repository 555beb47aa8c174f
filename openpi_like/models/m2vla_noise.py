"""M2-VLA as its paper has it: the head predicts the noise in a chunk, at a step of diffusion (arXiv 2604.24182).

Features of the backbone and what the memory recalls are computed once per observation, and serve every step. Which step
it is, is a second token beside the state. Of this head no code is published; sizes and schedule are ours.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from openpi_like.batch import Batch, Observation
from openpi_like.draws import RowKeys, named_key, row_keys, sample_keys
from openpi_like.models.backbone import masked_means
from openpi_like.models.ddim import Ddim, step_embedding
from openpi_like.models.flow import draw_noise
from openpi_like.models.layer_mixture import LayerFeatures
from openpi_like.models.m2vla import LayerPolicy, M2VlaConfig
from openpi_like.models.param import Linear, normal, weight

_VALIDATED = 10  # steps of the schedule that validation looks at


@dataclasses.dataclass(frozen=True, kw_only=True)
class M2VlaNoiseConfig(M2VlaConfig):
    """See `M2VlaConfig`, whose `perturbation` is not used. diffusion: the schedule."""

    diffusion: Ddim = Ddim()

    def _problems(self) -> list[str]:
        return super()._problems() + self.diffusion.problems()

    def create(self, key: Key[Array, ""]) -> "M2VlaNoise":
        """Returns a policy with fresh weights; every weight's draw depends on `key` and its own name only."""
        return M2VlaNoise(self, key)


class M2VlaNoise(LayerPolicy):
    """The policy: `loss` to train it, `sample_actions` to use it."""

    config: M2VlaNoiseConfig

    def __init__(self, config: M2VlaNoiseConfig, key: Key[Array, ""]) -> None:
        """Use `M2VlaNoiseConfig.create`."""
        super().__init__(config, key)
        A, J, D = config.action_horizon, config.action_dim, config.backbone.language.width
        self.action_in = Linear(named_key(key, "action_in"), "BAJ,JD->BAD", (J, D), ("action", "embed"))
        self.action_position = weight(key, "action_position", (A, D), ("position", "embed"), normal(0.02))
        self.step_in = Linear(named_key(key, "step_in"), "BD,DE->BE", (D, D), (None, "embed"))
        self.step_out = Linear(named_key(key, "step_out"), "BD,DE->BE", (D, D), (None, "embed"))

    def noise(
        self,
        features: LayerFeatures,
        state_B1D: Float[Array, "B 1 D"],
        recalled_BRAD: Float[Array, "B R A D"] | None,
        x_BAJ: Float[Array, "B A J"],
        step_B: Int[Array, "B"],
    ) -> Float[Array, "B A J"]:
        """Returns the noise that is in x at a step, as the head predicts it."""
        with jax.named_scope("action_head"):
            start = self.action_in(x_BAJ) + self.action_position[...]
            hidden = jax.nn.silu(self.step_in(step_embedding(step_B, state_B1D.shape[-1])))
            tokens = jnp.concatenate([state_B1D, self.step_out(hidden)[:, None]], axis=1)
            return self.head(start, features, tokens, recalled_BRAD)

    def _given(
        self, observation: Observation, episode_B2: Int[Array, "B 2"] | None = None
    ) -> tuple[LayerFeatures, Any, Any]:
        """Returns what does not change with the step. episode: see `recalled`."""
        features, keys = self.features(observation)
        return features, self.state_tokens(observation), self.recalled(keys, episode_B2)

    # ---- Training ----------------------------------------------------------------------------------------------------

    def _errors(
        self,
        batch: Batch,
        given: tuple[LayerFeatures, Any, Any],
        noise_BAJ: Float[Array, "B A J"],
        step_B: Int[Array, "B"],
    ) -> Float[Array, "B A J"]:
        actions = jnp.where(batch["action_mask"], batch["actions"], 0.0)
        x = self.config.diffusion.noised(actions, noise_BAJ, step_B)
        return jnp.square(self.noise(*given, x, step_B) - noise_BAJ)

    def loss(
        self, key: Key[Array, ""], batch: Batch, *, counts: dict[str, Float[Array, ""]] | None = None
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, "B"]]]:
        """Returns the mean squared error of the noise at random steps: of a sample's valid entries, then over samples.

        Metrics: "loss" and "valid". A sample's draws depend on `key` and its position alone. counts: see `loss_counts`.
        """
        self.config.check_inputs(batch, actions=True)
        keys = sample_keys(key, batch["position"])
        noise, step = draw_noise(keys, batch["actions"].shape[1:]), self.config.diffusion.draw_steps(keys)
        given = self._given(self.config.observation(batch), self.episodes(batch))
        errors = self._errors(batch, given, noise, step)
        return masked_means(errors, batch["action_mask"], None if counts is None else counts["actions"])

    def validation_losses(self, key: Key[Array, ""], batch: Batch) -> dict[str, Float[Array, ""]]:
        """Returns "loss", at steps spread over the schedule, noise by `key` and position."""
        self.config.check_inputs(batch, actions=True)
        noise = draw_noise(sample_keys(key, batch["position"]), batch["actions"].shape[1:])
        n = self.config.diffusion.train_steps
        steps = jnp.linspace(0, n - 1, min(_VALIDATED, n)).astype(jnp.int32)
        given = self._given(self.config.observation(batch))
        at = lambda step: self._errors(batch, given, noise, jnp.broadcast_to(step, len(noise)))  # noqa: E731
        return {"loss": masked_means(jax.lax.map(at, steps).mean(0), batch["action_mask"])[0]}

    # ---- Sampling ----------------------------------------------------------------------------------------------------

    def outputs(self, key: Key[Array, ""], batch: Batch) -> Float[Array, "B A J"]:
        """Returns actions sampled from noise drawn with `key`."""
        return self.sample_actions(key, self.config.observation(batch))

    def sample_actions(
        self,
        key: RowKeys,
        observation: Observation,
        *,
        action_mask: Bool[Array, "B A J"] | None = None,
    ) -> Float[Array, "B A J"]:
        """Returns normalised actions, from noise that `key` draws, row i from its own of `row_keys(key, B)`.

        action_mask: which entries of the chunk this robot has (None: all); the others follow the path of padding, whose
        noise is all there is, and are 0.

        Raises:
            ValueError: the observation does not fit the config; lists everything that does not.
        """
        c = self.config
        c.check_inputs(observation, actions=False)
        shape = (c.action_horizon, c.action_dim)
        start = draw_noise(row_keys(key, observation["state"].shape[0]), shape)
        given = self._given(observation)
        there = jnp.ones_like(start, bool) if action_mask is None else action_mask.any(1, keepdims=True)

        def predict(x: jax.Array, step: jax.Array) -> jax.Array:
            padding = x / jnp.sqrt(1 - jnp.asarray(c.diffusion.kept())[step])[:, None, None]
            return jnp.where(there, self.noise(*given, x, step), padding)

        actions = c.diffusion.sample(predict, start)
        return actions if action_mask is None else jnp.where(action_mask, actions, 0.0)
