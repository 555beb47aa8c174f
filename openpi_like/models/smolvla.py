"""SmolVLA: half of a small VLM, and an action expert that reads it, trained by flow matching (Shukor et al. 2025,
arXiv 2506.01844, section 3.1). As in LeRobot, whose weights it loads and writes:

- Tokens of images and text are multiplied by the square root of their width, those of text before them see all of it.
- The state is the last token of the prefix, in the VLM's width. It sees the others; they do not see it.
- An action sees the prefix, itself and those before it; in cross layers the prefix alone, and positions begin at zero.
- Rotations are of base 10,000 in both stacks, although SmolLM2 was trained with 100,000.

What LeRobot trains are the expert and the projections: `presets.expert_only` in the config of a run.

Letters: B batch, S prefix tokens, D width of the VLM, E width of the expert, A action horizon, J action dims.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int, Key

from openpi_like.batch import Observation
from openpi_like.data.prompts import PromptFormat, SmolVlaPrompt
from openpi_like.draws import named_key
from openpi_like.models.flow import FlowConfig, FlowPolicy, FlowTime, Prefix, exact_time_embedding
from openpi_like.models.formats import Format
from openpi_like.models.gemma import attention_mask, token_positions
from openpi_like.models.param import Linear
from openpi_like.models.sequences import Embedded
from openpi_like.models.smolvla_expert import Expert, ExpertConfig
from openpi_like.models.smolvla_names import lerobot_config, smolvla_formats
from openpi_like.models.smolvlm import SmolVlmConfig
from openpi_like.partition import pin


@dataclasses.dataclass(frozen=True, kw_only=True)
class SmolVlaConfig(FlowConfig):
    """Sizes and options of SmolVLA; see `FlowConfig` and `PolicyConfig` for those that others have too."""

    backbone: SmolVlmConfig
    expert: ExpertConfig
    prompt_format: PromptFormat = SmolVlaPrompt()

    def _problems(self) -> list[str]:
        problems = super()._problems()
        depth, every = self.backbone.language.depth, self.expert.self_every
        if depth % every:
            problems.append(f"backbone: {depth} layers are used, expected a multiple of expert.self_every={every}")
        return problems

    @classmethod
    def tiny(cls, *, image_size: tuple[int, int] = (64, 64), **options: Any) -> "SmolVlaConfig":
        """Returns a policy of about a million weights that trains on two CPU cores; options: the other fields."""
        backbone = SmolVlmConfig.tiny()
        expert = ExpertConfig(width=64, mlp_dim=192)
        return cls(backbone=backbone, expert=expert, image_size=image_size, unroll=True, **options)

    @classmethod
    def released(cls) -> "SmolVlaConfig":
        """Returns the sizes of lerobot/smolvla_base (450 million): half of the layers of SmolVLM2-500M.

        It is without the VLM's table of logits, 47 million of these, which nothing computes with.
        """
        backbone = SmolVlmConfig.smolvla()
        return cls(
            backbone=backbone,
            expert=ExpertConfig.beside(backbone.language),
            vocab_size=49_280,
            cameras=("camera1", "camera2", "camera3"),
            image_size=(512, 512),
            state_dim=32,
            action_dim=32,
            action_horizon=50,
            prompt_len=48,
            dtype="bfloat16",
        )

    def create(self, key: Key[Array, ""]) -> "SmolVla":
        """Returns a policy with fresh weights; every weight's draw depends on `key` and its own name only."""
        return SmolVla(self, key)

    def lerobot_config(self, dtype: str) -> dict[str, Any] | None:
        """Returns LeRobot's `config.json`, where it knows these sizes."""
        return lerobot_config(self)

    def formats(self) -> dict[str, Format]:
        """Returns the published layouts that hold this policy's weights, or those of its backbone alone."""
        return smolvla_formats(self.backbone.formats(self.vocab_size), self.expert, self.backbone.language.depth)


class SmolVla(FlowPolicy):
    """The policy: `loss` to train it, `sample_actions` to use it. A backbone, and an action expert that reads it."""

    config: SmolVlaConfig

    def __init__(self, config: SmolVlaConfig, key: Key[Array, ""]) -> None:
        """Use `SmolVlaConfig.create`."""
        super().__init__(config, key)
        c, D, E, J = config, config.backbone.language.width, config.expert.width, config.action_dim
        self.expert = Expert(
            c.expert, c.backbone.language, named_key(key, "expert"), dtype=c.dtype, unroll=c.unroll, remat=c.remat
        )
        # These run in float32: they touch states, actions and flow time, and cost next to nothing.
        outer, square = ("action", "embed"), (None, "embed")
        self.state_in = Linear(named_key(key, "state_in"), "BSJ,JD->BSD", (c.state_dim, D), outer)
        self.action_in = Linear(named_key(key, "action_in"), "BAJ,JE->BAE", (J, E), outer)
        self.action_out = Linear(named_key(key, "action_out"), "BAE,EJ->BAJ", (E, J), ("embed", "action"))
        self.action_time_in = Linear(named_key(key, "action_time_in"), "BAE,EF->BAF", (2 * E, E), square)
        self.action_time_out = Linear(named_key(key, "action_time_out"), "BAE,EF->BAF", (E, E), square)

    # ---- Tokens ------------------------------------------------------------------------------------------------------

    def embed_prefix(self, observation: Observation) -> Embedded:
        """Returns the tokens of cameras, prompt and, last, the state: (B, S, D)."""
        seen = self.backbone.embed_prefix(observation)
        D = seen.tokens.shape[-1]
        # In float32: 31 for 30.98 would be wrong for all tokens alike.
        tokens = (seen.tokens.astype(jnp.float32) * math.sqrt(D)).astype(seen.tokens.dtype)
        state = self.state_in(observation["state"][:, None, :]).astype(tokens.dtype)
        valid = jnp.pad(seen.valid, ((0, 0), (0, 1)), constant_values=True)
        return Embedded(pin(jnp.concatenate([tokens, state], axis=1), "batch", None, None), valid)

    @jax.named_scope("expert")
    def embed_actions(self, x_BAJ: Float[Array, "B A J"], time: FlowTime) -> Float[Array, "B A E"]:
        """Returns the action tokens."""
        actions = self.action_in(x_BAJ)
        time_BAE = exact_time_embedding(time[:, None] if time.ndim == 1 else time, self.config.expert.width)
        both = jnp.concatenate([actions, jnp.broadcast_to(time_BAE, actions.shape)], axis=-1)
        return self.action_time_out(jax.nn.swish(self.action_time_in(both)))

    def masks(
        self, prefix_valid_BS: Bool[Array, "B S"]
    ) -> tuple[Bool[Array, "B SplusA SplusA"], Int[Array, "B SplusA"]]:
        """Returns the attention mask of joint layers, and positions, of prefix and actions together: S2 tokens.

        Cameras and prompt are a block; the state and every action begin one. Each sees itself and the blocks before.
        """
        B, S = prefix_valid_BS.shape
        A = self.config.action_horizon
        valid = jnp.concatenate([prefix_valid_BS, jnp.ones((B, A), bool)], axis=1)
        starts = jnp.asarray(np.array([False] * (S - 1) + [True] * (1 + A)))
        return attention_mask(valid, starts), token_positions(valid)

    # ---- Passes ------------------------------------------------------------------------------------------------------

    def prefix(self, observation: Observation, *, differentiable: bool = True) -> Prefix:
        """Runs cameras, prompt and state through the vision tower and the language model.

        The cache is what the expert's layers see, see `Expert.read`.
        differentiable: False leaves out what only a gradient would need, see `LanguageModel.prefill`.
        """
        sequence = self.embed_prefix(observation)
        S = sequence.valid.shape[1]
        mask, positions = self.masks(sequence.valid)
        rope = self.backbone.vlm.rope(positions)
        inputs = sequence, mask[:, :S, :S], rope[:, :, :S]
        with jax.named_scope("vlm"):
            cache = self.backbone.run(*inputs)[1] if differentiable else self.backbone.keys_values(*inputs)
        with jax.named_scope("expert"):
            return Prefix(self.expert.read(cache), mask[:, S:], rope[:, :, S:])

    def velocity(
        self, prefix: Prefix, observation: Observation, x_BAJ: Float[Array, "B A J"], time: FlowTime
    ) -> Float[Array, "B A J"]:
        """Returns the predicted velocity (noise - actions) at x_t."""
        tokens = self.embed_actions(x_BAJ, time)
        cross_rope = self.backbone.vlm.rope(jnp.broadcast_to(jnp.arange(x_BAJ.shape[1]), x_BAJ.shape[:2]))
        with jax.named_scope("expert"):
            out, _ = self.expert(tokens, prefix.mask, prefix.rope, past=prefix.cache, cross_rope=cross_rope)
            return pin(self.action_out(out.astype(jnp.float32)), "batch", None, None)

    # ---- Sampling ----------------------------------------------------------------------------------------------------

    def sampling_times(self, steps: int) -> Float32[np.ndarray, "steps"]:
        """Returns the flow times of Euler steps: as in LeRobot, each rounded to float32 by itself."""
        return np.asarray(1.0 - np.arange(steps) / steps, np.float32)

    def packed(self) -> "SmolVla":
        """Returns the policy with its expert packed."""
        return self.with_parts(expert=self.expert.packed())
