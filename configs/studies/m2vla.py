"""M2-VLA on a frozen backbone that has learned something before, three Sawyer tasks: see m2vla_ablations.py.

All but the policy, and what is trained of it, is that of prismatic.py.
"""

import dataclasses
from pathlib import Path

from openpi_like.config import load_run
from openpi_like.models.m2vla import FROZEN, M2VlaConfig
from openpi_like.train.checkpoints.warm_start import WarmStart
from openpi_like.train.state import Trainable

base = load_run(Path(__file__).with_name("prismatic.py"))
same = ("cameras", "state_dim", "action_dim", "action_horizon", "vocab_size", "prompt_format", "prompt_len")

config = dataclasses.replace(
    base,
    run_dir="runs/studies/m2vla",
    model=M2VlaConfig.tiny(**{name: getattr(base.model, name) for name in same}),
    trainable=Trainable(frozen=FROZEN),
    warm_start=WarmStart("runs/studies/prismatic", drop=("^action_",)),
)
