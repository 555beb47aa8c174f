"""Fine-tunes a checkpoint to a robot: writes the config of the run, computes its statistics, and starts it:

    python train/finetune.py my_robot.py data/my_dataset/1.0.0 --from runs/pretrain --preset lora
    python train/finetune.py widowx data/bridge_dataset/1.0.0 --from weights/pi0_base --model pi0 \\
        --tokenizer weights/paligemma_tokenizer.model --preset lora --write-only

The config is a file of at most 40 lines, and one for each further dataset: `config.py` in the directory of the run
unless --config names another. What is not an option here is changed there, and then `python train/train.py CONFIG`
starts it. The same command goes on with a run that was stopped. The best step by the error of sampled actions on
held-out episodes is kept; `serve/policy_server.py RUN --step best` serves it.
"""

import dataclasses
import logging
import sys
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console

from openpi_like.child import run_program
from openpi_like.config import load_run
from openpi_like.data.schema import DatasetError
from openpi_like.models.weights import WeightsError
from openpi_like.robots.find import find_robot
from openpi_like.train.checkpoints.contract import CheckpointError
from openpi_like.train.finetune import FineTuning, write_config

ROOT = Path(__file__).resolve().parents[1]


@dataclasses.dataclass(frozen=True)
class Args:
    """Fine-tunes a checkpoint to a robot.

    robot: one of openpi_like/robots ("widowx"), or a file ("my_robot.py"). data: TFDS directories, or their URLs.
    from: a run of ours, whose policy, tokenizers and statistics are taken; or published weights, with --model and
    --tokenizer. preset: what is trained. statistics: by which the robot is normalised, see docs/training.md;
    statistics-of: name of the checkpoint's robot whose they are, default the one of the same name.
    selection: of recorded episodes (serve/record.py) all, those that succeeded, or what the expert did in these.
    fresh: weights may start fresh where the robot has more dims or steps than the policy.
    held-out: percent of the episodes where a dataset has no split "val". steps: at most. patience: validations, every
    validate-every steps, without a better one before it stops. peak-lr: default that of the run it starts from; for
    LoRA eight times that, up to 1e-3. augment: random changes of training images.
    run-dir: default runs/ROBOT_PRESET.
    config: the file to write.
    model: of published weights, such as pi0, or a config file with its sizes. tokenizer, action-tokenizer: theirs.
    write-only: write the config and say what was decided, but start nothing.
    """

    robot: Annotated[str, tyro.conf.Positional]
    data: Annotated[tuple[str, ...], tyro.conf.Positional]
    start: Annotated[str, tyro.conf.arg(name="from")]
    preset: Literal["full", "lora", "expert_only", "frozen_vision"] = "full"
    statistics: Literal["own", "pretrained", "blended"] = "own"
    statistics_of: str | None = None
    selection: Literal["all", "success", "corrections"] = "all"
    fresh: bool = False
    held_out: int = 10
    steps: int = 10_000
    batch_size: int = 32
    validate_every: int = 500
    patience: int = 10
    peak_lr: float | None = None
    augment: Literal["colours", "openpi", "octo", "none"] = "colours"
    run_dir: Path | None = None
    config: Path | None = None
    model: str | None = None
    tokenizer: str | None = None
    action_tokenizer: str | None = None
    write_only: bool = False


def asked(args: Args) -> FineTuning:
    """Returns what the arguments ask for."""
    run_dir = args.run_dir or Path("runs") / f"{find_robot(args.robot).name}_{args.preset}"
    same = {f.name: getattr(args, f.name) for f in dataclasses.fields(FineTuning) if f.name != "run_dir"}
    return FineTuning(**same, run_dir=str(run_dir))


def main(args: Args, console: Console) -> int:
    """Returns the exit status: that of the program that failed, or 0."""
    of = asked(args)
    path = args.config or Path(of.run_dir) / "config.py"
    written = write_config(of, path)
    for note in written.notes:
        console.print(note, markup=False, soft_wrap=True)
    console.print(f"written to {path}: {written.text.count(chr(10))} lines")
    if args.write_only:
        return 0
    commands = [["data/stats.py", "--config", str(path)], ["train/train.py", str(path)]]
    if not load_run(path).statistics.needs_own:
        del commands[0]
    for program, *options in commands:
        console.print(f"$ python {program} {' '.join(options)}", markup=False, soft_wrap=True)
        if status := run_program([str(ROOT / program), *options]):
            return status
    return 0


if __name__ == "__main__":
    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax reports every array it reads
    try:
        sys.exit(main(tyro.cli(Args), Console(highlight=False)))
    except (CheckpointError, WeightsError, DatasetError, ValueError, OSError) as e:
        sys.exit(f"no fine-tuning: {e}")
