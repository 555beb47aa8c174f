"""OpenVLA-OFT on a tiny Prismatic backbone, three Sawyer tasks: what the arms of m2vla_ablations.py begin with.

All but the policy is that of pi0.py.
"""

import dataclasses
from pathlib import Path

from openpi_like.config import load_run
from openpi_like.data.prompts import OpenVlaPrompt
from openpi_like.models.openvla_oft import OpenVlaOftConfig
from openpi_like.models.prismatic import PrismaticConfig

base = load_run(Path(__file__).with_name("pi0.py"))
same = {name: getattr(base.model, name) for name in ("cameras", "state_dim", "action_dim", "vocab_size")}

config = dataclasses.replace(
    base,
    run_dir="runs/studies/prismatic",
    model=OpenVlaOftConfig.tiny(
        **same,
        action_horizon=base.model.action_horizon,
        eos=1,
        backbone=PrismaticConfig.tiny(),
        image_slots=(1,),
        prompt_format=OpenVlaPrompt(),
        prompt_len=40,
    ),
)
