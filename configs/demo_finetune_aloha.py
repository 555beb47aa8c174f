"""Fine-tunes the pretrained demo policy to ALOHA: two arms, another camera, 14 joints at 50 Hz, longer chunks.

    python train/train.py configs/demo_finetune_aloha.py

Vision, language and expert blocks come from the checkpoint; what touches state and actions has other sizes and starts
fresh, and the run prints which weight came from where. Two CPU cores: about 3 minutes.
"""

from openpi_like.data.config import DataConfig, MixtureEntry
from openpi_like.models.pi0 import Pi0Config
from openpi_like.robots.aloha import ALOHA
from openpi_like.train.checkpoints.warm_start import WarmStart
from openpi_like.train.config import TrainConfig
from openpi_like.train.optimizer import OptimizerConfig

config = TrainConfig(
    run_dir="runs/demo/finetune",
    model=Pi0Config.tiny(
        cameras=("base", "wrist_right"),
        state_dim=14,
        action_dim=14,
        action_horizon=20,
        prompt_len=16,
        vocab_size=512,
    ),
    data=DataConfig(entries=(MixtureEntry(robot=ALOHA, path="runs/demo/data/aloha_sim/1.0.0", weight=1.0),)),
    stats="runs/demo/stats",
    tokenizer=None,
    warm_start=WarmStart("runs/demo/pretrain", reinitialize=("^action_in/kernel", "^action_out/", "^state_in/kernel")),
    batch_size=64,
    steps=900,
    optimizer=OptimizerConfig(peak_lr=1e-3, end_lr=1e-5, warmup_steps=50, decay_steps=900, weight_decay=1e-4),
    ema_decay=0.99,
    validate_every=450,
    save_every=300,
)
