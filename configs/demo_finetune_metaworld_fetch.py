"""Fine-tunes the pretrained demo policy to Fetch, which it never saw: another arm and camera, and a gripper that is
commanded the other way round. From 88 demonstrations of eleven tasks.

    python train/train.py configs/demo_finetune_metaworld_fetch.py

All weights come from the checkpoint; what is not said here is as in demo_pretrain.py. Two CPU cores: a minute; `make
demo` makes what it needs, and runs it.
"""

import dataclasses
from pathlib import Path

from openpi_like.config import load_run
from openpi_like.data.config import DataConfig, MixtureEntry
from openpi_like.robots.metaworld_fetch import METAWORLD_FETCH
from openpi_like.train.checkpoints.warm_start import WarmStart
from openpi_like.train.muon import MuonConfig

pretrain = load_run(Path(__file__).with_name("demo_pretrain.py"))

config = dataclasses.replace(
    pretrain,
    run_dir="runs/demo/finetune_metaworld_fetch",
    data=DataConfig(entries=(MixtureEntry(METAWORLD_FETCH, "runs/demo/data/metaworld_fetch_sim/1.0.0"),)),
    tokenizer=None,
    warm_start=WarmStart(pretrain.run_dir),
    steps=300,
    optimizer=MuonConfig(peak_lr=2e-3, end_lr=2e-5, warmup_steps=50, decay_steps=300, weight_decay=1e-4),
    validate_every=150,
    save_every=150,
)
