"""Flow matching on three Sawyer tasks: what the other policies of a study are compared with. See policies.py."""

import dataclasses

from openpi_like.data.config import DataConfig, MixtureEntry
from openpi_like.models.pi0 import Pi0Config
from openpi_like.robots.sawyer import SAWYER
from openpi_like.train.config import TrainConfig
from openpi_like.train.optimizer import OptimizerConfig

STEPS = 1_500
# To [-1, 1], as bins, tanh and FAST tokens want it.
ROBOT = dataclasses.replace(SAWYER, normalization="quantile")

config = TrainConfig(
    run_dir="runs/studies/pi0",
    model=Pi0Config.tiny(
        cameras=("base",), state_dim=4, action_dim=4, action_horizon=8, prompt_len=16, vocab_size=1536
    ),
    data=DataConfig(entries=(MixtureEntry(robot=ROBOT, path="runs/studies/data/sawyer_sim/1.0.0"),)),
    stats="runs/studies/stats",
    tokenizer="runs/studies/text.model",
    batch_size=32,
    steps=STEPS,
    optimizer=OptimizerConfig(peak_lr=1e-3, end_lr=1e-5, warmup_steps=50, decay_steps=STEPS, weight_decay=1e-4),
    ema_decay=0.99,
    validate_every=STEPS // 2,
    save_every=STEPS // 2,
)
