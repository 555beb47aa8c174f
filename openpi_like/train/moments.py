"""How Adam's moments are held between steps: in 32, 16 or 8 bits.

A step reads them as float32 and rounds what it has made of them at random, up or down by the distance: with rounding to
the nearest, a moment that moves by less than half a step of its scale would never move. What is drawn depends on the
step and the weight's name alone.
"""

import dataclasses
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Key, Shaped

from openpi_like.draws import named_key


class Held(NamedTuple):
    """One moment of all weights: their values as held, shaped like the weights, and the scales of these, if any."""

    values: Any
    scales: Any


@runtime_checkable
class Moments(Protocol):
    """A way to hold moments."""

    def hold(self, adam: optax.GradientTransformation) -> optax.GradientTransformation:
        """Returns optax's scale_by_adam with its moments held this way."""
        ...


@runtime_checkable
class Codec(Protocol):
    """Turns float32 moments of one weight into what is held (values and scales), and back."""

    def encode_first(self, key: Key[Array, ""], m: Float[Array, "..."]) -> tuple[jax.Array, jax.Array | None]: ...
    def decode_first(self, values: jax.Array, scales: jax.Array | None) -> Float[Array, "..."]: ...
    def encode_second(self, key: Key[Array, ""], v: Float[Array, "..."]) -> tuple[jax.Array, jax.Array | None]: ...
    def decode_second(self, values: jax.Array, scales: jax.Array | None) -> Float[Array, "..."]: ...


@dataclasses.dataclass(frozen=True)
class Float32Moments:
    """8 bytes a weight."""

    def hold(self, adam: optax.GradientTransformation) -> optax.GradientTransformation:
        """Returns it as it is."""
        return adam


@dataclasses.dataclass(frozen=True)
class BFloat16Moments:
    """4 bytes a weight."""

    def hold(self, adam: optax.GradientTransformation) -> optax.GradientTransformation:
        """See `Moments`."""
        return encoded(adam, self)

    def encode_first(self, key: Key[Array, ""], m: Float[Array, "..."]) -> tuple[jax.Array, jax.Array | None]:
        """Returns m in bfloat16: noise in the 16 bits that are cut off carries into those that stay."""
        bits = jax.lax.bitcast_convert_type(m, jnp.uint32)
        noise = jax.random.bits(key, m.shape, jnp.uint16).astype(jnp.uint32)
        up = jax.lax.bitcast_convert_type(((bits + noise) >> 16).astype(jnp.uint16), jnp.bfloat16)
        return jnp.where(jnp.isfinite(m), up, m.astype(jnp.bfloat16)), None

    def decode_first(self, values: jax.Array, scales: jax.Array | None) -> Float[Array, "..."]:
        """Returns the values in float32."""
        return values.astype(jnp.float32)

    encode_second, decode_second = encode_first, decode_first


@dataclasses.dataclass(frozen=True)
class EightBitMoments:
    """2 bytes a weight, and 8 bytes for every `block` of them along the last axis.

    First moment: linear in [-127, 127] of the largest of its block. Second moment: its logarithm, in steps of 2^(1/8)
    below the largest of its block, 32 powers of two down (255 is zero); linear steps would make zeros of all that are
    small, and Adam divides by them. (Dettmers et al. 2022 have one table of unequal steps for both.)
    """

    block: int = 256

    def __post_init__(self) -> None:
        if self.block < 1:
            raise ValueError(f"EightBitMoments: block={self.block}, expected at least 1")

    def hold(self, adam: optax.GradientTransformation) -> optax.GradientTransformation:
        """See `Moments`."""
        return encoded(adam, self)

    def _blocks(self, x: jax.Array) -> jax.Array:
        """Returns x with its last axis as (blocks, block); one block where they do not divide it."""
        n = x.shape[-1] if x.ndim else 1
        size = self.block if n % self.block == 0 else n
        return x.reshape(*x.shape[:-1], n // size, size)

    def _largest(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns the blocks and the largest absolute value of each."""
        blocks = self._blocks(x)
        return blocks, jnp.abs(blocks).max(-1)

    def encode_first(self, key: Key[Array, ""], m: Float[Array, "..."]) -> tuple[jax.Array, jax.Array | None]:
        """Returns int8 values and float32 scales."""
        blocks, largest = self._largest(m)
        scaled = 127 * blocks / jnp.maximum(largest, jnp.finfo(jnp.float32).tiny)[..., None]
        return _round(key, scaled).astype(jnp.int8).reshape(m.shape), largest

    def decode_first(self, values: jax.Array, scales: jax.Array | None) -> Float[Array, "..."]:
        """Returns float32 values."""
        assert scales is not None
        return (self._blocks(values.astype(jnp.float32)) * scales[..., None] / 127).reshape(values.shape)

    def encode_second(self, key: Key[Array, ""], v: Float[Array, "..."]) -> tuple[jax.Array, jax.Array | None]:
        """Returns uint8 values and float32 scales."""
        blocks, largest = self._largest(v)
        tiny = jnp.finfo(jnp.float32).tiny
        down = 8 * (jnp.log2(jnp.maximum(largest, tiny))[..., None] - jnp.log2(jnp.maximum(blocks, tiny)))
        code = jnp.where(blocks > 0, jnp.clip(_round(key, down), 0, 254), 255)
        return code.astype(jnp.uint8).reshape(v.shape), largest

    def decode_second(self, values: jax.Array, scales: jax.Array | None) -> Float[Array, "..."]:
        """Returns float32 values."""
        assert scales is not None
        codes = self._blocks(values.astype(jnp.float32))
        return jnp.where(codes < 255, scales[..., None] * jnp.exp2(-codes / 8), 0.0).reshape(values.shape)


def _round(key: Key[Array, ""], x: Float[Array, "..."]) -> Shaped[Array, "..."]:
    """Returns x rounded up with the probability of what is behind the point, down otherwise."""
    return jnp.floor(x + jax.random.uniform(key, x.shape))


class HeldAdamState(NamedTuple):
    """optax.ScaleByAdamState with moments as they are held."""

    count: Any  # int32 (); the base class has a method of this name
    mu: Held
    nu: Held


def encoded(adam: optax.GradientTransformation, codec: Codec) -> optax.GradientTransformation:
    """Returns optax's scale_by_adam with moments that are encoded between its steps."""

    def hold(state: optax.ScaleByAdamState) -> HeldAdamState:
        step = jax.random.fold_in(jax.random.key(0), state.count)

        def held(tree: Any, name: str, encode: Any) -> Held:
            leaves, structure = jax.tree_util.tree_flatten_with_path(tree)
            key_of = lambda path: named_key(step, f"{name} {jax.tree_util.keystr(path)}")  # noqa: E731
            pairs = [encode(key_of(path), leaf) for path, leaf in leaves]
            values, scales = (jax.tree.unflatten(structure, [pair[i] for pair in pairs]) for i in range(2))
            return Held(values, scales)

        first, second = codec.encode_first, codec.encode_second
        return HeldAdamState(state.count, held(state.mu, "mu", first), held(state.nu, "nu", second))

    def release(state: HeldAdamState) -> optax.ScaleByAdamState:
        def released(held: Held, decode: Any) -> Any:
            return jax.tree.map(decode, held.values, held.scales)

        mu, nu = released(state.mu, codec.decode_first), released(state.nu, codec.decode_second)
        return optax.ScaleByAdamState(state.count, mu, nu)

    def update(updates: Any, state: HeldAdamState, params: Any = None) -> tuple[Any, HeldAdamState]:
        scaled, new = adam.update(updates, release(state), params)
        return scaled, hold(new)

    return optax.GradientTransformation(lambda params: hold(adam.init(params)), update)
