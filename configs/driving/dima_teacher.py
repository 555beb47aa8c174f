"""The large model of dima.py, driving: a run of no steps with the same weights, for the comparison with its student.

python train/train.py configs/driving/dima_teacher.py
"""

import dataclasses
from pathlib import Path

from openpi_like.config import load_run
from openpi_like.train.checkpoints.warm_start import WarmStart

base = load_run(Path(__file__).with_name("dima.py"))

config = dataclasses.replace(
    base,
    run_dir="runs/driving/dima_teacher",
    model=dataclasses.replace(base.model, acts_as="teacher"),
    warm_start=WarmStart("runs/driving/dima"),
    steps=0,
)
