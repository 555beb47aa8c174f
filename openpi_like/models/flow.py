"""What policies share that are trained by flow matching: draws, loss, Euler steps (Lipman et al. 2023).

Flow time is t = 1 at noise and t = 0 at data, as in the published weights (the papers count the other way):
x_t = t * noise + (1 - t) * actions, velocity = noise - actions, sampling goes from t = 1 down to t = 0.

A policy that is asked again while its last chunk is still being executed can be told what is left of that
(`openpi_like.models.chunking`): the new chunk goes on where the old one is when it arrives.

Letters: B batch, S prefix tokens, A action horizon, J action dims, T suffix tokens, R draws per sample.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Key

from openpi_like.batch import Array as Leaf
from openpi_like.batch import Batch, Observation
from openpi_like.draws import RowKeys, named_key, row_keys, sample_keys
from openpi_like.models.backbone import masked_means
from openpi_like.models.chunking import Previous, draw_delay, guided
from openpi_like.models.policy import Model, PolicyConfig

# Flow times of validation.
VALIDATION_TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)

# Of a sample, or of each of its actions.
FlowTime = Float[Array, "B"] | Float[Array, "B A"]
# From x_t and flow time to velocity.
Velocity = Callable[[jax.Array, jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlowConfig(PolicyConfig):
    """Options of a policy that samples by flow matching; see `PolicyConfig` for those that all policies have.

    sample_steps: Euler steps when sampling.
    flow_draws: pairs of noise and flow time drawn per sample in the loss. The prefix is computed once for all of them,
        so a few more draws make the gradient less noisy at less than the cost of as many more samples.
    train_on_padding: count padded entries of actions in the loss, as openpi's released weights were trained.
    max_delay: of training-time real-time chunking (Black et al. 2025, arXiv 2512.05964): the first d actions of a
        chunk, d drawn from 0 .. max_delay for every sample, are given as they are, at flow time 0, and only the others
        are learned. The policy can then go on from d actions that are already committed; 0 trains on whole chunks.
    """

    sample_steps: int = 10
    train_on_padding: bool = False
    flow_draws: int = 1
    max_delay: int = 0

    @property
    def takes_previous(self) -> bool:
        """Whether `sample_actions` takes what is left of the chunk before: it does."""
        return True

    def _problems(self) -> list[str]:
        problems = super()._problems() + [
            f"{name}={getattr(self, name)}, expected at least 1"
            for name in ("sample_steps", "flow_draws")
            if getattr(self, name) < 1
        ]
        if not 0 <= self.max_delay < self.action_horizon:
            problems.append(f"max_delay={self.max_delay}, expected 0 to action_horizon - 1 = {self.action_horizon - 1}")
        return problems


# ---- Flow time -------------------------------------------------------------------------------------------------------


def time_embedding(
    time: Float[Array, "*rows"], dim: int, *, min_period: float = 4e-3, max_period: float = 4.0
) -> Float[Array, "*rows dim"]:
    """Returns sines, then cosines, of flow time at dim / 2 periods spaced geometrically, both ends included.

    The phase reaches 1571 rad, where float32 resolves 1e-4: it stays float32, with openpi's order of operations.
    """
    fraction = jnp.linspace(0.0, 1.0, dim // 2)
    period = min_period * (max_period / min_period) ** fraction
    phase = time[..., None] * (1.0 / period * 2 * jnp.pi)
    return jnp.concatenate([jnp.sin(phase), jnp.cos(phase)], axis=-1)


def exact_time_embedding(
    time: Float[Array, "*rows"], dim: int, *, min_period: float = 4e-3, max_period: float = 4.0
) -> Float[Array, "*rows dim"]:
    """Returns `time_embedding` to 1e-6, as LeRobot gets it from float64, for flow times in [0, 1].

    Whole turns are left out before the sine: the product that has them is of so few bits that it is exact.
    """
    turns = 1.0 / (min_period * (max_period / min_period) ** np.linspace(0.0, 1.0, dim // 2))
    coarse = np.round(turns * 8) / 8  # 11 bits
    coarse_time = jnp.round(time * 4096)[..., None] / 4096  # 13 bits
    exact = coarse_time * np.float32(coarse)
    rest = coarse_time * np.float32(turns - coarse) + (time[..., None] - coarse_time) * np.float32(turns)
    phase = 2 * jnp.pi * ((exact - jnp.floor(exact)) + rest)
    return jnp.concatenate([jnp.sin(phase), jnp.cos(phase)], axis=-1)


def summed_times(steps: int) -> Float32[np.ndarray, "steps"]:
    """Returns the flow times of Euler steps as openpi gets them, by sums in float32."""
    times = np.ones(steps, np.float32)
    for i in range(1, steps):
        times[i] = times[i - 1] + np.float32(-1.0 / steps)
    return times


# ---- Draws -----------------------------------------------------------------------------------------------------------


def draw_noise(keys_B: Key[Array, "B"], shape: tuple[int, ...]) -> Float[Array, "B ..."]:
    """Returns normal noise (B, *shape), each sample's from its own key."""
    return jax.vmap(lambda key: jax.random.normal(named_key(key, "noise"), shape))(keys_B)


def draw_time(keys_B: Key[Array, "B"]) -> Float[Array, "B"]:
    """Returns flow times 0.001 + 0.999 * Beta(1.5, 1) (pi0 paper, section B), each sample's from its own key."""
    uniform = jax.vmap(lambda key: jax.random.uniform(named_key(key, "time")))(keys_B)
    return 0.001 + 0.999 * uniform ** (1 / 1.5)  # Beta(a, 1) has the distribution function x^a


# ---- The policy ------------------------------------------------------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prefix:
    """Cameras and prompt, computed once per observation, and what else does not change while actions are sampled.

    cache: keys and values. mask: (B, T, S + T), what suffix tokens see. rope: (2, B, T, H / 2), of their positions.
    """

    cache: Any  # KVCache; a pytree's fields hold whatever jax maps over them
    mask: Leaf
    rope: Leaf


class FlowPolicy(Model):
    """A policy of a prefix and a velocity: `loss` to train it, `sample_actions` to use it."""

    config: FlowConfig

    # ---- What a subclass says ----------------------------------------------------------------------------------------

    def prefix(self, observation: Observation, *, differentiable: bool = True) -> Prefix:
        """Runs what does not change with flow time. differentiable: False leaves out what only a gradient needs."""
        raise NotImplementedError

    def velocity(
        self, prefix: Prefix, observation: Observation, x_BAJ: Float[Array, "B A J"], time: FlowTime
    ) -> Float[Array, "B A J"]:
        """Returns the predicted velocity (noise - actions) at x_t."""
        raise NotImplementedError

    def training_prefix(self, batch: Batch) -> tuple[Prefix, Any]:
        """Returns what the velocity of a batch needs, and what else its losses are of: here nothing, None."""
        return self.prefix(batch), None

    def sampler(self, observation: Observation) -> Velocity:
        """Returns the velocity as it is sampled with, many times for one observation."""
        prefix = self.prefix(observation, differentiable=False)
        policy = self.packed()
        return lambda x_BAJ, time: policy.velocity(prefix, observation, x_BAJ, time)

    def sampling_times(self, steps: int) -> Float32[np.ndarray, "steps"]:
        """Returns the flow times of Euler steps."""
        return summed_times(steps)

    # ---- Training ----------------------------------------------------------------------------------------------------

    def flow_loss(
        self, batch: Batch, noise_BAJ: Float[Array, "B A J"], time_B: Float[Array, "B"]
    ) -> Float[Array, "B A J"]:
        """Returns the squared error of the velocity, entry by entry, at given noise and flow times; masks nothing.

        Raises:
            ValueError: the batch does not fit the config; lists everything that does not.
        """
        self.config.check_inputs(batch, actions=True)
        return self._flow_errors(self.training_prefix(batch)[0], batch, noise_BAJ, time_B)

    def _flow_errors(
        self,
        prefix: Prefix,
        batch: Batch,
        noise_BAJ: Float[Array, "B A J"],
        time_B: Float[Array, "B"],
        given_BA: Bool[Array, "B A"] | None = None,
    ) -> Float[Array, "B A J"]:
        """given_BA: actions that are not to be found, see `FlowConfig.max_delay`; their errors mean nothing."""
        time = time_B if given_BA is None else jnp.where(given_BA, 0.0, time_B[:, None])
        t = time[..., None] if time.ndim == 2 else time[:, None, None]
        # Padded entries are zero by contract; whatever they hold must not reach the network.
        actions = jnp.where(batch["action_mask"], batch["actions"], 0.0)
        x_t = t * noise_BAJ + (1 - t) * actions
        velocity = self.velocity(prefix, batch, x_t, time)
        with jax.named_scope("flow_loss"):
            return jnp.square(velocity - (noise_BAJ - actions))

    def loss(
        self, key: Key[Array, ""], batch: Batch, *, counts: dict[str, Float[Array, ""]] | None = None
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, "B"]]]:
        """Returns the mean squared velocity error at random flow times, and per-sample metrics.

        A sample's loss is the mean over its valid entries and over `config.flow_draws` draws of noise and flow time;
        the scalar is the mean over samples that have any valid entry.
        Metrics: "loss", and "valid" (1.0, or 0.0 for a sample that counts in no loss, whose loss is 0).
        A sample's draws depend on `key` and its position alone, see `sample_keys`.
        counts: see `loss_counts`.
        """
        self.config.check_inputs(batch, actions=True)
        shape = (self.config.action_horizon, self.config.action_dim)

        def draw(draw_key: jax.Array) -> tuple[jax.Array, jax.Array]:
            keys = sample_keys(draw_key, batch["position"])
            return draw_noise(keys, shape), draw_time(keys)

        keys = [key, *(named_key(key, f"draw {i}") for i in range(1, self.config.flow_draws))]
        given = None
        if self.config.max_delay:
            given = draw_delay(sample_keys(key, batch["position"]), self.loss_mask(batch), self.config.max_delay)
        return self._losses(batch, *jax.vmap(draw)(jnp.stack(keys)), given_BA=given, counts=counts)

    def loss_counts(self, batch: Batch) -> dict[str, Float[Array, ""]]:
        """Returns what `loss` divides by. A part of a batch, with the counts of all of it, has its part of the loss."""
        return {"flow": self.loss_mask(batch).any((1, 2)).sum().astype(jnp.float32)}

    def validation_losses(self, key: Key[Array, ""], batch: Batch) -> dict[str, Float[Array, ""]]:
        """Returns losses that move only when the weights do: flow times on a fixed grid, noise by `key` and position.

        "loss", and each part of it that `loss` has with a "..._valid", NaN where no sample of the batch has it.
        """
        self.config.check_inputs(batch, actions=True)
        noise = draw_noise(sample_keys(key, batch["position"]), batch["actions"].shape[1:])
        times = jnp.broadcast_to(jnp.asarray(VALIDATION_TIMES)[:, None], (len(VALIDATION_TIMES), noise.shape[0]))
        every = jnp.broadcast_to(noise, (len(VALIDATION_TIMES), *noise.shape))
        loss, metrics = self._losses(batch, every, times, one_by_one=True)
        parts = {k: v for k, v in metrics.items() if f"{k}_valid" in metrics}
        return {"loss": loss, **{k: v.sum() / metrics[f"{k}_valid"].sum() for k, v in parts.items()}}

    def _losses(
        self,
        batch: Batch,
        noise_RBAJ: Float[Array, "R B A J"],
        time_RB: Float[Array, "R B"],
        *,
        given_BA: Bool[Array, "B A"] | None = None,
        one_by_one: bool = False,
        counts: dict[str, Float[Array, ""]] | None = None,
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, "B"]]]:
        """As `loss`, at R given draws; one by one in less memory."""
        prefix, other = self.training_prefix(batch)
        at = lambda draw: self._flow_errors(prefix, batch, draw[0], draw[1], given_BA)  # noqa: E731
        errors = (jax.lax.map if one_by_one else _vmap)(at, (noise_RBAJ, time_RB))
        total, mask = counts or {}, self.loss_mask(batch)
        if given_BA is not None:
            mask &= ~given_BA[..., None]
        flow, per_flow = masked_means(errors.mean(0), mask, total.get("flow"))
        return self._with_other_losses(flow, per_flow, other, batch, total)

    def _with_other_losses(
        self,
        flow: Float[Array, ""],
        per_flow: dict[str, Float[Array, "B"]],
        other: Any,
        batch: Batch,
        counts: dict[str, Float[Array, ""]],
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, "B"]]]:
        """Returns the loss and its metrics. other: what else losses are of, see `training_prefix`."""
        return flow, per_flow

    def loss_mask(self, batch: Batch) -> Bool[Array, "B A J"]:
        """Returns which entries of the actions count in the loss."""
        mask = batch["action_mask"]
        if not self.config.train_on_padding:
            return mask
        # A sample without any action, such as a question about an image, has nothing to pad.
        return jnp.broadcast_to(mask.any((1, 2), keepdims=True), mask.shape)

    # ---- Sampling ----------------------------------------------------------------------------------------------------

    def outputs(self, key: Key[Array, ""], batch: Batch) -> Float[Array, "B A J"]:
        """Returns actions sampled from noise drawn with `key`."""
        return self.sample_actions(key, self.config.observation(batch))

    def sample_actions(
        self,
        key: RowKeys,
        observation: Observation,
        *,
        num_steps: int | None = None,
        noise: Float[Array, "B A J"] | None = None,
        action_mask: Bool[Array, "B A J"] | None = None,
        previous: Previous | None = None,
    ) -> Float[Array, "B A J"]:
        """Returns normalised actions: Euler steps from noise (t = 1) to data (t = 0); the prefix is computed once.

        key: draws the noise, row i from its own of `row_keys(key, B)`; not used when `noise` is given.
        num_steps: None takes `config.sample_steps`.
        action_mask: which entries of the chunk this robot has (None: all). Dims that it lacks follow the path they had
            in training, that of padding, x_t = t * noise, whatever the network says about them; so they end at zero.
        previous: what is left of the chunk before. A policy that was trained for it (`config.max_delay`) takes its
            first actions as they are; of another one the velocities are led there, see `guided`.

        Raises:
            ValueError: the observation does not fit the config; lists everything that does not.
        """
        self.config.check_inputs(observation, actions=False)
        B = observation["state"].shape[0]
        steps = self.config.sample_steps if num_steps is None else num_steps
        shape = (self.config.action_horizon, self.config.action_dim)
        start = draw_noise(row_keys(key, B), shape) if noise is None else noise
        velocity, times = self.sampler(observation), jnp.asarray(self.sampling_times(steps))
        dt = jnp.float32(-1.0 / steps)
        dims_B1J = None if action_mask is None else action_mask.any(axis=1, keepdims=True)

        known = previous if self.config.max_delay else None
        if previous is not None and known is None:
            velocity = guided(velocity, previous, action_mask)

        def step(i: jax.Array, x: jax.Array) -> jax.Array:
            time = jnp.full((B,), times[i])
            if known is not None:
                x, time = known.put(x), jnp.where(known.given(shape[0]), 0.0, time[:, None])
            x = x + dt * velocity(x, time)
            return x if dims_B1J is None else jnp.where(dims_B1J, x, (1 - (i + 1) / steps) * start)

        x = jax.lax.fori_loop(0, steps, step, start)
        return x if known is None else known.put(x)


def _vmap(function: Any, xs: Any) -> Any:
    return jax.vmap(function)(xs)
