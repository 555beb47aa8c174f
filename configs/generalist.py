"""One tiny pi0 for all simulated arms: Sawyer (Meta-World), five arms of robosuite, Fetch, a disc that pushes a T, and
ALOHA's two arms.

    python train/train.py configs/generalist.py

`train/benchmark.py --scale full` makes the data, statistics and tokeniser it needs, runs it, and evaluates it. Its
pictures are the largest of these robots', in 8 x 8 patches; its chunks the longest, ALOHA's 0.8 s. Others fill what
they have. Of cameras there is one for all, and ALOHA's second.
"""

import dataclasses

from openpi_like.data.config import DataConfig, MixtureEntry
from openpi_like.models.pi0 import Pi0Config
from openpi_like.robots.aloha import ALOHA
from openpi_like.robots.fetch import FETCH
from openpi_like.robots.pusht import PUSHT
from openpi_like.robots.robosuite_arms import ARMS
from openpi_like.robots.sawyer import SAWYER as METAWORLD
from openpi_like.train.config import TrainConfig
from openpi_like.train.muon import MuonConfig

STEPS = 16_000

# Their part of the samples, and chunks as those that each alone was learned best with, see docs/demo.md.
ROBOTS = (
    (METAWORLD, 0.45),
    (dataclasses.replace(PUSHT, action_horizon=16, execute_steps=8), 0.15),
    (dataclasses.replace(ALOHA, action_horizon=40, execute_steps=20), 0.2),
    *((arm, 0.025) for arm in ARMS.values()),
    (FETCH, 0.075),
)

config = TrainConfig(
    run_dir="runs/benchmark_full/pi0_all",
    model=Pi0Config.tiny(
        cameras=("base", "wrist_right"),
        image_size=(96, 96),
        patch_size=12,
        state_dim=14,
        action_dim=14,
        action_horizon=40,
        prompt_len=24,
        vocab_size=1024,
        flow_draws=2,
    ),
    data=DataConfig(
        entries=tuple(
            MixtureEntry(robot=robot, path=f"runs/benchmark_full/data/{robot.name}_sim/1.0.0", weight=weight)
            for robot, weight in ROBOTS
        ),
        drop_cameras=("wrist",),
    ),
    stats="runs/benchmark_full/stats",
    tokenizer="runs/benchmark_full/text.model",
    batch_size=64,
    steps=STEPS,
    optimizer=MuonConfig(peak_lr=5e-3, end_lr=5e-5, warmup_steps=100, decay_steps=STEPS, weight_decay=1e-4),
    ema_decay=0.999,
    validate_every=2_000,
    save_every=1_000,
)
