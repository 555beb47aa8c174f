"""One of three policies on the same data for the same steps: pi0.5 with knowledge insulation, whose backbone learns to
write actions as tokens while its expert learns to sample them by flow matching.

    python train/train.py configs/demo_compare_insulated.py

All but the policy is that of demo_compare_flow.py. Two CPU cores: about 6 minutes.
"""

import dataclasses
from pathlib import Path

from openpi_like.batch import ActionTokens
from openpi_like.config import load_run
from openpi_like.data.prompts import FastPrompt
from openpi_like.models.pi0 import Pi0Config

config = dataclasses.replace(
    load_run(Path(__file__).with_name("demo_compare_flow.py")),
    run_dir="runs/demo/compare_insulated",
    model=Pi0Config.tiny(
        cameras=("base",),
        state_dim=4,
        action_dim=4,
        action_horizon=8,
        prompt_len=48,
        vocab_size=1536,
        pi05=True,
        prompt_format=FastPrompt(),
        action_tokens=ActionTokens(max_len=40, count=512, skip=0),
        flow_draws=2,
    ),
    action_tokenizer="runs/demo/fast",
)
