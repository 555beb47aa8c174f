"""Fits a FAST tokenizer to the actions of a run's mixture, without reading an image, and says what it costs:

    python data/fit_fast.py configs/demo_pretrain.py --out runs/demo/fast --set stats=runs/demo/stats

Chunks are those the run trains on: its robots, their horizons and its normalisation. The report compares with one of
256 bins per action and step (RT-2, OpenVLA) at the same horizon; errors are in the robots' own units. To measure a
tokenizer that exists, such as a released one, give its directory with --use instead of fitting.
"""

import dataclasses
import json
import logging
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from openpi_like.config import load_run, override
from openpi_like.data.config import open_datasets
from openpi_like.data.dataset import EpisodeDataset
from openpi_like.data.fast import FastError, FastTokenizer, dct_coefficients, fit_fast
from openpi_like.data.normalize import Normalization
from openpi_like.data.text import TextTokenizer, read_tokenizer

BLOCK = 4096  # chunks looked at together
BINS = 256
PERCENTILES = (50, 95, 99, 100)


@dataclasses.dataclass(frozen=True)
class Args:
    """Fits a FAST tokenizer to the actions of a run's mixture.

    config: the run. out: directory for the tokenizer and report.json. set: overrides of the run, key=value.
    chunks: how many to fit to, over all datasets, by their weights and evenly spaced in each. test_chunks: how many of
    each dataset to measure with. vocab_size: tokens at most.
    scale: DCT coefficients per unit of normalised action; larger is finer and longer.
    use: measure the tokenizer of this directory and fit none.
    """

    config: tyro.conf.Positional[Path]
    out: Path
    set: tuple[str, ...] = ()
    chunks: int = 100_000
    test_chunks: int = 10_000
    scale: float = 10.0
    vocab_size: int = 1024
    use: Path | None = None


def normalised(
    dataset: EpisodeDataset, normalization: Normalization, frames: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Returns normalised chunks, the same and their first states in robot space, and the mask within the episode.

    Plans are those that are known as a whole, as tokens are learned of no others.
    """
    state, (actions, mask) = dataset.state(frames), dataset.actions(frames)
    if dataset.robot.plan is not None:
        state, actions, mask = (x[mask.all(axis=1)] for x in (state, actions, mask))
    return normalization.apply_actions(dataset.robot.encode_actions(actions, state)), actions, state, mask


def spaced(dataset: EpisodeDataset, count: int) -> np.ndarray:
    return np.unique(np.linspace(0, len(dataset) - 1, min(count, len(dataset))).round().astype(np.int64))


def binned(chunks: np.ndarray) -> np.ndarray:
    """Returns the centres of the bins that values fall in; the range is [-1, 1], what is outside goes to its edge."""
    at = np.clip(np.floor((chunks + 1) * (BINS / 2)), 0, BINS - 1)
    return ((at + 0.5) * (2 / BINS) - 1).astype(np.float32)


def measure(
    tokenizer: FastTokenizer, dataset: EpisodeDataset, normalization: Normalization, count: int, room: int | None
) -> dict[str, Any]:
    """Returns tokens per chunk, and errors per action dim in robot space, of chunks that are evenly spaced."""
    robot = dataset.robot
    lengths: list[int] = []
    squares: dict[str, list[np.ndarray]] = {"fast": [], "bins": []}
    outside, seconds, frames = 0, 0.0, spaced(dataset, count)
    for at in range(0, len(frames), BLOCK):
        chunks, actions, state, mask = normalised(dataset, normalization, frames[at : at + BLOCK])
        started = time.perf_counter()
        encoded = tokenizer.encode(chunks, outside="saturate")
        decoded = tokenizer.decode(encoded.ids, horizon=robot.action_horizon, dims=robot.action_size)
        seconds += time.perf_counter() - started
        failed = [e for e in decoded.errors if e is not None]
        if failed:
            raise failed[0]  # what was encoded must come back
        outside += int(encoded.outside.sum())
        lengths += [len(ids) for ids in encoded.ids]
        for name, back in (("fast", decoded.actions), ("bins", binned(chunks))):
            again = robot.decode_actions(normalization.invert_actions(back), state)
            squares[name].append(np.square(again - actions)[mask])
    errors = {
        name: dict(zip(robot.robot_action_names, np.sqrt(np.concatenate(of).mean(0)).tolist(), strict=True))
        for name, of in squares.items()
    }
    return {
        "robot": robot.name,
        "chunks": len(frames),
        "tokens": {str(p): float(np.percentile(lengths, p)) for p in PERCENTILES},
        "tokens_of_bins": robot.action_horizon * robot.action_size,
        "too_long": None if room is None else float(np.mean(np.array(lengths) > room)),
        "saturated_coefficients": outside,
        "rmse": errors,
        "chunks_per_s": len(frames) / seconds,
    }


def show(rows: list[dict[str, Any]], room: int | None, console: Console) -> None:
    tokens = Table("dataset", *(f"p{p}" for p in PERCENTILES), "256 bins", "over the limit", title="tokens per chunk")
    errors = Table("dataset", "action", "FAST", "256 bins", title="reconstruction, RMSE in the robot's units")
    for row in rows:
        limit = "no limit" if room is None else f"{row['too_long']:.1%} of {room}"
        tokens.add_row(row["name"], *(f"{v:.0f}" for v in row["tokens"].values()), str(row["tokens_of_bins"]), limit)
        for dim, error in row["rmse"]["fast"].items():
            errors.add_row(row["name"], dim.replace("[", r"\["), f"{error:.4g}", f"{row['rmse']['bins'][dim]:.4g}")
        if row["saturated_coefficients"]:
            console.print(
                f"{row['name']}: {row['saturated_coefficients']} coefficients out of range, written as the nearest"
            )
    console.print(tokens)
    console.print(errors)


def main(args: Args, console: Console) -> None:
    run = override(load_run(args.config), args.set)
    entries = [e for e in run.data.entries if e.actions]
    data = dataclasses.replace(run.data, entries=tuple(entries))
    normalizations = dataclasses.replace(run, data=data).normalizations()
    training = [d for d in open_datasets(data) if d is not None]
    total = sum(e.weight for e in entries)
    if args.use is None:
        coefficients = []
        with Progress(console=console) as progress:
            for entry, dataset in zip(entries, training, strict=True):
                frames = spaced(dataset, max(1, round(args.chunks * entry.weight / total)))
                for at in progress.track(range(0, len(frames), BLOCK), description=f"chunks of {entry.robot.name}"):
                    chunks = normalised(dataset, normalizations[entry.robot.name], frames[at : at + BLOCK])[0]
                    coefficients.append(dct_coefficients(chunks, args.scale).astype(np.int32))
        tokenizer = fit_fast(coefficients, scale=args.scale, vocab_size=args.vocab_size, progress=True)
        tokenizer.save(args.out)
    else:
        tokenizer = FastTokenizer.load(args.use)
    low, high = tokenizer.span
    console.print(f"{tokenizer.vocab_size} tokens for coefficients {low} to {high} at scale {tokenizer.scale:g}")

    # Held-out episodes where there are any.
    rows = []
    room = None if run.model.action_tokens is None else run.model.action_tokens.max_len
    if room is not None and run.tokenizer is not None and Path(run.tokenizer).exists():
        text = TextTokenizer(read_tokenizer(run.tokenizer), 100, prompt_format=run.model.prompt_format, answer_len=room)
        empty = text.encode_actions("", np.zeros(1, np.float32), np.zeros(0, np.int32))
        room -= int(empty.prompt_action.sum())  # "Action: ", "|" and the end
    for entry, held_out, seen in zip(entries, open_datasets(data, validation=True), training, strict=True):
        dataset = seen if held_out is None else held_out
        name = f"{entry.robot.name} ({'training' if held_out is None else 'held out'})"
        rows.append(
            {"name": name, **measure(tokenizer, dataset, normalizations[entry.robot.name], args.test_chunks, room)}
        )
    show(rows, room, console)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "report.json").write_text(json.dumps(rows, indent=1))
    console.print(
        f"{sum(r['chunks_per_s'] for r in rows) / len(rows):,.0f} chunks/s there and back; written to {args.out}"
    )


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        main(tyro.cli(Args), Console(highlight=False))
    except (FastError, ValueError) as e:
        sys.exit(str(e))
