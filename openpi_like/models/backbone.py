"""Backbones: what sees images and reads text before a policy acts; and writes text, where that is asked for.

A sequence is the tokens of all cameras and text. Where each camera's tokens stand among those of the text is the same
for all samples (`VisionLanguageConfig.image_slots`): before all of it in PaliGemma, inside of the chat in others. Text
is a prefix, and a suffix, whose tokens see everything before them: captions, answers, subtasks. What the tokens of the
prefix see of each other is the backbone's: all in PaliGemma, those before them in others.

A policy can put tokens of its own behind those of the last camera (`embed_prefix`), and behind everything
(`run_queries`). Things around the robot stand behind the cameras, too: as observations have them or, with a perception,
as it sees them in what the towers make of the images (`looked`).

A new backbone is one file: a config (`backbone_config.BackboneConfig`), a module that says how images become tokens and
which language model reads them (`Backbone`), and the names that its weights have in published files.

Letters: B batch, C cameras, S text tokens, P image tokens, E tokens behind the last camera, Q queries, D width,
V vocabulary, L layers, T tokens up to the last of the images.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Shaped

from openpi_like.batch import Batch, Observation, TextBatch
from openpi_like.models.decoding import Decoding
from openpi_like.models.entities import EntityProjectors
from openpi_like.models.gemma import attention_mask, token_positions
from openpi_like.models.language import Behind, KVCache, LanguageModel
from openpi_like.models.sequences import Embedded, Seen, answers, given_beside
from openpi_like.partition import pin

if TYPE_CHECKING:
    from openpi_like.models.scene_perception import ScenePerception


class Backbone(Decoding):
    """Images and text to tokens: `language` to run them, `text_loss` to train text, `generate` to write it.

    A subclass declares its parts, the language model as `vlm`, and says how images become tokens. causal: whether
    tokens of the prefix see those before them only. towers: which of its parts look at images alone; one of those that
    are named here may be absent.
    """

    config: Any  # VisionLanguageConfig, whose module imports this one
    vlm: LanguageModel
    causal: bool = False
    towers: tuple[str, ...] = ("vision",)
    entities: EntityProjectors | None = None  # where the config has slots of things
    perception: "ScenePerception | None" = None  # where it sees these for itself

    def embed_images(
        self, images_BHWC: Float[Array, "B height width 3"], language_BD: Float[Array, "B D"] | None
    ) -> tuple[Float[Array, "B P D"], tuple[Float[Array, "B P D"], ...]]:
        """Returns one image's tokens in the language model's width, and what `Embedded.deep` takes of them.

        images: float32 in [-1, 1], RGB. language: of each image, see `image_condition`.
        """
        raise NotImplementedError

    def image_condition(self, observation: Observation | TextBatch | Batch) -> Float[Array, "B D"] | None:
        """Returns what images are seen with, of the prompt without its answer; most backbones see them without."""
        return None

    def positions(self, valid_BS: Bool[Array, "B S"]) -> Int[Array, "*axes B S"]:
        """Returns the positions of a sequence that begins with cameras and text and may go on after them.

        A token that is not valid has none that is greater than those before it.
        """
        return token_positions(valid_BS)

    # ---- Tokens ------------------------------------------------------------------------------------------------------

    def see(self, observation: Observation | TextBatch | Batch) -> Seen:
        """Returns the tokens of all cameras."""
        cameras = self.config.cameras
        images = jnp.stack([to_float(observation["images"][c]) for c in cameras], axis=1)
        # Cameras are the minor axis of the merged batch: a batch split over devices stays where it is.
        B, C = images.shape[:2]
        language = self.image_condition(observation)
        if language is not None:
            language = jnp.repeat(language, C, axis=0)
        tokens, deep = self.embed_images(images.reshape(B * C, *images.shape[2:]), language)
        by_camera = lambda x: x.reshape(B, C, *x.shape[1:])  # noqa: E731
        there = jnp.stack([observation["image_mask"][c] for c in cameras], axis=1)
        return Seen(by_camera(tokens), there, tuple(by_camera(x) for x in deep))

    def looked(self, observation: Observation | TextBatch | Batch) -> Any:
        """Returns an observation with what the towers see ("seen") and, with a perception, what that sees as entities.

        One that was looked at is as it is: whoever has need of that twice looks once, and may choose what is read.
        """
        if "seen" in observation:
            return observation
        seen = self.see(observation)
        return {**observation, "seen": seen, **({} if self.perception is None else self.perception(seen).entities())}

    def embed_prefix(
        self, observation: Observation | TextBatch | Batch, after_images: Float[Array, "B E D"] | None = None
    ) -> Embedded:
        """Returns the tokens of cameras, in config order, and text, each where it stands.

        Behind those of the last camera come tokens of the things around the robot, where the config has such.
        after_images: further tokens, valid in every row, behind these.
        """
        text, text_mask = self.vlm.embed(observation["prompt"]), observation["prompt_mask"]
        looked = self.looked(observation)
        seen: Seen = looked["seen"]
        extra, extra_valid = self._behind_images(looked, after_images, seen.tokens.dtype)
        nothing = None if extra is None else jnp.zeros_like(extra)
        return Embedded(
            pin(self.splice(seen.tokens, text, extra), "batch", None, None),
            self.splice(jnp.broadcast_to(seen.there[..., None], seen.tokens.shape[:3]), text_mask, extra_valid),
            tuple(self.splice(x, jnp.zeros_like(text), nothing) for x in seen.deep),
        )

    def _behind_images(
        self, observation: Any, after_images: Float[Array, "B E D"] | None, dtype: Any
    ) -> tuple[Float[Array, "B E2 D"], Bool[Array, "B E2"]] | tuple[None, None]:
        """Returns the tokens behind the last camera, and which are valid; None where there are none."""
        tokens, valid = [], []
        if self.entities is not None:
            things, there = self.entities(observation["entities"], observation["entity_mask"])
            tokens, valid = [things.astype(dtype)], [there]
        if after_images is not None:
            tokens, valid = [*tokens, after_images.astype(dtype)], [*valid, jnp.ones(after_images.shape[:2], bool)]
        if not tokens:
            return None, None
        return jnp.concatenate(tokens, axis=1), jnp.concatenate(valid, axis=1)

    def splice(
        self,
        images: Shaped[Array, "B C P *D"],
        text: Shaped[Array, "B S *D"],
        after_images: Shaped[Array, "B E *D"] | None = None,
    ) -> Shaped[Array, "B S2 *D"]:
        """Returns one sequence of what belongs to images, to text, and to tokens behind the last image."""
        B, C, P = images.shape[:3]
        extra = [] if after_images is None else [after_images]
        slots = self.config.image_slots
        if not slots:
            return jnp.concatenate([images.reshape(B, C * P, *images.shape[3:]), *extra, text], axis=1)
        parts = []
        for i, (start, end) in enumerate(zip((0, *slots), (*slots, text.shape[1]), strict=True)):
            parts += [*(extra if i == C else []), text[:, start:end], *([images[:, i]] if i < C else [])]
        return jnp.concatenate(parts, axis=1)

    def image_starts(self) -> tuple[int, ...]:
        """Returns where the tokens of each camera begin in a sequence."""
        P, slots = self.image_tokens, self.config.image_slots or (0,) * len(self.config.cameras)
        return tuple(i * P + slot for i, slot in enumerate(slots))

    @property
    def image_tokens(self) -> int:
        """P."""
        return self.config.backbone.image_tokens(self.config.image_size)

    def text_of(self, x: Shaped[Array, "B S *D"], text_len: int) -> Shaped[Array, "B T *D"]:
        """Returns what belongs to the `text_len` tokens of text: takes out of a sequence what `splice` put in."""
        slots, P = self.config.image_slots, self.image_tokens
        if not slots:
            return x[:, x.shape[1] - text_len :]
        extra = x.shape[1] - text_len - len(slots) * P
        text = np.arange(text_len)
        return x[:, text + P * np.searchsorted(slots, text, side="right") + extra * (text >= slots[-1])]

    def text_slots(self, marked_BS: Bool[Array, "B S"], length: int) -> Bool[Array, "B length"]:
        """Returns which of a sequence of `length` are marked tokens of text; all others are not."""
        (B, S), C, P = marked_BS.shape, len(self.config.cameras), self.image_tokens
        extra = jnp.zeros((B, length - S - C * P), bool)
        return self.splice(jnp.zeros((B, C, P), bool), marked_BS, extra)

    # ---- Training ----------------------------------------------------------------------------------------------------

    def language(
        self, batch: TextBatch | Batch, *, count_masked: bool = False
    ) -> tuple[Float[Array, "B S D"], KVCache, Bool[Array, "B S"]]:
        """Runs images and text; returns tokens after the final norm, their keys and values, and which are valid.

        count_masked: number the positions of masked slots too.
        """
        tokens, valid, deep = self.embed_prefix(batch)
        starts = self.text_slots(batch["prompt_causal"], valid.shape[1])
        positions = self.positions(jnp.ones_like(valid) if count_masked else valid)
        with jax.named_scope("vlm"):
            out, kv = self.run(Embedded(tokens, valid, deep), self.mask(valid, starts), self.vlm.rope(positions))
        return out, kv, valid

    def mask(self, valid_BS: Bool[Array, "B S"], starts_BS: Bool[Array, "*B S"]) -> Bool[Array, "B S S"]:
        """Returns which token sees which, see `attention_mask`; a causal backbone begins a block with every token."""
        return attention_mask(valid_BS, jnp.ones_like(starts_BS) if self.causal else starts_BS)

    def run(
        self, sequence: Embedded, mask_BST: Bool[Array, "B S T"], rope_2BSh: Float[Array, "2 B S half"]
    ) -> tuple[Float[Array, "B S D"], KVCache]:
        """Returns tokens after the final norm, and their keys and values."""
        return self.vlm(sequence.tokens, mask_BST, rope_2BSh, **given_beside(sequence))

    def keys_values(
        self, sequence: Embedded, mask_BSS: Bool[Array, "B S S"], rope_2BSh: Float[Array, "2 B S half"]
    ) -> KVCache:
        """Returns the keys and values of `run` alone, without what only a gradient would need."""
        return self.vlm.prefill(sequence.tokens, mask_BSS, rope_2BSh, **given_beside(sequence))

    def text_logits(self, batch: TextBatch | Batch, *, count_masked: bool = False) -> Float[Array, "B S V"]:
        """Returns float32 logits at every text token, each for the token after it.

        Raises:
            ValueError: the batch does not fit the config; lists everything that does not.
        """
        self.config.check(batch, answers=True)
        out, _, _ = self.language(batch, count_masked=count_masked)
        return self.vlm.logits(self.text_of(out, batch["prompt"].shape[1]))

    def text_samples(self, batch: TextBatch | Batch) -> Float[Array, ""]:
        """Returns how many samples of a batch have a token to predict, see `text_loss`."""
        return text_targets(batch).any(1).sum().astype(jnp.float32)

    def text_loss(
        self, batch: TextBatch | Batch, *, count_masked: bool = False, samples: Float[Array, ""] | None = None
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, "B"]]]:
        """Returns the mean cross-entropy of the tokens marked by `prompt_loss`, and per-sample metrics.

        A sample's loss is the mean over its marked tokens; the scalar is the mean over samples that have any. Metrics:
        "loss", and "valid" (1.0, or 0.0 for a sample without marked tokens, whose loss is 0). The first text token
        follows an image and is never predicted.
        samples: by how many to divide, see `masked_means`.

        Raises:
            ValueError: the batch does not fit the config; lists everything that does not.
        """
        self.config.check(batch, answers=True)
        return masked_means(*self.text_errors(self.language(batch, count_masked=count_masked)[0], batch), samples)

    def text_errors(
        self, out_BSD: Float[Array, "B S D"], batch: TextBatch | Batch
    ) -> tuple[Float[Array, "B T"], Bool[Array, "B T"]]:
        """Returns the cross-entropy of text tokens, and which are marked, for tokens after the final norm.

        Where answers have a length of their own, that many tokens are looked at, the marked ones first; a sample with
        more of them, which no tokenizer of ours makes, gets NaN.
        """
        x_BSD = self.text_of(out_BSD, batch["prompt"].shape[1])[:, :-1]
        targets, mask = batch["prompt"][:, 1:], text_targets(batch)
        T = self.config.answer_len
        if not 0 < T < mask.shape[1]:
            return self.vlm.token_losses(x_BSD, targets), mask
        chosen = jnp.argsort(~mask, axis=1, stable=True)[:, :T]
        take = lambda x: jnp.take_along_axis(x, chosen, axis=1)  # noqa: E731
        x_BTD = jnp.take_along_axis(x_BSD, chosen[..., None], axis=1)
        losses = self.vlm.token_losses(x_BTD, take(targets))
        return jnp.where(mask.sum(1, keepdims=True) > T, jnp.nan, losses), take(mask)

    # ---- Queries -----------------------------------------------------------------------------------------------------

    def run_queries(
        self,
        observation: Observation | TextBatch | Batch,
        queries_BQD: Float[Array, "B Q D"],
        after_images: Float[Array, "B E D"] | None = None,
        *,
        bidirectional: bool = False,
        everything_sees_everything: bool = False,
    ) -> tuple[Float[Array, "B S D"], Bool[Array, "B S"]]:
        """Runs cameras, text and queries; returns all tokens after the final norm, queries last, and which are valid.

        queries: embeddings that stand behind everything, valid in every row, and see all that is valid before them.
        after_images: see `embed_prefix`. bidirectional: queries see all queries, not those before them only.
        everything_sees_everything: what is valid sees all that is valid, queries and prefix.
        """
        who = {"bidirectional": bidirectional, "everything_sees_everything": everything_sees_everything}
        sequence, mask, rope = self._with_queries(observation, queries_BQD, after_images, **who)
        with jax.named_scope("vlm"):
            return self.run(sequence, mask, rope)[0], sequence.valid

    def hidden_states(
        self,
        observation: Observation | TextBatch | Batch,
        layers: Sequence[int],
        *,
        queries_BQD: Float[Array, "B Q D"] | None = None,
        after_images: Float[Array, "B E D"] | None = None,
        bidirectional: bool = False,
        everything_sees_everything: bool = False,
    ) -> tuple[Float[Array, "n B S D"], Bool[Array, "B S"]]:
        """Returns all tokens at some layers, and which are valid.

        layers: 0 for what the first layer is given, i for what is behind layer i, and for the last of them behind the
            final norm. The rest as in `run_queries`.
        """
        B, D = observation["prompt"].shape[0], self.config.backbone.language.width
        queries = jnp.zeros((B, 0, D)) if queries_BQD is None else queries_BQD
        who = {"bidirectional": bidirectional, "everything_sees_everything": everything_sees_everything}
        sequence, mask, rope = self._with_queries(observation, queries, after_images, **who)
        with jax.named_scope("vlm"):
            states = self.vlm.hidden_states(sequence.tokens, mask, rope, **given_beside(sequence))
        return states[np.asarray(layers)], sequence.valid

    def _with_queries(
        self,
        observation: Observation | TextBatch | Batch,
        queries_BQD: Float[Array, "B Q D"],
        after_images: Float[Array, "B E D"] | None,
        *,
        bidirectional: bool = False,
        everything_sees_everything: bool = False,
    ) -> tuple[Embedded, Bool[Array, "B S S"], Float[Array, "2 B S half"]]:
        """Returns a sequence, what sees what in it, and its rotations; see `run_queries`."""
        prefix = self.embed_prefix(observation, after_images)
        (B, S), Q = prefix.valid.shape, queries_BQD.shape[1]
        behind = lambda x, value: jnp.pad(x, [(0, 0), (0, Q), (0, 0)][: x.ndim], constant_values=value)  # noqa: E731
        tokens = jnp.concatenate([prefix.tokens, queries_BQD.astype(prefix.tokens.dtype)], axis=1)
        valid = behind(prefix.valid, True)
        if everything_sees_everything:
            mask = attention_mask(valid, jnp.zeros_like(valid))
        else:
            starts = jnp.ones((B, S), bool) if self.causal else self.text_slots(answers(observation), S)
            own = jnp.asarray(np.arange(Q) == 0 if bidirectional else np.ones(Q, bool))
            mask = attention_mask(valid, jnp.concatenate([starts, jnp.broadcast_to(own, (B, Q))], axis=1))
        deep = tuple(behind(x, 0) for x in prefix.deep)
        return Embedded(tokens, valid, deep), mask, self.vlm.rope(self.positions(valid))

    # ---- Images alone ------------------------------------------------------------------------------------------------

    @property
    def images_first(self) -> bool:
        """Whether what images become depends on nothing that stands behind them, so that it can be kept for a frame."""
        return self.causal and len(set(self.config.image_slots or (0,))) == 1 and self.entities is None

    def image_states(self, observation: Observation | TextBatch | Batch) -> Float[Array, "L1 B T D"]:
        """Returns the tokens up to the last of the images as `hidden_states`, of all layers, where `images_first`.

        T: image tokens of all cameras, and the text before them, which is the same for every prompt.
        """
        begin = slice(0, self.image_starts()[0])
        before: Any = {**observation, **{k: observation[k][:, begin] for k in ("prompt", "prompt_mask")}}
        B, D = observation["prompt"].shape[0], self.config.backbone.language.width
        sequence, mask, rope = self._with_queries(before, jnp.zeros((B, 0, D)), None)
        with jax.named_scope("vlm"):
            return self.vlm.hidden_states(sequence.tokens, mask, rope, **given_beside(sequence))

    def states_behind(
        self,
        observation: Observation | TextBatch | Batch,
        images_LBTD: Float[Array, "L1 B T D"],
        queries_BQD: Float[Array, "B Q D"],
    ) -> tuple[Float[Array, "L1 B S D"], Bool[Array, "B T"]]:
        """Returns text behind images, then queries, as `hidden_states`, of all layers; and which of the T are valid.

        images: what `image_states` returns. queries: as in `run_queries`.
        """
        C, P, first = len(self.config.cameras), self.image_tokens, self.image_starts()[0]
        B, T = images_LBTD.shape[1:3]
        text, text_mask = observation["prompt"][:, first:], observation["prompt_mask"]
        seen = jnp.stack([observation["image_mask"][c] for c in self.config.cameras], axis=1)
        seen_BT = self.splice(jnp.broadcast_to(seen[..., None], (B, C, P)), text_mask[:, :first])
        valid = jnp.concatenate([seen_BT, text_mask[:, first:], jnp.ones(queries_BQD.shape[:2], bool)], axis=1)
        tokens = self.vlm.embed(text)
        tokens = jnp.concatenate([tokens, queries_BQD.astype(tokens.dtype)], axis=1)
        mask, rope = self.mask(valid, jnp.ones_like(valid)), self.vlm.rope(self.positions(valid))
        behind = Behind(images_LBTD[:-1], rope[:, :, :T])
        with jax.named_scope("vlm"):
            return self.vlm.hidden_states(tokens, mask[:, T:], rope[:, :, T:], behind=behind), seen_BT

    def packed(self) -> Any:
        """Returns the same backbone with its language model packed, see `Gemma.packed`."""
        packed = self.vlm.packed()
        if packed is self.vlm:
            return self
        backbone = nnx.merge(*nnx.split(self))
        backbone.vlm = packed
        return backbone


def text_targets(batch: TextBatch | Batch) -> Bool[Array, "B T"]:
    """Returns which text tokens are to be predicted; the first cannot be."""
    return batch["prompt_loss"][:, 1:] & batch["prompt_mask"][:, 1:]


def to_float(image: jax.Array) -> jax.Array:
    """Returns an image in [-1, 1]; float images are in that range already."""
    return image.astype(jnp.float32) / 255.0 * 2.0 - 1.0 if image.dtype == jnp.uint8 else image


def masked_means(
    error_BX: Float[Array, "B *X"], mask_BX: Bool[Array, "B *X"], samples: Float[Array, ""] | None = None
) -> tuple[Float[Array, ""], dict[str, Float[Array, "B"]]]:
    """Returns the mean over samples of the mean over valid entries, and the per-sample "loss" and "valid".

    samples: by how many to divide; None counts those that have any valid entry.
    """
    axes = tuple(range(1, mask_BX.ndim))
    count = mask_BX.sum(axes).astype(jnp.float32)
    per_sample = jnp.where(mask_BX, error_BX, 0.0).sum(axes) / jnp.maximum(count, 1.0)
    valid = (count > 0).astype(jnp.float32)
    total = valid.sum() if samples is None else samples
    return per_sample.sum() / jnp.maximum(total, 1.0), {"loss": per_sample, "valid": valid}
