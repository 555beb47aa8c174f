"""What a policy has seen itself do: chunks by what it saw, first in, first out (M2-VLA's meta-skill memory).

Keys are features of images, values the normalised chunks that were done for them. Training writes, everything reads.
Rows lie in parts on the devices that share the weights; each finds the nearest of its own, and what is nearest of all
is chosen among those.

Letters: B batch, M rows of the memory, K numbers of a key, E numbers of a chunk, R chunks that are recalled.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from openpi_like.models.param import memory
from openpi_like.partition import of_parts


@dataclasses.dataclass(frozen=True)
class SkillMemoryConfig:
    """size: M. recalled: R. layers: of the language model whose visual tokens are the key, 0 before the first.

    written: part of the batches that are written, whole. apart: in training, chunks of a sample's own episode are not
        recalled: nearest of all are the frames beside it, whose chunks are nearly its own. A dataset that is there as
        two entries of the mixture is two.
    """

    size: int = 10_000
    recalled: int = 4
    layers: tuple[int, ...] = (3, 11, 23)
    written: float = 0.2
    apart: bool = False

    def problems(self, depth: int) -> list[str]:
        """Returns what is wrong, for a language model of so many layers."""
        problems = []
        if not 1 <= self.recalled <= self.size:
            problems.append(f"recalled={self.recalled}, size={self.size}, expected 1 <= recalled <= size")
        if not 0 <= self.written <= 1:
            problems.append(f"written={self.written}, expected 0 to 1")
        if not self.layers or not all(0 <= layer <= depth for layer in self.layers):
            problems.append(f"layers={self.layers}, expected some of 0 to {depth}")
        return [f"skills: {problem}" for problem in problems]


class SkillMemory(nnx.Module):
    """The rows. count: how many were written; once all are, less as many as there are, again and again.

    The next goes to row count % M, which has the oldest where all are written.
    """

    def __init__(self, config: SkillMemoryConfig, key_size: int, value_size: int) -> None:
        self.config = config
        self.keys = memory((config.size, key_size), ("memory", None))
        self.values = memory((config.size, value_size), ("memory", None))
        # Of each row, its dataset and its episode: -1 of no episode.
        self.episodes = memory((config.size, 2), ("memory", None)) if config.apart else None
        self.count = memory((), ())

    def recall(
        self, keys_BK: Float[Array, "B K"], episode_B2: Int[Array, "B 2"] | None = None
    ) -> Float[Array, "B R E"]:
        """Returns the chunks whose keys are nearest by mean absolute difference, nearest first; zeros for none.

        episode: dataset and episode of each, of which nothing is recalled; None recalls all.
        """
        R = self.config.recalled

        M = self.config.size
        own, theirs = jnp.full((len(keys_BK), 2), -1.0), jnp.zeros((M, 2))  # none is anybody's own
        if episode_B2 is not None and self.episodes is not None:
            own, theirs = episode_B2.astype(jnp.float32), self.episodes[...]

        def near(
            first: jax.Array,
            keys: jax.Array,
            own: jax.Array,
            count: jax.Array,
            rows: jax.Array,
            values: jax.Array,
            theirs: jax.Array,
        ) -> tuple[jax.Array, jax.Array]:
            there_M = first + jnp.arange(len(rows)) < count
            there_BM = there_M & (own[:, None] != theirs).any(-1)
            distance_BR, at_BR = nearest(keys, rows, there_BM, R)
            return distance_BR, values[at_BR]

        given = jax.lax.stop_gradient((keys_BK.astype(jnp.float32), own, self.count[...]))
        parts = (self.keys[...], self.values[...], theirs)
        distance_PBR, values_PBRE = of_parts(near, given, parts, "memory")
        P, B = distance_PBR.shape[:2]
        distance_BX = jnp.moveaxis(distance_PBR, 0, 1).reshape(B, P * R)
        values_BXE = jnp.moveaxis(values_PBRE, 0, 1).reshape(B, P * R, -1)
        negative_BR, at_BR = jax.lax.top_k(-distance_BX, R)
        found_BRE = jnp.take_along_axis(values_BXE, at_BR[..., None], axis=1)
        return jnp.where(jnp.isfinite(negative_BR)[..., None], found_BRE, 0.0)

    def written(
        self,
        keys_BK: Float[Array, "B K"],
        values_BE: Float[Array, "B E"],
        valid_B: Bool[Array, "B"],
        episode_B2: Int[Array, "B 2"] | None = None,
    ) -> dict[str, Float[Array, "..."]]:
        """Returns the memory with more rows, the valid ones, in the place of the oldest; of many, the last M stay.

        episode: as in `recall`; with `SkillMemoryConfig.apart`.
        """
        M, new = self.config.size, valid_B.sum()
        order_B = jnp.cumsum(valid_B) - 1
        fits_B = valid_B & (order_B >= new - M)
        at_B = jnp.where(fits_B, (self.count[...].astype(jnp.int32) + order_B) % M, M)  # M is nowhere
        put = lambda old, rows: old[...].at[at_B].set(rows.astype(jnp.float32), mode="drop")  # noqa: E731
        count = self.count[...] + new  # float32 counts to 16 million
        count = jnp.where(count < 2 * M, count, M + count % M)
        rows = {"keys": put(self.keys, keys_BK), "values": put(self.values, values_BE), "count": count}
        return rows if self.episodes is None else {**rows, "episodes": put(self.episodes, episode_B2)}


def nearest(
    keys_BK: Float[Array, "B K"], rows_MK: Float[Array, "M K"], there_BM: Bool[Array, "B M"], R: int
) -> tuple[Float[Array, "B R"], Int[Array, "B R"]]:
    """Returns the least mean absolute differences to rows, and which rows; infinite where there are fewer than R.

    there: which rows count.
    """
    M = len(rows_MK)
    # The compilers for CPUs and TPUs put the differences into the sum: none of them lies in memory.
    distance_BM = jnp.abs(keys_BK[:, None] - rows_MK).mean(-1)
    distance_BM = jnp.where(there_BM, distance_BM, jnp.inf)
    negative, at = jax.lax.top_k(-distance_BM, min(R, M))
    short = ((0, 0), (0, R - min(R, M)))
    return -jnp.pad(negative, short, constant_values=-jnp.inf), jnp.pad(at, short)
