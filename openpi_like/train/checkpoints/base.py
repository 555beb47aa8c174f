"""Weights that a run does not train: kept once beside its checkpoints, or where they came from, and checked.

A checkpoint of such a run holds the trained weights alone; with LoRA, under a hundredth of the policy. Its record says
where the base is, and a sum over the bits of each of its weights.
"""

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
import qwix
from jaxtyping import Array, Shaped, UInt32

from openpi_like.config import to_json
from openpi_like.models.weights import flatten, unflatten
from openpi_like.train.checkpoints.contract import CheckpointError
from openpi_like.train.state import Params

BASE = "base"  # of a run, beside its `checkpoints`
_WORD = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}


@jax.jit
def bit_sum(x: Shaped[Array, "..."]) -> UInt32[Array, ""]:
    """Returns a sum over the values of an array, each mixed with its place, modulo 2^32: the same on any mesh."""
    if jnp.dtype(x.dtype).itemsize not in _WORD or x.dtype == jnp.int4:
        x = x.astype(jnp.int8)
    words = jax.lax.bitcast_convert_type(x, _WORD[jnp.dtype(x.dtype).itemsize]).astype(jnp.uint32)
    place = jnp.zeros(x.shape, jnp.uint32)
    for axis in range(x.ndim):  # by axis, so that nothing is moved between devices
        place = place * jnp.uint32(x.shape[axis]) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    mixed = words ^ (place * jnp.uint32(0x9E3779B9))
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):  # the finaliser of MurmurHash3
        mixed = (mixed ^ (mixed >> shift)) * jnp.uint32(factor)
    return (mixed ^ (mixed >> 16)).sum(dtype=jnp.uint32)


def digest(frozen: Params) -> dict[str, int]:
    """Returns the sum of the bits of every weight, by name."""
    # One by one: many sums over devices that are under way at once can hold each other up where cores are few.
    sums = {name: [int(bit_sum(x)) for x in jax.tree.leaves(value)] for name, value in flatten(frozen).items()}
    return {name: functools.reduce(lambda a, b: (31 * a + b) % 2**32, of, 0) for name, of in sums.items()}


def save_base(run_dir: Path, frozen: Params) -> None:
    """Writes the frozen weights of a run beside its checkpoints, over those of a try that got to no checkpoint."""
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(run_dir.resolve() / BASE, plain(frozen), force=True)


def run_of(step_dir: Path) -> Path:
    """Returns the directory of the run that a step belongs to."""
    return step_dir.parent.parent if step_dir.parent.name == "checkpoints" else step_dir.parent


def base_record(frozen: Params, source: Any) -> dict[str, Any] | None:
    """Returns what a checkpoint says of its base: where it is and what is in it; None where there is none.

    source: the `WarmStart` by which the weights can be read again; None: they are saved beside the checkpoints.
    """
    if not frozen:
        return None
    return {"source": None if source is None else to_json(source), "digest": digest(frozen)}


def check_digest(record: Mapping[str, Any], frozen: Params, where: object) -> None:
    """Compares frozen weights with those of a record.

    Raises:
        CheckpointError: lists the weights that are others.
    """
    expected, got = record["digest"], digest(frozen)
    changed = sorted(name for name in expected.keys() | got.keys() if expected.get(name) != got.get(name))
    if changed:
        raise CheckpointError(
            f"the base in {where} is not what was trained on: {len(changed)} of {len(expected)} weights differ: "
            f"{', '.join(changed[:8])}{' ...' if len(changed) > 8 else ''}; restore it"
        )


def read_base(run_dir: Path, abstract: Params, shardings: Params) -> Params:
    """Returns the frozen weights that `save_base` wrote, placed as `shardings` say.

    Raises:
        CheckpointError: they are not there, or cannot be read.
    """
    directory = run_dir.resolve() / BASE
    if not directory.is_dir():
        raise CheckpointError(
            f"{directory} is missing: the weights that this run does not train; copy it beside checkpoints/"
        )
    target = jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), abstract, shardings)
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            stored = checkpointer.restore(directory, plain(target))
    except Exception as e:  # Orbax raises bare Exception for a damaged array
        first = str(e.__cause__ or e).split("\n")[0]
        raise CheckpointError(f"cannot read the base {directory}: {first}; it is damaged or incomplete") from e
    return _as_held(flatten(stored), abstract)


def plain(frozen: Params) -> Params:
    """Returns weights with those in fewer bits as {"qvalue", "scale"}, which Orbax can write."""
    arrays: dict[str, Any] = {}
    for name, value in flatten(frozen).items():
        if isinstance(value, qwix.QArray):
            arrays |= {f"{name}/qvalue": value.qvalue, f"{name}/scale": value.scale}
        else:
            arrays[name] = value
    return unflatten(arrays)


def _as_held(stored: Mapping[str, Any], abstract: Params) -> Params:
    """Inverse of `plain`."""
    held = {}
    for name, value in flatten(abstract).items():
        if isinstance(value, qwix.QArray):
            held[name] = dataclasses.replace(value, qvalue=stored[f"{name}/qvalue"], scale=stored[f"{name}/scale"])
        else:
            held[name] = stored[name]
    return unflatten(held)
