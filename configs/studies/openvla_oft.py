"""OpenVLA-OFT on three Sawyer tasks: a chunk in one pass, regressed.

All but the policy is that of pi0.py.
"""

import dataclasses
from pathlib import Path

from openpi_like.config import load_run
from openpi_like.models.openvla_oft import OpenVlaOftConfig

base = load_run(Path(__file__).with_name("pi0.py"))
same = {name: getattr(base.model, name) for name in ("cameras", "state_dim", "action_dim", "prompt_len", "vocab_size")}

config = dataclasses.replace(
    base,
    run_dir="runs/studies/openvla_oft",
    model=OpenVlaOftConfig.tiny(**same, action_horizon=base.model.action_horizon, eos=1),
)
