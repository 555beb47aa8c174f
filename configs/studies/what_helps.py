"""What helps a flow matching policy in as many steps, one change at a time, on three Sawyer tasks; and what a backbone
that was trained before is worth to flow matching, action tokens and knowledge insulation.

    python train/study.py configs/studies/what_helps.py --run runs/studies/what_helps

Data, statistics and tokenizers are made by `make compare`. Each change is a run of its own here, too:
`python train/train.py configs/studies/what_helps.py:augmented`. The backbone has first learned to write actions as
tokens and to say what the arm is doing, for 1,500 steps that the others have not had; in the setting of knowledge
insulation (arXiv 2505.23705) it has learned language, too, from far more than there is here. With so many arms, one of
twenty has a p below 0.05 by chance alone.
"""

import dataclasses
from pathlib import Path

from openpi_like.config import load_run
from openpi_like.data.augment import Augment
from openpi_like.train.checkpoints.warm_start import WarmStart
from openpi_like.train.config import TrainConfig
from openpi_like.train.study import Arm, Study

FOLDER = Path(__file__).parent
pi0, fast, insulated = (load_run(FOLDER / f"{name}.py") for name in ("pi0", "fast", "insulated"))
(entry,) = pi0.data.entries


def seen(augment: Augment) -> TrainConfig:
    """Returns pi0.py with random changes of what it sees."""
    return dataclasses.replace(pi0, data=dataclasses.replace(pi0.data, augment=augment))


def chunks(steps: int) -> TrainConfig:
    """Returns pi0.py with chunks of so many steps, of which half are executed."""
    robot = dataclasses.replace(entry.robot, action_horizon=steps, execute_steps=steps // 2)
    data = dataclasses.replace(pi0.data, entries=(dataclasses.replace(entry, robot=robot),))
    return dataclasses.replace(pi0, model=dataclasses.replace(pi0.model, action_horizon=steps), data=data)


def backbone() -> TrainConfig:
    """Returns fast.py on actions, and on what the arm is doing, in words."""
    texts = dataclasses.replace(fast.data.entries[0], text_key="subtask", actions=False, weight=0.5, label="subtask")
    return dataclasses.replace(fast, data=dataclasses.replace(fast.data, entries=(*fast.data.entries, texts)))


def started(config: TrainConfig) -> TrainConfig:
    """Returns a run that begins with the backbone's weights, which the study names."""
    return dataclasses.replace(config, warm_start=WarmStart("runs/studies/what_helps/backbone"))


configs = {
    "four_draws": dataclasses.replace(pi0, model=dataclasses.replace(pi0.model, flow_draws=4)),
    "augmented": seen(Augment.octo()),
    "state_noise": seen(Augment(state_noise=0.1)),
    "state_dropout": seen(Augment(state_dropout=0.2)),
    "chunks_of_4": chunks(4),
    "chunks_of_16": chunks(16),
    "no_average": dataclasses.replace(pi0, ema_decay=None),
    "backbone": backbone(),
    "flow_started": started(pi0),
    "fast_started": started(fast),
    "insulated_started": started(insulated),
}


def change(name: str, **options: object) -> Arm:
    """Returns an arm of one of the runs above."""
    return Arm(f"configs/studies/what_helps.py:{name}", **options)  # type: ignore[arg-type]


study = Study(
    arms={
        "pi0": Arm("configs/studies/pi0.py"),
        "four draws of noise and time": change("four_draws"),
        "augmented images": change("augmented"),
        "noise on the state": change("state_noise"),
        "no state in a fifth of the samples": change("state_dropout"),
        "chunks of 4": change("chunks_of_4"),
        "chunks of 16": change("chunks_of_16"),
        "no average of weights": change("no_average"),
        "backbone": change("backbone", driven=False),
        "pi0 on the backbone": change("flow_started", start="backbone"),
        "tokens": Arm("configs/studies/fast.py"),
        "tokens on the backbone": change("fast_started", start="backbone", beside="tokens"),
        "insulated": Arm("configs/studies/insulated.py"),
        "insulated on the backbone": change("insulated_started", start="backbone", beside="insulated"),
    },
    robot="sawyer",
    tasks=("button-press", "drawer-open", "window-close"),
    episodes=20,
    varies=("data",),  # what is changed in images and states, and how long chunks are
)
