"""One of three policies on the same data for the same steps: pi0.5 with knowledge insulation, whose backbone learns to
write actions as tokens while its expert learns to sample them by flow matching.

    python train/train.py configs/demo_compare_insulated.py

All but the policy is that of demo_compare_fast.py. Two CPU cores: about 6 minutes.
"""

import dataclasses
from pathlib import Path

from openpi_like.config import load_run
from openpi_like.data.prompts import FastPrompt
from openpi_like.models.pi0 import Pi0Config

fast = load_run(Path(__file__).with_name("demo_compare_fast.py"))
# The backbone reads and writes what that of pi0-FAST does.
same = ("cameras", "state_dim", "action_dim", "action_horizon", "prompt_len", "vocab_size", "action_tokens")

config = dataclasses.replace(
    fast,
    run_dir="runs/demo/compare_insulated",
    model=Pi0Config.tiny(
        **{name: getattr(fast.model, name) for name in same}, pi05=True, prompt_format=FastPrompt(), flow_draws=2
    ),
)
