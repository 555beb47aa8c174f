"""Fine-tunes the pretrained demo policy to ALOHA: two arms, another camera, 14 joints at 50 Hz, longer chunks.

    python train/train.py configs/demo_finetune_aloha.py

`DEMO_SCALE=full make demo` makes what it needs, and runs it. Language and blocks come from the checkpoint; what touches
state and actions has other sizes and starts fresh, and so do the patches, a quarter as large: the run prints which
weight came from where. The cube is 4 cm wide and five pixels; a chunk is 0.8 s.
"""

import dataclasses

from openpi_like.data.config import DataConfig, MixtureEntry
from openpi_like.models.pi0 import Pi0Config
from openpi_like.robots.aloha import ALOHA
from openpi_like.train.checkpoints.warm_start import WarmStart
from openpi_like.train.config import TrainConfig
from openpi_like.train.muon import MuonConfig

robot = dataclasses.replace(ALOHA, action_horizon=40, execute_steps=20)

config = TrainConfig(
    run_dir="runs/full/finetune_aloha",
    model=Pi0Config.tiny(
        cameras=("base", "wrist_right"),
        patch_size=8,
        state_dim=14,
        action_dim=14,
        action_horizon=40,
        prompt_len=16,
        vocab_size=512,
        flow_draws=2,
    ),
    data=DataConfig(entries=(MixtureEntry(robot=robot, path="runs/full/data/aloha_sim/1.0.0", weight=1.0),)),
    stats="runs/full/stats",
    tokenizer=None,
    warm_start=WarmStart(
        "runs/full/pretrain",
        reinitialize=(
            "^action_in/kernel",
            "^action_out/",
            "^state_in/kernel",
            "^vision/patch/kernel",
            "^vision/position",
        ),
    ),
    batch_size=64,
    steps=8_000,
    optimizer=MuonConfig(peak_lr=5e-3, end_lr=5e-5, warmup_steps=50, decay_steps=8_000, weight_decay=1e-4),
    ema_decay=0.999,
    validate_every=1_000,
    save_every=1_000,
)
