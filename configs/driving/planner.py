"""The planner of dima.py trained without a teacher, on the same data for as many steps: what teaching is worth.

python train/train.py configs/driving/planner.py
"""

import dataclasses
from pathlib import Path

from openpi_like.config import load_run
from openpi_like.models.dima import DimaStudentConfig

base = load_run(Path(__file__).with_name("dima.py"))
own = {f.name: getattr(base.model, f.name) for f in dataclasses.fields(DimaStudentConfig)}

config = dataclasses.replace(base, run_dir="runs/driving/planner", model=DimaStudentConfig(**own))
