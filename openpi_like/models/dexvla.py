"""DexVLA: a vision-language model that writes what it is about to do, and a diffusion expert that does it
(Wen et al. 2025, arXiv 2502.05855).

The model reads cameras and instruction and writes a line of reasoning. What it read and what it wrote become one vector
(`Fusion`), which is all that the expert (`scale_dp`) is told besides state and robot.

Letters: B batch, S tokens, T tokens of the reasoning, D width of the language model, A action horizon, J action dims,
W width of the expert.
"""

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from openpi_like.batch import Array as Leaf
from openpi_like.batch import Batch, Observation
from openpi_like.draws import RowKeys, named_key
from openpi_like.models.backbone import masked_means
from openpi_like.models.ddim import Ddim
from openpi_like.models.dexvla_names import policy_rows
from openpi_like.models.diffusion import DiffusionPolicy
from openpi_like.models.formats import Format, Table
from openpi_like.models.param import Linear, xavier
from openpi_like.models.policy import PolicyConfig
from openpi_like.models.prismatic import PrismaticConfig
from openpi_like.models.scale_dp import ScaleDp, ScaleDpConfig
from openpi_like.models.sequences import with_thought


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScaleDpPolicyConfig(PolicyConfig):
    """What policies share whose expert is ScaleDP; see `PolicyConfig`.

    expert: its sizes. diffusion: its schedule. Robots named in `robots` have maps of their own in it.
    """

    expert: ScaleDpConfig
    diffusion: Ddim = Ddim()
    has_robot_parts: ClassVar[bool] = True

    def _problems(self) -> list[str]:
        return super()._problems() + self.diffusion.problems()

    def released_normalization(self) -> str:
        """Returns "quantile"."""
        return "quantile"


@dataclasses.dataclass(frozen=True, kw_only=True)
class DexVlaConfig(ScaleDpPolicyConfig):
    """Sizes and options of a DexVLA policy; see `ScaleDpPolicyConfig`.

    thought_len: T, tokens of the reasoning at most, with its end; at least 1.
    text_weight: of its cross-entropy beside the noise's error.
    """

    text_weight: float = 1.0
    can_think: ClassVar[bool] = True

    @property
    def answer_len(self) -> int:
        """T: text that is written before acting is trained on as an answer."""
        return self.thought_len

    def _problems(self) -> list[str]:
        problems = super()._problems()
        if self.thought_len < 1:
            problems.append(f"thought_len={self.thought_len}, expected at least 1, for the end")
        if not self.text_weight >= 0:
            problems.append(f"text_weight={self.text_weight}, expected 0 or more")
        return problems

    def sampling_shapes(self) -> dict[str, Any]:
        """Returns the shape of "eos", which ends what is written."""
        return {"eos": jax.ShapeDtypeStruct((), "int32")}

    def sampling_options(self, text: Any, fast: Any) -> dict[str, Any]:
        """Returns "eos"."""
        return {"eos": jnp.int32(text.tokenizer.required("eos"))}

    def formats(self) -> dict[str, Format]:
        """Returns the published layouts of the backbone; in "huggingface" also what DexVLA's files have beside it."""
        formats = dict(super().formats())
        if "huggingface" in formats:
            table = Table(tuple(policy_rows(self.expert.depth, one_robot=len(self.robots) < 2)))
            formats["huggingface"] = formats["huggingface"].with_rows(lambda names: table)
        return formats

    @classmethod
    def tiny(cls, *, image_size: tuple[int, int] = (64, 64), patch_size: int = 16, **options: Any) -> "DexVlaConfig":
        """Returns a policy that trains on two CPU cores; options: the other fields."""
        fields: dict[str, Any] = {
            "backbone": PrismaticConfig.tiny(patch_size=patch_size),
            "image_size": image_size,
            "image_slots": (1,) * len(options["cameras"]),
            "expert": ScaleDpConfig.tiny(),
            "thought_len": 24,
        }
        return cls(**{**fields, **options})

    def create(self, key: Key[Array, ""]) -> "DexVla":
        """Returns a policy with fresh weights; every weight's draw depends on `key` and its own name only."""
        return DexVla(self, key)


class Fusion(nnx.Module):
    """One vector of what was read and what was written: FiLM of the one by the other, and the mean of what was read.

    Fresh, what was written does not matter.
    """

    def __init__(self, key: Key[Array, ""], width: int) -> None:
        def linear(name: str, **options: Any) -> Linear:
            return Linear(named_key(key, name), "BD,DE->BE", (width, width), ("embed", "mlp"), **options)

        for name in ("read_0", "read_1", "written_0", "written_1"):
            setattr(self, name, linear(name, init=xavier(width, width)))
        self.scale, self.shift = linear("scale", zero=True), linear("shift", zero=True)

    def __call__(self, read_BD: Float[Array, "B D"], written_BD: Float[Array, "B D"]) -> Float[Array, "B D"]:
        """Returns the vector. read, written: the means of their tokens."""

        def mapped(name: str, x: jax.Array) -> jax.Array:
            hidden = jax.nn.gelu(getattr(self, f"{name}_0")(x), approximate=False)
            return getattr(self, f"{name}_1")(hidden)

        read, written = mapped("read", read_BD), mapped("written", written_BD)
        return read * (1 + self.scale(written)) + self.shift(written) + read_BD


class Told(NamedTuple):
    """What the expert is told, (B, W), and by which robot's maps it acts, (B,)."""

    vector: Leaf
    robot: Leaf


class ScaleDpPolicy(DiffusionPolicy):
    """A policy whose expert is ScaleDP."""

    config: ScaleDpPolicyConfig

    def __init__(self, config: ScaleDpPolicyConfig, key: Key[Array, ""]) -> None:
        """Use the config's `create`."""
        super().__init__(config, key)
        c = config
        self.expert = ScaleDp(
            named_key(key, "expert"),
            c.expert,
            condition_dim=c.backbone.language.width,
            state_dim=c.state_dim,
            action_dim=c.action_dim,
            horizon=c.action_horizon,
            robots=max(1, len(c.robots)),
            dtype=c.dtype,
            unroll=c.unroll,
            remat=c.remat,
        )

    def told(self, condition_BD: Float[Array, "B D"], observation: Observation | Batch) -> Told:
        """Returns what the expert is told. condition: of what was seen and said."""
        state = observation["state"]
        robot = observation.get("robot")
        robot = jnp.zeros(len(state), jnp.int32) if robot is None else robot
        with jax.named_scope("expert"):
            return Told(self.expert.told(condition_BD, state), robot)

    def noise(self, given: Told, x_BAJ: Float[Array, "B A J"], step_B: Int[Array, "B"]) -> Float[Array, "B A J"]:
        """As `DiffusionPolicy.noise`."""
        with jax.named_scope("expert"):
            return self.expert(x_BAJ, step_B, given.vector, given.robot)


class DexVla(ScaleDpPolicy):
    """The policy: `loss` to train it, `think` and `sample_actions` to use it."""

    config: DexVlaConfig

    def __init__(self, config: DexVlaConfig, key: Key[Array, ""]) -> None:
        """Use `DexVlaConfig.create`."""
        super().__init__(config, key)
        self.fusion = Fusion(named_key(key, "fusion"), config.backbone.language.width)

    def _read(self, batch: Batch) -> tuple[Float[Array, "B S D"], Told]:
        """Returns tokens after the final norm, and what the expert is told of them."""
        out, _, valid = self.backbone.language(batch)
        written = self.backbone.text_slots(batch["prompt_causal"] & batch["prompt_mask"], valid.shape[1])
        means = (_mean(out, valid & ~written), _mean(out, written))
        with jax.named_scope("fusion"):
            return out, self.told(self.fusion(*means), batch)

    # ---- Training ----------------------------------------------------------------------------------------------------

    def loss(
        self, key: Key[Array, ""], batch: Batch, *, counts: dict[str, Float[Array, ""]] | None = None
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, "B"]]]:
        """Returns the error of the noise plus `text_weight` times the cross-entropy of the reasoning.

        Each is the mean over its valid entries of a sample, then over samples that have any. Metrics: "loss" and
        "valid", and "noise_loss" and "text_loss", each with its own "..._valid". counts: see `loss_counts`.
        """
        self.config.check_inputs(batch, actions=True)
        total, weight = counts or {}, self.config.text_weight
        out, told = self._read(batch)
        noise, per_noise = self.noise_loss(key, told, batch, samples=total.get("actions"))
        text, per_text = masked_means(*self.backbone.text_errors(out, batch), total.get("text"))
        return noise + weight * text, {
            "loss": per_noise["loss"] + weight * per_text["loss"],
            "valid": jnp.maximum(per_noise["valid"], per_text["valid"]),
            "noise_loss": per_noise["loss"],
            "noise_loss_valid": per_noise["valid"],
            "text_loss": per_text["loss"],
            "text_loss_valid": per_text["valid"],
        }

    def loss_counts(self, batch: Batch) -> dict[str, Float[Array, ""]]:
        """Returns what `loss` divides by. A part of a batch, with the counts of all of it, has its part of the loss."""
        return super().loss_counts(batch) | {"text": self.backbone.text_samples(batch)}

    def validation_losses(self, key: Key[Array, ""], batch: Batch) -> dict[str, Float[Array, ""]]:
        """Returns "loss", "noise_loss" and "text_loss", NaN where no sample of the batch has it; noise at steps spread
        over the schedule."""
        self.config.check_inputs(batch, actions=True)
        out, told = self._read(batch)
        noise = self.validation_noise_loss(key, told, batch)
        errors, mask = self.backbone.text_errors(out, batch)
        text = masked_means(errors, mask)[0]
        nan = lambda x, there: jnp.where(there.any(), x, jnp.nan)  # noqa: E731
        parts = {"noise_loss": nan(noise, batch["action_mask"]), "text_loss": nan(text, mask)}
        return {"loss": noise + self.config.text_weight * text, **parts}

    # ---- Acting ------------------------------------------------------------------------------------------------------

    def outputs(self, key: Key[Array, ""], batch: Batch) -> Float[Array, "B A J"]:
        """Returns actions sampled from noise drawn with `key`, of the reasoning that the batch has."""
        self.config.check_inputs(batch, actions=True)
        return self.denoised(key, self._read(batch)[1], batch["state"].shape[0], None)

    def think(self, observation: Observation, **options: Any) -> tuple[Int[Array, "B T"], Bool[Array, "B T"]]:
        """As `Model.think`: the reasoning, the likeliest token one after another, to its end ("eos" of the options)."""
        key = jax.random.key(0)  # nothing is drawn
        ends = lambda token: token == options["eos"]  # noqa: E731
        return self.backbone.generate(key, observation, max_new=self.config.thought_len, ends=ends)

    def sample_actions(
        self,
        key: RowKeys,
        observation: Observation,
        *,
        action_mask: Bool[Array, "B A J"] | None = None,
        eos: Int[Array, ""],
    ) -> Float[Array, "B A J"]:
        """Returns normalised actions, see `DiffusionPolicy.denoised`, after a thought where the observation has none.

        Raises:
            ValueError: the observation does not fit the config; lists everything that does not.
        """
        self.config.check_inputs(observation, actions=False)
        if "thought" not in observation:
            ids, mask = self.think(observation, eos=eos)
            observation = {**observation, "thought": ids, "thought_mask": mask}
        read = with_thought(observation)
        return self.denoised(key, self._read(read)[1], read["prompt"].shape[0], action_mask)


def _mean(out_BSD: Float[Array, "B S D"], there_BS: Bool[Array, "B S"]) -> Float[Array, "B D"]:
    """Returns the mean over the tokens that are there, zeros where there are none."""
    there = there_BS[..., None]
    total = jnp.where(there, out_BSD.astype(jnp.float32), 0.0).sum(1)
    return (total / jnp.maximum(there.sum(1), 1)).astype(out_BSD.dtype)
