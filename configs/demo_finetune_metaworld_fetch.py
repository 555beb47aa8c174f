"""Fine-tunes the pretrained demo policy to Fetch, which it never saw: another arm and camera, and a gripper that is
commanded the other way round. From 88 demonstrations of eleven tasks.

    python train/train.py configs/demo_finetune_metaworld_fetch.py

All weights come from the checkpoint. Two CPU cores: a minute; `make demo` makes what it needs, and runs it.
"""

from openpi_like.data.config import DataConfig, MixtureEntry
from openpi_like.models.pi0 import Pi0Config
from openpi_like.robots.metaworld_fetch import METAWORLD_FETCH
from openpi_like.train.checkpoints.warm_start import WarmStart
from openpi_like.train.config import TrainConfig
from openpi_like.train.optimizer import OptimizerConfig

config = TrainConfig(
    run_dir="runs/demo/finetune_metaworld_fetch",
    model=Pi0Config.tiny(
        cameras=("base",),
        state_dim=4,
        action_dim=4,
        action_horizon=8,
        prompt_len=16,
        vocab_size=512,
        flow_draws=2,
    ),
    data=DataConfig(entries=(MixtureEntry(METAWORLD_FETCH, "runs/demo/data/metaworld_fetch_sim/1.0.0"),)),
    stats="runs/demo/stats",
    tokenizer=None,
    warm_start=WarmStart("runs/demo/pretrain"),
    batch_size=32,
    steps=600,
    optimizer=OptimizerConfig(peak_lr=3e-4, end_lr=1e-5, warmup_steps=50, decay_steps=600, weight_decay=1e-4),
    ema_decay=0.99,
    validate_every=300,
    save_every=300,
)
