"""One training run as a typed object."""

import dataclasses
from typing import Any

from jax.sharding import Mesh

from openpi_like.config import near_names
from openpi_like.data.config import DataConfig, describe
from openpi_like.data.fast import FastTokenizer
from openpi_like.data.normalize import Normalization
from openpi_like.data.text import read_tokenizer
from openpi_like.models.attention import VARIANTS
from openpi_like.partition import ShardingRules
from openpi_like.train.checkpoints.checkpoint import Keep
from openpi_like.train.checkpoints.contract import Contract
from openpi_like.train.checkpoints.warm_start import WarmStart, start_contract
from openpi_like.train.fastest import AUTO
from openpi_like.train.hosts.places import Hosts
from openpi_like.train.optimizer import OptimizerConfig
from openpi_like.train.sharding import MeshConfig
from openpi_like.train.state import ModelDef, Trainable, Trainer
from openpi_like.train.statistics import Own, Statistics, load_statistics


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Everything a run is made of; `configs/` holds one file per run.

    run_dir: where checkpoints, metrics and the load report go.
    model: a policy config, an object with `create(key)`, for example `Pi0Config`.
    stats: directory with one normalisation file per robot, `<robot name>.json`, as `data/stats.py` writes them.
    statistics: whether a robot is normalised by these, by those of the `warm_start` checkpoint, or by both, see
        `openpi_like.train.statistics`.
    tokenizer: of the prompts: a SentencePiece model, a tokenizer.json of Hugging Face, or a directory with one; None
        takes the one of the `warm_start` checkpoint.
    action_tokenizer: directory of a FAST tokenizer (data/fit_fast.py), for policies with action tokens; None takes the
        one of the `warm_start` checkpoint.
    hosts: the processes of the run; found from the environment where nothing is given.
    attention: a variant in `openpi_like.models.attention.VARIANTS`, or "auto" for the one that measures fastest here.
    compile_cache: directory of compiled programs, see `use_compile_cache`.
    batch_size: samples per step over all hosts. accumulate: parts that a step takes it in, one after the other.
    trainable: what of the model is trained. ema_decay: None keeps no average.
    save_frozen: keep the weights that are not trained with the run (once); False: its checkpoints hold what is trained
        alone, and need the `warm_start` checkpoint to stay where it is.
    skip_bad_steps: steps whose loss or gradient is not finite that are left out before the run stops.
    log_every, validate_every, save_every: steps. keep: which checkpoints stay on disk.
    patience: validations without a better `keep.metric` before the run stops, its best checkpoint kept; None: never.
    accept_changed_data: resume a run although its data or their order are no longer those that it was trained on;
        without it, that is an error.
    validation_batches: batches per robot, of `validation_batch_size` evenly spaced held-out frames each.
    trackers: where metrics go besides metrics.jsonl, for example `(TensorBoard(), Wandb(project="pi0"))`, see
        `openpi_like.train.watching.trackers`.
    profile: first and last step of a profile, see `train/step_time.py`; None makes none.
    draw_batch: draw the first batch as pictures, `first_batch.png`: None when the run begins, True whenever it starts,
        False never.
    """

    run_dir: str
    model: Any
    data: DataConfig
    stats: str
    tokenizer: str | None
    batch_size: int
    steps: int
    statistics: Statistics = Own()
    accumulate: int = 1
    optimizer: OptimizerConfig = OptimizerConfig()
    trainable: Trainable = Trainable()
    ema_decay: float | None = 0.99
    seed: int = 0
    warm_start: WarmStart | None = None
    mesh: MeshConfig = MeshConfig()
    sharding: ShardingRules = ShardingRules()
    action_tokenizer: str | None = None
    hosts: Hosts = Hosts()
    attention: str = "auto"
    compile_cache: str | None = None
    log_every: int = 50
    validate_every: int = 1_000
    save_every: int = 1_000
    keep: Keep = Keep()
    patience: int | None = None
    save_frozen: bool = True
    skip_bad_steps: int = 0
    accept_changed_data: bool = False
    validation_batches: int = 4
    validation_batch_size: int = 64
    trackers: tuple[Any, ...] = ()
    profile: tuple[int, int] | None = None
    draw_batch: bool | None = None

    def __post_init__(self) -> None:
        problems = []
        if self.steps < 0:
            problems.append(f"steps={self.steps}, expected at least 0 (0 saves the weights the run would start from)")
        if self.profile is not None and not 1 <= self.profile[0] <= self.profile[1]:
            problems.append(f"profile={self.profile}, expected a first and a last step, (20, 24); steps count from 1")
        for name in ("batch_size", "log_every", "validate_every", "save_every", "accumulate"):
            if getattr(self, name) < 1:
                problems.append(f"{name}={getattr(self, name)}, expected at least 1")
        if self.attention not in (AUTO, *VARIANTS):
            problems.append(f"attention={self.attention!r}; {near_names(self.attention, (AUTO, *VARIANTS))}")
        if self.skip_bad_steps < 0:
            problems.append(f"skip_bad_steps={self.skip_bad_steps}, expected at least 0")
        if self.accumulate > 0 and self.batch_size % self.accumulate:
            problems.append(f"batch_size={self.batch_size}, expected a multiple of accumulate={self.accumulate}")
        if self.keep.best and self.save_every % self.validate_every:
            every = f"validate_every={self.validate_every}"
            problems.append(
                f"keep.best ranks what is saved: save_every={self.save_every}, expected a multiple of {every}"
            )
        held_out = any(entry.val_split is not None for entry in self.data.entries)
        if self.patience is not None and self.patience < 1:
            problems.append(f"patience={self.patience}, expected at least 1 validation, or None")
        if self.patience is not None and not self.keep.best:
            problems.append(
                "patience ends a run after its best step, which is gone then unless keep.best is at least 1"
            )
        if not held_out and (self.patience is not None or self.keep.best):
            problems.append(
                "patience and keep.best need held-out episodes, and no entry of data has a val_split; hold some out, "
                "split='train[:90%]', val_split='train[90%:]'"
            )
        if self.statistics.needs_start and self.warm_start is None:
            problems.append(f"statistics={self.statistics} needs a warm_start checkpoint to take them from")
        if not self.save_frozen and self.warm_start is None:
            problems.append("save_frozen=False needs a warm_start checkpoint to read the frozen weights from again")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            problems.append(f"ema_decay={self.ema_decay}, expected a value between 0 and 1, or None")
        augment = self.data.augment
        if augment is not None and augment.changes_states and self.model.prompt_format.state_in_prompt:
            problems.append(
                "augment.state_noise or state_dropout, and a policy whose state is in its prompt, where neither "
                "changes it; leave them out"
            )
        if self.tokenizer is None and self.warm_start is None:
            problems.append("tokenizer=None needs a warm_start checkpoint to take it from")
        if problems:
            raise ValueError("TrainConfig: " + "; ".join(problems))

    def trainer(self, mesh: Mesh) -> Trainer:
        """Returns what makes the state of this run and its steps. attention="auto" is still to be measured."""
        model = ModelDef(self.model, self.trainable)
        trainer = Trainer(
            model,
            self.optimizer.create(model.maps),
            ema_decay=self.ema_decay,
            seed=self.seed,
            mesh=mesh,
            rules=self.sharding,
            dataset_names=tuple(entry.name for entry in self.data.entries),
            augment=self.data.augment,
            accumulate=self.accumulate,
        )
        if self.attention != AUTO:
            trainer.attention = self.attention
        return trainer

    def batch_shapes(self, B: int) -> Any:
        """Returns the shapes of B samples of training: with images, or what was kept of a frozen backbone."""
        shapes = self.model.batch_shapes(B)
        return self.model.with_image_states(shapes) if self.data.has_image_states else shapes

    def contract(self) -> Contract:
        """Returns what serving will depend on: policy, robots, statistics and tokenizers.

        Raises:
            ValueError: there is no tokenizer. FileNotFoundError, DatasetError: as `load_statistics` and `describe`.
        """
        # Those that are served: datasets without actions teach language alone.
        robots = tuple({e.robot.name: e.robot for e in self.data.entries if e.actions}.values())
        before = start_contract(self.warm_start)
        if self.tokenizer is not None:
            tokenizer = read_tokenizer(self.tokenizer)
        elif before is not None:
            tokenizer = before.tokenizer
        else:
            raise ValueError("tokenizer=None: there is no run of ours to take it from; give its file or directory")
        action_tokenizer = None
        if self.action_tokenizer is not None:
            action_tokenizer = FastTokenizer.load(self.action_tokenizer).files
        elif before is not None and self.model.action_tokens is not None:
            action_tokenizer = before.action_tokenizer
        return Contract(
            policy=self.model,
            robots=robots,
            normalizations=self.normalizations(),
            tokenizer=tokenizer,
            renderers=describe(self.data).renderers,
            action_tokenizer=action_tokenizer,
        )

    def normalizations(self) -> dict[str, Normalization]:
        """Returns the statistics of every robot of the data, as `statistics` says.

        Raises:
            FileNotFoundError, ValueError: as `load_statistics`.
        """
        start = start_contract(self.warm_start) if self.statistics.needs_start else None
        robots = {entry.robot.name: entry.robot for entry in self.data.entries}
        return load_statistics(self.statistics, self.stats, robots, start)
