"""Converts weights between layouts, and shows that both compute the same:

    python train/convert.py runs/my_robot exported --to openpi
    python train/convert.py pi0_base/params runs/pi0_base --to run --model pi0 --set "cameras=('base',)" \\
        --robots sawyer --norm-stats norm_stats.json --tokenizer paligemma_tokenizer.model

The first gives what we trained to an openpi user (or to LeRobot's), the second gives released weights to our server.
SRC is a run of ours, or published weights: openpi's Orbax `params`, a big_vision `.npz`, Hugging Face or LeRobot
safetensors. Nothing is left out unless --drop names it. What was written is read back through the same name table,
which finds lost and damaged arrays; that the tables are right is shown by the tests against the references. To
fine-tune published weights there is no need to convert them: `warm_start=WarmStart("pi0_base/params")` reads them.
"""

import dataclasses
import gc
import json
import logging
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich.console import Console

from openpi_like.config import override
from openpi_like.data.fast import FastTokenizer
from openpi_like.data.openvla_stats import is_openvla_stats, load_openvla_stats
from openpi_like.data.stats import load_normalization, load_openpi_stats, save_openpi_stats
from openpi_like.data.text import read_tokenizer
from openpi_like.models.arrays import open_arrays
from openpi_like.models.lora import Lora
from openpi_like.models.policy import VisionLanguageConfig
from openpi_like.models.released import RELEASED, find_model
from openpi_like.models.weights import (
    WeightsError,
    bind,
    export_weights,
    layout,
    plan_load,
    print_load_report,
    read_weights,
    unflatten,
    write_npz,
    write_openpi,
    write_safetensors,
)
from openpi_like.robots.find import find_robot
from openpi_like.train.checkpoints.checkpoint import Step, find_step, is_run, save_policy, stored_trainable
from openpi_like.train.checkpoints.contract import (
    CheckpointError,
    Contract,
    contract_problems,
    read_contract,
    read_record,
)
from openpi_like.train.checkpoints.warm_start import open_weights


@dataclasses.dataclass(frozen=True)
class Args:
    """Converts weights between layouts, and shows that both compute the same.

    src: a run, or published weights. dst: directory to write. to: layout to write; "run" is ours.
    step: of a run, default the newest; or "best", by its held-out score.
    model: sizes of published weights: pi0, pi05, pi0_fast, smolvla, paligemma, or a config file; a run knows its own.
    set: changes of the model, such as action_horizon=10 cameras=('base','wrist').
    dtype: of the weights written. source_format: instead of recognising it. lora_scale: merge openpi's LoRA weights,
    alpha / rank. drop: regular expressions of arrays to leave out. keep_lora: write the LoRA weights of a run beside
    those that they lie on, where the layout has LoRA (openpi); otherwise they are merged.
    robots, norm_stats, tokenizer: for --to run, what serving needs: robots ("sawyer", "my_robot.py", "module:OBJECT"),
    for each its statistics (openpi's norm_stats.json, OpenVLA's dataset_statistics.json with the name of its
    dataset as stats_dataset, or ours), and the SentencePiece model of the prompts;
    action_tokenizer: for pi0_fast, the directory of the FAST tokenizer.
    verify: read back what was written, and compare outputs on the same inputs with those of the weights as read
    (rounded to dtype); fails where they differ by more than tolerance, a part of the largest output.
    """

    src: Annotated[Path, tyro.conf.Positional]
    dst: Annotated[Path, tyro.conf.Positional]
    to: Literal["run", "openpi", "lerobot", "huggingface", "big_vision"]
    step: Step = None
    model: str | None = None
    set: tuple[str, ...] = ()
    dtype: Literal["float32", "bfloat16"] = "float32"
    source_format: str | None = None
    lora_scale: float | None = None
    drop: tuple[str, ...] = ()
    keep_lora: bool = False
    robots: tuple[str, ...] = ()
    norm_stats: tuple[Path, ...] = ()
    stats_dataset: str | None = None
    tokenizer: Path | None = None
    action_tokenizer: Path | None = None
    verify: bool = True
    tolerance: float = 1e-5


def find_config(args: Args) -> VisionLanguageConfig:
    """Returns the config of the model that the source holds."""
    if is_run(args.src):
        if args.model is not None or args.set:
            raise ValueError("--model and --set are for published weights: a run knows its own model; leave them out")
        return read_contract(find_step(args.src)).policy
    if args.model is None:
        raise ValueError(f"--model: missing; expected one of {', '.join(RELEASED)}, or a config file with the sizes")
    return override(find_model(args.model), args.set)


def make_contract(args: Args, config: VisionLanguageConfig) -> Contract:
    """Returns what serving needs, from a run or from the arguments."""
    if is_run(args.src):
        return read_contract(find_step(args.src))
    problems = []
    if not args.robots:
        problems.append("--robots: missing; a run is served to robots")
    if len(args.norm_stats) != len(args.robots):
        problems.append(f"--norm-stats: got {len(args.norm_stats)} files, expected one for each of --robots")
    if args.tokenizer is None:
        problems.append("--tokenizer: missing; the file or directory of the tokenizer the weights were trained with")
    if getattr(config, "action_tokens", None) is not None and args.action_tokenizer is None:
        problems.append("--action-tokenizer: missing; the directory of the FAST tokenizer of these weights")
    if problems:
        raise ValueError("--to run needs more:\n  " + "\n  ".join(problems))
    robots = tuple(find_robot(name) for name in args.robots)
    mode = config.released_normalization()
    wrong = [r.name for r in robots if r.normalization != mode]
    if wrong:
        raise ValueError(f"robots {wrong} are not normalised by {mode!r}, which these weights were trained with")
    normalizations = {}
    for robot, path in zip(robots, args.norm_stats, strict=True):
        stored = json.loads(path.read_text())
        if is_openvla_stats(stored):
            normalizations[robot.name] = load_openvla_stats(path, robot, dataset=args.stats_dataset)
        else:
            load = load_openpi_stats if isinstance(stored, dict) and "norm_stats" in stored else load_normalization
            normalizations[robot.name] = load(path, robot)
    assert args.tokenizer is not None  # checked above
    tokenizer = read_tokenizer(args.tokenizer)
    fast = None if args.action_tokenizer is None else FastTokenizer.load(args.action_tokenizer).files
    contract = Contract(config, robots, normalizations, tokenizer, {r.name: None for r in robots}, fast)
    found = contract_problems(contract)
    if found:
        raise ValueError("these do not fit the model:\n  " + "\n  ".join(found))
    return contract


def kept_lora(args: Args) -> Lora | None:
    """Returns the LoRA that is written as it is.

    Raises:
        ValueError: there is none, or the layout has no place for it.
    """
    if not args.keep_lora:
        return None
    lora = stored_trainable(read_record(find_step(args.src))).lora if is_run(args.src) else None
    if lora is None or args.to != "openpi":
        raise ValueError("--keep-lora is for a run with LoRA and --to openpi; leave it out to merge LoRA")
    return lora


def outputs(config: VisionLanguageConfig, weights: dict[str, Any], lora: Lora | None) -> np.ndarray:
    """Returns what the model computes in float32 on seeded random inputs, see `Model.outputs`."""
    config = dataclasses.replace(config, dtype="float32", remat=None)
    rng = np.random.default_rng(0)

    def draw(shape: jax.ShapeDtypeStruct) -> np.ndarray:
        if shape.dtype == bool:
            return np.ones(shape.shape, bool)
        if jnp.issubdtype(shape.dtype, jnp.floating):
            return rng.normal(size=shape.shape).astype(shape.dtype)
        return rng.integers(0, config.vocab_size, shape.shape).astype(shape.dtype)

    batch = jax.tree.map(draw, config.batch_shapes(1))
    batch["images"] = {c: rng.uniform(-1, 1, x.shape).astype(np.float32) for c, x in batch["images"].items()}
    length = batch["prompt"].shape[1]
    batch["prompt_mask"] = np.arange(length)[None] < length - 1
    batch |= {name: np.arange(length)[None] > 1 for name in ("prompt_causal", "prompt_loss") if name in batch}
    run = jax.jit(lambda params, batch: bind(config, params, lora).outputs(jax.random.key(0), batch))
    return np.asarray(run(unflatten(weights), batch))


def write(
    args: Args, config: VisionLanguageConfig, weights: dict[str, Any], lora: Lora | None, console: Console
) -> Path:
    """Writes the weights in the layout asked for; returns where `open_weights` finds them."""
    if args.to == "run":
        contract = make_contract(args, config)
        return save_policy(args.dst, unflatten(weights), contract=contract, origin=str(args.src))
    arrays = export_weights(config, weights, args.to, lora=lora)
    args.dst.mkdir(parents=True, exist_ok=True)
    if args.to == "openpi":
        write_openpi(arrays, args.dst)
    elif args.to == "big_vision":
        return write_npz(arrays, args.dst / "weights.npz")
    else:  # LeRobot and openpi's PyTorch port read one file only
        write_safetensors(arrays, args.dst, **({"max_bytes": 2**62} if args.to == "lerobot" else {}))
    if is_run(args.src) and args.to == "openpi":
        fast = read_contract(find_step(args.src)).fast_tokenizer()
        if fast is not None:
            fast.save(args.dst / "fast_tokenizer")
        for name, normalization in read_contract(find_step(args.src)).normalizations.items():
            save_openpi_stats(normalization, args.dst / "assets" / name / "norm_stats.json")
            mode = read_contract(find_step(args.src)).policy.released_normalization()
            if normalization.mode != mode:
                console.print(f"WARNING: robot {name!r} is normalised by {normalization.mode}, openpi will use {mode}")
    if args.to == "lerobot":
        stored = config.lerobot_config(args.dtype)
        if stored is None:
            console.print("no config.json is written: LeRobot has none for these sizes")
        else:
            (args.dst / "config.json").write_text(json.dumps(stored, indent=2) + "\n")
    return args.dst


def main(args: Args, console: Console) -> int:
    """Returns the exit status: 0, or 1 where the difference is above tolerance."""
    if args.dst.exists() and any(args.dst.iterdir()):
        raise ValueError(f"{args.dst} is not empty; choose another directory")
    if args.step is not None and not is_run(args.src):
        raise ValueError(f"--step {args.step} is for runs, {args.src} is none; leave it out")
    if args.step is not None:
        args = dataclasses.replace(args, src=find_step(args.src, args.step))
    config = find_config(args)
    # What cannot work is said before anything is read.
    lora = kept_lora(args)
    if args.to == "run":
        make_contract(args, config)
    else:
        layout(config, args.to)
    serving = [name for name in ("robots", "norm_stats", "tokenizer", "action_tokenizer") if getattr(args, name)]
    if serving and (args.to != "run" or is_run(args.src)):
        raise ValueError(f"{serving} are for published weights and --to run; leave them out")

    # ---- Read --------------------------------------------------------------------------------------------------------
    arrays = open_weights(args.src, lora_scale=args.lora_scale, merge=lora is None)
    plan = plan_load(config, arrays, fmt=args.source_format, drop=args.drop, lora=lora)
    print_load_report(plan, console)
    weights = read_weights(arrays, plan, dtype=args.dtype)
    before = outputs(config, weights, lora) if args.verify else np.zeros(0)

    # ---- Write -------------------------------------------------------------------------------------------------------
    path = write(args, config, weights, lora, console)
    del weights
    gc.collect()
    count = sum(int(np.prod(shape)) for shape in arrays.shapes.values())
    console.print(f"wrote {args.dst}: {args.to}, {args.dtype}; {count:,} numbers read from {args.src}")
    if not args.verify:
        return 0

    # ---- Verify ------------------------------------------------------------------------------------------------------
    written = open_weights(args.dst) if args.to == "run" else open_arrays(path)
    read_back = read_weights(written, plan_load(config, written, lora=lora), dtype=args.dtype)
    after = outputs(config, read_back, lora)
    difference, largest = float(np.abs(after - before).max()), float(np.abs(before).max())
    equal = difference <= args.tolerance * largest  # not so for NaN
    console.print(
        f"outputs of the same inputs: largest difference {difference:.3g} (values up to {largest:.3g}), tolerance "
        f"{args.tolerance:g} of that: {'equal enough' if equal else 'TOO FAR APART'}"
    )
    return 0 if equal else 1


if __name__ == "__main__":
    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax reports every array it reads
    try:
        sys.exit(main(tyro.cli(Args), Console(highlight=False)))
    except (CheckpointError, WeightsError, ValueError, FileNotFoundError) as e:
        sys.exit(f"not converted: {e}")
