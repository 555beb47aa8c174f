"""Pretrains a tiny pi0 on two simulated robots: Sawyer (nine Meta-World tasks) and PushT.

    python train/train.py configs/demo_pretrain.py

`make demo` makes the data, statistics and tokeniser it needs, and runs it, in some minutes on two CPU cores.
"""

from openpi_like.data.config import DataConfig, MixtureEntry
from openpi_like.models.pi0 import Pi0Config
from openpi_like.robots.pusht import PUSHT
from openpi_like.robots.sawyer import SAWYER
from openpi_like.train.config import TrainConfig
from openpi_like.train.muon import MuonConfig

config = TrainConfig(
    run_dir="runs/demo/pretrain",
    model=Pi0Config.tiny(
        cameras=("base",),
        state_dim=4,
        action_dim=4,
        action_horizon=8,
        prompt_len=16,
        vocab_size=512,
        flow_draws=2,
    ),
    data=DataConfig(
        entries=(
            MixtureEntry(robot=SAWYER, path="runs/demo/data/sawyer_sim/1.0.0", weight=0.9),
            MixtureEntry(robot=PUSHT, path="runs/demo/data/pusht_sim/1.0.0", weight=0.1),
        ),
    ),
    stats="runs/demo/stats",
    tokenizer="runs/demo/text.model",
    batch_size=32,
    steps=2_500,
    optimizer=MuonConfig(peak_lr=5e-3, end_lr=5e-5, warmup_steps=50, decay_steps=2_500, weight_decay=1e-4),
    ema_decay=0.99,
    validate_every=1_000,
    save_every=1_000,
)
