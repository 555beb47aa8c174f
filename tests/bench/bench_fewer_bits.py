"""What sampling with weights in fewer bits costs in actions: a trained run, on its own held-out frames.

    python tests/bench/bench_fewer_bits.py runs/my_robot

For each robot of the run: mean absolute error of whole chunks against the demonstrations, and mean distance from the
chunks of float32 weights from the same noise; both in multiples of the actions' normalised scale, averaged over dims.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx
from rich.console import Console
from rich.table import Table

from openpi_like.config import from_json
from openpi_like.data.loader import ValidationBatch, validation_batches
from openpi_like.models.quantize import QUANTIZED, quantized_model
from openpi_like.train.checkpoints.checkpoint import find_step
from openpi_like.train.checkpoints.contract import read_record
from openpi_like.train.checkpoints.load import load_policy_parts

DTYPES = ("float32", "bfloat16", *QUANTIZED)


@dataclasses.dataclass(frozen=True)
class Args:
    """See the file's head. batches: per robot, of batch_size frames."""

    run: Annotated[Path, tyro.conf.Positional]
    batches: int = 4
    batch_size: int = 64


def held_out(args: Args) -> Iterator[ValidationBatch]:
    record = read_record(find_step(args.run))
    config, contract = from_json(record["config"]), from_json(record["contract"])
    items = validation_batches(
        config.data,
        batch_size=args.batch_size,
        count=args.batches,
        policy=config.model,
        tokenizer=contract.text_tokenizer(),
        normalizations=contract.normalizations,
        action_tokenizer=contract.fast_tokenizer(),
    )
    return (item for item in items if item.acts)


def chunks(args: Args, dtype: str) -> tuple[dict[str, list[np.ndarray]], dict[str, list[np.ndarray]]]:
    """Returns sampled and demonstrated actions of valid steps, (steps, J), by robot; normalised."""
    few = dtype in QUANTIZED
    parts = load_policy_parts(args.run, dtype="bfloat16" if few else dtype)
    model = parts.model.packed()
    graph, weights = nnx.split(quantized_model(model, dtype) if few else model)
    config, options = parts.model.config, jax.device_put(parts.sampling_options)

    @jax.jit
    def sample(weights: Any, key: jax.Array, observation: Any, mask: jax.Array, options: Any) -> jax.Array:
        return nnx.merge(graph, weights).sample_actions(key, observation, action_mask=mask, **options)

    sampled: dict[str, list[np.ndarray]] = {}
    shown: dict[str, list[np.ndarray]] = {}
    for i, item in enumerate(held_out(args)):
        robot, actions = item.robot, np.asarray(item.batch["actions"])
        mask = jnp.broadcast_to(config.chunk_mask(robot.action_horizon, robot.action_size), actions.shape)
        found = sample(weights, jax.random.key(i), config.observation(item.batch), mask, options)
        valid = np.asarray(item.batch["action_mask"]).any(-1)
        sampled.setdefault(robot.name, []).append(np.asarray(found)[valid][:, : robot.action_size])
        shown.setdefault(robot.name, []).append(actions[valid][:, : robot.action_size])
    return sampled, shown


def main(args: Args) -> None:
    table = Table("robot", "weights", "error against demonstrations", "distance from float32")
    reference: dict[str, np.ndarray] = {}
    for dtype in DTYPES:
        sampled, shown = chunks(args, dtype)
        for robot, parts in sampled.items():
            found, truth = np.concatenate(parts), np.concatenate(shown[robot])
            exact = reference.setdefault(robot, found)  # float32 comes first
            error, distance = np.abs(found - truth).mean(), np.abs(found - exact).mean()
            table.add_row(robot, dtype, f"{error:.4f}", f"{distance:.4f}")
    Console(width=120).print(table)


if __name__ == "__main__":
    main(tyro.cli(Args))
