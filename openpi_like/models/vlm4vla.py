"""VLM4VLA: a vision-language model, one learned query, and an MLP that reads actions off it (arXiv 2601.03309).

The least that makes a policy of a vision-language model, for telling what the model is worth: the query stands behind
cameras and instruction, its last hidden state becomes a chunk. Poses are regressed, what has two states (a gripper) is
classified. No state of the robot is seen. What is trained is `Trainable`'s: `frozen=("^vision/",)` or
`frozen=("^vlm/embedding$",)` are the published ablations; from scratch is a run without `warm_start`.

Letters: B batch, S tokens, Q queries, D width, W width of the head, A action horizon, J action dims, G binary dims.
"""

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Key

from openpi_like.batch import Batch, Observation
from openpi_like.draws import named_key
from openpi_like.models.backbone import masked_means
from openpi_like.models.paligemma import PaliGemmaConfig
from openpi_like.models.param import Linear, weight, xavier, zeros
from openpi_like.models.policy import OnePassPolicy, PolicyConfig
from openpi_like.robots import Robot


@dataclasses.dataclass(frozen=True, kw_only=True)
class Vlm4VlaConfig(PolicyConfig):
    """Sizes and options of a VLM4VLA policy; see `PolicyConfig`.

    binary_dims: action dims with two states, which normalisation has put at -1 and 1; the sign of their logit is what
        is done.
    clip: normalised poses beyond this are taken for it, and it becomes the end of tanh.
    gripper_weight: of the loss of binary dims beside that of poses; 1 in the paper's eq. 1, 0.01 in its released runs.
    head_width: W.
    """

    binary_dims: tuple[int, ...]
    clip: float = 0.65
    gripper_weight: float = 0.01
    head_width: int = 1024

    def _problems(self) -> list[str]:
        problems = super()._problems()
        dims = self.binary_dims
        if len(set(dims)) != len(dims) or not all(0 <= d < self.action_dim for d in dims):
            problems.append(f"binary_dims={dims}, expected different dims from 0 to {self.action_dim - 1}")
        if len(dims) == self.action_dim:
            problems.append("binary_dims are all dims, expected one at least that is not")
        if self.head_width < 4 or self.head_width % 4:
            problems.append(f"head_width={self.head_width}, expected a multiple of 4")
        problems += [
            f"{name}={getattr(self, name)}, expected a number above 0"
            for name in ("clip", "gripper_weight")
            if not getattr(self, name) > 0
        ]
        return problems

    @property
    def is_binary(self) -> Bool[np.ndarray, "J"]:
        """Which dims have two states."""
        return np.isin(np.arange(self.action_dim), self.binary_dims)

    def robot_problems(self, robot: Robot, fast: Any) -> list[str]:
        """Returns whether a robot is normalised otherwise than to [-1, 1], where tanh ends."""
        if robot.normalization == "quantile":
            return []
        return [f"normalization={robot.normalization!r}, expected 'quantile': the head's poses are within [-1, 1]"]

    def released_normalization(self) -> str:
        """Returns "quantile"."""
        return "quantile"

    @classmethod
    def tiny(cls, *, image_size: tuple[int, int] = (64, 64), patch_size: int = 16, **options: Any) -> "Vlm4VlaConfig":
        """Returns a policy of about a million weights that trains on two CPU cores; options: the other fields."""
        fields = PaliGemmaConfig.tiny_fields(patch_size=patch_size)
        return cls(**{**fields, "image_size": image_size, "head_width": 256, **options})

    def create(self, key: Key[Array, ""]) -> "Vlm4Vla":
        """Returns a policy with fresh weights; every weight's draw depends on `key` and its own name only."""
        return Vlm4Vla(self, key)


class Mlp(nnx.Module):
    """Linear maps with ReLU between them, not behind the last."""

    def __init__(self, key: Key[Array, ""], widths: tuple[int, ...], *, last: str = "mlp") -> None:
        """last: logical axis of what comes out."""
        self.depth = len(widths) - 1
        for i, shape in enumerate(itertools.pairwise(widths)):
            axes = ("embed", "mlp" if i + 1 < self.depth else last)
            linear = Linear(named_key(key, str(i)), "BD,DE->BE", shape, axes, init=xavier(*shape))
            setattr(self, f"map_{i}", linear)

    def __call__(self, x_BD: Float[Array, "B D"]) -> Float[Array, "B E"]:
        """Applies all of them."""
        for i in range(self.depth):
            x_BD = getattr(self, f"map_{i}")(x_BD if i == 0 else jax.nn.relu(x_BD))
        return x_BD


class ActionHead(nnx.Module):
    """A trunk, and a branch each for poses and for binary dims. Runs in float32; a few million weights."""

    def __init__(self, key: Key[Array, ""], config: Vlm4VlaConfig) -> None:
        D, W, A, G = config.backbone.language.width, config.head_width, config.action_horizon, len(config.binary_dims)
        self.config = config
        self.trunk = Mlp(named_key(key, "trunk"), (D, D // 2, W))
        widths = lambda dims: (W, W, W // 2, W // 4, A * dims)  # noqa: E731
        branch = lambda name, dims: Mlp(named_key(key, name), widths(dims), last="action")  # noqa: E731
        self.pose = branch("pose", config.action_dim - G)
        self.binary: Any = branch("binary", G) if G else None

    def __call__(self, x_BD: Float[Array, "B D"]) -> Float[Array, "B A J"]:
        """Returns tanh of poses and logits of binary dims, each where its dim is."""
        B, A = x_BD.shape[0], self.config.action_horizon
        trunk = self.trunk(x_BD.astype(jnp.float32))
        parts = [jnp.tanh(self.pose(trunk)).reshape(B, A, -1)]
        if self.binary is not None:
            parts.append(self.binary(trunk).reshape(B, A, -1))
        order = np.argsort(np.argsort(self.config.is_binary, kind="stable"), kind="stable")
        return jnp.concatenate(parts, axis=-1)[..., order]


class Vlm4Vla(OnePassPolicy):
    """The policy: `loss` to train it, `sample_actions` to use it."""

    config: Vlm4VlaConfig

    def __init__(self, config: Vlm4VlaConfig, key: Key[Array, ""]) -> None:
        """Use `Vlm4VlaConfig.create`."""
        super().__init__(config, key)
        self.action_query = weight(key, "action_query", (1, config.backbone.language.width), (None, "embed"), zeros)
        self.action_head = ActionHead(named_key(key, "action_head"), config)

    def predict(self, observation: Observation) -> Float[Array, "B A J"]:
        """Returns what the head says: poses over `clip`, in (-1, 1), and logits of binary dims."""
        B = observation["prompt"].shape[0]
        query = jnp.broadcast_to(self.action_query[...], (B, *self.action_query[...].shape))
        out_BSD, _ = self.backbone.run_queries(observation, query)
        with jax.named_scope("action_head"):
            return self.action_head(out_BSD[:, -1])

    # ---- Training ----------------------------------------------------------------------------------------------------

    def loss(
        self, key: Key[Array, ""], batch: Batch, *, counts: dict[str, Float[Array, ""]] | None = None
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, "B"]]]:
        """Returns the Huber loss of poses plus `gripper_weight` times the cross-entropy of binary dims.

        Each is the mean over its valid entries of a sample, then over samples that have any; `key` is not used.
        Metrics: "loss" and "valid", and "pose_loss" and "gripper_loss", each with its own "..._valid".
        counts: see `loss_counts`.
        """
        self.config.check_inputs(batch, actions=True)
        total, binary = counts or {}, jnp.asarray(self.config.is_binary)
        said, mask = self.predict(self.config.observation(batch)), batch["action_mask"]
        with jax.named_scope("action_loss"):
            actions = jnp.where(mask, batch["actions"], 0.0)
            error = said - jnp.clip(actions, -self.config.clip, self.config.clip) / self.config.clip
            size = jnp.abs(error)
            huber = jnp.where(size <= 1, 0.5 * jnp.square(error), size - 0.5)
            entropy = jax.nn.softplus(jnp.where(actions > 0, -said, said))
            pose, per_pose = masked_means(huber, mask & ~binary, total.get("pose"))
            gripper, per_gripper = masked_means(entropy, mask & binary, total.get("gripper"))
        weight = self.config.gripper_weight
        return pose + weight * gripper, {
            "loss": per_pose["loss"] + weight * per_gripper["loss"],
            "valid": jnp.maximum(per_pose["valid"], per_gripper["valid"]),
            "pose_loss": per_pose["loss"],
            "pose_loss_valid": per_pose["valid"],
            "gripper_loss": per_gripper["loss"],
            "gripper_loss_valid": per_gripper["valid"],
        }

    def loss_counts(self, batch: Batch) -> dict[str, Float[Array, ""]]:
        """Returns what `loss` divides by. A part of a batch, with the counts of all of it, has its part of the loss."""
        binary = jnp.asarray(self.config.is_binary)
        count = lambda mask: mask.any((1, 2)).sum().astype(jnp.float32)  # noqa: E731
        return {"pose": count(batch["action_mask"] & ~binary), "gripper": count(batch["action_mask"] & binary)}

    def validation_losses(self, key: Key[Array, ""], batch: Batch) -> dict[str, Float[Array, ""]]:
        """Returns "loss", "pose_loss" and "gripper_loss", NaN where no sample of the batch has it."""
        loss, metrics = self.loss(key, batch)
        parts = ("pose_loss", "gripper_loss")
        return {"loss": loss, **{k: metrics[k].sum() / metrics[f"{k}_valid"].sum() for k in parts}}

    def chosen(self, said_BAJ: Float[Array, "B A J"]) -> Float[Array, "B A J"]:
        """Returns poses up to `clip`, and -1 or 1 for binary dims."""
        # Without `sign`, which has a third value; what is not a number stays so.
        two = jnp.where(said_BAJ > 0, 1.0, jnp.where(said_BAJ <= 0, -1.0, said_BAJ))
        return jnp.where(jnp.asarray(self.config.is_binary), two, said_BAJ * self.config.clip)
