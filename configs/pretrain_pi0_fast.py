"""Pretrains pi0-FAST, which writes actions as tokens and has no action expert.

    python data/stats.py --config configs/pretrain_pi0_fast.py --workers 64
    python data/fit_fast.py configs/pretrain_pi0_fast.py --out weights/fast
    python train/train.py configs/pretrain_pi0_fast.py

All but the policy and its tokenizer of actions is that of pretrain_pi0.py.
"""

import dataclasses
from pathlib import Path

from openpi_like.config import load_run
from openpi_like.models.pi0_fast import Pi0FastConfig
from openpi_like.train.checkpoints.warm_start import WarmStart

config = dataclasses.replace(
    load_run(Path(__file__).with_name("pretrain_pi0.py")),
    run_dir="runs/pretrain_pi0_fast",
    model=dataclasses.replace(
        Pi0FastConfig.released(),
        cameras=("base", "base_1", "wrist"),
        state_dim=11,
        action_dim=10,
        action_horizon=16,
        openpi_positions=False,
    ),
    action_tokenizer="weights/fast",
    warm_start=WarmStart("weights/paligemma"),
)
