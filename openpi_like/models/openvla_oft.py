"""OpenVLA-OFT: a chunk in one pass, regressed (Kim, Finn and Liang 2025, arXiv 2502.19645).

Behind the prompt stands a slot for every number of the chunk, empty: zeros, told apart by their positions. All tokens
see each other. The hidden state before a slot is what the slot's number is read from, as a next token is; an MLP with
residual blocks makes each step's actions of its slots. The robot's state is one more token behind the cameras', and
with `film` the instruction changes the image towers (`PrismaticConfig.film`, "OFT+").

Letters: B batch, S tokens, D width, A action horizon, J action dims.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

from openpi_like.batch import Batch, Observation
from openpi_like.draws import named_key
from openpi_like.models.backbone import masked_means
from openpi_like.models.formats import Format, Row, Table, torch_linear
from openpi_like.models.openvla import eos_problems
from openpi_like.models.paligemma import PaliGemmaConfig
from openpi_like.models.param import Linear
from openpi_like.models.policy import OnePassPolicy, PolicyConfig
from openpi_like.models.vit import LayerNorm
from openpi_like.robots import Robot


@dataclasses.dataclass(frozen=True, kw_only=True)
class OpenVlaOftConfig(PolicyConfig):
    """Sizes and options of an OpenVLA-OFT policy; see `PolicyConfig`.

    eos: the token that stands behind the slots, where the released weights had it too: Llama's 2. None: one more empty
        slot.
    proprioception: the state is a token. head_width: of the head; None takes the language model's. head_blocks: its
    residual blocks.
    """

    eos: int | None = None
    proprioception: bool = True
    head_width: int | None = None
    head_blocks: int = 2

    def _problems(self) -> list[str]:
        problems = super()._problems()
        if self.eos is not None and not 0 <= self.eos < self.vocab_size:
            problems.append(f"eos={self.eos}, expected an id below vocab_size={self.vocab_size}, or None")
        if self.head_width is not None and self.head_width < 1:
            problems.append(f"head_width={self.head_width}, expected at least 1, or None")
        if self.head_blocks < 0:
            problems.append(f"head_blocks={self.head_blocks}, expected at least 0")
        return problems

    def tokenizer_problems(self, text: Any) -> list[str]:
        """Returns whether the tokenizer ends its answers with another id."""
        return eos_problems(self.eos, text)

    def robot_problems(self, robot: Robot, fast: Any) -> list[str]:
        """Returns whether a robot is normalised otherwise than the released policies' are."""
        if robot.normalization == "quantile":
            return []
        return [f"normalization={robot.normalization!r}, expected 'quantile', as OpenVLA's statistics are"]

    def released_normalization(self) -> str:
        """Returns "quantile"."""
        return "quantile"

    def formats(self) -> dict[str, Format]:
        """Returns the published layouts of the backbone; in "openvla" also the action head and the state's map.

        They are published as files of their own; as safetensors beside the others, their names begin with
        "action_head." and "proprio_projector.".
        """
        formats = dict(super().formats())
        if "openvla" in formats:
            formats["openvla"] = formats["openvla"].with_rows(self._head_table)
        return formats

    def _head_table(self, names: Sequence[str]) -> Table:
        order = "E D -> D E"
        head, ours = "action_head.model.", "action_head"

        def norm(mine: str, theirs: str) -> list[Row]:
            return [Row(f"{mine}/scale", f"{theirs}.weight"), Row(f"{mine}/bias", f"{theirs}.bias")]

        rows = [*norm(f"{ours}/norm_in", f"{head}layer_norm1"), *norm(f"{ours}/norm_out", f"{head}layer_norm2")]
        rows += [*torch_linear(f"{ours}/map_in", f"{head}fc1", order, "")]
        rows += torch_linear(f"{ours}/map_out", f"{head}fc2", order, "")
        for i in range(self.head_blocks):
            rows += norm(f"{ours}/block_{i}/norm", f"{head}mlp_resnet_blocks.{i}.ffn.0")
            rows += torch_linear(f"{ours}/block_{i}/map", f"{head}mlp_resnet_blocks.{i}.ffn.1", order, "")
        if self.proprioception:
            for mine, theirs in (("state_in", "fc1"), ("state_out", "fc2")):
                rows += torch_linear(mine, f"proprio_projector.{theirs}", order, "")
        return Table(tuple(rows))

    @classmethod
    def tiny(
        cls, *, image_size: tuple[int, int] = (64, 64), patch_size: int = 16, **options: Any
    ) -> "OpenVlaOftConfig":
        """Returns a policy of about a million weights that trains on two CPU cores; options: the other fields."""
        fields = PaliGemmaConfig.tiny_fields(patch_size=patch_size)
        return cls(**{**fields, "image_size": image_size, "head_width": 128, **options})

    def create(self, key: Key[Array, ""]) -> "OpenVlaOft":
        """Returns a policy with fresh weights; every weight's draw depends on `key` and its own name only."""
        return OpenVlaOft(self, key)


class ResidualBlock(nnx.Module):
    """x + relu(linear(norm(x)))."""

    def __init__(self, key: Key[Array, ""], width: int) -> None:
        self.norm = LayerNorm(named_key(key, "norm"), width, epsilon=1e-5)
        self.map = Linear(named_key(key, "map"), "BAD,DE->BAE", (width, width), (None, "embed"))

    def __call__(self, x: Float[Array, "B A D"]) -> Float[Array, "B A D"]:
        """Applies it to every step."""
        return x + jax.nn.relu(self.map(self.norm(x)))


class L1Head(nnx.Module):
    """All slots of a step to its actions. Runs in float32."""

    def __init__(self, key: Key[Array, ""], config: OpenVlaOftConfig) -> None:
        D, J = config.backbone.language.width, config.action_dim
        W = config.head_width or D
        self.norm_in = LayerNorm(named_key(key, "norm_in"), J * D, epsilon=1e-5)
        self.map_in = Linear(named_key(key, "map_in"), "BAD,DE->BAE", (J * D, W), ("mlp", "embed"))
        self.depth = config.head_blocks
        for i in range(self.depth):
            setattr(self, f"block_{i}", ResidualBlock(named_key(key, f"block {i}"), W))
        self.norm_out = LayerNorm(named_key(key, "norm_out"), W, epsilon=1e-5)
        self.map_out = Linear(named_key(key, "map_out"), "BAD,DJ->BAJ", (W, J), ("embed", "action"))

    def __call__(self, x_BAJD: Float[Array, "B A J D"]) -> Float[Array, "B A J"]:
        """Returns normalised actions."""
        B, A, J, D = x_BAJD.shape
        x = jax.nn.relu(self.map_in(self.norm_in(x_BAJD.reshape(B, A, J * D).astype(jnp.float32))))
        for i in range(self.depth):
            x = getattr(self, f"block_{i}")(x)
        return self.map_out(self.norm_out(x))


class OpenVlaOft(OnePassPolicy):
    """The policy: `loss` to train it, `sample_actions` to use it."""

    config: OpenVlaOftConfig

    def __init__(self, config: OpenVlaOftConfig, key: Key[Array, ""]) -> None:
        """Use `OpenVlaOftConfig.create`."""
        super().__init__(config, key)
        D = config.backbone.language.width
        self.action_head = L1Head(named_key(key, "action_head"), config)
        if config.proprioception:
            self.state_in = Linear(named_key(key, "state_in"), "BJ,JD->BD", (config.state_dim, D), ("action", "embed"))
            self.state_out = Linear(named_key(key, "state_out"), "BD,DE->BE", (D, D), (None, "embed"))

    def predict(self, observation: Observation) -> Float[Array, "B A J"]:
        """Returns normalised actions."""
        c = self.config
        B, D, slots = observation["prompt"].shape[0], c.backbone.language.width, c.action_horizon * c.action_dim
        state = None
        if c.proprioception:
            with jax.named_scope("state"):
                hidden = jax.nn.gelu(self.state_in(observation["state"]), approximate=False)
                state = self.state_out(hidden)[:, None].astype(c.dtype)
        empty = jnp.zeros((B, slots + 1, D), c.dtype)
        if c.eos is not None:  # all slots see it
            end = self.backbone.vlm.embed(jnp.full((B, 1), c.eos, jnp.int32))
            empty = jnp.concatenate([empty[:, :slots], end], axis=1)
        out, valid = self.backbone.run_queries(observation, empty, after_images=state, everything_sees_everything=True)
        S = out.shape[1] - slots - 1
        last = S - 1 - jnp.argmax(valid[:, :S][:, ::-1], axis=1)  # the last token of the prompt
        first = jnp.take_along_axis(out, last[:, None, None], axis=1)
        before = jnp.concatenate([first, out[:, S : S + slots - 1]], axis=1)
        with jax.named_scope("action_head"):
            return self.action_head(before.reshape(B, c.action_horizon, c.action_dim, D))

    # ---- Training ----------------------------------------------------------------------------------------------------

    def loss(
        self, key: Key[Array, ""], batch: Batch, *, counts: dict[str, Float[Array, ""]] | None = None
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, "B"]]]:
        """Returns the mean absolute error of a sample's valid entries, then over samples; `key` is not used.

        Metrics: "loss" and "valid". counts: see `loss_counts`.
        """
        self.config.check_inputs(batch, actions=True)
        mask = batch["action_mask"]
        error = jnp.abs(self.predict(self.config.observation(batch)) - jnp.where(mask, batch["actions"], 0.0))
        return masked_means(error, mask, None if counts is None else counts["actions"])

    def validation_losses(self, key: Key[Array, ""], batch: Batch) -> dict[str, Float[Array, ""]]:
        """Returns "loss"."""
        return {"loss": self.loss(key, batch)[0]}
