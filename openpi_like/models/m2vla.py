"""M2-VLA: a frozen vision-language model that is read layer by layer, and a memory of skills (arXiv 2604.24182).

Learned queries stand behind cameras and instruction. A head with as many blocks as the language model has layers reads
queries, state and images behind each of them (`layer_mixture`), and chunks that were done for similar images
(`skill_memory`). This is the head of the released code, which says the chunk in one pass and learns from its absolute
error; `m2vla_noise` has that of the paper, and `vla_adapter` the blocks of VLA-Adapter, from which both come.

The backbone is frozen, which is the run's to say: `Trainable(frozen=FROZEN)`. Where it is causal and cameras come first
(`PrismaticConfig`), what it makes of images depends on nothing else.

Letters: B batch, L layers, A action horizon, J action dims, Q queries, P visual tokens, D width, K numbers of a key.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from openpi_like.batch import Batch, Observation
from openpi_like.draws import named_key, sample_keys
from openpi_like.models.backbone import masked_means
from openpi_like.models.formats import Format, Table
from openpi_like.models.layer_mixture import LayerBlock, LayerFeatures, LayerHead, SeparateBlock
from openpi_like.models.m2vla_names import released_table
from openpi_like.models.param import Linear, weight, zeros
from openpi_like.models.policy import Model, OnePassPolicy, PolicyConfig
from openpi_like.models.prismatic import PrismaticConfig
from openpi_like.models.skill_memory import SkillMemory, SkillMemoryConfig
from openpi_like.models.vit import LayerNorm

FROZEN = ("^(dino|siglip|projector|vlm)/",)
"""Weights of a Prismatic backbone: for `Trainable`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class M2VlaConfig(PolicyConfig):
    """Sizes and options of an M2-VLA policy; see `PolicyConfig`.

    queries: Q. head_heads: of the attention in the head's blocks. skills: the memory, None without one.
    perturbation: standard deviation of what the chunk starts from in training; it starts from zeros otherwise.
    as_released: as the released code has it, for weights that were trained with it: angles that are no rotation (see
        `rotate_as_released`), and visual tokens from the text token before the first of them to the last but one.
    """

    queries: int = 64
    head_heads: int = 8
    skills: SkillMemoryConfig | None = None
    perturbation: float = 0.02
    as_released: bool = False
    block: ClassVar[type[LayerBlock]] = SeparateBlock

    def _problems(self) -> list[str]:
        problems = super()._problems()
        D = self.backbone.language.width
        if self.queries < 1:
            problems.append(f"queries={self.queries}, expected at least 1")
        if self.head_heads < 1 or D % (2 * self.head_heads):
            problems.append(f"head_heads={self.head_heads}, expected a number that divides half of the width {D}")
        if not self.perturbation >= 0:
            problems.append(f"perturbation={self.perturbation}, expected 0 or more")
        if self.skills is not None:
            problems += self.skills.problems(self.backbone.language.depth)
        if self.as_released and not all(self.image_slots):
            problems.append(f"as_released with image_slots={self.image_slots}, expected cameras behind a text token")
        return problems

    @property
    def reads_episodes(self) -> bool:
        """Whether the memory leaves out a sample's own episode."""
        return self.skills is not None and self.skills.apart

    def with_image_states(self, shapes: Mapping[str, Any]) -> dict[str, Any]:
        """As `PolicyConfig.with_image_states`."""
        B, language = shapes["prompt"].shape[0], self.backbone.language
        T = len(self.cameras) * self.backbone.image_tokens(self.image_size) + (self.image_slots or (0,))[0]
        states = jax.ShapeDtypeStruct((B, language.depth + 1, T, language.width), self.dtype)
        return {**shapes, "images": {}, "image_states": states}

    def released_normalization(self) -> str:
        """Returns "quantile"."""
        return "quantile"

    def formats(self) -> dict[str, Format]:
        """Returns the published layouts of the backbone; in "openvla" also what this policy adds, see `m2vla_names`."""
        formats = dict(super().formats())
        if "openvla" in formats:
            formats["openvla"] = formats["openvla"].with_rows(lambda names: self.table())
        return formats

    def table(self) -> Table:
        """Returns the rows of what this policy adds to its backbone."""
        language, gated = self.backbone.language, issubclass(self.block, SeparateBlock)
        return released_table(language.depth, language.width, self.head_heads, self.skills, gated=gated)

    @classmethod
    def released(cls, **options: Any) -> "M2VlaConfig":
        """Returns the published sizes: Prismatic Qwen2.5-0.5B, two cameras, chunks of 8 steps; options: others."""
        fields: dict[str, Any] = {
            "backbone": PrismaticConfig.qwen2_5_0_5b(),
            "cameras": ("base", "wrist"),
            "image_slots": (1, 1),
            "image_size": (224, 224),
            "state_dim": 8,
            "action_dim": 7,
            "action_horizon": 8,
            "prompt_len": 64,
            "vocab_size": 151_936,
            "dtype": "bfloat16",
            "skills": SkillMemoryConfig(),
        }
        return cls(**{**fields, **options})

    @classmethod
    def tiny(cls, *, image_size: tuple[int, int] = (64, 64), patch_size: int = 16, **options: Any) -> "M2VlaConfig":
        """Returns a policy that trains on two CPU cores; options: the other fields."""
        fields: dict[str, Any] = {
            "backbone": PrismaticConfig.tiny(patch_size=patch_size),
            "image_size": image_size,
            "image_slots": (1,) * len(options["cameras"]),
            "queries": 8,
            "head_heads": 4,
            "skills": SkillMemoryConfig(size=512, layers=(1, 2)),
        }
        return cls(**{**fields, **options})

    def create(self, key: Key[Array, ""]) -> "LayerPolicy":
        """Returns a policy with fresh weights; every weight's draw depends on `key` and its own name only."""
        return M2Vla(self, key)


class LayerPolicy(Model):
    """What policies share that read a backbone layer by layer: queries, state, memory."""

    config: M2VlaConfig

    def __init__(self, config: M2VlaConfig, key: Key[Array, ""]) -> None:
        """Use the config's `create`."""
        super().__init__(config, key)
        if not self.backbone.images_first:
            raise ValueError(
                f"{type(config).__name__}: backbone={config.backbone}, image_slots={config.image_slots}; expected a "
                "causal backbone, all cameras in one place of the text, no FiLM and no entities: it reads what images "
                "are without what stands behind them"
            )
        c, D, A = config, config.backbone.language.width, config.action_horizon
        self.queries = weight(key, "queries", (c.queries, D), (None, "embed"), zeros)
        self.state_in = Linear(named_key(key, "state_in"), "BJ,JD->BD", (c.state_dim, D), ("action", "embed"))
        self.state_out = Linear(named_key(key, "state_out"), "BD,DE->BE", (D, D), (None, "embed"))
        self.head = LayerHead(
            named_key(key, "head"),
            c.block,
            layers=c.backbone.language.depth,
            width=D,
            heads=c.head_heads,
            action_dim=c.action_dim,
            as_released=c.as_released,
            unroll=c.unroll,
            remat=c.remat,
        )
        E = A * c.action_dim
        self.skills: Any = None if c.skills is None else SkillMemory(c.skills, len(c.skills.layers) * D, E)
        if c.skills is not None:
            recalled = ("action", None, "embed")
            self.skill_in = Linear(named_key(key, "skill_in"), "BRE,EAD->BRAD", (E, A, D), recalled)

    # ---- What the backbone says --------------------------------------------------------------------------------------

    def features(self, observation: Observation) -> tuple[LayerFeatures, Float[Array, "B K"]]:
        """Returns what the head reads, and the keys of the memory (K = 0 without one)."""
        Q, B = self.config.queries, observation["prompt"].shape[0]
        queries = jnp.broadcast_to(self.queries[...], (B, *self.queries[...].shape))
        images = observation.get("image_states")
        images = self.backbone.image_states(observation) if images is None else jnp.moveaxis(images, 1, 0)
        behind, valid = self.backbone.states_behind(observation, images, queries)
        seen, mask = images[:, :, self._visual_tokens()], valid[:, self._visual_tokens()]
        return LayerFeatures(behind[1:, :, -Q:], seen[1:], mask), self.keys(seen, mask)

    def keys(self, seen_LBPD: Float[Array, "L B P D"], mask_BP: Bool[Array, "B P"]) -> Float[Array, "B K"]:
        """Returns the keys of images: means over their tokens at some layers. No gradient goes there."""
        layers = () if self.config.skills is None else self.config.skills.layers
        there, count = mask_BP[..., None], jnp.maximum(mask_BP.sum(1, keepdims=True), 1)
        means = [jnp.where(there, seen_LBPD[i].astype(jnp.float32), 0.0).sum(1) / count for i in layers]
        return jax.lax.stop_gradient(jnp.concatenate([*means, jnp.zeros((len(mask_BP), 0))], axis=1))

    def _visual_tokens(self) -> np.ndarray:
        starts = np.array(self.backbone.image_starts()) - self.config.as_released
        return (starts[:, None] + np.arange(self.backbone.image_tokens)).reshape(-1)

    # ---- The head ----------------------------------------------------------------------------------------------------

    def state_tokens(self, observation: Observation) -> Float[Array, "B 1 D"]:
        """Returns the state as a token."""
        with jax.named_scope("state"):
            hidden = jax.nn.gelu(self.state_in(observation["state"]), approximate=False)
            return self.state_out(hidden)[:, None]

    def recalled(
        self, keys_BK: Float[Array, "B K"], episode_B2: Int[Array, "B 2"] | None = None
    ) -> Float[Array, "B R A D"] | None:
        """Returns chunks that were done for similar images, as what the head makes of them. episode: not of these."""
        if self.skills is None:
            return None
        with jax.named_scope("skills"):
            return self.skill_in(self.skills.recall(keys_BK, episode_B2)).astype(self.config.dtype)

    def episodes(self, batch: Batch) -> Int[Array, "B 2"] | None:
        """Returns dataset and episode of each sample, where the memory leaves these out."""
        if not self.config.reads_episodes:
            return None
        return jnp.stack([batch["dataset_id"], batch["episode"]], axis=1)

    # ---- Memory ------------------------------------------------------------------------------------------------------

    def remember(self, key: Key[Array, ""], batch: Batch) -> dict[str, Float[Array, "..."]]:
        """Writes some batches, whole, after they were trained on: which, is drawn by their first sample's position.

        The backbone sees such a batch at once, in however many parts it was trained on.
        """
        if self.skills is None:
            return {}
        skills, first = self.skills, batch["position"][:1]
        draw = jax.random.uniform(named_key(sample_keys(key, first)[0], "skills"))
        kept = ("keys", "values", "count", *(("episodes",) if self.config.reads_episodes else ()))
        have = {name: getattr(skills, name)[...] for name in kept}

        def write() -> dict[str, jax.Array]:
            mask = batch["action_mask"]
            values = jnp.where(mask, batch["actions"], 0.0).reshape(len(mask), -1)
            _, keys = self.features(self.config.observation(batch))
            return skills.written(keys, values, mask.any((1, 2)), self.episodes(batch))

        written = jax.lax.cond(draw < skills.config.written, write, lambda: have)
        return {f"skills/{name}": x for name, x in written.items()}


class M2Vla(LayerPolicy, OnePassPolicy):
    """The policy: `loss` to train it, `sample_actions` to use it."""

    config: M2VlaConfig

    def __init__(self, config: M2VlaConfig, key: Key[Array, ""]) -> None:
        """Use `M2VlaConfig.create`."""
        super().__init__(config, key)
        J, D = config.action_dim, config.backbone.language.width
        self.norm_in = LayerNorm(named_key(key, "norm_in"), J * D, epsilon=1e-5)
        self.map_in = Linear(named_key(key, "map_in"), "BAE,ED->BAD", (J * D, D), ("mlp", "embed"))

    def predict(
        self,
        observation: Observation,
        start_BAE: Float[Array, "B A E"] | None = None,
        episode_B2: Int[Array, "B 2"] | None = None,
    ) -> Float[Array, "B A J"]:
        """Returns normalised actions.

        start: what the chunk starts from, E = J D; zeros by default. episode: see `recalled`.
        """
        features, keys = self.features(observation)
        shape = (len(keys), self.config.action_horizon, self.map_in.kernel[...].shape[0])
        start = jnp.zeros(shape) if start_BAE is None else start_BAE
        with jax.named_scope("action_head"):
            x = jax.nn.relu(self.map_in(self.norm_in(start)))
            return self.head(x, features, self.state_tokens(observation), self.recalled(keys, episode_B2))

    # ---- Training ----------------------------------------------------------------------------------------------------

    def loss(
        self, key: Key[Array, ""], batch: Batch, *, counts: dict[str, Float[Array, ""]] | None = None
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, "B"]]]:
        """Returns the mean absolute error of a sample's valid entries, then over samples, from a perturbed start.

        Metrics: "loss" and "valid". A sample's draws depend on `key` and its position alone. counts: see `loss_counts`.
        """
        keys, of = sample_keys(key, batch["position"]), self.map_in.kernel[...].shape[0]
        shape = (self.config.action_horizon, of)
        normal = jax.vmap(lambda key: jax.random.normal(named_key(key, "perturbation"), shape))(keys)
        start, episodes = self.config.perturbation * normal, self.episodes(batch)
        return self._errors(batch, start, episodes, counts)

    def _errors(
        self,
        batch: Batch,
        start_BAE: Float[Array, "B A E"] | None = None,
        episode_B2: Int[Array, "B 2"] | None = None,
        counts: dict[str, Float[Array, ""]] | None = None,
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, "B"]]]:
        self.config.check_inputs(batch, actions=True)
        mask = batch["action_mask"]
        said = self.predict(self.config.observation(batch), start_BAE, episode_B2)
        error = jnp.abs(said - jnp.where(mask, batch["actions"], 0.0))
        return masked_means(error, mask, None if counts is None else counts["actions"])

    def validation_losses(self, key: Key[Array, ""], batch: Batch) -> dict[str, Float[Array, ""]]:
        """Returns "loss", of chunks that start from zeros."""
        return {"loss": self._errors(batch)[0]}
