"""Stacks of layers: as a loop or written out, and what of them is kept for the backward pass."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Shaped

from openpi_like.config import near_names

# What can be kept by name, see `kept`: queries, keys and values of a layer; what its attention saw; what is between
# the two products of its MLP.
NAMES = ("queries", "keys_values", "attention", "mlp")
# Policies of jax.checkpoint_policies that need no names.
POLICIES = ("nothing_saveable", "dots_saveable", "dots_with_no_batch_dims_saveable")
_HOST = "pinned_host"


def kept(x: Shaped[Array, "..."], name: str) -> Shaped[Array, "..."]:
    """Returns x, which a remat policy can keep by this name, one of `NAMES`."""
    return checkpoint_name(x, name)


def remat_problem(remat: str | None) -> str | None:
    """Returns what is wrong with a remat policy, or None.

    A policy is None (keep everything), one of `POLICIES`, or says what is kept by name: "save:attention,mlp" on the
    device, "offload:attention" in the host's memory, or both, as in "save:attention+offload:mlp".
    """
    if remat is None or remat in POLICIES:
        return None
    named: set[str] = set()
    for part in remat.split("+"):
        how, colon, names = part.partition(":")
        if not colon or how not in ("save", "offload"):
            known = [*POLICIES, "save:NAMES", "offload:NAMES"]
            return f"remat={remat!r}, expected None or a policy; {near_names(part, known)}"
        for name in names.split(","):
            if name not in NAMES:
                return f"remat={remat!r}: nothing is called {name!r}; {near_names(name, NAMES)}"
            if name in named:
                return f"remat={remat!r}: {name!r} is named twice"
            named.add(name)
    return None


def remat_policy(remat: str) -> Callable[..., Any]:
    """Returns the policy of jax.checkpoint for a name, see `remat_problem`."""
    if remat in POLICIES:
        return getattr(jax.checkpoint_policies, remat)
    named: dict[str, list[str]] = {"save": [], "offload": []}
    for part in remat.split("+"):
        how, _, names = part.partition(":")
        named[how] += names.split(",")
    if not named["offload"]:
        return jax.checkpoint_policies.save_only_these_names(*named["save"])
    return jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=named["save"],
        names_which_can_be_offloaded=named["offload"],
        offload_src="device",
        offload_dst=_HOST,
    )


def run_layers(
    body: Callable[[Any, Any], tuple[Any, Any]], carry: Any, layers: Any, *, unroll: bool, remat: str | None
) -> tuple[Any, Any]:
    """Runs `carry, y = body(carry, layer)` over axis 0 of every array in `layers`; returns (carry, stacked y).

    layers: a pytree, for example a module declared with stacked weights, which `body` gets with one layer's weights;
        or a list of what `body` gets, which is always written out.
    unroll: write the layers out one by one. Compilation grows with depth, but what nobody reads is never computed (the
        prefix's last output) and nothing is copied into stacks: a train step of three layers on CPU takes 0.6 of the
        time.
    remat: see `remat_problem`.
    """
    if remat is not None:
        # Inside a scan nothing can be merged across the checkpoint, so its guard against that is not needed.
        body = jax.checkpoint(body, policy=remat_policy(remat), prevent_cse=unroll or isinstance(layers, list))
    if not unroll and not isinstance(layers, list):
        return jax.lax.scan(body, carry, layers)
    ys = []
    for layer in layers if isinstance(layers, list) else unstacked(layers):
        carry, y = body(carry, layer)
        ys.append(y)
    return carry, jax.tree.map(lambda *y: jnp.stack(y), *ys)


def unstacked(layers: Any) -> list[Any]:
    """Returns the layers of a stack, see `run_layers`, one by one."""
    return [jax.tree.map(lambda w, i=i: w[i], layers) for i in range(jax.tree.leaves(layers)[0].shape[0])]
