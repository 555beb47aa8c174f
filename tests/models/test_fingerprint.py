"""Names of weights: of every bit and its place, and of nothing else."""

import hashlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from openpi_like.models.fingerprint import fingerprint
from openpi_like.train.sharding import MeshConfig

KEY = jax.random.key(0)


def weights() -> dict[str, Any]:
    drawn = jax.random.normal(KEY, (4, 6))
    return {
        "a": drawn,
        "b/kernel": drawn.astype(jnp.bfloat16),
        "c": jnp.arange(8, dtype=jnp.int8),
        "d": jnp.array([1, -2, 3], jnp.int4),
        "e": jnp.array([True, False]),
        "f": jnp.float32(0.25),
    }


def by_hand(of: dict[str, Any]) -> str:
    """The same in numpy, from whole numbers without a limit."""
    lines = []
    for name, x in sorted(of.items()):
        flat, bits = np.asarray(x).reshape(-1), 4 if x.dtype == jnp.int4 else 8 * x.dtype.itemsize
        words = [int(v) % 16 if bits == 4 else int(v.view(f"u{bits // 8}")) for v in flat]
        sums = []
        for odd in (0x9E3779B1, 0x85EBCA77):
            total = 0
            for place, word in enumerate(words):
                mixed = (word + 1) * ((place * odd) % 2**32 | 1) % 2**32
                mixed = (mixed ^ (mixed >> 15)) * odd % 2**32
                total += mixed ^ (mixed >> 13)
            sums.append(f"{total % 2**32:08x}")
        lines.append(f"{name} {x.shape} {x.dtype} {''.join(sums)}")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def test_it_is_what_a_loop_over_all_weights_says() -> None:
    assert fingerprint(weights()) == by_hand(weights())


def test_it_does_not_depend_on_where_weights_lie() -> None:
    mesh = MeshConfig(data=2, fsdp=2).create(jax.devices()[:4])
    placed = weights()
    placed["a"] = jax.device_put(placed["a"], NamedSharding(mesh, PartitionSpec("data", "fsdp")))
    placed["c"] = jax.device_put(placed["c"], NamedSharding(mesh, PartitionSpec(("data", "fsdp"))))
    assert fingerprint(dict(reversed(placed.items()))) == fingerprint(weights())


@pytest.mark.parametrize("name", ["a", "b/kernel", "c"])
def test_the_least_change_is_told(name: str) -> None:
    of = weights()
    x = of[name].reshape(-1)
    nearest = jnp.nextafter(x[3], jnp.full_like(x[3], 9.0)) if x.dtype.kind != "i" else x[3] + 1
    others = [
        {**of, name: x.at[3].set(nearest).reshape(of[name].shape)},
        {**of, name: x.at[1].set(x[2]).at[2].set(x[1]).reshape(of[name].shape)},
        {**of, name: x},
        {**of, name: -of[name]},
        {**{n: v for n, v in of.items() if n != name}, f"{name}2": of[name]},
        {n: v for n, v in of.items() if n != name},
    ]
    named = [fingerprint(other) for other in (of, *others)]
    assert len(set(named)) == len(named) - (x.shape == of[name].shape)
