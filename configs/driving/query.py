"""One learned query and an MLP that drive: the least that makes a planner of a vision-language model (VLM4VLA).

    python train/train.py configs/driving/query.py

All but the policy is that of fast.py. Unlike VLM4VLA's robots, a car is told how fast it goes, in the prompt, and plans
may go three times as far as between their quantiles, as those of a hard turn do; what is beyond is cut.
"""

import dataclasses
from pathlib import Path

from openpi_like.config import load_run
from openpi_like.data.prompts import FastPrompt
from openpi_like.models.vlm4vla import Vlm4VlaConfig

base = load_run(Path(__file__).with_name("fast.py"))
same = ("cameras", "image_size", "state_dim", "action_dim", "action_horizon", "prompt_len")

config = dataclasses.replace(
    base,
    run_dir="runs/driving/query",
    model=Vlm4VlaConfig.tiny(
        **{name: getattr(base.model, name) for name in same},
        vocab_size=1024,
        prompt_format=FastPrompt(),
        binary_dims=(),
        clip=3.0,
    ),
    action_tokenizer=None,
)
