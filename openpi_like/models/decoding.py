"""Writing text behind a prompt, token by token, with a cache of keys and values.

Letters: B batch, S tokens, D width, V vocabulary, L layers, T slots of a cache, I tokens that every answer begins with.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from openpi_like.batch import Array as Leaf
from openpi_like.batch import Observation
from openpi_like.draws import RowKeys, row_keys
from openpi_like.models.language import KVCache, LanguageModel
from openpi_like.models.sequences import Embedded, answers, with_thought

EOS = 1


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


class Decoding(nnx.Module):
    """What a backbone writes text with. It has the parts that are named here."""

    config: Any
    vlm: LanguageModel

    embed_prefix: Callable[..., Embedded]
    positions: Callable[..., jax.Array]
    text_slots: Callable[..., jax.Array]
    mask: Callable[..., jax.Array]
    run: Callable[..., tuple[jax.Array, KVCache]]

    def prefill(
        self,
        observation: Observation,
        *,
        max_new: int,
        begin: Int[Array, "I"] | None = None,
        skip: int = 0,
    ) -> tuple[Float[Array, "B D"], TextCache]:
        """Returns the last token after the final norm, and a cache with room for `max_new` tokens.

        The prompt is all prefix, but for a thought behind it; padding may stand anywhere but its tokens are seen by
        nobody.
        begin: tokens that every answer begins with. skip: positions to leave out before the answer.
        """
        self.config.check(observation)
        observation = with_thought(observation)
        tokens, valid, deep = self.embed_prefix(observation)
        B, I = tokens.shape[0], 0 if begin is None else begin.shape[0]  # noqa: E741
        starts = self.text_slots(answers(observation), tokens.shape[1])
        starts, positions = jnp.pad(starts, ((0, 0), (0, I))), self.positions(valid)
        if begin is not None and I:
            said = jnp.broadcast_to(begin, (B, I))
            tokens = jnp.concatenate([tokens, self.vlm.embed(said)], axis=1)
            valid = jnp.pad(valid, ((0, 0), (0, I)), constant_values=True)
            starts = starts.at[:, -I:].set(True)
            deep = tuple(jnp.pad(x, ((0, 0), (0, I), (0, 0))) for x in deep)
            positions = self.positions(valid)
        rope = self.vlm.rope(positions + skip * starts)
        out, kv = self.run(Embedded(tokens, valid, deep), self.mask(valid, starts), rope)
        S = valid.shape[1]
        last = S - 1 - jnp.argmax(valid[:, ::-1], axis=1)  # slot of the last valid token
        room = lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, max_new), (0, 0), (0, 0)))  # noqa: E731
        return jnp.take_along_axis(out, last[:, None, None], axis=1)[:, 0], TextCache(
            kv=jax.tree.map(room, kv),
            valid=jnp.pad(valid, ((0, 0), (0, max_new))),
            slot=jnp.int32(S),
            position=_last(positions) + 1 + skip,
        )

    def extend(
        self, tokens_B: Int[Array, "B"], cache: TextCache, *, valid_B: Bool[Array, "B"] | None = None
    ) -> tuple[Float[Array, "B D"], TextCache]:
        """Returns one more token of each row after the final norm, and the cache with it.

        valid: False for rows that get none: what is returned for them means nothing, and nobody sees it. None: all do.
        """
        new_B = jnp.ones(tokens_B.shape[0], bool) if valid_B is None else valid_B
        x_B1D = self.vlm.embed(tokens_B[:, None])
        mask_B1T = jnp.concatenate([cache.valid, jnp.ones_like(new_B)[:, None]], axis=1)[:, None]
        out, own = self.vlm(x_B1D, mask_B1T, self.vlm.rope(cache.position[:, None]), past=cache.kv)
        write = lambda old, new: jax.lax.dynamic_update_slice_in_dim(old, new, cache.slot, axis=2)  # noqa: E731
        kv: KVCache = jax.tree.map(write, cache.kv, own)
        valid = jax.lax.dynamic_update_slice_in_dim(cache.valid, new_B[:, None], cache.slot, axis=1)
        return out[:, 0], TextCache(kv, valid, cache.slot + 1, cache.position + new_B)

    def next_logits(self, x_BD: Float[Array, "B D"]) -> Float[Array, "B V"]:
        """Returns the logits of the token after these."""
        return self.vlm.logits(x_BD[:, None])[:, 0]

    def generate(
        self,
        key: Key[Array, ""],
        observation: Observation,
        *,
        max_new: int,
        temperature: float = 0.0,
        skip: int = 0,
        ends: Callable[[Int[Array, "B"]], Bool[Array, "B"]] = lambda token: token == EOS,
    ) -> tuple[Int[Array, "B new"], Bool[Array, "B new"]]:
        """Returns new token ids, 0 after the end, and the mask of real ones (what ends the answer included).

        Stops when every row has ended. temperature: 0 takes the likeliest token; otherwise row i draws its token s
        with `fold_in(fold_in(key, i), s)`. skip: see `prefill`. ends: which tokens end an answer; by default
        Gemma's end of a sequence.
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
            return step + 1, x, cache, ended | ends(token), ids, mask

        start = (jnp.int32(0), x, cache, jnp.zeros(B, bool))
        empty = (jnp.zeros((B, max_new), jnp.int32), jnp.zeros((B, max_new), bool))
        return jax.lax.while_loop(going, body, (*start, *empty))[-2:]


def _last(positions: Int[Array, "*axes B S"]) -> Int[Array, "B"]:
    """Returns the greatest position of each row."""
    return positions.max((*range(positions.ndim - 2), positions.ndim - 1))


def choose_token(
    key: RowKeys, step: Int[Array, ""], logits_BV: Float[Array, "B V"], temperature: float
) -> Int[Array, "B"]:
    """Returns the likeliest token per row at temperature 0, else row i's draw with `fold_in(fold_in(key, i), step)`."""
    if temperature == 0:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)

    def draw(row_key: jax.Array, logits: jax.Array) -> jax.Array:
        return jax.random.categorical(jax.random.fold_in(row_key, step), logits / temperature)

    return jax.vmap(draw)(row_keys(key, logits_BV.shape[0]), logits_BV).astype(jnp.int32)
