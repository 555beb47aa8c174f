"""pi0 and pi0.5: a vision-language prefix and an action expert trained by flow matching (Black et al. 2024, 2025).

What it has in common with other policies that are trained by flow matching is in `openpi_like.models.flow`.

With action tokens the backbone writes the same actions as text, in the same pass, and the expert's loss is kept from
it (knowledge insulation). What sees what, in training:

    cameras, prompt     themselves
    subtask             cameras, prompt, and the subtask so far
    action tokens       cameras, prompt, subtask, and the action tokens so far
    expert's tokens     cameras, prompt, subtask, themselves; never an action token

Letters: B batch, S prefix tokens, P patches, D width, A action horizon, J action dims, T suffix tokens.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from openpi_like.batch import Batch, Observation
from openpi_like.data.prompts import Pi0Prompt, Pi05Prompt
from openpi_like.draws import RowKeys, named_key
from openpi_like.models.backbone import masked_means
from openpi_like.models.flow import FlowConfig, FlowPolicy, FlowTime, Prefix, Velocity, time_embedding
from openpi_like.models.formats import Format
from openpi_like.models.gemma import Gemma, GemmaConfig, attention_mask
from openpi_like.models.paligemma import PaliGemmaConfig
from openpi_like.models.param import Linear
from openpi_like.models.pi0_names import lerobot_config, pi0_formats
from openpi_like.models.sequences import with_thought
from openpi_like.models.thoughts import TokenThoughts, thought_options, thought_problems, thought_shapes
from openpi_like.partition import pin


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pi0Config(FlowConfig):
    """Sizes and options of a pi0 policy; see `FlowConfig` and `PolicyConfig` for those that others have too.

    pi05: there is no state token, and flow time acts through adaptive norms; the state is in the prompt
        (`Pi05Prompt` or `FastPrompt`), or not seen at all (`Pi0Prompt`).
    action_tokens: the backbone also learns to write the actions as tokens, in the same pass (Driess et al. 2025,
        "Knowledge insulating vision-language-action models", arXiv 2505.23705). The expert never sees these tokens.
    insulate: with action tokens, the flow loss does not reach the backbone: the expert reads its keys and values
        behind a stop-gradient (section 5.2 there). False trains both losses jointly.
    flow_weight: of the flow loss beside the text loss (alpha in eq. 4 there).
    thought_len: with action tokens, it can write a subtask before it acts, see `thoughts`; the expert reads that too.
    """

    writes_tokens: ClassVar[bool] = True
    can_think: ClassVar[bool] = True
    expert: GemmaConfig
    pi05: bool = False
    insulate: bool = True
    flow_weight: float = 1.0

    def _problems(self) -> list[str]:
        problems = super()._problems()
        for name in ("depth", "num_heads", "num_kv_heads", "head_dim"):
            ours, theirs = getattr(self.backbone.language, name), getattr(self.expert, name)
            if ours != theirs:
                problems.append(f"expert.{name}={theirs}, expected the backbone's {ours}: they attend to each other")
        if self.prompt_format.ends_with_indicator and not self.pi05:
            got = f"prompt_format={self.prompt_format} with pi05=False"
            problems.append(f"{got}, expected {Pi0Prompt()}: pi0 has a token for the state")
        if self.expert.width % 2:
            problems.append(f"expert.width={self.expert.width}, expected an even number (sine and cosine of the time)")
        problems += thought_problems(self)
        if not self.flow_weight > 0:
            problems.append(f"flow_weight={self.flow_weight}, expected a number above 0; pi0-FAST has no flow at all")
        return problems

    def sampling_shapes(self) -> dict[str, Any]:
        """Returns the shapes of what it thinks with, see `thoughts`."""
        return thought_shapes(self)

    def sampling_options(self, text: Any, fast: Any) -> dict[str, Any]:
        """Returns what it thinks with, see `thoughts`."""
        return thought_options(self, text)

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


class Pi0(FlowPolicy, TokenThoughts):
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
        self, observation: Observation, x_BAJ: Float[Array, "B A J"], time: FlowTime
    ) -> tuple[Float[Array, "B T D"], Float[Array, "B #T D"] | None]:
        """Returns the expert's tokens (state first, then actions; pi0.5: actions only) and its condition (pi0.5)."""
        actions, cond = self.embed_actions(x_BAJ, time)
        if self.config.pi05:
            return actions, cond
        return jnp.concatenate([self.embed_state(observation), actions], axis=1), None

    @jax.named_scope("expert")
    def embed_state(self, observation: Observation) -> Float[Array, "B 1 D"]:
        """Returns the state token (pi0)."""
        return self.state_in(observation["state"][:, None, :])

    @jax.named_scope("expert")
    def embed_actions(
        self, x_BAJ: Float[Array, "B A J"], time: FlowTime
    ) -> tuple[Float[Array, "B A D"], Float[Array, "B #A D"] | None]:
        """Returns the action tokens and the expert's condition (pi0.5, else None)."""
        actions = self.action_in(x_BAJ)
        time_BAD = time_embedding(time[:, None] if time.ndim == 1 else time, self.config.expert.width)
        if self.config.pi05:
            return actions, jax.nn.swish(self.time_out(jax.nn.swish(self.time_in(time_BAD))))
        both = jnp.concatenate([actions, jnp.broadcast_to(time_BAD, actions.shape)], axis=-1)
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
        observed = with_thought(observation)
        sequence = self.backbone.embed_prefix(observed)
        S = sequence.valid.shape[1]
        mask, positions = self.masks(sequence.valid)
        rope, own = self.backbone.vlm.rope(positions), mask[:, :S, :S]
        if "thought" in observed:
            own = self.backbone.mask(sequence.valid, self.backbone.text_slots(observed["prompt_causal"], S))
        inputs = sequence, own, rope[:, :, :S]
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
        cond_BSD: Float[Array, "B #T D"] | None,
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
        time: FlowTime,
    ) -> Float[Array, "B A J"]:
        """Returns the predicted velocity (noise - actions) at x_t."""
        return self._velocity(self.suffix(prefix, *self.embed_suffix(observation, x_BAJ, time)))

    @jax.named_scope("expert")
    def _velocity(self, out_BTD: Float[Array, "B T D"]) -> Float[Array, "B A J"]:
        return pin(self.action_out(out_BTD[:, -self.config.action_horizon :].astype(jnp.float32)), "batch", None, None)

    def sampling_velocity(self, prefix: Prefix, x_BAJ: Float[Array, "B A J"], time: FlowTime) -> Float[Array, "B A J"]:
        """Returns `velocity` against a prefix that holds the state token already, see `_with_state`."""
        return self._velocity(self.suffix(prefix, *self.embed_actions(x_BAJ, time)))

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

    def loss_counts(self, batch: Batch) -> dict[str, Float[Array, ""]]:
        """Returns what `loss` divides by. A part of a batch, with the counts of all of it, has its part of the loss."""
        counts = super().loss_counts(batch)
        return counts if self.config.action_tokens is None else counts | {"text": self.backbone.text_samples(batch)}

    def _with_other_losses(
        self,
        flow: Float[Array, ""],
        per_flow: dict[str, Float[Array, "B"]],
        other: Float[Array, "B S D"] | None,
        batch: Batch,
        counts: dict[str, Float[Array, ""]],
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, "B"]]]:
        """Adds the loss of the text, where there are action tokens, each of the two averaged over samples that have it.

        Then there are the metrics "flow_loss" and "text_loss" too, each with its own "..._valid".
        """
        if other is None:
            return flow, per_flow
        text, per_text = masked_means(*self.backbone.text_errors(other, batch), counts.get("text"))
        weight = self.config.flow_weight
        return text + weight * flow, {
            "loss": per_text["loss"] + weight * per_flow["loss"],
            "valid": jnp.maximum(per_text["valid"], per_flow["valid"]),
            "flow_loss": per_flow["loss"],
            "flow_loss_valid": per_flow["valid"],
            "text_loss": per_text["loss"],
            "text_loss_valid": per_text["valid"],
        }

    # ---- Sampling ----------------------------------------------------------------------------------------------------

    def packed(self) -> "Pi0":
        """Returns the policy with its expert packed."""
        return self.with_parts(expert=self.expert.packed())

    def sample_actions(
        self, key: RowKeys, observation: Observation, *, ends: Int[Array, "E"] | None = None, **options: Any
    ) -> Float[Array, "B A J"]:
        """As `FlowPolicy.sample_actions`, after a thought, where the policy thinks and the observation has none.

        ends: see `thoughts`.
        """
        self.config.check_inputs(observation, actions=False)
        return super().sample_actions(key, self.thinking(observation, ends), **options)

    def sampler(self, observation: Observation) -> Velocity:
        """Returns the velocity as it is sampled with: the state token is computed once, too (pi0)."""
        prefix = self.prefix(observation, differentiable=False)
        policy = self.packed()
        # A pass for one token reads as many weights as one for all: in a server that is a step more (1 ms on an H200).
        if self.config.pi05 or policy.expert.is_taken_apart:
            return lambda x_BAJ, time: policy.velocity(prefix, observation, x_BAJ, time)
        whole = policy._with_state(prefix, observation)
        return lambda x_BAJ, time: policy.sampling_velocity(whole, x_BAJ, time)
