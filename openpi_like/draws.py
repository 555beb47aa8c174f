"""Keys of random draws: functions of a seed, of names and of positions, whatever is drawn beside or before."""

import contextlib
import zlib

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key, UInt32

# Of a batch of requests: one key for all rows, or one for each.
RowKeys = Key[Array, ""] | Key[Array, "B"]


def named_key(key: Key[Array, ""], name: str) -> Key[Array, ""]:
    """Returns the key of a named part: adding or reordering parts leaves the draws of all others unchanged.

    Of a key that is known while a function is traced it is a constant there, and nothing is compiled for it.
    """
    known = contextlib.nullcontext() if isinstance(key, jax.core.Tracer) else jax.ensure_compile_time_eval()
    with known:
        return jax.random.fold_in(key, zlib.crc32(name.encode()))


def sample_keys(key: Key[Array, ""], position_B2: UInt32[Array, "B 2"]) -> Key[Array, "B"]:
    """Returns a key per sample by its position, see `Batch`: the same in any row, of any batch, on any host."""
    return jax.vmap(lambda words: jax.random.fold_in(jax.random.fold_in(key, words[0]), words[1]))(position_B2)


def row_keys(key: RowKeys, rows: int) -> Key[Array, "B"]:
    """Returns a key per row, for requests, which have no position: the same with any number of other rows.

    key: of all rows; or one of each row, which are returned as they are.
    """
    return key if key.ndim else jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(rows))
