"""Attention: one function, computed by what is fastest where it runs.

`attention` is an einsum unless `computed_by` says otherwise while a function is traced. Which variant is fastest
depends on the device and on the sizes; `openpi_like.train.fastest` measures it.

Letters: B batch, T queries, S keys, N query heads, K kv heads, H head dim.
"""

import contextlib
import contextvars
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from openpi_like.partition import Axes, on_each_device

MASKED = -2.3819763e38  # as in the references


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of one call of attention, on one device or on all of them together. soft_cap: see `attention`."""

    B: int
    T: int
    S: int
    N: int
    K: int
    H: int
    dtype: str
    masked: bool
    soft_cap: float | None = None

    @classmethod
    def of(cls, q: jax.Array, k: jax.Array, mask: jax.Array | None, soft_cap: float | None = None) -> "Sizes":
        B, N, T, H = q.shape
        S, K = k.shape[1:3]
        return cls(B=B, T=T, S=S, N=N, K=K, H=H, dtype=str(q.dtype), masked=mask is not None, soft_cap=soft_cap)


# ---- Variants --------------------------------------------------------------------------------------------------------


def einsum(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None, *, soft_cap: float | None = None
) -> jax.Array:
    """All queries of one kv head are the rows of one matrix, which measures 1.2 to 1.4 times faster on CPU than
    `jax.nn.dot_product_attention`. Logits and their exponentials are float32: bfloat16 has 8 bits for a sum over
    thousands of keys. Masked logits are finite, so a query that sees nothing gets the mean of all values, not NaN.
    """
    B, N, T, H = q.shape
    S, K = k.shape[1:3]
    q_BKQH = (q * jnp.asarray(H**-0.5, q.dtype)).reshape(B, K, N // K * T, H)
    logits = jnp.einsum("BKQH,BSKH->BKQS", q_BKQH, k, preferred_element_type=jnp.float32)
    if soft_cap is not None:
        logits = soft_cap * jnp.tanh(logits / soft_cap)
    if mask is not None:
        by_query = logits.reshape(B, K, N // K, T, S)
        logits = jnp.where(mask[:, None, None], by_query, MASKED).reshape(logits.shape)
    weights = jnp.exp(logits - jax.lax.stop_gradient(logits.max(-1, keepdims=True)))
    # Divided by the sum after the product with the values: there are fewer of these than of weights.
    total = weights.sum(-1, keepdims=True)
    seen = jnp.einsum("BKQS,BSKH->BKQH", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    return (seen / total).astype(q.dtype).reshape(B, N, T, H)


def _by_jax(implementation: Literal["xla", "cudnn"]) -> Callable[..., jax.Array]:
    def attend(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None) -> jax.Array:
        shown = None if mask is None else (mask | ~mask.any(-1, keepdims=True))[:, None]
        seen = jax.nn.dot_product_attention(q.swapaxes(1, 2), k, v, mask=shown, implementation=implementation)
        return seen.swapaxes(1, 2)

    return attend


def splash(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array | None,
    *,
    soft_cap: float | None = None,
    interpret: bool = False,
) -> jax.Array:
    """jax's TPU kernel, which never writes logits to memory; everything is padded to its lanes. On each device alone.

    A query that sees nothing sees everything here; nobody reads what comes of it.
    """
    # Here, as it takes a second to import, and hardly any program needs it.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash_kernel

    N, T, H = q.shape[1:]
    S, K = k.shape[1:3]
    up = lambda n, unit: -(-n // unit) * unit  # noqa: E731
    block_q, block_k = min(512, up(T, 128)), min(512, up(S, 128))
    rows, columns, width = up(T, block_q), up(S, block_k), up(H, 128)
    fill = lambda x, n: jnp.pad(x, [(0, 0)] * 2 + [(0, n - x.shape[2]), (0, width - H)])  # noqa: E731
    seen = jnp.ones((q.shape[0], T, S), bool) if mask is None else mask | ~mask.any(-1, keepdims=True)
    seen = jnp.pad(seen, ((0, 0), (0, 0), (0, columns - S)))
    seen = jnp.pad(seen, ((0, 0), (0, rows - T), (0, 0)), constant_values=True)
    sizes = splash_kernel.BlockSizes(
        **{name: block_q for name in ("block_q", "block_q_dkv", "block_q_dq")},
        **{name: block_k for name in ("block_kv", "block_kv_compute", "block_kv_dkv", "block_kv_dkv_compute")},
        block_kv_dq=block_k,
    )
    make = splash_kernel.make_splash_mqa_single_device if K == 1 else splash_kernel.make_splash_mha_single_device

    def of_one(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
        shown, cap = jnp.broadcast_to(mask, (N, *mask.shape)), soft_cap
        kernel = make(shown, block_sizes=sizes, attn_logits_soft_cap=cap, interpret=interpret)
        for name in ("fwd_mask_info", "dq_mask_info", "dkv_mask_info"):
            info = getattr(kernel, name)  # whose flag jax 0.10 has made an array of, which cannot be asked under jit
            if info is not None:
                setattr(kernel, name, info._replace(is_dynamic_mask=True))
        return kernel(q, k[0], v[0]) if K == 1 else kernel(q, k, v)

    scaled = q * jnp.asarray(H**-0.5, q.dtype)
    out = jax.vmap(of_one)(fill(scaled, rows), fill(k.swapaxes(1, 2), columns), fill(v.swapaxes(1, 2), columns), seen)
    return out[:, :, :T, :H]


@dataclasses.dataclass(frozen=True)
class Variant:
    """A way to compute attention. platforms: where it runs. dtypes: of queries, keys and values that it takes.

    alone: it is a kernel that the compiler cannot split over devices, for one kv head, or as many as heads.
    caps: it can cap logits; it is called with soft_cap where they are capped.
    """

    attend: Callable[..., jax.Array]
    platforms: tuple[str, ...] = ("cpu", "gpu", "tpu")
    dtypes: tuple[str, ...] = ("float32", "bfloat16", "float16")
    alone: bool = False
    caps: bool = False

    def takes(self, sizes: Sizes, platform: str) -> bool:
        """Says whether it can compute these sizes there."""
        heads = not self.alone or sizes.K in (1, sizes.N)
        caps = self.caps or sizes.soft_cap is None
        return platform in self.platforms and sizes.dtype in self.dtypes and heads and caps


VARIANTS: dict[str, Variant] = {
    "einsum": Variant(einsum, caps=True),
    "xla": Variant(_by_jax("xla")),
    "cudnn": Variant(_by_jax("cudnn"), platforms=("gpu",), dtypes=("bfloat16", "float16")),
    "splash": Variant(splash, platforms=("tpu",), alone=True, caps=True),
}

# ---- The function ----------------------------------------------------------------------------------------------------

_chosen: contextvars.ContextVar[Mapping[Sizes, str] | str] = contextvars.ContextVar("attention", default="einsum")
_seen: contextvars.ContextVar[set[Sizes] | None] = contextvars.ContextVar("attention sizes", default=None)


@contextlib.contextmanager
def computed_by(choice: Mapping[Sizes, str] | str) -> Iterator[None]:
    """While a function is traced: the name of a variant in `VARIANTS`, or one for each of some sizes.

    What is traced must not have been traced before with another choice; jax would remember it.
    """
    token = _chosen.set(choice)
    try:
        yield
    finally:
        _chosen.reset(token)


def sizes_in(function: Callable[..., Any], *args: Any) -> set[Sizes]:
    """Returns the sizes of all calls of attention in a function, which is traced for it."""
    found: set[Sizes] = set()
    token = _seen.set(found)
    try:
        jax.eval_shape(lambda *args: function(*args), *args)
    finally:
        _seen.reset(token)
    return found


@jax.named_scope("attention")
def attention(
    q_BNTH: Float[Array, "B N T H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    mask_BTS: Bool[Array, "B T S"] | None,
    *,
    soft_cap: float | None = None,
) -> Float[Array, "B N T H"]:
    """Returns softmax(q k^T / sqrt(H)) v; query head n uses kv head n // (N / K). mask: True where a token is seen.

    What a query gets that sees nothing is finite, and depends on the variant.
    soft_cap: logits are cap * tanh(logits / cap) (Gemma 2); not all variants can do it, see `Variant`.
    """
    sizes, choice, seen = Sizes.of(q_BNTH, k_BSKH, mask_BTS, soft_cap), _chosen.get(), _seen.get()
    if seen is not None:
        seen.add(sizes)
    variant = VARIANTS[choice if isinstance(choice, str) else choice.get(sizes, "einsum")]
    attend = variant.attend if soft_cap is None else functools.partial(variant.attend, soft_cap=soft_cap)
    if not variant.alone:
        return attend(q_BNTH, k_BSKH, v_BSKH, mask_BTS)
    of_keys = ("batch", None, "heads" if sizes.K == sizes.N else "kv_heads", None)
    axes: list[Axes] = [("batch", "heads", None, None), of_keys, of_keys]
    if mask_BTS is None:
        return on_each_device(lambda q, k, v: attend(q, k, v, None), axes)(q_BNTH, k_BSKH, v_BSKH)
    axes.append(("batch", None, None))
    return on_each_device(attend, axes)(q_BNTH, k_BSKH, v_BSKH, mask_BTS)
