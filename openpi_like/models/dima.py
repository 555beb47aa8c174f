"""DiMA: a small planner that looks, taught by a large one that also reads (Hegde et al. 2025, arXiv 2501.09757).

Both read the tokens of the same image towers. The teacher runs them and the command through the language model; the
last hidden state of a query behind everything, and the car's state, become the plan. The student is a small decoder
whose queries are waypoints. Both learn the plan; besides, the student's planning feature is drawn to the teacher's. It
drives alone: the language model is there for training, and to compare with.

The paper's: one scene encoder for both, trained by both; KL divergence between features of the planner and of the
language model; losses that are summed without weights; a planner that is trained alone before (60 epochs, and 30
together). Ours: features are of the last layer, not of the one before it; the divergence is that of softmaxes over
channels, and moves the student alone; the student imitates the teacher's plan too; L1. Not here: VAD's and UniAD's
encoders, questions and answers, masked and future bird's-eye views, scene editing. What is said of the paper is from
its abstract and public notes on it; its text and code were not at hand.

Letters: B batch, C cameras, P tokens of one image, S tokens, D width of the language model, W width of the student,
H width of the teacher's head, A action horizon, J action dims.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Key

from openpi_like.batch import Array as Leaf
from openpi_like.batch import Batch, Observation
from openpi_like.draws import named_key
from openpi_like.models.backbone import Backbone, masked_means
from openpi_like.models.losses import weighted_sum
from openpi_like.models.paligemma import PaliGemmaConfig
from openpi_like.models.param import Linear, normal, use, weight, zeros
from openpi_like.models.policy import OnePassPolicy, PolicyConfig
from openpi_like.models.scene_decoder import SceneDecoder, SceneDecoderConfig, SceneReader
from openpi_like.models.vit import LayerNorm
from openpi_like.partition import lookup

ACTORS = ("student", "teacher")
LEFT_BEHIND = (r"^vlm/", r"^teacher/")
"""Weights of `DimaConfig` that `DimaStudentConfig` has no place for: for `WarmStart.drop`."""


# ---- Configs ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class DimaStudentConfig(PolicyConfig):
    """Sizes and options of the student alone, which has no language model; see `PolicyConfig`.

    backbone: of the teacher, for the towers, which see images without the text. student: sizes of its decoder.
    """

    student: SceneDecoderConfig

    def _problems(self) -> list[str]:
        problems = super()._problems()
        if getattr(self.backbone, "film", False):
            problems.append("backbone.film=True, expected False: the student has no language model to look with")
        return problems

    @classmethod
    def tiny(cls, *, image_size: tuple[int, int] = (64, 64), patch_size: int = 16, **options: Any) -> Any:
        """Returns a policy of about a million weights that trains on two CPU cores; options: the other fields."""
        fields = {**PaliGemmaConfig.tiny_fields(patch_size=patch_size), "student": SceneDecoderConfig.tiny()}
        return cls(**{**fields, "image_size": image_size, **options})

    def create(self, key: Key[Array, ""]) -> Any:
        """Returns a policy with fresh weights; every weight's draw depends on `key` and its own name only."""
        return DimaStudent(self, key)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DimaConfig(DimaStudentConfig):
    """Sizes and options of student and teacher; see `DimaStudentConfig`.

    acts_as: whose plan `sample_actions` returns, one of `ACTORS`.
    feature_weight: of the divergence of the student's feature; 1 in the paper. imitation_weight: of the distance to the
        teacher's plan; below 1, or all plans between the truth and the teacher's would be equally good.
    teacher_width: H.
    """

    acts_as: str = "student"
    feature_weight: float = 1.0
    imitation_weight: float = 0.5
    teacher_width: int = 512

    def _problems(self) -> list[str]:
        problems = super()._problems()
        if self.acts_as not in ACTORS:
            problems.append(f"acts_as={self.acts_as!r}, expected one of {ACTORS}")
        if not self.feature_weight >= 0:
            problems.append(f"feature_weight={self.feature_weight}, expected 0 or more")
        if not 0 <= self.imitation_weight < 1:
            problems.append(f"imitation_weight={self.imitation_weight}, expected 0 or more and less than 1")
        if self.teacher_width < 1:
            problems.append(f"teacher_width={self.teacher_width}, expected at least 1")
        return problems

    def create(self, key: Key[Array, ""]) -> "Dima":
        """Returns a policy with fresh weights; every weight's draw depends on `key` and its own name only."""
        return Dima(self, key)


# ---- Parts -----------------------------------------------------------------------------------------------------------


class Planned(NamedTuple):
    """A plan (B, A, J), normalised, and the feature it was read from: (B, W) of the student, (B, D) of the teacher."""

    plan: Leaf
    feature: Leaf


class Student(nnx.Module):
    """A waypoint is a query: what the car does and is told, of which all begin with the same, and one vector each.

    The command is the mean of its words, in a table of the student's own: that of the language model would be most of
    its weights.
    """

    def __init__(self, config: DimaStudentConfig, key: Key[Array, ""]) -> None:
        c, D, W = config, config.backbone.language.width, config.student.width
        draw = normal(W**-0.5)
        self.words = weight(key, "words", (c.vocab_size, W), ("vocab", "embed"), draw, table=True)
        self.state_in = Linear(named_key(key, "state_in"), "BJ,JW->BW", (c.state_dim, W), ("action", "embed"))
        self.waypoint = weight(key, "waypoint", (c.action_horizon, W), (None, "embed"), draw)
        self.images_in = SceneReader(named_key(key, "images_in"), cameras=len(c.cameras), token_width=D, width=W)
        if c.entities:
            self.things_norm = LayerNorm(named_key(key, "things_norm"), D)
            self.things_in = Linear(named_key(key, "things_in"), "BED,DW->BEW", (D, W), ("embed", "mlp"))
        self.decoder = SceneDecoder(named_key(key, "decoder"), c.student, unroll=c.unroll, remat=c.remat)
        self.plan_out = Linear(named_key(key, "plan_out"), "BAW,WJ->BAJ", (W, c.action_dim), ("embed", "action"))

    def _told(self, observation: Observation) -> Float[Array, "B W"]:
        words_BSW = lookup(self.words[...], self.words.get_metadata()["axes"], observation["prompt"])
        there_BS = observation["prompt_mask"][..., None]
        mean_BW = jnp.where(there_BS, words_BSW, 0).sum(1) / jnp.maximum(there_BS.sum(1), 1)
        return mean_BW + self.state_in(observation["state"])

    def __call__(self, backbone: Backbone, observation: Any) -> Planned:
        """Returns the plan. backbone: what has a map of the things around the car. observation: that `looked` returns.

        The feature is the mean of the waypoints' queries behind the decoder.
        """
        tokens, there = self.images_in(observation["seen"])
        if backbone.entities is not None:
            things, there_too = backbone.entities(observation["entities"], observation["entity_mask"])
            things_BEW = self.things_in(self.things_norm(things.astype(tokens.dtype)))
            tokens, there = jnp.concatenate([tokens, things_BEW], axis=1), jnp.concatenate([there, there_too], axis=1)
        queries_BAW = self._told(observation)[:, None] + use(self.waypoint, jnp.float32)
        read_BAW = self.decoder(queries_BAW, tokens, there)
        return Planned(self.plan_out(read_BAW), read_BAW.mean(1))


class Teacher(nnx.Module):
    """A query behind everything, and a head with one hidden layer. `match` is for training alone: it takes the
    student's feature to the width of the teacher's."""

    def __init__(self, config: DimaConfig, key: Key[Array, ""]) -> None:
        c, D, H = config, config.backbone.language.width, config.teacher_width
        self.query = weight(key, "query", (1, D), (None, "embed"), zeros)
        self.hidden_in = Linear(named_key(key, "hidden_in"), "BD,DH->BH", (D, H), ("embed", "mlp"))
        self.state_in = Linear(named_key(key, "state_in"), "BJ,JH->BH", (c.state_dim, H), ("action", "mlp"))
        shape = (H, c.action_horizon, c.action_dim)
        self.plan_out = Linear(named_key(key, "plan_out"), "BH,HAJ->BAJ", shape, ("mlp", None, "action"))
        self.match = Linear(named_key(key, "match"), "BW,WD->BD", (c.student.width, D), ("mlp", "embed"))

    def __call__(self, backbone: Backbone, observation: Any) -> Planned:
        """Returns the plan; its feature is the query's last hidden state."""
        B = observation["prompt"].shape[0]
        query = jnp.broadcast_to(self.query[...], (B, *self.query[...].shape))
        out_BSD, _ = backbone.run_queries(observation, query)
        with jax.named_scope("teacher_head"):
            hidden_BD = out_BSD[:, -1].astype(jnp.float32)
            told_BH = self.hidden_in(hidden_BD) + self.state_in(observation["state"])
            return Planned(self.plan_out(jax.nn.gelu(told_BH, approximate=False)), hidden_BD)


def divergence(of_BD: Float[Array, "B D"], to_BD: Float[Array, "B D"]) -> Float[Array, "B"]:
    """Returns KL(to || of), in nats, of the softmaxes of two features over their channels."""
    log_of, log_to = jax.nn.log_softmax(of_BD), jax.nn.log_softmax(to_BD)
    return (jnp.exp(log_to) * (log_to - log_of)).sum(-1)


# ---- Policies --------------------------------------------------------------------------------------------------------


class ScenePolicy(OnePassPolicy):
    """What student and both have in common."""

    config: DimaStudentConfig

    def __init__(self, config: DimaStudentConfig, key: Key[Array, ""]) -> None:
        """Use the config's `create`."""
        super().__init__(config, key)
        self.student = Student(config, named_key(key, "student"))

    def validation_losses(self, key: Key[Array, ""], batch: Batch) -> dict[str, Float[Array, ""]]:
        """Returns "loss" and each of its parts, NaN where no sample of the batch has it."""
        loss, metrics = self.loss(key, batch)
        parts = [name for name in metrics if f"{name}_valid" in metrics]
        return {"loss": loss, **{k: metrics[k].sum() / metrics[f"{k}_valid"].sum() for k in parts}}

    def loss(
        self, key: Key[Array, ""], batch: Batch, *, counts: dict[str, Float[Array, ""]] | None = None
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, "B"]]]:
        """Returns the scalar and metrics by sample. counts: see `loss_counts`."""
        raise NotImplementedError


class DimaStudent(ScenePolicy):
    """The student alone: `loss` to train it, `sample_actions` to use it."""

    config: DimaStudentConfig

    def __init__(self, config: DimaStudentConfig, key: Key[Array, ""]) -> None:
        """Use `DimaStudentConfig.create`."""
        super().__init__(config, key)
        del self.backbone.vlm

    def predict(self, observation: Observation) -> Float[Array, "B A J"]:
        """Returns normalised waypoints."""
        return self.student(self.backbone, self.backbone.looked(observation)).plan

    def loss(
        self, key: Key[Array, ""], batch: Batch, *, counts: dict[str, Float[Array, ""]] | None = None
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, "B"]]]:
        """Returns the mean absolute error of a sample's valid entries, then over samples; `key` is not used.

        Metrics: "loss" and "valid", and the same as "student_loss". counts: see `loss_counts`.
        """
        self.config.check_inputs(batch, actions=True)
        plan, total = self.predict(self.config.observation(batch)), None if counts is None else counts["actions"]
        return weighted_sum({"student_loss": (1.0, _l1(plan, batch["actions"], batch["action_mask"], total))})


class Dima(ScenePolicy):
    """Both: `loss` to train them, `sample_actions` to use the one that `acts_as` names."""

    config: DimaConfig

    def __init__(self, config: DimaConfig, key: Key[Array, ""]) -> None:
        """Use `DimaConfig.create`."""
        super().__init__(config, key)
        self.teacher = Teacher(config, named_key(key, "teacher"))

    def both(self, observation: Observation) -> tuple[Planned, Planned]:
        """Returns what the student and the teacher plan, who look once."""
        looked = self.backbone.looked(observation)
        return self.student(self.backbone, looked), self.teacher(self.backbone, looked)

    def predict(self, observation: Observation) -> Float[Array, "B A J"]:
        """Returns normalised waypoints of the one that acts; the other is not run."""
        plans = self.student if self.config.acts_as == "student" else self.teacher
        return plans(self.backbone, self.backbone.looked(observation)).plan

    def outputs(self, key: Key[Array, ""], batch: Batch) -> Float[Array, "B A2 J"]:
        """Returns both plans, the student's first."""
        return jnp.concatenate([planned.plan for planned in self.both(self.config.observation(batch))], axis=1)

    def loss(
        self, key: Key[Array, ""], batch: Batch, *, counts: dict[str, Float[Array, ""]] | None = None
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, "B"]]]:
        """Returns the mean absolute error of both plans, plus what draws the student to the teacher; `key` is not used.

        Each part is a mean over a sample's valid entries, then over samples that have any. Metrics: "loss" and "valid",
        and each part with its own "..._valid": "student_loss", "teacher_loss", "feature_loss" and
        "imitation_loss". counts: see `loss_counts`.
        """
        self.config.check_inputs(batch, actions=True)
        c, mask, total = self.config, batch["action_mask"], None if counts is None else counts["actions"]
        student, teacher = self.both(self.config.observation(batch))
        with jax.named_scope("distillation"):
            apart = divergence(self.teacher.match(student.feature), jax.lax.stop_gradient(teacher.feature))
            feature = masked_means(apart[:, None], mask.any((1, 2))[:, None], total)
            imitation = _l1(student.plan, jax.lax.stop_gradient(teacher.plan), mask, total)
        parts = {
            "student_loss": (1.0, _l1(student.plan, batch["actions"], mask, total)),
            "teacher_loss": (1.0, _l1(teacher.plan, batch["actions"], mask, total)),
            "feature_loss": (c.feature_weight, feature),
            "imitation_loss": (c.imitation_weight, imitation),
        }
        return weighted_sum(parts)


def _l1(
    plan_BAJ: Float[Array, "B A J"],
    to_BAJ: Float[Array, "B A J"],
    mask_BAJ: Bool[Array, "B A J"],
    samples: Float[Array, ""] | None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, "B"]]]:
    """Returns the mean absolute error, see `masked_means`."""
    return masked_means(jnp.abs(plan_BAJ - jnp.where(mask_BAJ, to_BAJ, 0.0)), mask_BAJ, samples)
