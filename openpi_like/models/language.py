"""What all language models share: a table, stacked layers, a final norm, and how they are run.

Letters: B batch, S tokens, T keys (cached and own), D width, K kv heads, H head dim, V vocabulary, L layers.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int
from qwix import QArray

from openpi_like.batch import Array as Leaf
from openpi_like.models.cross_entropy import capped, cross_entropy
from openpi_like.models.param import linear, linear_parts
from openpi_like.models.stack import kept, run_layers, unstacked
from openpi_like.partition import pin


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys (after rotation) and values: (L, B, S, K, H), or (B, S, K, H) inside a layer."""

    k: Leaf
    v: Leaf

    def after(self, past: "KVCache | None") -> "KVCache":
        """Returns those of `past`, then these; inside a layer."""
        return self if past is None else jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=1), past, self)


class MapsLayer(nnx.Module):
    """What layers of language models share: the maps q, kv, out, gate_up and down, declared for all layers at once.

    A subclass declares them, and says how queries, keys and values come about.
    """

    activation: Callable[[jax.Array], jax.Array]  # of the gate
    MAPS = ("q", "kv", "out", "gate_up", "down")

    @property
    def is_plain(self) -> bool:
        """Says whether no map has an overlay, or is in fewer bits."""
        return not any(hasattr(self, f"{n}_lora") or isinstance(getattr(self, n)[...], QArray) for n in self.MAPS)

    queries: Callable[..., jax.Array]  # (B, S, D) normalised tokens, rotations -> (B, N, S, H)
    keys_and_values: Callable[..., KVCache]

    def project(
        self, y_BSD: Float[Array, "B S D"], rope_2BSh: Float[Array, "2 B S half"]
    ) -> tuple[Float[Array, "B N S H"], KVCache]:
        """Returns queries, keys and values of normalised tokens."""
        return self.queries(y_BSD, rope_2BSh), self.keys_and_values(y_BSD, rope_2BSh)

    @jax.named_scope("projections")
    def project_out(self, seen_BNSH: Float[Array, "B N S H"]) -> Float[Array, "B S D"]:
        """Returns what attention adds to the tokens."""
        return linear(self, "out", "BNSH,NHD->BSD", seen_BNSH)

    @jax.named_scope("mlp")
    def mlp(self, y_BSD: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        """Returns what the MLP adds to the tokens."""
        gate, up = linear_parts(self, "gate_up", "BSD,DF->BSF", y_BSD)
        hidden_BSF = pin(self.activation(gate) * up, "batch", None, "mlp")
        return linear(self, "down", "BSF,FD->BSD", kept(hidden_BSF, "mlp"))


class Behind(NamedTuple):
    """Tokens that others stand behind, as every layer got them, (L, B, T, D), and their rotations, (2, B, T, H / 2)."""

    states: Leaf
    rope: Leaf


M = TypeVar("M", bound="LanguageModel")
# One layer: (tokens, (layer, its number, its cache or None)) -> (tokens, own keys and values).
Step = Callable[[jax.Array, tuple[Any, jax.Array, KVCache | None]], tuple[jax.Array, KVCache]]


class LanguageModel(nnx.Module):
    """Stacked layers between a table and a final norm. A subclass declares them and says what a layer does.

    `given`: what a model knows besides tokens, masks and rotations; it names it in `step`.
    """

    config: Any
    dtype: str
    unroll: bool
    remat: str | None
    embedding: nnx.Param
    layers: Any
    soft_cap: float | None = None  # of logits, see `capped`

    embed: Callable[..., jax.Array]  # (B, S) tokens -> (B, S, D)
    rope: Callable[..., jax.Array]  # positions -> rotations (2, B, S, H / 2)
    step: Callable[..., Step]  # mask, rotations, what is given -> what one layer does
    own_keys: Callable[..., KVCache]  # a layer, its inputs, rotations -> its keys and values
    last_norm: Callable[..., jax.Array]  # tokens, what is given -> tokens after the final norm

    def table(self) -> nnx.Param:
        """Returns the table (V, D) that logits are products with."""
        return self.embedding

    def logits(
        self, x_BSD: Float[Array, "B S D"], *, rows: slice | Int[np.ndarray, "V"] = slice(None)
    ) -> Float[Array, "B S V"]:
        """Returns x times the table, accumulated and returned in float32: a softmax over them follows.

        rows: the part of the vocabulary that is asked for, or the ids.
        """
        table = self.table()[...][rows].astype(self.dtype)
        logits = jnp.einsum("BSD,VD->BSV", x_BSD.astype(self.dtype), table, preferred_element_type=jnp.float32)
        return capped(logits, self.soft_cap)

    @jax.named_scope("text_loss")
    def token_losses(self, x_BSD: Float[Array, "B S D"], targets_BS: Int[Array, "B S"]) -> Float[Array, "B S"]:
        """Returns the cross-entropy of each target under `logits` of its token, without ever holding those."""
        B, S, D = x_BSD.shape
        x_TD = x_BSD.astype(self.dtype).reshape(B * S, D)
        losses_T = cross_entropy(x_TD, self.table()[...], targets_BS.reshape(-1), soft_cap=self.soft_cap)
        return losses_T.reshape(B, S)

    def packed(self: M) -> M:
        """Returns the same model for many small calls, with the maps of a layer in fewer products; for sampling only.

        One whose maps have overlays or fewer bits stays as it is.
        """
        if self.is_taken_apart:
            return self
        layers = self.layers.packed(self.config, self.dtype)
        if layers is self.layers:
            return self
        packed = nnx.merge(*nnx.split(self))
        packed.layers = layers
        return packed

    @property
    def is_taken_apart(self) -> bool:
        """Says whether each layer has arrays of its own, see `sampling.for_sampling`."""
        return isinstance(self.layers, nnx.List)

    def _inputs(self, past: Any) -> Any:
        """past: of all layers, one behind another; or None."""
        number = jnp.arange(self.config.depth)
        if not self.is_taken_apart:
            return self.layers, number, past
        pasts = [None] * self.config.depth if past is None else unstacked(past)
        return list(zip(self.layers, number, pasts, strict=True))

    def __call__(
        self,
        x_BSD: Float[Array, "B S D"],
        mask_BST: Bool[Array, "B S T"],
        rope_2BSh: Float[Array, "2 B S half"],
        *,
        past: KVCache | None = None,
        **given: Any,
    ) -> tuple[Float[Array, "B S D"], KVCache]:
        """Returns the tokens after the final norm, and their keys and values, (L, B, S, K, H).

        mask: True where a token sees a key; T counts the keys of `past` first, then the S own ones.
        past: keys and values of the tokens before these, (L, B, T - S, K, H).
        """
        step = self.step(mask_BST, rope_2BSh, **given)
        x_BSD = x_BSD.astype(self.dtype)
        x_BSD, own = run_layers(step, x_BSD, self._inputs(past), unroll=self.unroll, remat=self.remat)
        return self.last_norm(x_BSD, **given), own

    def hidden_states(
        self,
        x_BSD: Float[Array, "B S D"],
        mask_BST: Bool[Array, "B S T"],
        rope_2BSh: Float[Array, "2 B S half"],
        *,
        behind: Behind | None = None,
        **given: Any,
    ) -> Float[Array, "L1 B S D"]:
        """Returns the inputs of every layer and, last, the output after the final norm: (L + 1, B, S, D).

        mask: True where a token sees a key; T counts the tokens that these are behind first, then the S own ones.
        """
        step = self.step(mask_BST, rope_2BSh, **given)

        def body(x: jax.Array, inputs: tuple[Any, jax.Array, jax.Array | None]) -> tuple[jax.Array, jax.Array]:
            layer, i, seen = inputs
            past = None if behind is None else self.own_keys(layer, seen, behind.rope)
            return step(x, (layer, i, past))[0], x

        x_BSD = x_BSD.astype(self.dtype)
        states = None if behind is None else behind.states
        x_BSD, inputs = run_layers(body, x_BSD, self._inputs(states), unroll=self.unroll, remat=self.remat)
        return jnp.concatenate([inputs, self.last_norm(x_BSD, **given)[None]])

    def prefill(
        self,
        x_BSD: Float[Array, "B S D"],
        mask_BSS: Bool[Array, "B S S"],
        rope_2BSh: Float[Array, "2 B S half"],
        **given: Any,
    ) -> KVCache:
        """Returns the keys and values alone: of the last layer, nothing but its keys and values is computed."""
        if self.unroll or self.is_taken_apart:  # then the compiler leaves out what nobody reads
            return self(x_BSD, mask_BSS, rope_2BSh, **given)[1]
        step = self.step(mask_BSS, rope_2BSh, **given)
        at = lambda i: jax.tree.map(lambda w: jax.lax.dynamic_index_in_dim(w, i, keepdims=False), self.layers)  # noqa: E731
        last = self.config.depth - 1
        body = lambda x, i: step(x, (at(i), i, None))  # noqa: E731
        x_BSD, early = jax.lax.scan(body, x_BSD.astype(self.dtype), jnp.arange(last))
        own = self.own_keys(at(last), x_BSD, rope_2BSh)
        return jax.tree.map(lambda e, o: jnp.concatenate([e, o[None]]), early, own)
