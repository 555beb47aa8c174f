"""M2-VLA with the head of its paper, which predicts noise, where m2vla.py has that of its code, which says chunks."""

import dataclasses
from pathlib import Path

from openpi_like.config import load_run
from openpi_like.models.m2vla_noise import M2VlaNoiseConfig

base = load_run(Path(__file__).with_name("m2vla.py"))

config = dataclasses.replace(
    base,
    run_dir="runs/studies/m2vla_noise",
    model=M2VlaNoiseConfig(**{f.name: getattr(base.model, f.name) for f in dataclasses.fields(base.model)}),
)
