"""Trains M2-VLA's head for the WidowX of Bridge V2 on Prismatic Qwen2.5-0.5B, which stays frozen.

    python data/stats.py --robot configs/finetune_m2vla.py:ROBOT --data data/bridge_dataset/1.0.0 \\
        --out stats/widowx.json
    python train/train.py configs/finetune_m2vla.py

`weights/prism-qwen25-0_5b` holds the safetensors of Stanford-ILIAD/prism-qwen25-extra-dinosiglip-224px-0_5b as
VLA-Adapter writes them, and Qwen2.5's tokenizer. No recipe of M2-VLA is published; this one is VLA-Adapter's without
its LoRA: batch 16, 2e-4, a tenth of it behind two thirds of the 15,000 steps that the paper trains. Two cameras are
`cameras=("base", "wrist")` and `image_slots=(1, 1)`. The noise-predicting head of the paper is `M2VlaNoiseConfig`.
`train/image_states.py` runs the backbone once over every frame, at 11 MiB a frame and camera; then take out `augment`.
"""

import dataclasses

from openpi_like.data.augment import Augment
from openpi_like.data.config import DataConfig, MixtureEntry
from openpi_like.data.prompts import PrismaticChatPrompt
from openpi_like.models.m2vla import FROZEN, M2VlaConfig
from openpi_like.robots.widowx import WIDOWX
from openpi_like.train.checkpoints.warm_start import WarmStart
from openpi_like.train.config import TrainConfig
from openpi_like.train.optimizer import OptimizerConfig
from openpi_like.train.state import Trainable

ROBOT = dataclasses.replace(WIDOWX, normalization="quantile")

config = TrainConfig(
    run_dir="runs/m2vla_widowx",
    model=M2VlaConfig.released(
        cameras=("base",),
        image_slots=(1,),
        prompt_format=PrismaticChatPrompt(),
        state_dim=ROBOT.state_size,
        action_dim=ROBOT.action_size,
        action_horizon=8,
        remat="nothing_saveable",
    ),
    data=DataConfig(
        entries=(MixtureEntry(robot=ROBOT, path="data/bridge_dataset/1.0.0"),),
        drop_cameras=("base_1", "base_2"),
        augment=Augment.openpi(),
        num_threads=8,
    ),
    stats="stats",
    tokenizer="weights/prism-qwen25-0_5b",
    warm_start=WarmStart("weights/prism-qwen25-0_5b", reinitialize=("^(queries|state_|norm_in|map_in|head|skill)",)),
    trainable=Trainable(frozen=FROZEN, frozen_dtype="bfloat16"),
    batch_size=16,
    steps=15_000,
    optimizer=OptimizerConfig(peak_lr=2e-4, end_lr=2e-5, warmup_steps=100, decay_steps=15_000, weight_decay=0.01),
    ema_decay=None,
    validate_every=1_000,
    save_every=1_000,
)
