"""Decides in words, then plans: "give way", and then the waypoints (Senna, Jiang et al. 2024, arXiv 2410.22313).

    python train/train.py configs/driving/senna.py

There two models do it; here the language model that wrote the words goes on with the plan. All else is as in text.py.
"""

import dataclasses
from pathlib import Path

from openpi_like.config import load_run

base = load_run(Path(__file__).with_name("text.py"))
(entry,) = base.data.entries

config = dataclasses.replace(
    base,
    run_dir="runs/driving/senna",
    data=dataclasses.replace(base.data, entries=(dataclasses.replace(entry, text_key="subtask"),)),
    model=dataclasses.replace(base.model, thought_len=16),
)
