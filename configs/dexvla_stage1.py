"""DexVLA, stage 1: the one-billion diffusion expert learns from many robots, without a vision-language model.

    python data/stats.py --config configs/dexvla_stage1.py --workers 64
    python train/train.py configs/dexvla_stage1.py mesh.fsdp=8

`/data/oxe` holds a directory per dataset, see `openpi_like.data.oxe.mixture`, and `data/aloha` episodes of the robot
that the next stages are about. `weights/distilbert` holds distilbert-base-uncased, its safetensors and its tokenizer.
The recipe is the published one (arXiv 2502.05855, table 1): all is trained, 1e-4 throughout; its own hundred hours are
not published.
Each robot has maps of its own into the expert and out of it.
"""

import dataclasses

from openpi_like.data.augment import Augment
from openpi_like.data.config import DataConfig, MixtureEntry
from openpi_like.data.oxe import mixture
from openpi_like.data.prompts import BertPrompt
from openpi_like.models.dexvla_stage1 import DexVlaStage1Config
from openpi_like.models.resnet_bert import ResNetBertConfig
from openpi_like.models.scale_dp import ScaleDpConfig
from openpi_like.robots.aloha_stationary import ALOHA_STATIONARY
from openpi_like.train.checkpoints.warm_start import WarmStart
from openpi_like.train.config import TrainConfig
from openpi_like.train.optimizer import OptimizerConfig

ROBOT = dataclasses.replace(ALOHA_STATIONARY, action_horizon=50, normalization="quantile")
ENTRIES = (
    MixtureEntry(robot=ROBOT, path="data/aloha/1.0.0", weight=10.0),
    *mixture("oxe_magic_soup_plus", "/data/oxe", missing="expect"),
)

config = TrainConfig(
    run_dir="runs/dexvla_stage1",
    model=DexVlaStage1Config(
        backbone=ResNetBertConfig.dexvla(),
        expert=ScaleDpConfig.huge(),
        cameras=("base", "base_1", "wrist", "wrist_left", "wrist_right"),
        image_size=(240, 320),
        prompt_len=48,
        prompt_format=BertPrompt(),
        vocab_size=30_522,
        state_dim=14,
        action_dim=14,
        action_horizon=50,
        robots=tuple(dict.fromkeys(entry.robot.name for entry in ENTRIES)),
        dtype="bfloat16",
        remat="nothing_saveable",
    ),
    data=DataConfig(entries=ENTRIES, drop_cameras=("base_2", "wrist_1"), augment=Augment.openpi(), num_threads=16),
    stats="stats",
    tokenizer="weights/distilbert",
    warm_start=WarmStart("weights/distilbert", reinitialize=("^(resnet_|map_|expert/)",)),
    batch_size=96,
    steps=200_000,
    optimizer=OptimizerConfig(peak_lr=1e-4, end_lr=1e-4, warmup_steps=1_000, decay_steps=200_000, weight_decay=0.0),
    ema_decay=0.999,
    validate_every=5_000,
    save_every=5_000,
)
