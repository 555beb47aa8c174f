"""pi0-FAST: a prefix language model that writes actions as tokens (Pertsch et al. 2025, arXiv 2501.09747).

Actions are the tokens of `openpi_like.data.fast`, written with ids of the text vocabulary after the prompt. Sampling is
constrained: only action tokens are scored, and of these only such as leave a way to exactly as many coefficients as the
robot's chunk has, within the tokens that are left. So every chunk can be decoded, whatever finite logits there are.

Letters: B batch, S tokens, D width, A action horizon, J action dims, W action tokens, Q states of decoding,
C coefficients of a chunk, I tokens that every answer begins with.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from openpi_like.batch import ActionTokens, Batch, Observation
from openpi_like.batch import Array as Leaf
from openpi_like.data.prompts import FastPrompt, PromptFormat
from openpi_like.draws import RowKeys
from openpi_like.models.decoding import choose_token
from openpi_like.models.paligemma import PaliGemmaConfig
from openpi_like.models.policy import PolicyConfig
from openpi_like.models.thoughts import TokenThoughts, thought_options, thought_problems, thought_shapes
from openpi_like.robots import Robot


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pi0FastConfig(PolicyConfig):
    """Sizes and options of a pi0-FAST policy; see `PolicyConfig`.

    openpi_positions: number positions as openpi does with its released weights. Its loss numbers masked slots too,
        which differs where a camera is masked; its sampling leaves out one position before the first token it writes.
    """

    writes_tokens: ClassVar[bool] = True
    can_think: ClassVar[bool] = True
    prompt_format: PromptFormat = FastPrompt()
    openpi_positions: bool = False

    def _problems(self) -> list[str]:
        problems = super()._problems()
        if self.action_tokens is None:
            problems.append("action_tokens=None, expected ActionTokens: they are all this policy learns")
        return problems + thought_problems(self)

    @property
    def tokens(self) -> ActionTokens:
        """The action tokens, which this policy always has."""
        assert self.action_tokens is not None
        return self.action_tokens

    def sampling_shapes(self) -> dict[str, Any]:
        """Returns the shapes of `sampling_options`, for a tokenizer of coefficients (one state), runs of up to 32."""
        W, C, Q = self.tokens.count, self.action_horizon * self.action_dim, 1
        ids = lambda *shape: jax.ShapeDtypeStruct(shape, "int32")  # noqa: E731
        return {
            **thought_shapes(self),
            "decoding": ActionDecoding(
                following=ids(Q, W),
                count=ids(Q, W),
                values=ids(Q, W, 32),
                least=ids(C + 1, Q),
                scale=jax.ShapeDtypeStruct((), "float32"),
                begin=ids(3),
            ),
        }

    def sampling_options(self, text: Any, fast: Any) -> dict[str, Any]:
        """Returns "decoding", how the tokens that are written become actions; and what it thinks with (`thoughts`)."""
        assert fast is not None  # the contract's problems have been checked
        tables = fast.tables(self.action_horizon * self.action_dim, count=self.tokens.count)
        begin = np.array(text.action_indicator(), np.int32)
        decoding = ActionDecoding(**dataclasses.asdict(tables), begin=begin)
        return {**thought_options(self, text), "decoding": decoding}

    def robot_problems(self, robot: Robot, fast: Any) -> list[str]:
        """Returns whether a chunk of the robot takes more action tokens than there is room for."""
        if fast is None:
            return []
        least = fast.tables(self.action_horizon * self.action_dim).least
        size = robot.action_horizon * robot.action_size
        needs = int(least[min(size, len(least) - 1), 0])
        if needs <= self.answer_len:
            return []
        return [
            f"a chunk of {size} coefficients takes at least {needs} action tokens, the policy has room for "
            f"{self.answer_len}"
        ]

    def released_normalization(self) -> str:
        """Returns "quantile"."""
        return "quantile"

    @classmethod
    def tiny(cls, *, image_size: tuple[int, int] = (64, 64), patch_size: int = 16, **options: Any) -> "Pi0FastConfig":
        """Returns a policy of about a million weights that trains on two CPU cores; options: the other fields."""
        return cls(**PaliGemmaConfig.tiny_fields(patch_size=patch_size), image_size=image_size, **options)

    @classmethod
    def released(cls) -> "Pi0FastConfig":
        """Returns the sizes of openpi's released pi0-FAST weights (2.9 billion)."""
        return cls(
            **PaliGemmaConfig.released_fields(),
            cameras=("base_0_rgb", "base_1_rgb", "wrist_0_rgb"),
            image_size=(224, 224),
            state_dim=32,
            action_dim=32,
            action_horizon=32,
            prompt_len=150,
            action_tokens=ActionTokens(max_len=100),
            openpi_positions=True,
        )

    def create(self, key: Key[Array, ""]) -> "Pi0Fast":
        """Returns a policy with fresh weights; every weight's draw depends on `key` and its own name only."""
        return Pi0Fast(self, key)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ActionDecoding:
    """How action tokens become actions, on the device; the fields are explained in `openpi_like.data.fast`.

    following, count: (Q, W). values: (Q, W, longest). least: (C + 1, Q). scale: ().
    begin: (I,), ids of the text before the first action token.
    """

    following: Leaf
    count: Leaf
    values: Leaf
    least: Leaf
    scale: Leaf
    begin: Leaf

    def allowed(
        self, state_B: Int[Array, "B"], left_B: Int[Array, "B"], tokens_left: Int[Array, ""]
    ) -> Bool[Array, "B W"]:
        """Returns which tokens leave a way to `left` more coefficients in no more than the tokens left."""
        following, rest = self.following[state_B], left_B[:, None] - self.count[state_B]
        least = self.least[jnp.maximum(rest, 0), jnp.maximum(following, 0)]
        return (following >= 0) & (rest >= 0) & (1 + least <= tokens_left)

    def actions(
        self, coefficients_BC: Int[Array, "B C"], action_mask_BAJ: Bool[Array, "B A J"]
    ) -> Float[Array, "B A J"]:
        """Returns the chunks of coefficients: dims of frequency 0 first; zero where the robot has no action.

        Each row has the horizon and the dims of its robot, so its inverse transform (DCT-III) is of that size.
        """
        A, J = action_mask_BAJ.shape[1:]
        H, dims = (action_mask_BAJ.any(axis).sum(1)[:, None, None] for axis in (2, 1))  # (B, 1, 1) each
        k, j = jnp.arange(A)[:, None], jnp.arange(J)[None, :]
        at_BAJ = jnp.where((k < H) & (j < dims), k * dims + j, 0)
        flat = jnp.take_along_axis(coefficients_BC, at_BAJ.reshape(at_BAJ.shape[0], -1), axis=1)
        spectrum_BAJ = jnp.where((k < H) & (j < dims), flat.reshape(at_BAJ.shape), 0) / self.scale
        t = jnp.arange(A)[None, :]
        basis = jnp.cos(jnp.pi * (2 * t + 1) * k / (2 * H)) * jnp.sqrt(jnp.where(k == 0, 1.0, 2.0) / H)
        # At full precision: fast matrix units would round coefficients that were written exactly.
        waves = jnp.einsum("BKA,BKJ->BAJ", basis, spectrum_BAJ, precision=jax.lax.Precision.HIGHEST)
        return jnp.where(action_mask_BAJ, waves, 0.0)


class Pi0Fast(TokenThoughts):
    """The policy: `loss` to train it, `sample_actions` to use it."""

    config: Pi0FastConfig

    def loss(
        self, key: Key[Array, ""], batch: Batch, *, counts: dict[str, Float[Array, ""]] | None = None
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, "B"]]]:
        """Returns `text_loss`, over the action tokens and what is around them; `key` is not used, nothing is drawn.

        counts: see `loss_counts`.
        """
        self.config.check_inputs(batch, actions=True)
        samples = None if counts is None else counts["text"]
        return self.backbone.text_loss(batch, count_masked=self.config.openpi_positions, samples=samples)

    def loss_counts(self, batch: Batch) -> dict[str, Float[Array, ""]]:
        """Returns what `loss` divides by. A part of a batch, with the counts of all of it, has its part of the loss."""
        return {"text": self.backbone.text_samples(batch)}

    def validation_losses(self, key: Key[Array, ""], batch: Batch) -> dict[str, Float[Array, ""]]:
        """Returns "loss"."""
        return {"loss": self.loss(key, batch)[0]}

    def packed(self) -> "Pi0Fast":
        """Returns the policy with its language model packed: it reads the prompt and writes with the same weights."""
        return self.with_parts(backbone=self.backbone.packed())

    def action_logits(self, x_BD: Float[Array, "B D"]) -> Float[Array, "B W"]:
        """Returns the logits of the action tokens alone, in their own order: a hundredth of the vocabulary."""
        first, count = self.config.tokens.first(self.config.vocab_size), self.config.tokens.count
        rows = slice(first - count + 1, first + 1)
        return self.backbone.vlm.logits(x_BD[:, None], rows=rows)[:, 0, ::-1]

    def sample_actions(
        self,
        key: RowKeys,
        observation: Observation,
        *,
        decoding: ActionDecoding,
        action_mask: Bool[Array, "B A J"] | None = None,
        temperature: float = 0.0,
        ends: Int[Array, "E"] | None = None,
    ) -> Float[Array, "B A J"]:
        """Returns normalised actions: tokens written one by one, decoded; a row stops when its chunk is complete.

        action_mask: which entries of the chunk this robot has: its first steps, and of these its first dims; None: all.
        temperature: 0 takes the likeliest of the allowed tokens; otherwise row i draws its token s with
            `fold_in(fold_in(key, i), s)`.
        ends: see `thoughts`; where the policy thinks and the observation has no thought, one is written first.
        A row is NaN whose logits are not finite, or whose chunk cannot be completed in `action_tokens.max_len` tokens,
        which `DecodingTables.least` tells beforehand.

        Raises:
            ValueError: the observation does not fit the config; lists everything that does not.
        """
        self.config.check_inputs(observation, actions=False)
        observation = self.thinking(observation, ends)
        tokens = self.sample_tokens(
            key, observation, decoding=decoding, action_mask=action_mask, temperature=temperature
        )
        return tokens[0]

    def sample_tokens(
        self,
        key: RowKeys,
        observation: Observation,
        *,
        decoding: ActionDecoding,
        action_mask: Bool[Array, "B A J"] | None = None,
        temperature: float = 0.0,
    ) -> tuple[Float[Array, "B A J"], Int[Array, "B new"], Bool[Array, "B new"]]:
        """As `sample_actions`, with the action tokens (of the FAST vocabulary) and the mask of real ones; without a
        thought that the observation has not."""
        c = self.config
        c.check_inputs(observation, actions=False)
        B, chunk = observation["state"].shape[0], (c.action_horizon, c.action_dim)
        mask = jnp.ones((B, *chunk), bool) if action_mask is None else action_mask
        policy, skip, budget = self.packed(), int(c.openpi_positions), c.tokens.max_len
        x, cache = policy.backbone.prefill(observation, max_new=budget, begin=decoding.begin, skip=skip)
        longest = decoding.values.shape[-1]
        need_B = mask.sum((1, 2))

        def going(carry: Any) -> jax.Array:
            step, _, _, _, left, *_ = carry
            return (step < budget) & (left > 0).any()

        def body(carry: Any) -> Any:
            step, x, cache, state, left, coefficients, ids, real, sound = carry
            with jax.named_scope("choose"):
                allowed = decoding.allowed(state, left, budget - step)
                scored = policy.action_logits(x)
                logits = jnp.where(allowed, scored, -jnp.inf)
                writing = (left > 0) & allowed.any(1)
                # Logits of broken weights would still choose something, and that would be a motion.
                sound &= jnp.isfinite(scored).all(1) | ~writing
                token = jnp.where(writing, choose_token(key, step, logits, temperature), 0)
            # All values of the token are written, and those beyond its count are overwritten by the next ones.
            write = lambda row, new, at: jax.lax.dynamic_update_slice(row, new, (at,))  # noqa: E731
            written = jax.vmap(write)(coefficients, decoding.values[state, token], need_B - left)
            coefficients = jnp.where(writing[:, None], written, coefficients)
            ids, real = ids.at[:, step].set(token), real.at[:, step].set(writing)
            left = jnp.where(writing, left - decoding.count[state, token], left)
            state = jnp.where(writing, decoding.following[state, token], state)
            x, cache = policy.backbone.extend(c.tokens.first(c.vocab_size) - token, cache)
            return step + 1, x, cache, state, left, coefficients, ids, real, sound

        nothing = jnp.zeros(B, jnp.int32)
        start = (jnp.int32(0), x, cache, nothing, need_B.astype(jnp.int32))
        empty = (
            jnp.zeros((B, chunk[0] * chunk[1] + longest), jnp.int32),
            jnp.zeros((B, budget), jnp.int32),
            jnp.zeros((B, budget), bool),
            jnp.ones(B, bool),
        )
        _, _, _, state, left, coefficients, ids, real, sound = jax.lax.while_loop(going, body, (*start, *empty))
        complete = ((left == 0) & (state == 0) & sound)[:, None, None]
        return jnp.where(complete, decoding.actions(coefficients, mask), jnp.nan), ids, real
