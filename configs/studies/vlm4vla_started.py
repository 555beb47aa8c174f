"""VLM4VLA on a backbone that has learned something before: what the arms of vlm4vla_ablations.py begin with.

All else is that of vlm4vla.py; `warm_start.checkpoint` names the run.
"""

import dataclasses
from pathlib import Path

from openpi_like.config import load_run
from openpi_like.train.checkpoints.warm_start import WarmStart

config = dataclasses.replace(
    load_run(Path(__file__).with_name("vlm4vla.py")),
    run_dir="runs/studies/vlm4vla_started",
    warm_start=WarmStart("runs/studies/fast"),
)
