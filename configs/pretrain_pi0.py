"""Pretrains pi0 on Open X-Embodiment (27 datasets, 5 TB as published) from PaliGemma, with the backbone of the release.

    python data/stats.py --config configs/pretrain_pi0.py --workers 64
    python train/train.py configs/pretrain_pi0.py

`/data/oxe` holds a directory per dataset, see `openpi_like.data.oxe.mixture`; `weights/paligemma` is PaliGemma-3B for
224 pixels and `weights/paligemma_tokenizer.model` its SentencePiece model. Three cameras, two of the scene and one on
the hand; those that a robot lacks are masked. The mesh is for 64 chips and multiples of that.
"""

import dataclasses

from openpi_like.data.augment import Augment
from openpi_like.data.config import DataConfig
from openpi_like.data.oxe import mixture
from openpi_like.models.pi0 import Pi0Config
from openpi_like.train.checkpoints.warm_start import WarmStart
from openpi_like.train.config import TrainConfig
from openpi_like.train.optimizer import OptimizerConfig
from openpi_like.train.sharding import MeshConfig

config = TrainConfig(
    run_dir="runs/pretrain_pi0",
    model=dataclasses.replace(
        Pi0Config.released(),
        cameras=("base", "base_1", "wrist"),
        state_dim=11,
        action_dim=10,
        action_horizon=16,
        train_on_padding=False,
    ),
    data=DataConfig(
        # A dataset that is not there is named when the run starts; where it is only planned, none need be.
        entries=mixture("oxe_magic_soup_plus", "/data/oxe", missing="expect"),
        drop_cameras=("base_2", "wrist_1"),
        augment=Augment.openpi(),
        num_threads=16,
    ),
    stats="stats",
    tokenizer="weights/paligemma_tokenizer.model",
    warm_start=WarmStart("weights/paligemma", reinitialize=("^expert/", "^action_", "^state_in/")),
    batch_size=1024,
    steps=100_000,
    optimizer=OptimizerConfig(peak_lr=5e-5, end_lr=5e-6, decay_steps=100_000),
    ema_decay=0.999,
    mesh=MeshConfig(fsdp=64),
    validate_every=5_000,
    validation_batch_size=256,
    save_every=1_000,
)
