"""PaliGemma: images and a text prefix in, text out (Beyer et al. 2024); also the prefix of the pi0 family.

A sequence is the tokens of all cameras, then text. Text is a prefix, whose tokens and the images see each other, and a
suffix, whose tokens see everything before them: captions, answers, subtasks.

Letters: B batch, S text tokens, P image tokens, D width, V vocabulary, T slots of a cache.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from openpi_like.batch import Array as Leaf
from openpi_like.batch import Observation, TextBatch
from openpi_like.config import near_names
from openpi_like.models.gemma import REMAT, Gemma, GemmaConfig, KVCache, attention_mask, token_positions
from openpi_like.models.param import named_key
from openpi_like.models.siglip import Siglip, SiglipConfig

EOS = 1
RESIZE = ("cubic", "pillow")


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisionLanguageConfig:
    """Sizes and options of what PaliGemma and the pi0 family share.

    cameras: slot names, in prefix order; any number. image_size: (height, width) pixels, multiples of the patch size.
    resize: how frames of other sizes become this one, see `openpi_like.data.images.fit`.
    prompt_len: padded text tokens. dtype: of activations, "float32" or "bfloat16"; weights are float32.
    remat: what the backward pass recomputes, see `gemma.REMAT`; None recomputes nothing.
    unroll: compile layers one by one instead of as a loop: faster for a few layers, see `gemma.run_layers`.
    """

    vision: SiglipConfig
    vlm: GemmaConfig
    cameras: tuple[str, ...]
    image_size: tuple[int, int]
    prompt_len: int
    vocab_size: int
    resize: str = "cubic"
    dtype: str = "float32"
    remat: str | None = None
    unroll: bool = False

    def __post_init__(self) -> None:
        problems = self._problems()
        if problems:
            raise ValueError(f"{type(self).__name__}: " + "; ".join(problems))

    def _problems(self) -> list[str]:
        problems = []
        if any(size % self.vision.patch_size for size in self.image_size):
            problems.append(f"image_size={self.image_size}, expected multiples of {self.vision.patch_size=}")
        if len(set(self.cameras)) != len(self.cameras) or not self.cameras:
            problems.append(f"cameras={self.cameras}, expected at least one, each named once")
        problems += [
            f"{name}={getattr(self, name)}, expected at least 1"
            for name in ("prompt_len", "vocab_size")
            if getattr(self, name) < 1
        ]
        if self.resize not in RESIZE:
            problems.append(f"resize={self.resize!r}, expected one of {RESIZE}")
        if self.dtype not in ("float32", "bfloat16"):
            problems.append(f"dtype={self.dtype!r}, expected 'float32' or 'bfloat16'")
        if self.remat is not None and self.remat not in REMAT:
            problems.append(f"remat={self.remat!r}, expected None or one of {REMAT}")
        return problems

    def check(self, inputs: Any, rows: dict[str, tuple[tuple[int, ...], str]]) -> None:
        """Checks names, shapes and dtypes of images, prompt and `rows`; costs nothing when compiled.

        rows: further leaves, name -> (shape after the batch, dtype).

        Raises:
            ValueError: lists everything that does not fit.
        """
        problems: list[str] = []
        leaves: dict[str, Any] = dict(inputs)
        B = leaves["prompt"].shape[0] if "prompt" in leaves and leaves["prompt"].ndim else 0

        def expect(name: str, value: Any, shape: tuple[int, ...], *dtypes: str) -> None:
            if tuple(value.shape) != shape or str(value.dtype) not in dtypes:
                got = f"{value.dtype} {tuple(value.shape)}"
                problems.append(f"{name}: got {got}, expected {' or '.join(dtypes)} {shape}")

        text = {"prompt": ((self.prompt_len,), "int32"), "prompt_mask": ((self.prompt_len,), "bool")}
        for name, (shape, dtype) in {**text, **rows}.items():
            if name in leaves:
                expect(name, leaves[name], (B, *shape), dtype)
            else:
                problems.append(f"{name}: missing; got {sorted(leaves)}")
        cameras: dict[str, tuple[tuple[int, ...], tuple[str, ...]]] = {
            "images": ((B, *self.image_size, 3), ("uint8", "float32")),
            "image_mask": ((B,), ("bool",)),
        }
        for group, (shape, dtypes) in cameras.items():
            if group not in leaves:
                problems.append(f"{group}: missing; got {sorted(leaves)}")
                continue
            for camera in self.cameras:
                if camera in leaves[group]:
                    expect(f"{group}[{camera!r}]", leaves[group][camera], shape, *dtypes)
                else:
                    problems.append(f"{group}[{camera!r}]: missing; {near_names(camera, list(leaves[group]))}")
            for camera in sorted(set(leaves[group]) - set(self.cameras)):
                near = near_names(camera, self.cameras)
                problems.append(f"{group}[{camera!r}]: the policy has no such camera; {near}; leave it out")
        if problems:
            raise ValueError("inputs do not fit the policy's config:\n  " + "\n  ".join(problems))


@dataclasses.dataclass(frozen=True, kw_only=True)
class PaliGemmaConfig(VisionLanguageConfig):
    """A prefix language model over images in its own right."""

    @classmethod
    def released(cls, *, image_size: int = 224, prompt_len: int = 48) -> "PaliGemmaConfig":
        """Returns the sizes of the released PaliGemma-3B weights; image_size: 224, 448 or 896 pixels."""
        return cls(
            vision=SiglipConfig.so400m_14(),
            vlm=GemmaConfig.gemma_2b(),
            cameras=("image",),
            image_size=(image_size, image_size),
            prompt_len=prompt_len,
            vocab_size=257_152,
            resize="pillow",
            dtype="bfloat16",
            remat="nothing_saveable",
        )

    def create(self, key: Key[Array, ""]) -> "PaliGemma":
        """Returns a model with fresh weights; every weight's draw depends on `key` and its own name only."""
        return PaliGemma(self, key)


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


class VisionLanguageModel(nnx.Module):
    """Vision tower and language model: `text_loss` to train text, `generate` to write it."""

    config: VisionLanguageConfig

    def __init__(self, config: VisionLanguageConfig, key: Key[Array, ""]) -> None:
        self.config = c = config
        self.vision = Siglip(
            c.vision,
            named_key(key, "vision"),
            image_size=c.image_size,
            out_width=c.vlm.width,
            dtype=c.dtype,
            unroll=c.unroll,
            remat=c.remat,
        )
        self.vlm = Gemma(
            c.vlm, named_key(key, "vlm"), vocab_size=c.vocab_size, dtype=c.dtype, unroll=c.unroll, remat=c.remat
        )

    # ---- Tokens ------------------------------------------------------------------------------------------------------

    def embed_prefix(self, observation: Observation | TextBatch) -> tuple[Float[Array, "B S D"], Bool[Array, "B S"]]:
        """Returns the tokens of all cameras in config order, then of the text, and which of them are valid."""
        cameras = self.config.cameras
        images = jnp.stack([_to_float(observation["images"][c]) for c in cameras], axis=1)
        # Cameras are the minor axis of the merged batch: a batch split over devices stays where it is.
        B, C = images.shape[:2]
        tokens = self.vision(images.reshape(B * C, *images.shape[2:]))
        P, D = tokens.shape[1:]
        seen = jnp.stack([observation["image_mask"][c] for c in cameras], axis=1)
        tokens = jnp.concatenate([tokens.reshape(B, C * P, D), self.vlm.embed(observation["prompt"])], axis=1)
        return tokens, jnp.concatenate([jnp.repeat(seen, P, axis=1), observation["prompt_mask"]], axis=1)

    def _language(self, inputs: Observation | TextBatch, causal_BS: jax.Array | None) -> tuple[Any, Any, Any]:
        """Returns tokens after the final norm, keys and values, and which are valid; causal: None for no suffix."""
        tokens, valid = self.embed_prefix(inputs)
        B, S = inputs["prompt"].shape
        starts = jnp.zeros((B, S), bool) if causal_BS is None else causal_BS
        starts = jnp.pad(starts, ((0, 0), (valid.shape[1] - S, 0)))
        out, kv = self.vlm(tokens, attention_mask(valid, starts), self.vlm.rope(token_positions(valid)))
        return out, kv, valid

    # ---- Training ----------------------------------------------------------------------------------------------------

    def text_logits(self, batch: TextBatch) -> Float[Array, "B S V"]:
        """Returns float32 logits at every text token, each for the token after it.

        Raises:
            ValueError: the batch does not fit the config; lists everything that does not.
        """
        causal = ((self.config.prompt_len,), "bool")
        self.config.check(batch, {"prompt_causal": causal})
        out, _, _ = self._language(batch, batch["prompt_causal"])
        return self.vlm.logits(out[:, -self.config.prompt_len :])

    def text_loss(self, batch: TextBatch) -> tuple[Float[Array, ""], dict[str, Float[Array, "B"]]]:
        """Returns the mean cross-entropy of the tokens marked by `prompt_loss`, and per-sample metrics.

        A sample's loss is the mean over its marked tokens; the scalar is the mean over samples that have any. Metrics:
        "loss", and "valid" (1.0, or 0.0 for a sample without marked tokens, whose loss is 0). The first text token
        follows an image and is never predicted.

        Raises:
            ValueError: the batch does not fit the config; lists everything that does not.
        """
        self.config.check(batch, {"prompt_loss": ((self.config.prompt_len,), "bool")})
        logits, targets = self.text_logits(batch)[:, :-1], batch["prompt"][:, 1:]
        mask = batch["prompt_loss"][:, 1:] & batch["prompt_mask"][:, 1:]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
        return masked_means(losses, mask)

    # ---- Decoding ----------------------------------------------------------------------------------------------------

    def prefill(self, observation: Observation, *, max_new: int) -> tuple[Float[Array, "B V"], TextCache]:
        """Returns the logits of the first new token, and a cache with room for `max_new` tokens.

        The prompt is all prefix; padding may stand anywhere but its tokens are seen by nobody.
        """
        self.config.check(observation, {})
        out, kv, valid = self._language(observation, None)
        S = valid.shape[1]
        last = S - 1 - jnp.argmax(valid[:, ::-1], axis=1)  # slot of the last valid token
        logits = self.vlm.logits(jnp.take_along_axis(out, last[:, None, None], axis=1))[:, 0]
        room = lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, max_new), (0, 0), (0, 0)))  # noqa: E731
        return logits, TextCache(
            kv=jax.tree.map(room, kv),
            valid=jnp.pad(valid, ((0, 0), (0, max_new))),
            slot=jnp.int32(S),
            position=valid.sum(axis=1, dtype=jnp.int32),
        )

    def extend(self, tokens_B: Int[Array, "B"], cache: TextCache) -> tuple[Float[Array, "B V"], TextCache]:
        """Returns the logits after one more token of each row, and the cache with it."""
        x_B1D = self.vlm.embed(tokens_B[:, None])
        mask_B1T = jnp.concatenate([cache.valid, jnp.ones((tokens_B.shape[0], 1), bool)], axis=1)[:, None]
        out, own = self.vlm(x_B1D, mask_B1T, self.vlm.rope(cache.position[:, None]), past=cache.kv)
        write = lambda old, new: jax.lax.dynamic_update_slice_in_dim(old, new, cache.slot, axis=2)  # noqa: E731
        kv: KVCache = jax.tree.map(write, cache.kv, own)
        valid = jax.lax.dynamic_update_slice_in_dim(
            cache.valid, jnp.ones((tokens_B.shape[0], 1), bool), cache.slot, axis=1
        )
        return self.vlm.logits(out)[:, 0], TextCache(kv, valid, cache.slot + 1, cache.position + 1)

    def generate(
        self, key: Key[Array, ""], observation: Observation, *, max_new: int, temperature: float = 0.0
    ) -> tuple[Int[Array, "B new"], Bool[Array, "B new"]]:
        """Returns new token ids, 0 after the end, and the mask of real ones (the end-of-sequence token included).

        Stops when every row has ended. temperature: 0 takes the likeliest token; otherwise row i draws its token s
        with `fold_in(fold_in(key, i), s)`.
        """
        logits, cache = self.prefill(observation, max_new=max_new)
        B = logits.shape[0]
        row_keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(B))

        def choose(step: jax.Array, logits: jax.Array) -> jax.Array:
            if temperature == 0:
                return jnp.argmax(logits, axis=-1).astype(jnp.int32)
            keys = jax.vmap(lambda k: jax.random.fold_in(k, step))(row_keys)
            return jax.vmap(jax.random.categorical)(keys, logits / temperature).astype(jnp.int32)

        def going(carry: Any) -> jax.Array:
            step, _, _, ended, _, _ = carry
            return (step < max_new) & ~ended.all()

        def body(carry: Any) -> Any:
            step, logits, cache, ended, ids, mask = carry
            token = jnp.where(ended, 0, choose(step, logits))
            ids, mask = ids.at[:, step].set(token), mask.at[:, step].set(~ended)
            logits, cache = self.extend(token, cache)
            return step + 1, logits, cache, ended | (token == EOS), ids, mask

        start = (jnp.int32(0), logits, cache, jnp.zeros(B, bool))
        empty = (jnp.zeros((B, max_new), jnp.int32), jnp.zeros((B, max_new), bool))
        return jax.lax.while_loop(going, body, (*start, *empty))[-2:]


class PaliGemma(VisionLanguageModel):
    """The model that is trained on text alone."""

    def loss(self, key: Key[Array, ""], batch: TextBatch) -> tuple[Float[Array, ""], dict[str, Float[Array, "B"]]]:
        """Returns `text_loss`; `key` is not used, nothing is drawn."""
        return self.text_loss(batch)


def _to_float(image: jax.Array) -> jax.Array:
    """Returns an image in [-1, 1]; float images are in that range already."""
    return image.astype(jnp.float32) / 255.0 * 2.0 - 1.0 if image.dtype == jnp.uint8 else image


def masked_means(
    error_BX: Float[Array, "B *X"], mask_BX: Bool[Array, "B *X"]
) -> tuple[Float[Array, ""], dict[str, Float[Array, "B"]]]:
    """Returns the mean over samples of the mean over valid entries, and the per-sample "loss" and "valid"."""
    axes = tuple(range(1, mask_BX.ndim))
    count = mask_BX.sum(axes).astype(jnp.float32)
    per_sample = jnp.where(mask_BX, error_BX, 0.0).sum(axes) / jnp.maximum(count, 1.0)
    valid = (count > 0).astype(jnp.float32)
    return per_sample.sum() / jnp.maximum(valid.sum(), 1.0), {"loss": per_sample, "valid": valid}
