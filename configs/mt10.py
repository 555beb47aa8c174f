"""One tiny pi0 for the ten tasks of Meta-World's MT-10, from one camera of 64 pixels.

    python train/train.py configs/mt10.py

`make benchmark` makes the data, statistics and tokeniser it needs, runs it, and evaluates it.
"""

from openpi_like.data.config import DataConfig, MixtureEntry
from openpi_like.models.pi0 import Pi0Config
from openpi_like.robots.sawyer import SAWYER
from openpi_like.train.config import TrainConfig
from openpi_like.train.muon import MuonConfig

STEPS = 6_000

config = TrainConfig(
    run_dir="runs/benchmark/mt10",
    model=Pi0Config.tiny(
        cameras=("base",),
        patch_size=8,  # the puck and the peg are small
        state_dim=4,
        action_dim=4,
        action_horizon=8,
        prompt_len=24,
        vocab_size=512,
        flow_draws=2,
    ),
    data=DataConfig(entries=(MixtureEntry(robot=SAWYER, path="runs/benchmark/data/sawyer_sim/1.0.0"),)),
    stats="runs/benchmark/stats",
    tokenizer="runs/benchmark/text.model",
    batch_size=32,
    steps=STEPS,
    optimizer=MuonConfig(peak_lr=5e-3, end_lr=5e-5, warmup_steps=50, decay_steps=STEPS, weight_decay=1e-4),
    ema_decay=0.99,
    validate_every=STEPS // 4,
    save_every=STEPS // 4,
)
