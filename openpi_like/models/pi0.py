"""pi0 and pi0.5: a vision-language prefix and an action expert trained by flow matching (Black et al. 2024, 2025).

Flow time is t = 1 at noise and t = 0 at data, as in the published weights (the paper counts the other way):
x_t = t * noise + (1 - t) * actions, velocity = noise - actions, sampling goes from t = 1 down to t = 0.

With action tokens the backbone writes the same actions as text, in the same pass, and the expert's loss is kept from
it (knowledge insulation). What sees what, in training:

    cameras, prompt     themselves
    subtask             cameras, prompt, and the subtask so far
    action tokens       cameras, prompt, subtask, and the action tokens so far
    expert's tokens     cameras, prompt, subtask, themselves; never an action token

Letters: B batch, S prefix tokens, P patches, D width, A action horizon, J action dims, T suffix tokens.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from openpi_like.batch import Array as Leaf
from openpi_like.batch import Batch, Observation
from openpi_like.data.prompts import Pi0Prompt, Pi05Prompt
from openpi_like.draws import named_key, row_keys, sample_keys
from openpi_like.models.backbone import masked_means
from openpi_like.models.formats import Format
from openpi_like.models.gemma import Gemma, GemmaConfig, attention_mask
from openpi_like.models.paligemma import PaliGemmaConfig
from openpi_like.models.param import Linear
from openpi_like.models.pi0_names import lerobot_config, pi0_formats
from openpi_like.models.policy import Model, PolicyConfig
from openpi_like.partition import pin


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pi0Config(PolicyConfig):
    """Sizes and options of a pi0 policy; see `PolicyConfig` for those that all policies have.

    pi05: there is no state token, and flow time acts through adaptive norms; the state is in the prompt
        (`Pi05Prompt` or `FastPrompt`), or not seen at all (`Pi0Prompt`).
    sample_steps: Euler steps when sampling.
    flow_draws: pairs of noise and flow time drawn per sample in the loss. The prefix is computed once for all of them,
        so a few more draws make the gradient less noisy at less than the cost of as many more samples.
    train_on_padding: count padded entries of actions in the loss, as openpi's released weights were trained.
    action_tokens: the backbone also learns to write the actions as tokens, in the same pass (Driess et al. 2025,
        "Knowledge insulating vision-language-action models", arXiv 2505.23705). The expert never sees these tokens.
    insulate: with action tokens, the flow loss does not reach the backbone: the expert reads its keys and values
        behind a stop-gradient (section 5.2 there). False trains both losses jointly.
    flow_weight: of the flow loss beside the text loss (alpha in eq. 4 there).
    """

    expert: GemmaConfig
    pi05: bool = False
    sample_steps: int = 10
    train_on_padding: bool = False
    flow_draws: int = 1
    insulate: bool = True
    flow_weight: float = 1.0

    def _problems(self) -> list[str]:
        problems = super()._problems()
        for name in ("depth", "num_heads", "num_kv_heads", "head_dim"):
            ours, theirs = getattr(self.backbone.language, name), getattr(self.expert, name)
            if ours != theirs:
                problems.append(f"expert.{name}={theirs}, expected the backbone's {ours}: they attend to each other")
        problems += [
            f"{name}={getattr(self, name)}, expected at least 1"
            for name in ("sample_steps", "flow_draws")
            if getattr(self, name) < 1
        ]
        if self.prompt_format.ends_with_indicator and not self.pi05:
            got = f"prompt_format={self.prompt_format} with pi05=False"
            problems.append(f"{got}, expected {Pi0Prompt()}: pi0 has a token for the state")
        if self.expert.width % 2:
            problems.append(f"expert.width={self.expert.width}, expected an even number (sine and cosine of the time)")
        if not self.flow_weight > 0:
            problems.append(f"flow_weight={self.flow_weight}, expected a number above 0; pi0-FAST has no flow at all")
        return problems

    @classmethod
    def tiny(cls, *, image_size: tuple[int, int] = (64, 64), patch_size: int = 16, **options: Any) -> "Pi0Config":
        """Returns a policy of about a million weights that trains on two CPU cores; options: the other fields."""
        expert = GemmaConfig.tiny(width=64, mlp_dim=192)
        return cls(
            **PaliGemmaConfig.tiny_fields(patch_size=patch_size), expert=expert, image_size=image_size, **options
        )

    @classmethod
    def released(cls, *, pi05: bool = False) -> "Pi0Config":
        """Returns the sizes of openpi's released pi0 or pi0.5 weights (3.2 billion)."""
        return cls(
            **PaliGemmaConfig.released_fields(),
            expert=GemmaConfig.gemma_300m(),
            cameras=("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb"),
            image_size=(224, 224),
            state_dim=32,
            action_dim=32,
            action_horizon=50,
            prompt_len=200 if pi05 else 48,
            pi05=pi05,
            prompt_format=Pi05Prompt() if pi05 else Pi0Prompt(),
            train_on_padding=True,
        )

    def create(self, key: Key[Array, ""]) -> "Pi0":
        """Returns a policy with fresh weights; every weight's draw depends on `key` and its own name only."""
        return Pi0(self, key)

    def released_normalization(self) -> str:
        """Returns "quantile" for pi0.5, "zscore" for pi0."""
        return "quantile" if self.pi05 else "zscore"

    def lerobot_config(self, dtype: str) -> dict[str, Any] | None:
        """Returns LeRobot's `config.json`, where it knows these sizes."""
        return lerobot_config(self, dtype)

    def formats(self) -> dict[str, Format]:
        """Returns the published layouts that hold this policy's weights, or those of its backbone alone."""
        backbone = self.backbone.formats(self.vocab_size)
        return pi0_formats(backbone, self.expert, pi05=self.pi05, vocab_size=self.vocab_size)


def time_embedding(
    time_B: Float[Array, "B"], dim: int, *, min_period: float = 4e-3, max_period: float = 4.0
) -> Float[Array, "B dim"]:
    """Returns sines, then cosines, of flow time at dim / 2 periods spaced geometrically, both ends included.

    The phase reaches 1571 rad, where float32 resolves 1e-4: it stays float32, with openpi's order of operations.
    """
    fraction = jnp.linspace(0.0, 1.0, dim // 2)
    period = min_period * (max_period / min_period) ** fraction
    phase = time_B[:, None] * (1.0 / period * 2 * jnp.pi)[None, :]
    return jnp.concatenate([jnp.sin(phase), jnp.cos(phase)], axis=-1)


# Flow times of validation.
VALIDATION_TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prefix:
    """Cameras and prompt, computed once per observation, and what else does not change while actions are sampled.

    cache: keys and values. mask: (B, T, S + T), what suffix tokens see. rope: (2, B, T, H / 2), of their positions.
    """

    cache: Any  # KVCache; a pytree's fields hold whatever jax maps over them
    mask: Leaf
    rope: Leaf


class Pi0(Model):
    """The policy: `loss` to train it, `sample_actions` to use it. A backbone, and an action expert that reads it."""

    config: Pi0Config

    def __init__(self, config: Pi0Config, key: Key[Array, ""]) -> None:
        """Use `Pi0Config.create`."""
        super().__init__(config, key)
        c, D, J = config, config.expert.width, config.action_dim
        self.expert = Gemma(
            c.expert, named_key(key, "expert"), adaptive=c.pi05, dtype=c.dtype, unroll=c.unroll, remat=c.remat
        )
        # These run in float32, as in openpi: they touch actions and flow time, and cost next to nothing.
        self.action_in = Linear(named_key(key, "action_in"), "BAJ,JD->BAD", (J, D), ("action", "embed"))
        self.action_out = Linear(named_key(key, "action_out"), "BAD,DJ->BAJ", (D, J), ("embed", "action"))
        square = (None, "embed")
        if c.pi05:
            self.time_in = Linear(named_key(key, "time_in"), "BSD,DE->BSE", (D, D), square)
            self.time_out = Linear(named_key(key, "time_out"), "BSD,DE->BSE", (D, D), square)
        else:
            state_axes = ("action", "embed")
            self.state_in = Linear(named_key(key, "state_in"), "BSJ,JD->BSD", (c.state_dim, D), state_axes)
            self.action_time_in = Linear(named_key(key, "action_time_in"), "BAD,DE->BAE", (2 * D, D), square)
            self.action_time_out = Linear(named_key(key, "action_time_out"), "BAD,DE->BAE", (D, D), square)

    # ---- Tokens ------------------------------------------------------------------------------------------------------

    def embed_suffix(
        self, observation: Observation, x_BAJ: Float[Array, "B A J"], time_B: Float[Array, "B"]
    ) -> tuple[Float[Array, "B T D"], Float[Array, "B 1 D"] | None]:
        """Returns the expert's tokens (state first, then actions; pi0.5: actions only) and its condition (pi0.5)."""
        actions, cond = self.embed_actions(x_BAJ, time_B)
        if self.config.pi05:
            return actions, cond
        return jnp.concatenate([self.embed_state(observation), actions], axis=1), None

    @jax.named_scope("expert")
    def embed_state(self, observation: Observation) -> Float[Array, "B 1 D"]:
        """Returns the state token (pi0)."""
        return self.state_in(observation["state"][:, None, :])

    @jax.named_scope("expert")
    def embed_actions(
        self, x_BAJ: Float[Array, "B A J"], time_B: Float[Array, "B"]
    ) -> tuple[Float[Array, "B A D"], Float[Array, "B 1 D"] | None]:
        """Returns the action tokens and the expert's condition (pi0.5, else None)."""
        actions = self.action_in(x_BAJ)
        time_B1D = time_embedding(time_B, self.config.expert.width)[:, None, :]
        if self.config.pi05:
            return actions, jax.nn.swish(self.time_out(jax.nn.swish(self.time_in(time_B1D))))
        both = jnp.concatenate([actions, jnp.broadcast_to(time_B1D, actions.shape)], axis=-1)
        return self.action_time_out(jax.nn.swish(self.action_time_in(both))), None

    def masks(
        self, prefix_valid_BS: Bool[Array, "B S"]
    ) -> tuple[Bool[Array, "B SplusT SplusT"], Int[Array, "B SplusT"]]:
        """Returns the attention mask and positions of prefix and suffix together.

        Three blocks: cameras and prompt; the state token (pi0); the actions. Each sees itself and the blocks before.
        """
        B, S = prefix_valid_BS.shape
        A = self.config.action_horizon
        suffix_starts = [True] + [False] * (A - 1) if self.config.pi05 else [True, True] + [False] * (A - 1)
        valid = jnp.concatenate([prefix_valid_BS, jnp.ones((B, len(suffix_starts)), bool)], axis=1)
        starts = jnp.asarray(np.array([self.backbone.causal] * S + suffix_starts))
        return attention_mask(valid, starts), self.backbone.positions(valid)

    # ---- Passes ------------------------------------------------------------------------------------------------------

    def prefix(self, observation: Observation, *, differentiable: bool = True) -> Prefix:
        """Runs cameras and prompt through the vision tower and the language model.

        differentiable: False leaves out what only a gradient would need, see `Gemma.prefill`.
        """
        sequence = self.backbone.embed_prefix(observation)
        S = sequence.valid.shape[1]
        mask, positions = self.masks(sequence.valid)
        rope = self.backbone.vlm.rope(positions)
        inputs = sequence, mask[:, :S, :S], rope[:, :, :S]
        with jax.named_scope("vlm"):
            cache = self.backbone.run(*inputs)[1] if differentiable else self.backbone.keys_values(*inputs)
        return Prefix(cache, mask[:, S:], rope[:, :, S:])

    def training_prefix(self, batch: Batch) -> tuple[Prefix, Float[Array, "B S D"] | None]:
        """Runs cameras and text; returns what the expert sees and, with action tokens, all of it after the final norm.

        Action tokens take no positions away from the expert: there are none when it samples.
        """
        if self.config.action_tokens is None:
            return self.prefix(batch), None
        out, cache, valid = self.backbone.language(batch)
        S = valid.shape[1]
        mask, positions = self.masks(valid & ~self.backbone.text_slots(batch["prompt_action"], S))
        if self.config.insulate:
            cache = jax.lax.stop_gradient(cache)
        return Prefix(cache, mask[:, S:], self.backbone.vlm.rope(positions[..., S:])), out

    def suffix(
        self,
        prefix: Prefix,
        tokens_BTD: Float[Array, "B T D"],
        cond_BSD: Float[Array, "B 1 D"] | None,
    ) -> Float[Array, "B T D"]:
        """Runs the expert's tokens against the prefix; returns them after the final norm."""
        with jax.named_scope("expert"):
            out, _ = self.expert(tokens_BTD, prefix.mask, prefix.rope, past=prefix.cache, cond_BSD=cond_BSD)
        return out

    def velocity(
        self,
        prefix: Prefix,
        observation: Observation,
        x_BAJ: Float[Array, "B A J"],
        time_B: Float[Array, "B"],
    ) -> Float[Array, "B A J"]:
        """Returns the predicted velocity (noise - actions) at x_t."""
        return self._velocity(self.suffix(prefix, *self.embed_suffix(observation, x_BAJ, time_B)))

    @jax.named_scope("expert")
    def _velocity(self, out_BTD: Float[Array, "B T D"]) -> Float[Array, "B A J"]:
        return pin(self.action_out(out_BTD[:, -self.config.action_horizon :].astype(jnp.float32)), "batch", None, None)

    def sampling_velocity(
        self, prefix: Prefix, x_BAJ: Float[Array, "B A J"], time_B: Float[Array, "B"]
    ) -> Float[Array, "B A J"]:
        """Returns `velocity` against a prefix that holds the state token already, see `_with_state`."""
        return self._velocity(self.suffix(prefix, *self.embed_actions(x_BAJ, time_B)))

    def _with_state(self, prefix: Prefix, observation: Observation) -> Prefix:
        """Returns a prefix that holds the state token too: actions see it, and it sees none of them (pi0)."""
        S = prefix.mask.shape[2] - prefix.mask.shape[1]
        _, own = self.expert(
            self.embed_state(observation),
            prefix.mask[:, :1, : S + 1],
            prefix.rope[:, :, :1],
            past=prefix.cache,
        )
        cache = jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=2), prefix.cache, own)
        return Prefix(cache, prefix.mask[:, 1:], prefix.rope[:, :, 1:])

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
        self, prefix: Prefix, batch: Batch, noise_BAJ: Float[Array, "B A J"], time_B: Float[Array, "B"]
    ) -> Float[Array, "B A J"]:
        t = time_B[:, None, None]
        # Padded entries are zero by contract; whatever they hold must not reach the network.
        actions = jnp.where(batch["action_mask"], batch["actions"], 0.0)
        x_t = t * noise_BAJ + (1 - t) * actions
        velocity = self.velocity(prefix, batch, x_t, time_B)
        with jax.named_scope("flow_loss"):
            return jnp.square(velocity - (noise_BAJ - actions))

    def loss(
        self, key: Key[Array, ""], batch: Batch, *, counts: dict[str, Float[Array, ""]] | None = None
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, "B"]]]:
        """Returns the mean squared velocity error at random flow times, and per-sample metrics.

        A sample's loss is the mean over its valid entries and over `config.flow_draws` draws of noise and flow time;
        the scalar is the mean over samples that have any valid entry. With action tokens, the loss of the text is added
        (see `text_loss`), each of the two averaged over the samples that have it.
        Metrics: "loss", and "valid" (1.0, or 0.0 for a sample that counts in no loss, whose loss is 0); with action
        tokens also "flow_loss" and "text_loss", each with its own "..._valid".
        A sample's draws depend on `key` and its position alone, see `sample_keys`.
        counts: see `loss_counts`.
        """
        self.config.check_inputs(batch, actions=True)
        shape = (self.config.action_horizon, self.config.action_dim)

        def draw(draw_key: jax.Array) -> tuple[jax.Array, jax.Array]:
            keys = sample_keys(draw_key, batch["position"])
            return draw_noise(keys, shape), draw_time(keys)

        keys = [key, *(named_key(key, f"draw {i}") for i in range(1, self.config.flow_draws))]
        return self._losses(batch, *jax.vmap(draw)(jnp.stack(keys)), counts=counts)

    def loss_counts(self, batch: Batch) -> dict[str, Float[Array, ""]]:
        """Returns what `loss` divides by. A part of a batch, with the counts of all of it, has its part of the loss."""
        counts = {"flow": self.loss_mask(batch).any((1, 2)).sum().astype(jnp.float32)}
        return counts if self.config.action_tokens is None else counts | {"text": self.backbone.text_samples(batch)}

    def validation_losses(self, key: Key[Array, ""], batch: Batch) -> dict[str, Float[Array, ""]]:
        """Returns losses that move only when the weights do: flow times on a fixed grid, noise by `key` and position.

        "loss", and with action tokens "flow_loss" and "text_loss", NaN where no sample of the batch has it.
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
        one_by_one: bool = False,
        counts: dict[str, Float[Array, ""]] | None = None,
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, "B"]]]:
        """As `loss`, at R given draws; one by one in less memory."""
        total = counts or {}
        prefix, out = self.training_prefix(batch)
        at = lambda draw: self._flow_errors(prefix, batch, *draw)  # noqa: E731
        errors = (jax.lax.map if one_by_one else _vmap)(at, (noise_RBAJ, time_RB))
        flow, per_flow = masked_means(errors.mean(0), self.loss_mask(batch), total.get("flow"))
        if out is None:
            return flow, per_flow
        text, per_text = masked_means(*self.backbone.text_errors(out, batch), total.get("text"))
        weight = self.config.flow_weight
        return text + weight * flow, {
            "loss": per_text["loss"] + weight * per_flow["loss"],
            "valid": jnp.maximum(per_text["valid"], per_flow["valid"]),
            "flow_loss": per_flow["loss"],
            "flow_loss_valid": per_flow["valid"],
            "text_loss": per_text["loss"],
            "text_loss_valid": per_text["valid"],
        }

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

    def packed(self) -> "Pi0":
        """Returns the policy with its expert packed."""
        return self.with_parts(expert=self.expert.packed())

    def sample_actions(
        self,
        key: Key[Array, ""],
        observation: Observation,
        *,
        num_steps: int | None = None,
        noise: Float[Array, "B A J"] | None = None,
        action_mask: Bool[Array, "B A J"] | None = None,
    ) -> Float[Array, "B A J"]:
        """Returns normalised actions: Euler steps from noise (t = 1) to data (t = 0); the prefix is computed once.

        key: draws the noise, row i from `fold_in(key, i)`; not used when `noise` is given.
        num_steps: None takes `config.sample_steps`.
        action_mask: which entries of the chunk this robot has (None: all). Dims that it lacks follow the path they had
            in training, that of padding, x_t = t * noise, whatever the network says about them; so they end at zero.

        Raises:
            ValueError: the observation does not fit the config; lists everything that does not.
        """
        self.config.check_inputs(observation, actions=False)
        B = observation["state"].shape[0]
        steps = self.config.sample_steps if num_steps is None else num_steps
        shape = (self.config.action_horizon, self.config.action_dim)
        start = draw_noise(row_keys(key, B), shape) if noise is None else noise
        prefix = self.prefix(observation, differentiable=False)
        policy = self.packed()
        # A pass for one token reads as many weights as one for all: in a server that is a step more (1 ms on an H200).
        with_state = not self.config.pi05 and not policy.expert.is_taken_apart
        if with_state:
            prefix = policy._with_state(prefix, observation)
        dt = jnp.float32(-1.0 / steps)
        dims_B1J = None if action_mask is None else action_mask.any(axis=1, keepdims=True)

        def step(i: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            x, t = carry
            time_B = jnp.full((B,), t)
            if with_state:
                x = x + dt * policy.sampling_velocity(prefix, x, time_B)
            else:
                x = x + dt * policy.velocity(prefix, observation, x, time_B)
            # Time accumulates in float32, as in openpi: the embedding turns its rounding into 1e-4 of velocity.
            t = t + dt
            if dims_B1J is not None:
                x = jnp.where(dims_B1J, x, (1 - (i + 1) / steps) * start)
            return x, t

        return jax.lax.fori_loop(0, steps, step, (start, jnp.float32(1.0)))[0]


def _vmap(function: Any, xs: Any) -> Any:
    return jax.vmap(function)(xs)


def draw_noise(keys_B: Key[Array, "B"], shape: tuple[int, ...]) -> Float[Array, "B ..."]:
    """Returns normal noise (B, *shape), each sample's from its own key."""
    return jax.vmap(lambda key: jax.random.normal(named_key(key, "noise"), shape))(keys_B)


def draw_time(keys_B: Key[Array, "B"]) -> Float[Array, "B"]:
    """Returns flow times 0.001 + 0.999 * Beta(1.5, 1) (pi0 paper, section B), each sample's from its own key."""
    uniform = jax.vmap(lambda key: jax.random.uniform(named_key(key, "time")))(keys_B)
    return 0.001 + 0.999 * uniform ** (1 / 1.5)  # Beta(a, 1) has the distribution function x^a
