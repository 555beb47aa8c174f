"""Fine-tunes the pretrained demo policy to PushT alone, with larger pictures, smaller patches and longer chunks.

    python train/train.py configs/demo_finetune_pusht.py

`DEMO_SCALE=full make demo` makes what it needs, and runs it. Success is 95 % of the T on its outline, a matter of a
pixel, so patches are small. A pushing plan takes a second or two, and a chunk holds a whole one: where every chunk
chooses anew, the disc wavers between pushes that are as good.
"""

import dataclasses

from openpi_like.data.config import DataConfig, MixtureEntry
from openpi_like.models.pi0 import Pi0Config
from openpi_like.robots.pusht import PUSHT
from openpi_like.train.checkpoints.warm_start import WarmStart
from openpi_like.train.config import TrainConfig
from openpi_like.train.muon import MuonConfig

robot = dataclasses.replace(PUSHT, action_horizon=16, execute_steps=8)

config = TrainConfig(
    run_dir="runs/full/finetune_pusht",
    model=Pi0Config.tiny(
        cameras=("base",),
        image_size=(96, 96),
        patch_size=12,
        state_dim=4,
        action_dim=4,
        action_horizon=16,
        prompt_len=16,
        vocab_size=512,
        flow_draws=4,
    ),
    data=DataConfig(entries=(MixtureEntry(robot=robot, path="runs/full/data/pusht_sim/1.0.0", weight=1.0),)),
    stats="runs/full/stats",
    tokenizer=None,
    warm_start=WarmStart("runs/full/pretrain", reinitialize=("^vision/patch/kernel", "^vision/position")),
    batch_size=64,
    steps=6_000,
    optimizer=MuonConfig(peak_lr=5e-3, end_lr=5e-5, warmup_steps=50, decay_steps=6_000, weight_decay=1e-4),
    ema_decay=0.999,
    validate_every=1_000,
    save_every=1_000,
)
