"""Pretrains pi0.5 with knowledge insulation: the backbone learns to write actions as tokens, the expert to sample them.

    python data/stats.py --config configs/pretrain_pi05.py --workers 64
    python data/fit_fast.py configs/pretrain_pi05.py --out weights/fast
    python train/train.py configs/pretrain_pi05.py

All but the policy and its tokenizer of actions is that of pretrain_pi0.py.
"""

import dataclasses
from pathlib import Path

from openpi_like.batch import ActionTokens
from openpi_like.config import load_run
from openpi_like.data.prompts import FastPrompt
from openpi_like.models.pi0 import Pi0Config
from openpi_like.train.checkpoints.warm_start import WarmStart

config = dataclasses.replace(
    load_run(Path(__file__).with_name("pretrain_pi0.py")),
    run_dir="runs/pretrain_pi05",
    model=dataclasses.replace(
        Pi0Config.released(pi05=True),
        cameras=("base", "base_1", "wrist"),
        state_dim=11,
        action_dim=10,
        action_horizon=16,
        train_on_padding=False,
        prompt_format=FastPrompt(),
        action_tokens=ActionTokens(max_len=100),
    ),
    action_tokenizer="weights/fast",
    warm_start=WarmStart("weights/paligemma", reinitialize=("^expert/", "^action_", "^time_")),
)
