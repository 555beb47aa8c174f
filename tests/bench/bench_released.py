"""The real pi0 and pi0.5, compiled ahead of time without allocating an array: parameters, memory, time to compile.

    python tests/bench/bench_released.py                        # for this machine
    python tests/bench/bench_released.py --topology v5e:4x4     # for TPUs that are not there

The second needs the extra `plan` (`pip install -e '.[plan]'`), and JAX_PLATFORMS=cpu where there is no TPU.
Memory is the compiler's own account for one device. On CPU it is larger than anywhere else: there, bfloat16 products
are computed in float32, and the weights are converted as a whole.
"""

import dataclasses
import time
from typing import Any

import jax
import tyro
from flax import nnx
from jax.experimental import topologies
from rich.console import Console
from rich.table import Table

from openpi_like.batch import ActionTokens
from openpi_like.models.paligemma import PolicyConfig
from openpi_like.models.pi0 import Pi0Config
from openpi_like.models.pi0_fast import Pi0FastConfig
from openpi_like.models.weights import layout, weight_shapes
from openpi_like.partition import ShardingRules
from openpi_like.train.optimizer import OptimizerConfig
from openpi_like.train.sharding import MeshConfig, batch_sharding, replicated
from openpi_like.train.state import ModelDef, Trainer

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Args:
    """Compiles the released sizes.

    topology: of TPUs, such as v5e:4x4; None compiles for this machine. batch: per training step, over all devices.
    remat: what the backward pass recomputes. only: some of the policies, default all.
    """

    topology: str | None = None
    batch: int = 32
    remat: str = "nothing_saveable"
    only: tuple[str, ...] = ()


def spec(shape: tuple[int, ...], dtype: str, sharding: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def observation(config: PolicyConfig, B: int, sharding: Any) -> dict[str, Any]:
    return {
        "images": {c: spec((B, *config.image_size, 3), "uint8", sharding) for c in config.cameras},
        "image_mask": {c: spec((B,), "bool", sharding) for c in config.cameras},
        "state": spec((B, config.state_dim), "float32", sharding),
        "state_mask": spec((B, config.state_dim), "bool", sharding),
        "prompt": spec((B, config.prompt_len), "int32", sharding),
        "prompt_mask": spec((B, config.prompt_len), "bool", sharding),
    }


def compiled_row(name: str, lowered: Any, console: Console) -> tuple[str, ...]:
    started = time.perf_counter()
    compiled = lowered.compile()
    seconds = time.perf_counter() - started
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis() or {}
    total = memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.output_size_in_bytes
    total -= memory.alias_size_in_bytes
    sizes = (memory.argument_size_in_bytes, memory.temp_size_in_bytes, total)
    return (name, f"{seconds:.1f}", *(f"{size / GIB:.2f}" for size in sizes), f"{cost.get('flops', 0) / 1e12:.2f}")


def main(args: Args) -> None:
    console = Console(width=120)
    devices = (
        topologies.get_topology_desc(platform="tpu", topology_name=args.topology).devices if args.topology else None
    )
    kind = (devices or jax.devices())[0].device_kind
    count = len(devices or jax.devices())
    table = Table(title=f"{count} x {kind}, training batch {args.batch}, remat {args.remat}; memory per device, GiB")
    for column in ("", "compile, s", "arguments", "temporary", "peak", "TFLOP (loops once)"):
        table.add_column(column, justify="left" if not column else "right")
    both = dataclasses.replace(
        Pi0Config.released(pi05=True), prompt_format="fast", action_tokens=ActionTokens(max_len=100)
    )
    kinds: dict[str, PolicyConfig] = {
        "pi0": Pi0Config.released(),
        "pi0.5": Pi0Config.released(pi05=True),
        "pi0-FAST": Pi0FastConfig.released(),
        "pi0.5 insulated": both,
    }
    for name in args.only or kinds:
        config = kinds[name]
        config = dataclasses.replace(config, remat=args.remat)
        leaves = weight_shapes(config)
        total = sum(leaf.size for leaf in leaves.values())
        published = len(layout(config, "openpi"))
        console.print(f"{name}: {total:,} parameters in {len(leaves)} arrays (openpi: {published}), by jax.eval_shape")

        model = ModelDef(config)
        one = MeshConfig().create(devices[:1] if devices else jax.devices()[:1])
        # As a server loads them.
        graph, packed = nnx.split(nnx.eval_shape(lambda c=config: c.create(jax.random.key(0)).packed()))
        weights = jax.tree.map(lambda leaf: spec(leaf.shape, "bfloat16", replicated(one)), packed)  # noqa: B023
        key = jax.eval_shape(lambda: jax.random.key(0))
        key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=replicated(one))
        for B in (1, 8) if name in ("pi0", "pi0.5") else ():
            sample = jax.jit(lambda params, obs, key, g=graph: nnx.merge(g, params).sample_actions(key, obs))
            lowered = sample.lower(weights, observation(config, B, replicated(one)), key)
            table.add_row(*compiled_row(f"{name} sampler, bfloat16, batch {B}, one device", lowered, console))

        mesh = MeshConfig(data=1, fsdp=count).create(devices)
        trainer = Trainer(
            model, OptimizerConfig().create(), ema_decay=0.99, seed=0, mesh=mesh, rules=ShardingRules(),
            dataset_names=("released",),
        )  # fmt: skip
        state = jax.tree.map(lambda a, s: spec(a.shape, a.dtype, s), trainer.abstract, trainer.shardings)
        rows, chunk = batch_sharding(mesh), (args.batch, config.action_horizon, config.action_dim)
        batch = observation(config, args.batch, rows) | {
            "actions": spec(chunk, "float32", rows),
            "action_mask": spec(chunk, "bool", rows),
            "dataset_id": spec((args.batch,), "int32", rows),
            "position": spec((args.batch, 2), "uint32", rows),
        }
        if config.action_tokens is not None:
            text = (args.batch, config.prompt_len + config.answer_len)
            masks = ("prompt_mask", "prompt_causal", "prompt_loss", "prompt_action")
            batch |= {k: spec(text, "bool", rows) for k in masks}
            batch["prompt"] = spec(text, "int32", rows)
        lowered = trainer.train_step.lower(state, batch)
        table.add_row(*compiled_row(f"{name} train step with AdamW and EMA, fsdp {count}", lowered, console))
    console.print(table)


if __name__ == "__main__":
    main(tyro.cli(Args))
