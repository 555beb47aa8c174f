"""Cross-entropy of a large vocabulary, a part of the vocabulary at a time.

Neither the logits (T, V) nor one-hot targets ever exist: logits of one part are computed, used and dropped, and
computed again for the gradient. Parts are cut along the vocabulary and not along the tokens, so that each row of the
gradient of the table is written once, and reduced once over the devices that share a batch.

Letters: T tokens, D width, V vocabulary.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from openpi_like.partition import lookup, pin

PART = 16_384  # rows of the table at a time
# Axes of the table as (G, V / G, D), where it is kept and where it is computed with, see `openpi_like.partition`.
_KEPT, _USED = ("vocab", None, "embed"), ("vocab", None, None)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def cross_entropy(
    x_TD: Float[Array, "T D"],
    table_VD: Float[Array, "V D"],
    targets_T: Int[Array, "T"],
    part: int = PART,
    soft_cap: float | None = None,
) -> Float[Array, "T"]:
    """Returns -log softmax(x table^T)[target] of every token, float32.

    The table is cast to the type of x, part by part; logits are summed and stay in float32, as do their exponentials.
    soft_cap: logits are `capped` by it.
    """
    return _forward(x_TD, table_VD, targets_T, part, soft_cap)[0]


def capped(logits: Float[Array, "*any"], soft_cap: float | None) -> Float[Array, "*any"]:
    """Returns cap * tanh(logits / cap) (Gemma 2): like logits where they are small, within the cap everywhere."""
    return logits if soft_cap is None else soft_cap * jnp.tanh(logits / soft_cap)


def _view(table_VD: jax.Array, part: int) -> tuple[jax.Array, int, int]:
    """Returns the table as (G, V / G, D), and how many parts the second axis is cut in, and how large.

    Cut there, a table whose vocabulary is split over up to 8 devices stays where it is. The last part may overlap the
    one before.
    """
    V, D = table_VD.shape
    groups = math.gcd(V, 8)
    length = V // groups
    count = -(-length // max(part // groups, 1))
    return table_VD.reshape(groups, length, D), count, -(-length // count)


def _part_logits(
    x_TD: jax.Array, table_GVD: jax.Array, i: jax.Array, size: int, soft_cap: float | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the first row of part i in each group, its rows in x's type, and its logits (T, G, size).

    Logits are -inf for rows that part i - 1 has had.
    """
    start = jnp.minimum(i * size, table_GVD.shape[1] - size)
    rows = jax.lax.dynamic_slice_in_dim(table_GVD, start, size, axis=1).astype(x_TD.dtype)
    rows = pin(pin(rows, *_KEPT), *_USED)
    logits = pin(jnp.einsum("TD,GVD->TGV", x_TD, rows, preferred_element_type=jnp.float32), "batch", "vocab", None)
    return start, rows, jnp.where(start + jnp.arange(size) >= i * size, capped(logits, soft_cap), -jnp.inf)


def _forward(
    x_TD: jax.Array, table_VD: jax.Array, targets_T: jax.Array, part: int, soft_cap: float | None
) -> tuple[jax.Array, jax.Array]:
    table_GVD, count, size = _view(table_VD, part)

    def add(carry: tuple[jax.Array, jax.Array], i: jax.Array) -> tuple[tuple[jax.Array, jax.Array], None]:
        top, total = carry  # of the logits so far: their maximum, and the sum of exp(logit - maximum)
        logits = _part_logits(x_TD, table_GVD, i, size, soft_cap)[2]
        new = jnp.maximum(top, logits.max((1, 2)))
        return (new, total * jnp.exp(top - new) + jnp.exp(logits - new[:, None, None]).sum((1, 2))), None

    start = jnp.full(targets_T.shape, -jnp.inf), jnp.zeros(targets_T.shape)
    (top, total), _ = jax.lax.scan(add, start, jnp.arange(count))
    log_total = top + jnp.log(total)
    chosen = lookup(table_VD, ("vocab", "embed"), targets_T[:, None])[:, 0].astype(x_TD.dtype)
    of_target = jnp.einsum("TD,TD->T", x_TD, chosen, preferred_element_type=jnp.float32)
    return log_total - capped(of_target, soft_cap), log_total


def _forward_rule(
    x_TD: jax.Array, table_VD: jax.Array, targets_T: jax.Array, part: int, soft_cap: float | None
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    losses, log_total = _forward(x_TD, table_VD, targets_T, part, soft_cap)
    return losses, (x_TD, table_VD, targets_T, log_total)


def _backward_rule(
    part: int, soft_cap: float | None, saved: tuple[jax.Array, ...], g_T: jax.Array
) -> tuple[jax.Array, jax.Array, None]:
    x_TD, table_VD, targets_T, log_total = saved
    table_GVD, count, size = _view(table_VD, part)
    groups, length, D = table_GVD.shape

    def add(carry: tuple[jax.Array, jax.Array], i: jax.Array) -> tuple[tuple[jax.Array, jax.Array], None]:
        dx, dtable = carry
        start, rows, logits = _part_logits(x_TD, table_GVD, i, size, soft_cap)
        ids = jnp.arange(groups)[:, None] * length + start + jnp.arange(size)
        hit = (ids == targets_T[:, None, None]) & jnp.isfinite(logits)
        # p - 1 in float32, before it is rounded: where a target is nearly certain, that difference is all there is.
        p = jnp.exp(logits - log_total[:, None, None])
        dlogits = g_T[:, None, None] * (p - hit)
        if soft_cap is not None:  # the derivative of `capped`, where a logit was computed
            dlogits *= jnp.where(jnp.isfinite(logits), 1 - jnp.square(logits / soft_cap), 0)
        dlogits = dlogits.astype(x_TD.dtype)
        dx += pin(jnp.einsum("TGV,GVD->TD", dlogits, rows, preferred_element_type=jnp.float32), "batch", None)
        drows = pin(jnp.einsum("TGV,TD->GVD", dlogits, x_TD, preferred_element_type=jnp.float32), *_KEPT)
        before = jax.lax.dynamic_slice_in_dim(dtable, start, size, axis=1)
        return (dx, jax.lax.dynamic_update_slice_in_dim(dtable, before + drows, start, axis=1)), None

    zero = pin(jnp.zeros(x_TD.shape, jnp.float32), "batch", None), pin(jnp.zeros(table_GVD.shape, jnp.float32), *_KEPT)
    (dx, dtable), _ = jax.lax.scan(add, zero, jnp.arange(count))
    return dx.astype(x_TD.dtype), dtable.reshape(groups * length, D).astype(table_VD.dtype), None


cross_entropy.defvjp(_forward_rule, _backward_rule)
