"""pi0-FAST on three Sawyer tasks: action tokens injected into the backbone before another policy is made of it.

All but the policy is that of pi0.py.
"""

import dataclasses
from pathlib import Path

from openpi_like.batch import ActionTokens
from openpi_like.config import load_run
from openpi_like.models.pi0_fast import Pi0FastConfig

base = load_run(Path(__file__).with_name("pi0.py"))
same = ("cameras", "state_dim", "action_dim", "action_horizon", "vocab_size")

config = dataclasses.replace(
    base,
    run_dir="runs/studies/fast",
    model=Pi0FastConfig.tiny(
        **{name: getattr(base.model, name) for name in same},
        prompt_len=48,
        action_tokens=ActionTokens(max_len=40, count=512, skip=0),
    ),
    action_tokenizer="runs/studies/fast_tokens",
)
