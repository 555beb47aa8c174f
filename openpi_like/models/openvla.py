"""OpenVLA: actions as words, 256 bins a dim, written one after the other (Kim et al. 2024, arXiv 2406.09246).

A bin takes the id of a word at the end of the vocabulary, so nothing is added to the language model. Chunks of several
steps are written step by step. Entries that a robot lacks are not written, and are seen by nobody.

Letters: B batch, S tokens, T written tokens (A * J and the end), D width, A action horizon, J action dims.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from openpi_like.batch import Batch, Observation
from openpi_like.draws import RowKeys
from openpi_like.models.backbone import masked_means
from openpi_like.models.paligemma import PaliGemmaConfig
from openpi_like.models.policy import Model, PolicyConfig
from openpi_like.models.written import written_errors
from openpi_like.robots import Robot

BINS = 256


def action_bins(actions: Float[Array, "*B"]) -> Int[Array, "*B"]:
    """Returns the bin of each value, 1 to 256: how many of 256 edges from -1 to 1 are at most it, as `np.digitize`."""
    edges = jnp.asarray(np.linspace(-1, 1, BINS), jnp.float32)
    return jnp.searchsorted(edges, jnp.clip(actions, -1.0, 1.0), side="right").astype(jnp.int32)


def bin_centres() -> Float[np.ndarray, "256"]:
    """Returns the value of each bin, 1 to 256: the middle of its edges. The last is one point, and has that before it.

    The ends are +-0.99608; the error is 1/255 at most.
    """
    edges = np.linspace(-1, 1, BINS)
    centres = (edges[:-1] + edges[1:]) / 2
    return np.concatenate([centres, centres[-1:]]).astype(np.float32)


def eos_problems(eos: int | None, text: Any) -> list[str]:
    """Returns a line if a policy's `eos` is not that of a `TextTokenizer`; None is no id, and fits."""
    theirs = text.tokenizer.eos_id
    return [] if eos in (None, theirs) else [f"eos={eos}, expected {theirs}, the id of the tokenizer"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class OpenVlaConfig(PolicyConfig):
    """Sizes and options of an OpenVLA policy; see `PolicyConfig`.

    bin_end: bin b has the id `bin_end` - b: the size of the text vocabulary, which a padded table can exceed.
    eos: the id that ends an answer; it is trained, and not needed to sample.
    """

    bin_end: int
    eos: int

    def _problems(self) -> list[str]:
        problems = super()._problems()
        if not BINS <= self.bin_end <= self.vocab_size:
            problems.append(f"bin_end={self.bin_end}, expected {BINS} to vocab_size={self.vocab_size}")
        if not 0 <= self.eos < self.vocab_size:
            problems.append(f"eos={self.eos}, expected an id below vocab_size={self.vocab_size}")
        return problems

    def tokenizer_problems(self, text: Any) -> list[str]:
        """Returns whether the tokenizer ends its answers with another id."""
        return eos_problems(self.eos, text)

    def robot_problems(self, robot: Robot, fast: Any) -> list[str]:
        """Returns whether a robot is normalised otherwise than to [-1, 1], which the bins divide."""
        if robot.normalization == "quantile":
            return []
        return [f"normalization={robot.normalization!r}, expected 'quantile': bins divide [-1, 1]"]

    def released_normalization(self) -> str:
        """Returns "quantile"."""
        return "quantile"

    @classmethod
    def tiny(cls, *, image_size: tuple[int, int] = (64, 64), patch_size: int = 16, **options: Any) -> "OpenVlaConfig":
        """Returns a policy of about a million weights that trains on two CPU cores; options: the other fields."""
        return cls(**{**PaliGemmaConfig.tiny_fields(patch_size=patch_size), "image_size": image_size, **options})

    def create(self, key: Key[Array, ""]) -> "OpenVla":
        """Returns a policy with fresh weights; every weight's draw depends on `key` and its own name only."""
        return OpenVla(self, key)


class OpenVla(Model):
    """The policy: `loss` to train it, `sample_actions` to use it. It has no weights beside its backbone's."""

    config: OpenVlaConfig

    # ---- Training ----------------------------------------------------------------------------------------------------

    def targets(self, batch: Batch) -> tuple[Int[Array, "B T"], Bool[Array, "B T"]]:
        """Returns the ids that are to be written, and which of them there are; the end of the answer is the last."""
        B = batch["prompt"].shape[0]
        mask = batch["action_mask"].reshape(B, -1)
        ids = self.config.bin_end - action_bins(jnp.where(mask, batch["actions"].reshape(B, -1), 0.0))
        ids = jnp.concatenate([ids, jnp.full((B, 1), self.config.eos, jnp.int32)], axis=1)
        return ids, jnp.concatenate([mask, mask.any(1, keepdims=True)], axis=1)

    def token_errors(self, batch: Batch) -> tuple[Float[Array, "B T"], Bool[Array, "B T"]]:
        """Returns the cross-entropy of every token to be written, and which of them there are."""
        ids, real = self.targets(batch)
        return written_errors(self.backbone, self.config.observation(batch), ids, real)[0], real

    def loss(
        self, key: Key[Array, ""], batch: Batch, *, counts: dict[str, Float[Array, ""]] | None = None
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, "B"]]]:
        """Returns the mean cross-entropy of a sample's tokens, then over samples; `key` is not used.

        Metrics: "loss" and "valid". counts: see `loss_counts`.
        """
        self.config.check_inputs(batch, actions=True)
        return masked_means(*self.token_errors(batch), None if counts is None else counts["tokens"])

    def loss_counts(self, batch: Batch) -> dict[str, Float[Array, ""]]:
        """Returns what `loss` divides by. A part of a batch, with the counts of all of it, has its part of the loss."""
        return {"tokens": batch["action_mask"].any((1, 2)).sum().astype(jnp.float32)}

    def validation_losses(self, key: Key[Array, ""], batch: Batch) -> dict[str, Float[Array, ""]]:
        """Returns "loss"."""
        return {"loss": self.loss(key, batch)[0]}

    # ---- Sampling ----------------------------------------------------------------------------------------------------

    def outputs(self, key: Key[Array, ""], batch: Batch) -> Float[Array, "B T"]:
        """Returns the cross-entropy of every token to be written."""
        return self.token_errors(batch)[0]

    def packed(self) -> "OpenVla":
        """Returns the policy with its language model packed: it reads the prompt and writes with the same weights."""
        return self.with_parts(backbone=self.backbone.packed())

    def sample_actions(
        self,
        key: RowKeys,
        observation: Observation,
        *,
        action_mask: Bool[Array, "B A J"] | None = None,
    ) -> Float[Array, "B A J"]:
        """Returns normalised actions: for every entry the likeliest bin, after those written before it.

        Bins alone are scored, so every answer is a chunk. `key` is not used, nothing is drawn.
        action_mask: which entries of the chunk this robot has (None: all); the others are 0. NaN where logits are not
            finite.

        Raises:
            ValueError: the observation does not fit the config; lists everything that does not.
        """
        c = self.config
        c.check_inputs(observation, actions=False)
        B, chunk = observation["prompt"].shape[0], (c.action_horizon, c.action_dim)
        mask = (jnp.ones((B, *chunk), bool) if action_mask is None else action_mask).reshape(B, -1)
        policy, T = self.packed(), mask.shape[1]
        x, cache = policy.backbone.prefill(observation, max_new=T)
        rows = slice(c.bin_end - BINS, c.bin_end)

        def body(i: jax.Array, carry: Any) -> Any:
            x, cache, bins, sound = carry
            logits = policy.backbone.vlm.logits(x[:, None], rows=rows)[:, 0, ::-1]
            b = jnp.argmax(logits, axis=-1).astype(jnp.int32)  # bin b + 1
            written = mask[:, i]
            sound &= jnp.isfinite(logits).all(1) | ~written
            new_x, cache = policy.backbone.extend(c.bin_end - 1 - b, cache, valid_B=written)
            return jnp.where(written[:, None], new_x, x), cache, bins.at[:, i].set(b), sound

        start = (x, cache, jnp.zeros((B, T), jnp.int32), jnp.ones(B, bool))
        _, _, bins, sound = jax.lax.fori_loop(0, T, body, start)
        actions = jnp.where(sound[:, None], jnp.asarray(bin_centres())[bins], jnp.nan)
        return jnp.where(mask, actions, 0.0).reshape(B, *chunk)
