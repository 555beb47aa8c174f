"""What stages 2 and 3 of dexvla_stages.py are: dexvla.py that begins with the weights of a run; the study names it."""

import dataclasses
from pathlib import Path

from openpi_like.config import load_run
from openpi_like.train.checkpoints.warm_start import WarmStart

base = load_run(Path(__file__).with_name("dexvla.py"))

config = dataclasses.replace(
    base, run_dir="runs/studies/dexvla_started", warm_start=WarmStart("runs/studies/dexvla_stage1")
)
