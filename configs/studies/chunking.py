"""Chunks of one second for Sawyer, long enough to be late: what `train/chunking.py` trains, whole and with delays."""

import dataclasses
from pathlib import Path

from openpi_like.config import load_run
from openpi_like.data.config import DataConfig, MixtureEntry
from openpi_like.robots.sawyer import SAWYER

demo = load_run(Path(__file__).parents[1] / "demo_pretrain.py")
robot = dataclasses.replace(SAWYER, action_horizon=20, execute_steps=8)

config = dataclasses.replace(
    demo,
    run_dir="runs/studies/chunking/whole",
    model=dataclasses.replace(demo.model, action_horizon=20),
    data=DataConfig(entries=(MixtureEntry(robot, "runs/studies/chunking/data/sawyer_sim/1.0.0"),)),
    stats="runs/studies/chunking/stats",
    tokenizer="runs/studies/chunking/text.model",
    steps=2_500,
    optimizer=dataclasses.replace(demo.optimizer, decay_steps=2_500),
)
