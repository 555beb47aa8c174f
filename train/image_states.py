"""Runs a frozen backbone once over every frame of a run's training data, and keeps what it makes of images:

    python train/image_states.py CONFIG --out DIR --set key=value

for policies that read their backbone layer by layer (M2-VLA). Training then reads that in the place of images, by
`data.entries.I.image_states=DIR/I`, and runs neither image towers nor the images' part of the language model. It is
large: (layers + 1) x tokens x width numbers a frame. A stopped program goes on where it was.
"""

import contextlib
import dataclasses
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro
from rich.console import Console
from rich.progress import Progress

from openpi_like.config import load_run, override
from openpi_like.data.assembly import Assembler
from openpi_like.data.config import open_datasets
from openpi_like.data.image_states import StatesOf, Writer
from openpi_like.data.schema import DatasetError
from openpi_like.models.weights import WeightsError
from openpi_like.train.checkpoints.contract import CheckpointError
from openpi_like.train.checkpoints.warm_start import warm_start
from openpi_like.train.compile_cache import use_compile_cache
from openpi_like.train.config import TrainConfig
from openpi_like.train.image_states import backbone_weights
from openpi_like.train.sharding import check_batch, put_batch


@dataclasses.dataclass(frozen=True)
class Args:
    """What a frozen backbone makes of every training frame.

    config: of the run that will read it. out: directory, with one below it for each entry of the data.
    set: overrides of the config, key=value. batch_size: frames at a time; that of the run by default.
    """

    config: tyro.conf.Positional[Path]
    out: Path
    set: tuple[str, ...] = ()
    batch_size: int | None = None


def main(args: Args, config: TrainConfig, console: Console) -> None:
    mesh, size = config.mesh.create(), args.batch_size or config.batch_size
    check_batch(size, 1, mesh)
    trainer, contract = config.trainer(mesh), config.contract()
    start = config.warm_start
    state = trainer.init() if start is None else trainer.init_from(warm_start(start, trainer)[0])
    weights = backbone_weights(trainer, state)
    tokenizer = contract.text_tokenizer()

    @jax.jit
    def states(weights: Any, batch: Any) -> jax.Array:
        with trainer.tracing():
            made = trainer.model.bind(weights).backbone.image_states(config.model.observation(batch))
            return made.swapaxes(0, 1)

    shape = config.model.with_image_states(config.model.batch_shapes(1))["image_states"]
    with contextlib.ExitStack() as opened:
        datasets = open_datasets(config.data)
        for dataset in datasets:
            assert dataset is not None  # only validation splits may be absent
            opened.callback(dataset.close)
        plain = dataclasses.replace(config.data, augment=None, camera_dropout=0.0)
        more = (contract.normalizations, plain, contract.fast_tokenizer())
        assemble = Assembler(datasets, config.model, tokenizer, *more)
        for i, dataset in enumerate(datasets):
            assert dataset is not None  # as above
            of = StatesOf.make(
                dataset,
                config.model,
                weights=weights,
                begins_with=tuple(tokenizer.before_images),
                shape=shape.shape[1:],
                dtype=str(shape.dtype),
            )
            where, begun = args.out / str(i), time.perf_counter()
            with Writer(where, of) as writer, Progress(console=console, transient=True) as progress:
                already = writer.done
                console.print(f"{where}: {of.count:,} frames of {of.row_bytes / 2**20:.3g} MiB each, {already:,} there")
                bar = progress.add_task(dataset.robot.name, total=of.count, completed=already)
                for frames in writer.batches(size):
                    batch, _ = assemble(np.full(size, i), frames, frames, held_out=True)
                    writer.write(jax.device_get(states(state.weights(average=False), put_batch(batch, mesh))))
                    progress.update(bar, completed=writer.done)
                writer.finish()
            took = time.perf_counter() - begun
            console.print(f"{(writer.done - already) / took:.0f} frames/s; data.entries.{i}.image_states={where}")


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__)
    config = override(load_run(args.config), args.set)
    use_compile_cache(config.compile_cache)
    try:
        main(args, config, Console())
    except (CheckpointError, DatasetError, WeightsError) as e:
        sys.exit(str(e))
