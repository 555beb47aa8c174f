"""Fine-tunes the pretrained demo policy to Fetch: a robot, cameras and tasks that pretraining never saw.

    python train/train.py configs/demo_finetune_fetch.py

Two CPU cores: about 4 minutes; `make demo` makes what it needs, and runs it.
"""

from openpi_like.data.config import DataConfig, MixtureEntry
from openpi_like.models.pi0 import Pi0Config
from openpi_like.robots.fetch import FETCH
from openpi_like.train.checkpoints.warm_start import WarmStart
from openpi_like.train.config import TrainConfig
from openpi_like.train.optimizer import OptimizerConfig

config = TrainConfig(
    run_dir="runs/demo/finetune",
    model=Pi0Config.tiny(
        cameras=("base", "wrist"),
        state_dim=4,
        action_dim=4,
        action_horizon=8,
        prompt_len=16,
        vocab_size=512,
        flow_draws=4,
    ),
    data=DataConfig(entries=(MixtureEntry(robot=FETCH, path="runs/demo/data/fetch_sim/1.0.0", weight=1.0),)),
    stats="runs/demo/stats",
    tokenizer=None,
    warm_start=WarmStart("runs/demo/pretrain"),
    batch_size=64,
    steps=3_000,
    optimizer=OptimizerConfig(peak_lr=1e-3, end_lr=1e-5, warmup_steps=50, decay_steps=3_000, weight_decay=1e-4),
    ema_decay=0.99,
    validate_every=500,
    save_every=500,
)
