"""DiMA that drives: a small planner, taught by a large one that reads the command with a language model.

    python train/train.py configs/driving/dima.py

dima_student.py serves the planner alone, dima_teacher.py the large one.
"""

import dataclasses
from pathlib import Path

from openpi_like.config import load_run
from openpi_like.models.dima import DimaConfig

base = load_run(Path(__file__).with_name("flow.py"))
SAME = ("cameras", "image_size", "state_dim", "action_dim", "action_horizon", "prompt_len", "vocab_size")

config = dataclasses.replace(
    base,
    run_dir="runs/driving/dima",
    model=DimaConfig.tiny(**{name: getattr(base.model, name) for name in SAME}, teacher_width=192),
)
