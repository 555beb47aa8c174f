"""PaliGemma: images and a text prefix in, text out (Beyer et al. 2024); also the prefix of the pi0 family.

A sequence is the tokens of all cameras, then text. Text is a prefix, whose tokens and the images see each other, and a
suffix, whose tokens see everything before them: captions, answers, subtasks.

Letters: B batch, S text tokens, P image tokens, D width, V vocabulary, T slots of a cache.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from openpi_like.batch import ActionTokens, Batch, Observation, TextBatch
from openpi_like.batch import Array as Leaf
from openpi_like.config import near_names
from openpi_like.data.prompts import Pi0Prompt, PromptFormat
from openpi_like.draws import named_key, row_keys
from openpi_like.models.gemma import Gemma, GemmaConfig, KVCache, attention_mask, token_positions
from openpi_like.models.siglip import Siglip, SiglipConfig
from openpi_like.models.stack import remat_problem
from openpi_like.partition import pin

EOS = 1
RESIZE = ("cubic", "pillow")


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisionLanguageConfig:
    """Sizes and options of what PaliGemma and the pi0 family share.

    cameras: slot names, in prefix order; any number. image_size: (height, width) pixels, multiples of the patch size.
    resize: how frames of other sizes become this one, see `openpi_like.data.images.fit`.
    prompt_len: S, padded text tokens. dtype: of activations, "float32" or "bfloat16"; weights are float32.
    remat: what the backward pass recomputes, see `stack.remat_problem`; None recomputes nothing.
    unroll: compile layers one by one instead of as a loop: faster for a few layers, see `stack.run_layers`.
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
        wrong = remat_problem(self.remat)
        if wrong is not None:
            problems.append(wrong)
        return problems

    @staticmethod
    def released_backbone() -> dict[str, Any]:
        """Returns the fields that all released PaliGemma-3B and pi0 weights have in common."""
        return {
            "vision": SiglipConfig.so400m_14(),
            "vlm": GemmaConfig.gemma_2b(),
            "vocab_size": 257_152,
            "resize": "pillow",
            "dtype": "bfloat16",
            "remat": "nothing_saveable",
        }

    @staticmethod
    def tiny_backbone(*, patch_size: int = 16) -> dict[str, Any]:
        """Returns fields of a backbone that trains on two CPU cores."""
        return {"vision": SiglipConfig.tiny(patch_size), "vlm": GemmaConfig.tiny(), "unroll": True}

    @property
    def answer_len(self) -> int:
        """T, text tokens of a training batch beyond `prompt_len`; 0 where prompt and answer share that."""
        return 0

    # ---- Shapes of inputs --------------------------------------------------------------------------------------------

    def text_shapes(self, B: int, *, answers: bool = False) -> dict[str, Any]:
        """Returns the shapes of B rows of images and text, each a `jax.ShapeDtypeStruct`.

        answers: the text has answers, as in training.
        """
        row = lambda dtype, *shape: jax.ShapeDtypeStruct((B, *shape), dtype)  # noqa: E731
        S = self.prompt_len + self.answer_len * answers
        masks = ("prompt_mask", *(("prompt_causal", "prompt_loss") if answers else ()))
        return {
            "prompt": row("int32", S),
            **{name: row("bool", S) for name in masks},
            "images": {camera: row("uint8", *self.image_size, 3) for camera in self.cameras},
            "image_mask": {camera: row("bool") for camera in self.cameras},
        }

    def batch_shapes(self, B: int) -> dict[str, Any]:
        """Returns the shapes of a training batch, see `openpi_like.batch.TextBatch`."""
        return self.text_shapes(B, answers=True) | {"dataset_id": jax.ShapeDtypeStruct((B,), "int32")}

    def check(self, inputs: Any, *, answers: bool = False) -> None:
        """Checks names, shapes and dtypes of images and text; costs nothing when compiled. answers: see `text_shapes`.

        Raises:
            ValueError: lists everything that does not fit.
        """
        _compare(inputs, self.text_shapes(_rows(inputs), answers=answers))


@dataclasses.dataclass(frozen=True, kw_only=True)
class PaliGemmaConfig(VisionLanguageConfig):
    """A prefix language model over images in its own right."""

    @classmethod
    def released(cls, *, image_size: int = 224, prompt_len: int = 48) -> "PaliGemmaConfig":
        """Returns the sizes of the released PaliGemma-3B weights; image_size: 224, 448 or 896 pixels."""
        return cls(
            **cls.released_backbone(), cameras=("image",), image_size=(image_size, image_size), prompt_len=prompt_len
        )

    def create(self, key: Key[Array, ""]) -> "PaliGemma":
        """Returns a model with fresh weights; every weight's draw depends on `key` and its own name only."""
        return PaliGemma(self, key)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PolicyConfig(VisionLanguageConfig):
    """What all policies share; see `VisionLanguageConfig` for images and text.

    state_dim, action_dim: padded sizes. action_horizon: A, steps in a chunk.
    prompt_format: how its prompts and answers are written, see `openpi_like.data.prompts`.
    action_tokens: how actions are written as tokens, None where they are not.
    """

    state_dim: int
    action_dim: int
    action_horizon: int
    prompt_format: PromptFormat = Pi0Prompt()
    action_tokens: ActionTokens | None = None

    @property
    def answer_len(self) -> int:
        """T, see `ActionTokens.max_len`."""
        return 0 if self.action_tokens is None else self.action_tokens.max_len

    def _problems(self) -> list[str]:
        problems = super()._problems()
        problems += [
            f"{name}={getattr(self, name)}, expected at least 1"
            for name in ("state_dim", "action_dim", "action_horizon")
            if getattr(self, name) < 1
        ]
        if not isinstance(self.prompt_format, PromptFormat):
            problems.append(f"prompt_format={self.prompt_format!r}, expected a PromptFormat such as {Pi0Prompt()}")
        tokens = self.action_tokens
        if tokens is not None and tokens.count + tokens.skip > self.vocab_size:
            least = tokens.count + tokens.skip
            problems.append(f"vocab_size={self.vocab_size}, expected at least {least} for the ids of action tokens")
        return problems

    def check_inputs(self, inputs: Observation | Batch, *, actions: bool) -> None:
        """Checks an observation, or a batch with `actions`, as `check` does.

        Raises:
            ValueError: lists everything that does not fit.
        """
        _compare(inputs, self.input_shapes(_rows(inputs), actions=actions))

    def input_shapes(self, B: int, *, actions: bool) -> dict[str, Any]:
        """Returns the shapes of B observations, or of B samples with `actions`, each a `jax.ShapeDtypeStruct`."""
        row = lambda dtype, *shape: jax.ShapeDtypeStruct((B, *shape), dtype)  # noqa: E731
        answers = actions and self.action_tokens is not None
        chunk = (self.action_horizon, self.action_dim)
        shapes: dict[str, Any] = {"state": row("float32", self.state_dim), "state_mask": row("bool", self.state_dim)}
        shapes |= self.text_shapes(B, answers=answers)
        if actions:
            shapes |= {
                "actions": row("float32", *chunk),
                "action_mask": row("bool", *chunk),
                "position": row("uint32", 2),
            }
        if answers:
            shapes["prompt_action"] = row("bool", *shapes["prompt"].shape[1:])
        return shapes

    def batch_shapes(self, B: int) -> dict[str, Any]:
        """Returns the shapes of a training batch, see `openpi_like.batch.Batch`."""
        return self.input_shapes(B, actions=True) | {"dataset_id": jax.ShapeDtypeStruct((B,), "int32")}

    def sampling_shapes(self) -> dict[str, Any]:
        """Returns the shapes of what `sample_actions` takes besides an observation, by name: here nothing."""
        return {}

    def chunk_mask(self, horizon: int, dims: int) -> Bool[np.ndarray, "A J"]:
        """Returns which entries of a chunk a robot has: its first `horizon` steps, and of these its first `dims`."""
        return (np.arange(self.action_horizon)[:, None] < horizon) & (np.arange(self.action_dim) < dims)

    def observation(self, batch: Batch) -> Observation:
        """Returns what a robot would have asked with: the batch without actions, and without answers to the prompt."""
        seen: dict[str, Any] = {k: batch[k] for k in Observation.__annotations__}  # type: ignore[literal-required]
        if self.action_tokens is not None:
            asked = batch["prompt_mask"] & ~batch["prompt_causal"]
            seen["prompt"] = jnp.where(asked, batch["prompt"], 0)[:, : self.prompt_len]
            seen["prompt_mask"] = asked[:, : self.prompt_len]
        return Observation(**seen)  # type: ignore[typeddict-item]


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
        return pin(tokens, "batch", None, None), jnp.concatenate(
            [jnp.repeat(seen, P, axis=1), observation["prompt_mask"]], axis=1
        )

    # ---- Training ----------------------------------------------------------------------------------------------------

    def language(
        self, batch: TextBatch | Batch, *, count_masked: bool = False
    ) -> tuple[Float[Array, "B S D"], KVCache, Bool[Array, "B S"]]:
        """Runs images and text; returns tokens after the final norm, their keys and values, and which are valid.

        count_masked: number the positions of masked slots too.
        """
        tokens, valid = self.embed_prefix(batch)
        images = tokens.shape[1] - batch["prompt"].shape[1]
        starts = jnp.pad(batch["prompt_causal"], ((0, 0), (images, 0)))
        positions = token_positions(jnp.ones_like(valid) if count_masked else valid)
        with jax.named_scope("vlm"):
            out, kv = self.vlm(tokens, attention_mask(valid, starts), self.vlm.rope(positions))
        return out, kv, valid

    def text_logits(self, batch: TextBatch | Batch, *, count_masked: bool = False) -> Float[Array, "B S V"]:
        """Returns float32 logits at every text token, each for the token after it.

        Raises:
            ValueError: the batch does not fit the config; lists everything that does not.
        """
        self.config.check(batch, answers=True)
        out, _, _ = self.language(batch, count_masked=count_masked)
        return self.vlm.logits(out[:, -batch["prompt"].shape[1] :])

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
        x_BSD = out_BSD[:, -batch["prompt"].shape[1] : -1]
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
        tokens, valid = self.embed_prefix(observation)
        B, I = tokens.shape[0], 0 if begin is None else begin.shape[0]  # noqa: E741
        starts, positions = jnp.zeros((B, tokens.shape[1] + I), bool), token_positions(valid)
        if begin is not None and I:
            said = jnp.broadcast_to(begin, (B, I))
            tokens = jnp.concatenate([tokens, self.vlm.embed(said)], axis=1)
            valid = jnp.pad(valid, ((0, 0), (0, I)), constant_values=True)
            starts = starts.at[:, -I:].set(True)
            positions = token_positions(valid) + skip * starts
        out, kv = self.vlm(tokens, attention_mask(valid, starts), self.vlm.rope(positions))
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

    def packed(self) -> "VisionLanguageModel":
        """Returns the same model with its weights as repeated calls want them, see `Gemma.packed`.

        A server does this once, when it loads; where it was not done, sampling does it in every call.
        """
        return self

    def _with_packed(self, name: str) -> Any:
        """Returns the same model with one of its `Gemma` packed."""
        packed = getattr(self, name).packed()
        if packed is getattr(self, name):
            return self
        model = nnx.merge(*nnx.split(self))
        setattr(model, name, packed)
        return model


def choose_token(
    key: Key[Array, ""], step: Int[Array, ""], logits_BV: Float[Array, "B V"], temperature: float
) -> Int[Array, "B"]:
    """Returns the likeliest token per row at temperature 0, else row i's draw with `fold_in(fold_in(key, i), step)`."""
    if temperature == 0:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)

    def draw(row_key: jax.Array, logits: jax.Array) -> jax.Array:
        return jax.random.categorical(jax.random.fold_in(row_key, step), logits / temperature)

    return jax.vmap(draw)(row_keys(key, logits_BV.shape[0]), logits_BV).astype(jnp.int32)


class PaliGemma(VisionLanguageModel):
    """The model that is trained on text alone."""

    def loss(
        self, key: Key[Array, ""], batch: TextBatch, *, counts: dict[str, Float[Array, ""]] | None = None
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, "B"]]]:
        """Returns `text_loss`; `key` is not used, nothing is drawn. counts: see `loss_counts`."""
        return self.text_loss(batch, samples=None if counts is None else counts["text"])

    def loss_counts(self, batch: TextBatch) -> dict[str, Float[Array, ""]]:
        """Returns what `loss` divides by. A part of a batch, with the counts of all of it, has its part of the loss."""
        return {"text": self.text_samples(batch)}


def text_targets(batch: TextBatch | Batch) -> Bool[Array, "B T"]:
    """Returns which text tokens are to be predicted; the first cannot be."""
    return batch["prompt_loss"][:, 1:] & batch["prompt_mask"][:, 1:]


def _rows(inputs: Any) -> int:
    """Returns the number of rows, by the prompt."""
    return inputs["prompt"].shape[0] if "prompt" in inputs and inputs["prompt"].ndim else 0


def _compare(inputs: Any, shapes: dict[str, Any]) -> None:
    """Compares inputs with the shapes that a policy takes; further leaves are let through, further cameras are not.

    Raises:
        ValueError: lists everything that does not fit.
    """
    problems: list[str] = []

    def expect(name: str, value: Any, shape: Any, *dtypes: str) -> None:
        if tuple(value.shape) != shape.shape or str(value.dtype) not in dtypes:
            got = f"{value.dtype} {tuple(value.shape)}"
            problems.append(f"{name}: got {got}, expected {' or '.join(dtypes)} {shape.shape}")

    for name, shape in shapes.items():
        if name not in inputs:
            problems.append(f"{name}: missing; got {sorted(inputs)}")
        elif not isinstance(shape, dict):
            expect(name, inputs[name], shape, str(shape.dtype))
        else:  # by camera
            got = inputs[name]
            for camera in shape:
                if camera in got:
                    # Images that were changed in the step are float already.
                    dtypes = ("uint8", "float32") if name == "images" else (str(shape[camera].dtype),)
                    expect(f"{name}[{camera!r}]", got[camera], shape[camera], *dtypes)
                else:
                    problems.append(f"{name}[{camera!r}]: missing; {near_names(camera, list(got))}")
            for camera in sorted(set(got) - set(shape)):
                near = near_names(camera, list(shape))
                problems.append(f"{name}[{camera!r}]: the policy has no such camera; {near}; leave it out")
    if problems:
        raise ValueError("inputs do not fit the policy's config:\n  " + "\n  ".join(problems))


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
