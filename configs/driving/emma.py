"""Everything as text: describes the scene, then writes the plan (EMMA, Hwang et al. 2024, arXiv 2410.23262).

    python train/train.py configs/driving/emma.py
    python serve/policy_server.py runs/driving/emma
    python serve/policy_server.py runs/driving/emma --think-every 0

The description is the caption of the step: light, road, speed, what the car does, and who is near. The same policy
plans with it (the first server) and without (the second), and has learned both: a quarter of the samples have no
description. They are the fewer ones, so that the likeliest first word is that of a description where one is asked for.
All else is as in text.py.
"""

import dataclasses
from pathlib import Path

from openpi_like.config import load_run

base = load_run(Path(__file__).with_name("text.py"))
(entry,) = base.data.entries
described = dataclasses.replace(entry, text_key="caption", weight=3.0, label="described")

config = dataclasses.replace(
    base,
    run_dir="runs/driving/emma",
    data=dataclasses.replace(base.data, entries=(described, entry)),
    model=dataclasses.replace(base.model, thought_len=112),
)
