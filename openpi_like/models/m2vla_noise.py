"""M2-VLA as its paper has it: the head predicts the noise in a chunk, at a step of diffusion (arXiv 2604.24182).

Features of the backbone and what the memory recalls are computed once per observation, and serve every step. Which step
it is, is a second token beside the state. Of this head no code is published; sizes and schedule are ours.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from openpi_like.batch import Array as Leaf
from openpi_like.batch import Batch, Observation
from openpi_like.draws import RowKeys, named_key
from openpi_like.models.ddim import Ddim, step_embedding
from openpi_like.models.diffusion import DiffusionPolicy
from openpi_like.models.formats import Format
from openpi_like.models.layer_mixture import LayerFeatures
from openpi_like.models.m2vla import LayerPolicy, M2VlaConfig
from openpi_like.models.param import Linear, normal, weight
from openpi_like.models.policy import PolicyConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class M2VlaNoiseConfig(M2VlaConfig):
    """See `M2VlaConfig`, whose `perturbation` is not used. diffusion: the schedule."""

    diffusion: Ddim = Ddim()

    def _problems(self) -> list[str]:
        return super()._problems() + self.diffusion.problems()

    def formats(self) -> dict[str, Format]:
        """Returns the published layouts of its backbone: none holds such a head."""
        return dict(PolicyConfig.formats(self))

    def create(self, key: Key[Array, ""]) -> "M2VlaNoise":
        """Returns a policy with fresh weights; every weight's draw depends on `key` and its own name only."""
        return M2VlaNoise(self, key)


class Given(NamedTuple):
    """What the head is told. state: (B, 1, D). recalled: (B, R, A, D), or None."""

    features: LayerFeatures
    state: Leaf
    recalled: Any


class M2VlaNoise(LayerPolicy, DiffusionPolicy):
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

    def given(self, observation: Observation, episode_B2: Int[Array, "B 2"] | None = None) -> Given:
        """Returns what the head is told of an observation. episode: see `recalled`."""
        features, keys = self.features(observation)
        return Given(features, self.state_tokens(observation), self.recalled(keys, episode_B2))

    def noise(self, given: Given, x_BAJ: Float[Array, "B A J"], step_B: Int[Array, "B"]) -> Float[Array, "B A J"]:
        """As `DiffusionPolicy.noise`."""
        with jax.named_scope("action_head"):
            start = self.action_in(x_BAJ) + self.action_position[...]
            hidden = jax.nn.silu(self.step_in(step_embedding(step_B, given.state.shape[-1])))
            tokens = jnp.concatenate([given.state, self.step_out(hidden)[:, None]], axis=1)
            return self.head(start, given.features, tokens, given.recalled)

    def loss(
        self, key: Key[Array, ""], batch: Batch, *, counts: dict[str, Float[Array, ""]] | None = None
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, "B"]]]:
        """Returns the mean squared error of the noise at random steps: of a sample's valid entries, then over samples.

        Metrics: "loss" and "valid". A sample's draws depend on `key` and its position alone. counts: see `loss_counts`.
        """
        self.config.check_inputs(batch, actions=True)
        given = self.given(self.config.observation(batch), self.episodes(batch))
        return self.noise_loss(key, given, batch, samples=None if counts is None else counts["actions"])

    def validation_losses(self, key: Key[Array, ""], batch: Batch) -> dict[str, Float[Array, ""]]:
        """Returns "loss", at steps spread over the schedule, noise by `key` and position."""
        self.config.check_inputs(batch, actions=True)
        return {"loss": self.validation_noise_loss(key, self.given(self.config.observation(batch)), batch)}

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
        """Returns normalised actions, see `DiffusionPolicy.denoised`.

        Raises:
            ValueError: the observation does not fit the config; lists everything that does not.
        """
        self.config.check_inputs(observation, actions=False)
        return self.denoised(key, self.given(observation), observation["state"].shape[0], action_mask)
