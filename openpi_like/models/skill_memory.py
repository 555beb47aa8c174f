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

_BLOCK = 512  # rows whose differences to a key are in memory at a time


@dataclasses.dataclass(frozen=True)
class SkillMemoryConfig:
    """size: M. recalled: R. layers: of the language model whose visual tokens are the key, 0 before the first.

    written: part of the batches that are written, whole.
    """

    size: int = 10_000
    recalled: int = 4
    layers: tuple[int, ...] = (3, 11, 23)
    written: float = 0.2

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
    """The rows. count: how many are written. next: where the next goes."""

    def __init__(self, config: SkillMemoryConfig, key_size: int, value_size: int) -> None:
        self.config = config
        self.keys = memory((config.size, key_size), ("memory", None))
        self.values = memory((config.size, value_size), ("memory", None))
        self.count, self.next = memory((), ()), memory((), ())

    def recall(self, keys_BK: Float[Array, "B K"]) -> Float[Array, "B R E"]:
        """Returns the chunks whose keys are nearest by mean absolute difference, nearest first; zeros for none."""
        R = self.config.recalled

        def near(
            first: jax.Array, keys: jax.Array, count: jax.Array, rows: jax.Array, values: jax.Array
        ) -> tuple[jax.Array, jax.Array]:
            distance_BR, at_BR = nearest(keys, rows, first, count, R)
            return distance_BR, values[at_BR]

        given = jax.lax.stop_gradient((keys_BK.astype(jnp.float32), self.count[...]))
        distance_PBR, values_PBRE = of_parts(near, given, (self.keys[...], self.values[...]), "memory")
        P, B = distance_PBR.shape[:2]
        distance_BX = jnp.moveaxis(distance_PBR, 0, 1).reshape(B, P * R)
        values_BXE = jnp.moveaxis(values_PBRE, 0, 1).reshape(B, P * R, -1)
        negative_BR, at_BR = jax.lax.top_k(-distance_BX, R)
        found_BRE = jnp.take_along_axis(values_BXE, at_BR[..., None], axis=1)
        return jnp.where(jnp.isfinite(negative_BR)[..., None], found_BRE, 0.0)

    def written(
        self, keys_BK: Float[Array, "B K"], values_BE: Float[Array, "B E"], valid_B: Bool[Array, "B"]
    ) -> dict[str, Float[Array, "..."]]:
        """Returns the memory with more rows, the valid ones, in the place of the oldest; of many, the last M stay."""
        M, new = self.config.size, valid_B.sum()
        order_B = jnp.cumsum(valid_B) - 1
        fits_B = valid_B & (order_B >= new - M)
        at_B = jnp.where(fits_B, (self.next[...].astype(jnp.int32) + order_B) % M, M)  # M is nowhere
        put = lambda old, rows: old[...].at[at_B].set(rows.astype(jnp.float32), mode="drop")  # noqa: E731
        return {
            "keys": put(self.keys, keys_BK),
            "values": put(self.values, values_BE),
            "count": jnp.minimum(self.count[...] + new, M),
            "next": (self.next[...] + new) % M,
        }


def nearest(
    keys_BK: Float[Array, "B K"], rows_MK: Float[Array, "M K"], first: Int[Array, ""], count: Float[Array, ""], R: int
) -> tuple[Float[Array, "B R"], Int[Array, "B R"]]:
    """Returns the least mean absolute differences to rows, and which rows; infinite where there are fewer than R.

    first: number of the first of these rows in the memory, of whose rows the first `count` are written.
    """
    M, K = rows_MK.shape
    blocks = -(-M // _BLOCK)
    padded = jnp.pad(rows_MK, ((0, blocks * _BLOCK - M), (0, 0))).reshape(blocks, _BLOCK, K)
    distance = jax.lax.map(lambda block: jnp.abs(keys_BK[:, None] - block).mean(-1), padded)  # (blocks, B, rows)
    distance_BM = jnp.moveaxis(distance, 0, 1).reshape(len(keys_BK), -1)[:, :M]
    there_M = first + jnp.arange(M) < count
    distance_BM = jnp.where(there_M, distance_BM, jnp.inf)
    negative, at = jax.lax.top_k(-distance_BM, min(R, M))
    short = ((0, 0), (0, R - min(R, M)))
    return -jnp.pad(negative, short, constant_values=-jnp.inf), jnp.pad(at, short)
