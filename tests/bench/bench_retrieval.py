"""Times what M2-VLA's memory recalls: the nearest of 10,000 keys of 2,688 numbers, beside a plain formula and faiss.

    python tests/bench/bench_retrieval.py [--rows 10000] [--batch 16]

The formula is in numpy, one query after the other. faiss-cpu is no dependency of this project; where it is not
installed, its line says so. Once more in parts on eight simulated devices. It fails where the formula finds other rows,
or the parts other chunks, or in another order.
"""

import argparse
import os
import time
from collections.abc import Callable
from typing import Any

os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count=8 {os.environ.get('XLA_FLAGS', '')}"

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from openpi_like.models.skill_memory import SkillMemory, SkillMemoryConfig, nearest
from openpi_like.partition import ShardingRules, placed
from openpi_like.train.sharding import MeshConfig

RECALLED = 4


def timed(call: Callable[[], Any], *, tries: int = 7) -> tuple[float, Any]:
    """Returns the median of some calls in ms, after one that is not counted, and what the last one returned."""
    took, out = [], jax.block_until_ready(call())
    for _ in range(tries):
        start = time.perf_counter()
        out = jax.block_until_ready(call())
        took.append(1e3 * (time.perf_counter() - start))
    return float(np.median(took)), out


def plain(asked: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Returns the rows whose mean absolute difference to each query is least, nearest first."""
    distance = np.array([np.abs(keys - query).mean(axis=1) for query in asked])
    return np.argsort(distance, axis=1)[:, :RECALLED]


def main() -> None:
    """Print a line each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--numbers", type=int, default=2_688)
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    draw = lambda *shape: np.asarray(rng.standard_normal(shape), np.float32)  # noqa: E731
    keys, values, asked = draw(args.rows, args.numbers), draw(args.rows, 56), draw(args.batch, args.numbers)
    there = jnp.ones((args.batch, args.rows), bool)
    print(f"{args.batch} queries, {args.rows:,} keys of {args.numbers:,} numbers, the nearest {RECALLED}")

    ours = jax.jit(lambda q, k: nearest(q, k, there, RECALLED))
    device = [jax.device_put(x, jax.devices()[0]) for x in (asked, keys)]
    took, (_, at) = timed(lambda: ours(*device))
    print(f"{'nearest':<24}{took:8.1f} ms")
    formula, expected = timed(lambda: plain(asked, keys))
    np.testing.assert_array_equal(at, expected)
    print(f"{'plain formula, numpy':<24}{formula:8.1f} ms, {formula / took:.2f} of it; the same rows")
    try:
        import faiss  # type: ignore[import-not-found]
    except ImportError:
        print(f"{'faiss':<24} not installed (faiss-cpu)")
    else:
        index = faiss.IndexFlat(args.numbers, faiss.METRIC_L1)
        index.add(keys)
        with_faiss, (_, theirs) = timed(lambda: index.search(asked, RECALLED))
        same = bool((np.asarray(at) == theirs).all())
        print(
            f"{'faiss ' + faiss.__version__:<24}{with_faiss:8.1f} ms, {with_faiss / took:.2f} of it; same rows: {same}"
        )

    config = SkillMemoryConfig(size=args.rows, recalled=RECALLED, layers=(0,))
    memory: Any = SkillMemory(config, args.numbers, values.shape[1])
    memory.keys[...], memory.values[...], memory.count[...] = map(jnp.asarray, (keys, values, np.float32(args.rows)))
    graph, state = nnx.split(memory)
    with placed(MeshConfig(fsdp=8).create(), ShardingRules()):
        recall = jax.jit(lambda state, asked: nnx.merge(graph, state).recall(asked))
        parts, found = timed(lambda: recall(state, jnp.asarray(asked)))
    np.testing.assert_array_equal(found, values[expected])
    print(f"{'in parts on 8 devices':<24}{parts:8.1f} ms (of two cores); the same chunks")


if __name__ == "__main__":
    main()
