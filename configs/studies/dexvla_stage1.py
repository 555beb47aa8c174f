"""DexVLA's first stage at tiny size on three Sawyer tasks: the expert behind a ResNet and a text encoder.

All but the policy is that of pi0.py. See dexvla_stages.py.
"""

import dataclasses
from pathlib import Path

from openpi_like.config import load_run
from openpi_like.models.dexvla_stage1 import DexVlaStage1Config

base = load_run(Path(__file__).with_name("pi0.py"))
same = ("cameras", "state_dim", "action_dim", "action_horizon", "prompt_len", "vocab_size")

config = dataclasses.replace(
    base,
    run_dir="runs/studies/dexvla_stage1",
    model=DexVlaStage1Config.tiny(**{name: getattr(base.model, name) for name in same}),
)
