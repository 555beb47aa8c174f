"""Fine-tunes SmolVLA to the WidowX of Bridge V2 on one small GPU: 450 M weights, of which 100 M are trained.

    python data/stats.py --robot widowx --data data/bridge_dataset/1.0.0 --out stats/widowx.json
    python train/train.py configs/finetune_smolvla.py
    python train/convert.py runs/smolvla_widowx weights/smolvla_widowx --to lerobot

`weights/smolvla_base` holds lerobot/smolvla_base; `weights/smolvlm2_tokenizer` the tokenizer of SmolVLM2-500M, its
`tokenizer.json` and `tokenizer_config.json`. For another robot: its cameras, of which there can be any number, and its
dataset. As in LeRobot the VLM is not trained, and is held in bfloat16; without `trainable` all weights are. To start
from SmolVLM2 without an expert: `WarmStart("weights/smolvlm2", reinitialize=("^expert/", "^(state|action)_"))`.

Images are fitted as for other policies, centred on black; LeRobot has them at the lower right.
"""

import dataclasses

from openpi_like.data.augment import Augment
from openpi_like.data.config import DataConfig, MixtureEntry
from openpi_like.models.smolvla import SmolVlaConfig
from openpi_like.robots.widowx import WIDOWX
from openpi_like.train import presets
from openpi_like.train.checkpoints.warm_start import WarmStart
from openpi_like.train.config import TrainConfig
from openpi_like.train.optimizer import OptimizerConfig

MODEL = dataclasses.replace(
    SmolVlaConfig.released(), cameras=("base", "base_1", "base_2"), action_horizon=8, remat="nothing_saveable"
)

config = TrainConfig(
    run_dir="runs/smolvla_widowx",
    model=MODEL,
    data=DataConfig(
        entries=(MixtureEntry(robot=WIDOWX, path="data/bridge_dataset/1.0.0"),), augment=Augment.openpi(), num_threads=8
    ),
    stats="stats",
    tokenizer="weights/smolvlm2_tokenizer",
    warm_start=WarmStart("weights/smolvla_base"),
    trainable=presets.expert_only(MODEL),
    batch_size=64,
    steps=20_000,
    optimizer=OptimizerConfig(peak_lr=1e-4, end_lr=2.5e-6, warmup_steps=1_000, decay_steps=20_000, clip_norm=10.0),
    validate_every=2_000,
    save_every=2_000,
)
