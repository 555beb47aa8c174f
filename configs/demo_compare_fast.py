"""One of three policies on the same data for the same steps: pi0-FAST, which writes actions as tokens.

    python train/train.py configs/demo_compare_fast.py

All but the policy is that of demo_compare_flow.py. Two CPU cores: about 5 minutes.
"""

import dataclasses
from pathlib import Path

from openpi_like.batch import ActionTokens
from openpi_like.config import load_run
from openpi_like.models.pi0_fast import Pi0FastConfig

config = dataclasses.replace(
    load_run(Path(__file__).with_name("demo_compare_flow.py")),
    run_dir="runs/demo/compare_fast",
    model=Pi0FastConfig.tiny(
        cameras=("base",),
        state_dim=4,
        action_dim=4,
        action_horizon=8,
        prompt_len=48,
        vocab_size=1536,
        action_tokens=ActionTokens(max_len=40, count=512, skip=0),
    ),
    action_tokenizer="runs/demo/fast",
)
