"""SmolVLA on three Sawyer tasks: flow matching by an expert that reads half of a small vision-language model.

All but the policy is that of pi0.py.
"""

import dataclasses
from pathlib import Path

from openpi_like.config import load_run
from openpi_like.models.smolvla import SmolVlaConfig

base = load_run(Path(__file__).with_name("pi0.py"))
same = ("cameras", "state_dim", "action_dim", "action_horizon", "prompt_len", "vocab_size")

config = dataclasses.replace(
    base,
    run_dir="runs/studies/smolvla",
    model=SmolVlaConfig.tiny(**{name: getattr(base.model, name) for name in same}),
)
