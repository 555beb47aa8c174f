"""What is around the robot, seen by the image towers of a policy: agents and map lines in bird's-eye view, as rows of
numbers like those of `openpi_like.driving.scene_entities`.

A query for each row that a slot has room for; of each, whether there is something, and its numbers. A set has no order,
so what is learned is the row that fits best: truth and queries are matched one to one with the least cost, as in DETR
(Carion et al. 2020, arXiv 2005.12872: matched by the probability and 5 times the L1 distance, trained with the same
weights), which VAD does for agents and map (Jiang et al. 2023, arXiv 2303.12077). Ours: one decoder for all slots, no
overlap of boxes and no angles beside L1, cross-entropy of presence without a lower weight for what is empty, and the
mean over a row's numbers, so that long rows weigh as much as short ones. The matching is exact (the Hungarian
algorithm of optax) and runs where the loss does.

Letters: B batch, N rows of a slot and its queries, M rows of the truth, F numbers of a row, Q queries of all slots,
W width of the decoder.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from openpi_like.batch import Array as Leaf
from openpi_like.batch import EntityTokens
from openpi_like.draws import named_key
from openpi_like.models.backbone import masked_means
from openpi_like.models.param import Linear, normal, use, weight
from openpi_like.models.scene_decoder import SceneDecoder, SceneDecoderConfig, SceneReader
from openpi_like.models.sequences import Seen

READS = ("annotations", "predictions")
Slots = Mapping[str, Float[Array, "B _ _"]]
There = Mapping[str, Bool[Array, "B _"]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PerceptionConfig:
    """How a policy sees for itself what is around it.

    decoder: sizes. weight: of its loss beside the policy's. value_weight: of the distance of numbers beside presence.
    reads: what the policy reads in training, one of `READS`; acting, it always reads predictions.
    detached: the policy's loss does not reach the perception through them.
    alone: the policy's own loss is left out, and not computed; for a run that makes a perception for others.
    """

    decoder: SceneDecoderConfig
    weight: float = 1.0
    value_weight: float = 5.0
    reads: str = "predictions"
    detached: bool = True
    alone: bool = False

    def __post_init__(self) -> None:
        problems = [
            f"{name}={getattr(self, name)}, expected a number above 0"
            for name in ("weight", "value_weight")
            if not getattr(self, name) > 0
        ]
        if self.reads not in READS:
            problems.append(f"reads={self.reads!r}, expected one of {READS}")
        if problems:
            raise ValueError("PerceptionConfig: " + "; ".join(problems))


class Perceived(NamedTuple):
    """By slot: logits that there is something (B, N), and its numbers (B, N, F); float32."""

    logits: dict[str, Leaf]
    values: dict[str, Leaf]

    def entities(self) -> dict[str, dict[str, Leaf]]:
        """Returns what is likelier there than not, as "entities" and "entity_mask" of an `Observation`."""
        there = {name: logits > 0 for name, logits in self.logits.items()}
        values = {name: jnp.where(there[name][..., None], x, 0) for name, x in self.values.items()}
        return {"entities": values, "entity_mask": there}


class SlotHead(nnx.Module):
    """The queries of one slot, and what is read off them."""

    def __init__(self, key: Key[Array, ""], slot: EntityTokens, width: int) -> None:
        """width: W."""
        self.query = weight(key, "query", (slot.count, width), (None, "embed"), normal(width**-0.5))
        # What comes out are numbers, as actions are, which an optimiser like Muon is not for.
        axes = ("embed", "action")
        self.presence = Linear(named_key(key, "presence"), "BNW,WF->BNF", (width, 1), axes)
        self.values = Linear(named_key(key, "values"), "BNW,WF->BNF", (width, slot.size), axes)


class ScenePerception(nnx.Module):
    """Camera tokens to rows of all slots; all queries see each other."""

    def __init__(
        self,
        key: Key[Array, ""],
        config: PerceptionConfig,
        slots: Sequence[EntityTokens],
        *,
        cameras: int,
        token_width: int,
        unroll: bool,
        remat: str | None,
    ) -> None:
        """token_width: of what `Backbone.see` returns. unroll, remat: see `run_layers`."""
        width = config.decoder.width
        self.config, self.slots = config, tuple(slots)
        self.images_in = SceneReader(named_key(key, "images_in"), cameras=cameras, token_width=token_width, width=width)
        self.decoder = SceneDecoder(named_key(key, "decoder"), config.decoder, unroll=unroll, remat=remat)
        for slot in slots:
            setattr(self, slot.name, SlotHead(named_key(key, slot.name), slot, width))

    @jax.named_scope("perception")
    def __call__(self, seen: Seen) -> Perceived:
        """Returns what the cameras show."""
        heads: list[SlotHead] = [getattr(self, slot.name) for slot in self.slots]
        tokens, there = self.images_in(seen)
        queries_QW = jnp.concatenate([use(head.query, jnp.float32) for head in heads])
        read_BQW = self.decoder(jnp.broadcast_to(queries_QW, (tokens.shape[0], *queries_QW.shape)), tokens, there)
        logits, values, start = dict[str, jax.Array](), dict[str, jax.Array](), 0
        for slot, head in zip(self.slots, heads, strict=True):
            own_BNW = read_BQW[:, start : start + slot.count]
            logits[slot.name], values[slot.name] = head.presence(own_BNW)[..., 0], head.values(own_BNW)
            start += slot.count
        return Perceived(logits, values)

    def errors(
        self, perceived: Perceived, truth: Slots, there: There
    ) -> tuple[Float[Array, "B"], dict[str, tuple[Float[Array, "B _"], Bool[Array, "B _"]]]]:
        """Returns the loss of each sample, summed over slots, and the errors it is made of, and which count.

        Of each slot, "<slot>_presence_loss" in nats and "<slot>_values_loss", the mean absolute error of a row's
        numbers. A sample without rows has none of the latter.
        """
        total, parts = jnp.float32(0), {}
        for slot in self.slots:
            name = slot.name
            presence, values, matched = set_errors(
                perceived.logits[name], perceived.values[name], truth[name], there[name], self.config.value_weight
            )
            parts[f"{name}_presence_loss"] = presence, jnp.ones(presence.shape, bool)
            parts[f"{name}_values_loss"] = values, matched
            total += presence.mean(1) + self.config.value_weight * masked_means(values, matched)[1]["loss"]
        return total, parts


def set_errors(
    logits_BN: Float[Array, "B N"],
    values_BNF: Float[Array, "B N F"],
    truth_BNF: Float[Array, "B N F"],
    there_BN: Bool[Array, "B N"],
    value_weight: float,
) -> tuple[Float[Array, "B N"], Float[Array, "B N"], Bool[Array, "B N"]]:
    """Returns of each query its cross-entropy of presence, the mean absolute error of its numbers beside those of the
    row that it was matched with, and whether it was. there: which rows of the truth there are."""
    row_BN = matching(logits_BN, values_BNF, truth_BNF, there_BN, value_weight)
    matched = jnp.take_along_axis(there_BN, row_BN, axis=1)
    presence = optax.losses.sigmoid_binary_cross_entropy(logits_BN, matched.astype(jnp.float32))
    target = jnp.take_along_axis(truth_BNF, row_BN[..., None], axis=1)
    return presence, jnp.where(matched, jnp.abs(values_BNF - target).mean(-1), 0.0), matched


def matching(
    logits_BN: Float[Array, "B N"],
    values_BNF: Float[Array, "B N F"],
    truth_BNF: Float[Array, "B N F"],
    there_BN: Bool[Array, "B N"],
    value_weight: float,
) -> Int[Array, "B N"]:
    """Returns which row of the truth each query is matched with: a permutation of the least cost.

    The cost is the distance of the numbers, weighted, less the probability that something is there. Rows that are not
    there cost nothing, whoever has them.
    """
    apart_BNM = jnp.abs(values_BNF[:, :, None] - truth_BNF[:, None]).mean(-1)
    cost_BNM = value_weight * apart_BNM - jax.nn.sigmoid(logits_BN)[..., None]
    cost_BNM = jax.lax.stop_gradient(jnp.where(there_BN[:, None], cost_BNM, 0.0))
    # Where numbers are not finite the search for a path would not end; the loss says that they are not.
    cost_BNM = jnp.nan_to_num(cost_BNM, nan=0.0, posinf=1e6, neginf=-1e6)

    def one(cost_NM: jax.Array) -> jax.Array:
        queries, rows = optax.assignment.hungarian_algorithm(cost_NM)
        return jnp.zeros(len(cost_NM), jnp.int32).at[queries].set(rows.astype(jnp.int32))

    return jax.vmap(one)(cost_BNM)
