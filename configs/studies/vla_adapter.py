"""VLA-Adapter's head where m2vla.py has M2-VLA's: one softmax over all it looks at; with or without the memory."""

import dataclasses
from pathlib import Path

from openpi_like.config import load_run
from openpi_like.models.vla_adapter import VlaAdapterConfig

base = load_run(Path(__file__).with_name("m2vla.py"))

config = dataclasses.replace(
    base,
    run_dir="runs/studies/vla_adapter",
    model=VlaAdapterConfig(**{f.name: getattr(base.model, f.name) for f in dataclasses.fields(base.model)}),
)
