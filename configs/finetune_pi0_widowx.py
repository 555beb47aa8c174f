"""Fine-tunes the released pi0 to the WidowX of Bridge V2, in the sizes of the release.

    python data/stats.py --robot widowx --data data/bridge_dataset/1.0.0 --out stats/widowx.json
    python train/train.py configs/finetune_pi0_widowx.py mesh.fsdp=8

`weights/pi0_base` holds the release (its `params` folder), in openpi's layout or any other in docs/weights.md;
`weights/paligemma_tokenizer.model` is PaliGemma's SentencePiece model. Weights, their average and AdamW's moments take
48 GiB in all, divided by `mesh.fsdp`; see train/plan.py.
Every weight has its place, whatever the cameras, so nothing starts fresh. For pi0.5: `Pi0Config.released(pi05=True)`,
and quantile normalisation in the robot.
"""

import dataclasses

from openpi_like.data.augment import Augment
from openpi_like.data.config import DataConfig, MixtureEntry
from openpi_like.models.pi0 import Pi0Config
from openpi_like.robots.widowx import WIDOWX
from openpi_like.train.checkpoints.warm_start import WarmStart
from openpi_like.train.config import TrainConfig
from openpi_like.train.optimizer import OptimizerConfig

config = TrainConfig(
    run_dir="runs/pi0_widowx",
    model=dataclasses.replace(
        Pi0Config.released(), cameras=("base", "base_1", "base_2"), action_horizon=8, train_on_padding=False
    ),
    data=DataConfig(
        entries=(MixtureEntry(robot=WIDOWX, path="data/bridge_dataset/1.0.0"),), augment=Augment.openpi(), num_threads=8
    ),
    stats="stats",
    tokenizer="weights/paligemma_tokenizer.model",
    warm_start=WarmStart("weights/pi0_base"),
    batch_size=32,
    steps=30_000,
    optimizer=OptimizerConfig(),
    ema_decay=0.99,
    validate_every=2_000,
    save_every=2_000,
)
