"""DAgger rounds: what an expert did in states that a policy led to joins the data that the policy learned from."""

import dataclasses

from openpi_like.config import near_names
from openpi_like.data.config import MixtureEntry
from openpi_like.train.checkpoints.warm_start import WarmStart
from openpi_like.train.config import TrainConfig
from openpi_like.train.finetune import SELECTIONS
from openpi_like.train.statistics import Pretrained

CORRECTIONS = SELECTIONS["corrections"]
"""The expert's own actions, of episodes that it brought to success."""


@dataclasses.dataclass(frozen=True)
class Round:
    """One more training of a policy, on the data that it had and on corrections.

    start: run, or checkpoint of one, whose weights it begins with. run_dir: of this one. robot: name of the corrected
        one. steps: of training.
    recorded: RLDS of `serve/record.py`, of this round and those before; None trains as long on the data it had, for
        comparison. share: part of the samples that are corrections.
    """

    start: str
    run_dir: str
    robot: str
    steps: int
    recorded: str | None
    share: float = 0.3

    def __post_init__(self) -> None:
        problems = []
        if not 0 < self.share < 1:
            problems.append(f"share={self.share}, expected a part of the samples between 0 and 1")
        if self.steps < 1:
            problems.append(f"steps={self.steps}, expected at least 1")
        if problems:
            raise ValueError("Round: " + "; ".join(problems))


def round_config(before: TrainConfig, of: Round) -> TrainConfig:
    """Returns the run of a round: that of before, from other weights, with corrections in its mixture.

    Statistics and tokenizers are those of the policy, so weights mean the same. The learning rate begins and falls
    anew, to its end: no step in between is the best, and no patience ends it, or the control would differ in length.

    Raises:
        ValueError: the run does not train the robot.
    """
    robots = {entry.robot.name: entry.robot for entry in before.data.entries if entry.actions}
    if of.robot not in robots:
        raise ValueError(f"the run does not train robot {of.robot!r}; {near_names(of.robot, list(robots))}")
    entries = before.data.entries
    if of.recorded is not None:
        weight = of.share / (1 - of.share) * sum(entry.weight for entry in entries)
        corrections = MixtureEntry(
            robot=robots[of.robot],
            path=of.recorded,
            weight=weight,
            val_split=None,
            selection=CORRECTIONS,
            label="corrected",
        )
        entries = (*entries, corrections)
    decay_steps = max(of.steps, 100)
    warmup_steps = min(before.optimizer.warmup_steps, decay_steps // 10)
    return dataclasses.replace(
        before,
        run_dir=of.run_dir,
        data=dataclasses.replace(before.data, entries=entries),
        steps=of.steps,
        optimizer=dataclasses.replace(before.optimizer, warmup_steps=warmup_steps, decay_steps=decay_steps),
        warm_start=WarmStart(of.start),
        statistics=Pretrained(),
        keep=dataclasses.replace(before.keep, best=0),
        patience=None,
        tokenizer=None,
        action_tokenizer=None,
    )


def config_file(config: str, overrides: tuple[str, ...], of: Round) -> str:
    """Returns the run of a round as the text of a file like those of configs/."""
    fields = "".join(f"    {f.name}={getattr(of, f.name)!r},\n" for f in dataclasses.fields(of))
    return (
        f'"""A round of train/dagger.py."""\n\n'
        "from openpi_like.config import load_run, override\n"
        "from openpi_like.train.dagger import Round, round_config\n\n"
        f"before = override(load_run({config!r}), {overrides!r})\n"
        f"of = Round(\n{fields})\n"
        "config = round_config(before, of)\n"
    )
