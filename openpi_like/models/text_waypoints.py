"""Waypoints written as text: a vision-language model that says its plan in plain digits (OpenDriveVLA, Zhou et al.
2025, arXiv 2503.23463; GPT-Driver, Mao et al. 2023, arXiv 2310.01415), after a reasoning where it has learned one
(EMMA, Hwang et al. 2024, arXiv 2410.23262; Senna, Jiang et al. 2024, arXiv 2410.22313).

Nothing is added to the language model: no head, and no words. What a plan is written with, and what may follow what, is
in `plan_text`. Sampling follows that grammar, so every answer is a whole plan, whatever finite logits there are.

Letters: B batch, T characters of a plan or tokens of a thought, A action horizon, J action dims.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from openpi_like.batch import Batch, Observation
from openpi_like.data.prompts import FastPrompt, PromptFormat
from openpi_like.draws import RowKeys
from openpi_like.models.backbone import masked_means, text_targets
from openpi_like.models.paligemma import PaliGemmaConfig
from openpi_like.models.plan_text import MOST_M, Characters, Written, longest, plan_characters
from openpi_like.models.policy import Model, PolicyConfig
from openpi_like.models.written import written_errors
from openpi_like.robots import Robot

# By name: the cross-entropy of tokens, and which there are.
_Errors = dict[str, tuple[Float[Array, "B _"], Bool[Array, "B _"]]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextWaypointsConfig(PolicyConfig):
    """Sizes and options of a policy that writes waypoints; see `PolicyConfig`.

    characters: the ids that it writes with, `Characters.fitted()` or `Characters.of(tokenizer)`.
    prompt_format: by default one that has the state in the prompt: how fast a car goes says most of where it will be.
    thought_len: with a text for each sample (`MixtureEntry.text_key`), it learns to write that before the plan.
    """

    characters: Characters
    prompt_format: PromptFormat = FastPrompt()
    can_think: ClassVar[bool] = True

    @property
    def answer_len(self) -> int:
        """Tokens of the text that is written before the plan, which is trained on as an answer."""
        return self.thought_len

    def _problems(self) -> list[str]:
        return super()._problems() + self.characters.problems(self.vocab_size)

    def tokenizer_problems(self, text: Any) -> list[str]:
        """Returns which characters have other ids in the tokenizer, or are several tokens."""
        return self.characters.tokenizer_problems(text.tokenizer)

    def robot_problems(self, robot: Robot, fast: Any) -> list[str]:
        """Returns whether a robot's chunks are no plans in metres, as they are and as long as this policy's."""
        problems = []
        if robot.plan is None or robot.plan.scale != "none":
            problems.append(f"plan={robot.plan}, expected Plan(scale='none'): what is written are metres as they are")
        if other := [f"{f.name} [{f.model_unit}]" for f in robot.action if f.model_unit != "m"]:
            problems.append(f"actions {', '.join(other)}, expected metres")
        for field in (f for f in robot.action if f.limits is not None and f.model_unit == "m"):
            assert field.limits is not None
            ends = field.to_model(np.stack(field.limits.arrays(field.size)[:2]))
            far = np.abs(ends[np.isfinite(ends)])
            if (far > MOST_M).any():
                problems.append(f"action {field.name!r} goes to {far.max():g} m, expected at most {MOST_M} m")
        if robot.action_horizon != self.action_horizon:
            problems.append(
                f"action_horizon {robot.action_horizon}, expected {self.action_horizon}: shorter plans could not be "
                "told from those of which less is known"
            )
        return problems

    def released_normalization(self) -> str:
        """Returns "quantile", for the state in the prompt."""
        return "quantile"

    @classmethod
    def tiny(
        cls, *, image_size: tuple[int, int] = (64, 64), patch_size: int = 16, **options: Any
    ) -> "TextWaypointsConfig":
        """Returns a policy of about a million weights that trains on two CPU cores; options: the other fields.

        Its characters are those of a tokenizer that is fitted for it.
        """
        fields = {**PaliGemmaConfig.tiny_fields(patch_size=patch_size), "characters": Characters.fitted()}
        return cls(**{**fields, "image_size": image_size, **options})

    def create(self, key: Key[Array, ""]) -> "TextWaypoints":
        """Returns a policy with fresh weights; every weight's draw depends on `key` and its own name only."""
        return TextWaypoints(self, key)


class TextWaypoints(Model):
    """The policy: `loss` to train it, `think` and `sample_actions` to use it. All weights are its backbone's."""

    config: TextWaypointsConfig

    # ---- Training ----------------------------------------------------------------------------------------------------

    def targets(self, batch: Batch) -> tuple[Int[Array, "B T"], Bool[Array, "B T"]]:
        """Returns the ids that are to be written, and which of them there are.

        Of a plan that is known in part, the known points alone are to be written: neither what stands behind them nor
        the end, which would say that the plan ends there.
        """
        characters, there = plan_characters(batch["actions"], batch["action_mask"])
        return jnp.asarray(self.config.characters.every)[characters], there

    def _errors(self, batch: Batch) -> _Errors:
        """Returns the cross-entropy of every token to be written, and which there are: of plans, and of thoughts."""
        ids, real = self.targets(batch)
        errors, out = written_errors(self.backbone, batch, ids, real)
        parts = {"plan_loss": (errors, real)}
        if self.config.thought_len:
            parts["thought_loss"] = self.backbone.text_errors(out, batch)
        return parts

    def token_errors(self, batch: Batch) -> tuple[Float[Array, "B _"], Bool[Array, "B _"]]:
        """Returns the cross-entropy of every token to be written, a thought's too, and which there are."""
        return _joined(self._errors(batch))

    def loss(
        self, key: Key[Array, ""], batch: Batch, *, counts: dict[str, Float[Array, ""]] | None = None
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, "B"]]]:
        """Returns the mean cross-entropy of a sample's tokens, then over samples that have any; `key` is not used.

        Metrics: "loss" and "valid". counts: see `loss_counts`.
        """
        self.config.check_inputs(batch, actions=True)
        return masked_means(*self.token_errors(batch), None if counts is None else counts["tokens"])

    def loss_counts(self, batch: Batch) -> dict[str, Float[Array, ""]]:
        """Returns what `loss` divides by. A part of a batch, with the counts of all of it, has its part of the loss."""
        any_B = batch["action_mask"].any((1, 2))
        if self.config.thought_len:
            any_B |= text_targets(batch).any(1)
        return {"tokens": any_B.sum().astype(jnp.float32)}

    def validation_losses(self, key: Key[Array, ""], batch: Batch) -> dict[str, Float[Array, ""]]:
        """Returns "loss"; where it thinks, also "plan_loss" and "thought_loss", NaN where no sample has any."""
        self.config.check_inputs(batch, actions=True)
        parts = self._errors(batch)
        losses = {"loss": masked_means(*_joined(parts))[0]}
        if self.config.thought_len:
            for name, (errors, real) in parts.items():
                losses[name] = jnp.where(real.any(), masked_means(errors, real)[0], jnp.nan)
        return losses

    def outputs(self, key: Key[Array, ""], batch: Batch) -> Float[Array, "B _"]:
        """Returns the cross-entropy of every token to be written."""
        return self.token_errors(batch)[0]

    # ---- Acting ------------------------------------------------------------------------------------------------------

    def packed(self) -> "TextWaypoints":
        """Returns the policy with its language model packed: it reads the prompt and writes with the same weights."""
        return self.with_parts(backbone=self.backbone.packed())

    def think(self, observation: Observation, **options: Any) -> tuple[Int[Array, "B T"], Bool[Array, "B T"]]:
        """As `Model.think`: the likeliest token one after another, to the end of the text, which belongs to it."""
        key = jax.random.key(0)  # nothing is drawn
        ends = lambda token: token == self.config.characters.eos  # noqa: E731
        return self.backbone.generate(key, observation, max_new=self.config.thought_len, ends=ends)

    def sample_actions(
        self,
        key: RowKeys,
        observation: Observation,
        *,
        action_mask: Bool[Array, "B A J"] | None = None,
    ) -> Float[Array, "B A J"]:
        """Returns waypoints in metres: the likeliest character of those allowed, after those written before it; after
        a thought, where the policy thinks and the observation has none.

        `key` is not used, nothing is drawn.
        action_mask: which entries of the chunk this robot has: its first points, and of these the first dims; None:
            all. The others are 0. A row is NaN whose logits are not finite.

        Raises:
            ValueError: the observation does not fit the config; lists everything that does not.
        """
        c = self.config
        c.check_inputs(observation, actions=False)
        if c.thought_len and "thought" not in observation:
            ids, there = self.think(observation)
            observation = {**observation, "thought": ids, "thought_mask": there}
        return self.sample_text(observation, action_mask=action_mask)[0]

    def sample_text(
        self, observation: Observation, *, action_mask: Bool[Array, "B A J"] | None = None
    ) -> tuple[Float[Array, "B A J"], Int[Array, "B T"], Bool[Array, "B T"], Bool[Array, "B T"]]:
        """As `sample_actions`, with the ids of the text, which of them there are, and where the grammar ruled out the
        likeliest character; without a thought that the observation has not."""
        c = self.config
        c.check_inputs(observation, actions=False)
        B, chunk = observation["prompt"].shape[0], (c.action_horizon, c.action_dim)
        mask = jnp.ones((B, *chunk), bool) if action_mask is None else action_mask
        policy, T = self.packed(), longest(*chunk)
        x, cache = policy.backbone.prefill(observation, max_new=T)
        every = c.characters.every

        def going(carry: Any) -> jax.Array:
            step, _, _, plans, *_ = carry
            return (step < T) & ~plans.is_whole.all()

        def body(carry: Any) -> Any:
            step, x, cache, plans, ids, real, ruled_out, sound = carry
            scored = policy.backbone.vlm.logits(x[:, None], rows=every)[:, 0]
            writing = ~plans.is_whole
            # Logits of broken weights would still choose something, and that would be a motion.
            sound &= jnp.isfinite(scored).all(1) | ~writing
            # What is allowed stays above what is not, also where logits are not finite: the plan still ends.
            chosen = jnp.argmax(jnp.where(plans.allowed(), jnp.nan_to_num(scored), -jnp.inf), axis=-1)
            other = writing & (chosen != jnp.argmax(scored, axis=-1))
            token = jnp.where(writing, jnp.asarray(every)[chosen], 0)
            ids, real = ids.at[:, step].set(token), real.at[:, step].set(writing)
            ruled_out = ruled_out.at[:, step].set(other)
            x, cache = policy.backbone.extend(token, cache, valid_B=writing)
            return step + 1, x, cache, plans.after(chosen), ids, real, ruled_out, sound

        nothing = jnp.zeros((B, T), bool)
        start = (jnp.int32(0), x, cache, Written.nothing(mask), nothing.astype(jnp.int32), nothing, nothing)
        *_, plans, ids, real, ruled_out, sound = jax.lax.while_loop(going, body, (*start, jnp.ones(B, bool)))
        actions = jnp.where(sound[:, None, None], plans.metres(), jnp.nan)
        return jnp.where(mask, actions, 0.0), ids, real, ruled_out


def _joined(parts: _Errors) -> tuple[Float[Array, "B _"], Bool[Array, "B _"]]:
    errors, real = zip(*parts.values(), strict=True)
    return jnp.concatenate(errors, axis=1), jnp.concatenate(real, axis=1)
