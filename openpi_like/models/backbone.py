"""Backbones: what sees images and reads text before a policy acts; and writes text, where that is asked for.

A sequence is the tokens of all cameras and text. Where each camera's tokens stand among those of the text is the same
for all samples (`VisionLanguageConfig.image_slots`): before all of it in PaliGemma, inside of the chat in others. Text
is a prefix, and a suffix, whose tokens see everything before them: captions, answers, subtasks. What the tokens of the
prefix see of each other is the backbone's: all in PaliGemma, those before them in others.

A new backbone is one file: a config (`BackboneConfig`), a module that says how images become tokens and which language
model reads them (`Backbone`), and the names that its weights have in published files.

Letters: B batch, C cameras, S text tokens, P image tokens, D width, V vocabulary, L layers, T slots of a cache.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key, Shaped

from openpi_like.batch import Array as Leaf
from openpi_like.batch import Batch, Observation, TextBatch
from openpi_like.draws import row_keys
from openpi_like.models.formats import Format
from openpi_like.models.gemma import attention_mask, token_positions
from openpi_like.models.language import KVCache, LanguageModel
from openpi_like.partition import pin

EOS = 1


# ---- Protocols -------------------------------------------------------------------------------------------------------


@runtime_checkable
class StackSizes(Protocol):
    """What others need to know of a language model's layers."""

    @property
    def width(self) -> int: ...
    @property
    def depth(self) -> int: ...
    @property
    def num_heads(self) -> int: ...
    @property
    def num_kv_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...


@runtime_checkable
class BackboneConfig(Protocol):
    """Sizes of a backbone; a frozen dataclass of this package, so that a checkpoint can hold it."""

    @property
    def language(self) -> StackSizes:
        """Sizes of the language model, which action experts read keys and values of."""
        ...

    def problems(self, image_size: tuple[int, int]) -> list[str]:
        """Returns what does not fit images of this many pixels."""
        ...

    def create(self, config: Any, key: Key[Array, ""]) -> "Backbone":
        """Returns the module with fresh weights. config: of the model it is a part of, a `VisionLanguageConfig`."""
        ...

    def formats(self, vocab_size: int) -> Mapping[str, Format]:
        """Returns the published layouts that hold its weights."""
        ...


# ---- Sequences -------------------------------------------------------------------------------------------------------


class Embedded(NamedTuple):
    """A sequence before the language model. tokens: (B, S, D). valid: (B, S).

    deep: what is added to the tokens after the first layers, each (B, S, D); most backbones have none.
    """

    tokens: Leaf
    valid: Leaf
    deep: tuple[Leaf, ...] = ()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TextCache:
    """What decoding has seen so far.

    kv: keys and values, (L, B, T, K, H). valid: (B, T), slots that hold a token. slot: (), where the next token goes,
    the same for all rows. position: (B,), its position, which differs where prompts differ in length.
    """

    kv: Any  # KVCache
    valid: Leaf
    slot: Leaf
    position: Leaf


class Backbone(nnx.Module):
    """Images and text to tokens: `language` to run them, `text_loss` to train text, `generate` to write it.

    A subclass declares its parts, the language model as `vlm`, and says how images become tokens. causal: whether
    tokens of the prefix see those before them only.
    """

    config: Any  # VisionLanguageConfig, whose module imports this one
    vlm: LanguageModel
    causal: bool = False

    def embed_images(
        self, images_BHWC: Float[Array, "B height width 3"]
    ) -> tuple[Float[Array, "B P D"], tuple[Float[Array, "B P D"], ...]]:
        """Returns one image's tokens in the language model's width, and what `Embedded.deep` takes of them.

        images: float32 in [-1, 1], RGB.
        """
        raise NotImplementedError

    def positions(self, valid_BS: Bool[Array, "B S"]) -> Int[Array, "*axes B S"]:
        """Returns the positions of a sequence that begins with cameras and text and may go on after them."""
        return token_positions(valid_BS)

    # ---- Tokens ------------------------------------------------------------------------------------------------------

    def embed_prefix(self, observation: Observation | TextBatch) -> Embedded:
        """Returns the tokens of cameras, in config order, and text, each where it stands."""
        cameras = self.config.cameras
        images = jnp.stack([_to_float(observation["images"][c]) for c in cameras], axis=1)
        # Cameras are the minor axis of the merged batch: a batch split over devices stays where it is.
        B, C = images.shape[:2]
        tokens, deep = self.embed_images(images.reshape(B * C, *images.shape[2:]))
        P, D = tokens.shape[1:]
        seen = jnp.stack([observation["image_mask"][c] for c in cameras], axis=1)
        text = self.vlm.embed(observation["prompt"])
        by_camera = lambda x: x.reshape(B, C, P, D)  # noqa: E731
        return Embedded(
            pin(self.splice(by_camera(tokens), text), "batch", None, None),
            self.splice(jnp.broadcast_to(seen[..., None], (B, C, P)), observation["prompt_mask"]),
            tuple(self.splice(by_camera(x), jnp.zeros_like(text)) for x in deep),
        )

    def splice(self, images: Shaped[Array, "B C P *D"], text: Shaped[Array, "B S *D"]) -> Shaped[Array, "B S2 *D"]:
        """Returns one sequence of what belongs to images and to text, each where it stands."""
        B, C, P = images.shape[:3]
        slots = self.config.image_slots
        if not slots:
            return jnp.concatenate([images.reshape(B, C * P, *images.shape[3:]), text], axis=1)
        parts = []
        for i, (start, end) in enumerate(zip((0, *slots), (*slots, text.shape[1]), strict=True)):
            parts += [text[:, start:end], *([images[:, i]] if i < C else [])]
        return jnp.concatenate(parts, axis=1)

    def text_of(self, x: Shaped[Array, "B S *D"], text_len: int) -> Shaped[Array, "B T *D"]:
        """Returns what belongs to the `text_len` tokens of text: takes out of a sequence what `splice` put in."""
        slots = self.config.image_slots
        if not slots:
            return x[:, x.shape[1] - text_len :]
        P = (x.shape[1] - text_len) // len(slots)
        return x[:, np.arange(text_len) + P * np.searchsorted(slots, np.arange(text_len), side="right")]

    def text_slots(self, marked_BS: Bool[Array, "B S"], length: int) -> Bool[Array, "B length"]:
        """Returns which of a sequence of `length` are marked tokens of text; images are not."""
        C = len(self.config.cameras)
        none = jnp.zeros((marked_BS.shape[0], C, (length - marked_BS.shape[1]) // C), bool)
        return self.splice(none, marked_BS)

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
        extra: dict[str, Any] = {"deepstack": sequence.deep} if sequence.deep else {}
        return self.vlm(sequence.tokens, mask_BST, rope_2BSh, **extra)

    def keys_values(
        self, sequence: Embedded, mask_BSS: Bool[Array, "B S S"], rope_2BSh: Float[Array, "2 B S half"]
    ) -> KVCache:
        """Returns the keys and values of `run` alone, without what only a gradient would need."""
        extra: dict[str, Any] = {"deepstack": sequence.deep} if sequence.deep else {}
        return self.vlm.prefill(sequence.tokens, mask_BSS, rope_2BSh, **extra)

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

    # ---- Decoding ----------------------------------------------------------------------------------------------------

    def prefill(
        self,
        observation: Observation,
        *,
        max_new: int,
        begin: Int[Array, "I"] | None = None,
        skip: int = 0,
    ) -> tuple[Float[Array, "B D"], TextCache]:
        """Returns the last token after the final norm, and a cache with room for `max_new` tokens.

        The prompt is all prefix; padding may stand anywhere but its tokens are seen by nobody.
        begin: tokens that every answer begins with. skip: positions to leave out before the answer.
        """
        self.config.check(observation)
        tokens, valid, deep = self.embed_prefix(observation)
        B, I = tokens.shape[0], 0 if begin is None else begin.shape[0]  # noqa: E741
        starts, positions = jnp.zeros((B, tokens.shape[1] + I), bool), self.positions(valid)
        if begin is not None and I:
            said = jnp.broadcast_to(begin, (B, I))
            tokens = jnp.concatenate([tokens, self.vlm.embed(said)], axis=1)
            valid = jnp.pad(valid, ((0, 0), (0, I)), constant_values=True)
            starts = starts.at[:, -I:].set(True)
            deep = tuple(jnp.pad(x, ((0, 0), (0, I), (0, 0))) for x in deep)
            positions = self.positions(valid) + skip * starts
        out, kv = self.run(Embedded(tokens, valid, deep), self.mask(valid, starts), self.vlm.rope(positions))
        S = valid.shape[1]
        last = S - 1 - jnp.argmax(valid[:, ::-1], axis=1)  # slot of the last valid token
        room = lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, max_new), (0, 0), (0, 0)))  # noqa: E731
        return jnp.take_along_axis(out, last[:, None, None], axis=1)[:, 0], TextCache(
            kv=jax.tree.map(room, kv),
            valid=jnp.pad(valid, ((0, 0), (0, max_new))),
            slot=jnp.int32(S),
            position=valid.sum(axis=1, dtype=jnp.int32) + skip,
        )

    def extend(self, tokens_B: Int[Array, "B"], cache: TextCache) -> tuple[Float[Array, "B D"], TextCache]:
        """Returns one more token of each row after the final norm, and the cache with it."""
        x_B1D = self.vlm.embed(tokens_B[:, None])
        mask_B1T = jnp.concatenate([cache.valid, jnp.ones((tokens_B.shape[0], 1), bool)], axis=1)[:, None]
        out, own = self.vlm(x_B1D, mask_B1T, self.vlm.rope(cache.position[:, None]), past=cache.kv)
        write = lambda old, new: jax.lax.dynamic_update_slice_in_dim(old, new, cache.slot, axis=2)  # noqa: E731
        kv: KVCache = jax.tree.map(write, cache.kv, own)
        valid = jax.lax.dynamic_update_slice_in_dim(
            cache.valid, jnp.ones((tokens_B.shape[0], 1), bool), cache.slot, axis=1
        )
        return out[:, 0], TextCache(kv, valid, cache.slot + 1, cache.position + 1)

    def next_logits(self, x_BD: Float[Array, "B D"]) -> Float[Array, "B V"]:
        """Returns the logits of the token after these."""
        return self.vlm.logits(x_BD[:, None])[:, 0]

    def generate(
        self, key: Key[Array, ""], observation: Observation, *, max_new: int, temperature: float = 0.0, skip: int = 0
    ) -> tuple[Int[Array, "B new"], Bool[Array, "B new"]]:
        """Returns new token ids, 0 after the end, and the mask of real ones (the end-of-sequence token included).

        Stops when every row has ended. temperature: 0 takes the likeliest token; otherwise row i draws its token s
        with `fold_in(fold_in(key, i), s)`. skip: see `prefill`.
        """
        x, cache = self.prefill(observation, max_new=max_new, skip=skip)
        B = x.shape[0]

        def going(carry: Any) -> jax.Array:
            step, _, _, ended, _, _ = carry
            return (step < max_new) & ~ended.all()

        def body(carry: Any) -> Any:
            step, x, cache, ended, ids, mask = carry
            token = choose_token(key, step, self.next_logits(x), temperature)
            token = jnp.where(ended, 0, token)
            ids, mask = ids.at[:, step].set(token), mask.at[:, step].set(~ended)
            x, cache = self.extend(token, cache)
            return step + 1, x, cache, ended | (token == EOS), ids, mask

        start = (jnp.int32(0), x, cache, jnp.zeros(B, bool))
        empty = (jnp.zeros((B, max_new), jnp.int32), jnp.zeros((B, max_new), bool))
        return jax.lax.while_loop(going, body, (*start, *empty))[-2:]

    def packed(self) -> Any:
        """Returns the same backbone with its language model packed, see `Gemma.packed`."""
        packed = self.vlm.packed()
        if packed is self.vlm:
            return self
        backbone = nnx.merge(*nnx.split(self))
        backbone.vlm = packed
        return backbone


def choose_token(
    key: Key[Array, ""], step: Int[Array, ""], logits_BV: Float[Array, "B V"], temperature: float
) -> Int[Array, "B"]:
    """Returns the likeliest token per row at temperature 0, else row i's draw with `fold_in(fold_in(key, i), step)`."""
    if temperature == 0:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)

    def draw(row_key: jax.Array, logits: jax.Array) -> jax.Array:
        return jax.random.categorical(jax.random.fold_in(row_key, step), logits / temperature)

    return jax.vmap(draw)(row_keys(key, logits_BV.shape[0]), logits_BV).astype(jnp.int32)


def text_targets(batch: TextBatch | Batch) -> Bool[Array, "B T"]:
    """Returns which text tokens are to be predicted; the first cannot be."""
    return batch["prompt_loss"][:, 1:] & batch["prompt_mask"][:, 1:]


def _to_float(image: jax.Array) -> jax.Array:
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
