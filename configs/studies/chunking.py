"""Chunks of one second for Sawyer, trained whole, and with delays: what answers that come late do to both.

    make chunking

trains both on the demo's demonstrations, and drives each with answers that are 0 to 8 control steps late
(`serve/delays.py`): the newest chunk as it is, an ensemble, and real-time chunking.
"""

import dataclasses
from pathlib import Path

from openpi_like.config import load_run
from openpi_like.data.config import DataConfig, MixtureEntry
from openpi_like.robots.sawyer import SAWYER

demo = load_run(Path(__file__).parents[1] / "demo_pretrain.py")
robot = dataclasses.replace(SAWYER, action_horizon=20, execute_steps=8)

whole = dataclasses.replace(
    demo,
    run_dir="runs/studies/chunking/whole",
    model=dataclasses.replace(demo.model, action_horizon=20),
    data=DataConfig(entries=(MixtureEntry(robot, "runs/studies/data/sawyer_sim/1.0.0"),)),
    stats="runs/studies/stats",
    tokenizer="runs/studies/text.model",
    steps=3_000,
    optimizer=dataclasses.replace(demo.optimizer, decay_steps=3_000),
)
delayed = dataclasses.replace(
    whole, run_dir="runs/studies/chunking/delayed", model=dataclasses.replace(whole.model, max_delay=10)
)
config = whole
