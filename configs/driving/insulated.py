"""pi0.5 with knowledge insulation that drives: its backbone learns to write plans as tokens, its expert to sample them
by flow matching.

    python train/train.py configs/driving/insulated.py

All but the policy is that of fast.py.
"""

import dataclasses
from pathlib import Path

from openpi_like.config import load_run
from openpi_like.data.prompts import FastPrompt
from openpi_like.models.pi0 import Pi0Config

fast = load_run(Path(__file__).with_name("fast.py"))
# The backbone reads and writes what that of pi0-FAST does.
same = ("cameras", "image_size", "state_dim", "action_dim", "action_horizon", "prompt_len", "vocab_size")

config = dataclasses.replace(
    fast,
    run_dir="runs/driving/insulated",
    model=Pi0Config.tiny(
        **{name: getattr(fast.model, name) for name in same},
        action_tokens=fast.model.action_tokens,
        flow_draws=4,
        pi05=True,
        prompt_format=FastPrompt(),
    ),
)
