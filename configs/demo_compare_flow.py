"""One of three policies on the same data for the same steps: pi0, which samples actions by flow matching.

    python train/train.py configs/demo_compare_flow.py

The others are demo_compare_fast.py and demo_compare_insulated.py. Robots are normalised by quantiles, as FAST tokens
want it. `make demo` makes the data, statistics and tokenisers, and runs all three; two CPU cores: about 2 minutes.
"""

import dataclasses

from openpi_like.data.config import DataConfig, MixtureEntry
from openpi_like.models.pi0 import Pi0Config
from openpi_like.robots.pusht import PUSHT
from openpi_like.robots.sawyer import SAWYER
from openpi_like.train.config import TrainConfig
from openpi_like.train.optimizer import OptimizerConfig

sawyer, pusht = (dataclasses.replace(robot, normalization="quantile") for robot in (SAWYER, PUSHT))

config = TrainConfig(
    run_dir="runs/demo/compare_flow",
    model=Pi0Config.tiny(
        cameras=("base",), state_dim=4, action_dim=4, action_horizon=8, prompt_len=16, vocab_size=1536, flow_draws=2
    ),
    data=DataConfig(
        entries=(
            MixtureEntry(robot=sawyer, path="runs/demo/data/sawyer_sim/1.0.0", weight=0.9),
            MixtureEntry(robot=pusht, path="runs/demo/data/pusht_sim/1.0.0", weight=0.1),
        ),
    ),
    stats="runs/demo/stats",
    tokenizer="runs/demo/text_fast.model",
    batch_size=32,
    steps=1_500,
    optimizer=OptimizerConfig(peak_lr=1e-3, end_lr=1e-5, warmup_steps=50, decay_steps=1_500, weight_decay=1e-4),
    ema_decay=0.99,
    validate_every=750,
    save_every=750,
)
