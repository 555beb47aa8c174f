"""The planner that dima.py has taught, alone: a run of no steps, which holds what serving needs and no language model.

python train/train.py configs/driving/dima_student.py
"""

import dataclasses
from pathlib import Path

from openpi_like.config import load_run
from openpi_like.models.dima import LEFT_BEHIND
from openpi_like.train.checkpoints.warm_start import WarmStart

base = load_run(Path(__file__).with_name("planner.py"))

config = dataclasses.replace(
    base,
    run_dir="runs/driving/dima_student",
    warm_start=WarmStart("runs/driving/dima", drop=LEFT_BEHIND),
    steps=0,
)
