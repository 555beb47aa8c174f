"""DexVLA, stage 3: all of it, on one task of the robot, whose reasoning was looked through by people.

    python train/train.py configs/dexvla_stage3.py mesh.fsdp=16

From stage 2 comes everything, but for the rate: 2e-5, to nothing along a cosine (arXiv 2502.05855, table 1).
"""

import dataclasses
from pathlib import Path

from openpi_like.config import load_run
from openpi_like.train.checkpoints.warm_start import WarmStart
from openpi_like.train.state import Trainable

before = load_run(Path(__file__).with_name("dexvla_stage2.py"))
entry = dataclasses.replace(before.data.entries[0], path="data/aloha_folding/1.0.0")

config = dataclasses.replace(
    before,
    run_dir="runs/dexvla_stage3",
    data=dataclasses.replace(before.data, entries=(entry,)),
    warm_start=WarmStart("runs/dexvla_stage2"),
    trainable=Trainable(),
    steps=80_000,
    optimizer=dataclasses.replace(before.optimizer, warmup_steps=100, end_lr=0.0, decay_steps=80_000),
)
