"""Transfer between five arms of robosuite: a tiny pi0 pretrained on four of them, and fine-tuned to the one left out.

    make transfer

makes the data and the text tokeniser, and runs this study; or, by hand, the first command for each arm of ARMS:

    python data/make_demos.py --robot robosuite_panda --out runs/studies/transfer/data --episodes-per-task 50 \\
        --val-episodes-per-task 8 --tasks lift
    python data/fit_text.py --data runs/studies/transfer/data/robosuite_panda_sim/1.0.0 \\
        --out runs/studies/transfer/text.model
    python train/study.py configs/studies/transfer.py --run runs/studies/transfer

For each arm in turn: pretraining on the other four, then fine-tuning with 10 and 50 episodes of it, full and with LoRA,
and training from scratch for as many steps, each driven at its best step by the error of sampled actions on 8 held-out
episodes; all are normalised by their own episodes alone. Zero-shot is the pretrained policy itself, which has seen
nothing of the arm: the arms have the same fields, and it is normalised by the statistics of the other four together.

On two CPU cores beside other work a row takes 20 minutes, and the data six; docs/training.md has the table.
"""

import dataclasses

from openpi_like.data.augment import Augment
from openpi_like.data.config import DataConfig, MixtureEntry
from openpi_like.models.pi0 import Pi0Config
from openpi_like.robots.robosuite_arms import IIWA, KINOVA3, PANDA, SAWYER, UR5E
from openpi_like.robots.robot import Robot
from openpi_like.train.checkpoints.checkpoint import Keep
from openpi_like.train.checkpoints.warm_start import WarmStart
from openpi_like.train.config import TrainConfig
from openpi_like.train.muon import MuonConfig
from openpi_like.train.presets import PRESETS
from openpi_like.train.study import Arm, Matrix, Study, learning_curve

HERE, RUNS = "configs/studies/transfer.py", "runs/studies/transfer"
ARMS = {"iiwa": IIWA, "kinova3": KINOVA3, "panda": PANDA, "sawyer": SAWYER, "ur5e": UR5E}
PRETRAINING, FINE_TUNING = 800, 250  # steps
EPISODES = (10, 50)
RATE = 5e-3
MODEL = Pi0Config.tiny(
    cameras=("base", "wrist"),
    state_dim=10,
    action_dim=7,
    action_horizon=8,
    prompt_len=16,
    vocab_size=512,
    flow_draws=2,
)
LORA = PRESETS["lora"].trainable(MODEL)


def optimizer(steps: int, rate: float) -> MuonConfig:
    return MuonConfig(peak_lr=rate, end_lr=rate / 100, warmup_steps=50, decay_steps=steps, weight_decay=1e-4)


def data(robots: dict[str, Robot]) -> DataConfig:
    """Returns the demonstrations of arms, by name, each read as a robot."""
    entries = (MixtureEntry(robot, f"{RUNS}/data/{ARMS[arm].name}_sim/1.0.0") for arm, robot in robots.items())
    return DataConfig(entries=tuple(entries), augment=Augment.octo())


def runs(left_out: str) -> dict[str, TrainConfig]:
    """Returns the runs of an arm that is left out."""
    others = {arm: robot for arm, robot in ARMS.items() if arm != left_out}
    pretrain = TrainConfig(
        run_dir=f"{RUNS}/{left_out}/pretrained",
        model=MODEL,
        data=data(others),
        stats=f"{RUNS}/{left_out}/stats",
        tokenizer=f"{RUNS}/text.model",
        batch_size=32,
        steps=PRETRAINING,
        optimizer=optimizer(PRETRAINING, RATE),
        validate_every=PRETRAINING // 2,
        save_every=PRETRAINING // 2,
    )
    zero_shot = dataclasses.replace(
        pretrain,
        data=data(dict.fromkeys(others, ARMS[left_out])),  # the others' episodes, as if they were of this arm
        steps=0,
        warm_start=WarmStart(pretrain.run_dir),
    )
    finetune = dataclasses.replace(
        pretrain,
        data=data({left_out: ARMS[left_out]}),
        steps=FINE_TUNING,
        optimizer=optimizer(FINE_TUNING, PRESETS["full"].peak_lr(RATE)),
        warm_start=WarmStart(pretrain.run_dir),
        keep=Keep(newest=1, best=1, metric="action_error"),
        validate_every=FINE_TUNING // 5,
        save_every=FINE_TUNING // 5,
    )
    lora = dataclasses.replace(
        finetune,
        trainable=LORA,
        optimizer=optimizer(FINE_TUNING, PRESETS["lora"].peak_lr(RATE)),
    )
    return {
        f"{left_out}_pretrain": pretrain,
        f"{left_out}_zero_shot": zero_shot,
        f"{left_out}_full": finetune,
        f"{left_out}_lora": lora,
        f"{left_out}_scratch": dataclasses.replace(finetune, warm_start=None),
    }


def leave_out(arm: str) -> Study:
    """Returns the row of an arm."""
    arms = {
        "pretrained": Arm(f"{HERE}:{arm}_pretrain", driven=False, own_statistics=True),
        "zero-shot": Arm(f"{HERE}:{arm}_zero_shot", start="pretrained", own_statistics=True),
    }
    for n in EPISODES:
        for preset, name in (("full", "{} full"), ("lora", "{} LoRA")):
            config = f"{HERE}:{arm}_{preset}"
            arms |= learning_curve(config, (n,), name=name, start="pretrained", beside="{} scratch")
        arms |= learning_curve(f"{HERE}:{arm}_scratch", (n,), name="{} scratch")
    return Study(arms, robot=ARMS[arm].name, tasks=("lift",), episodes=20, varies=("data",))


configs = {name: run for arm in ARMS for name, run in runs(arm).items()}
study = Matrix({arm: leave_out(arm) for arm in ARMS})
