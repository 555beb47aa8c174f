"""The planner of planner.py, told the nearest vehicles and lines of the map: no language model, nothing is sampled.

    python train/train.py configs/driving/planner_scene.py

What the simulator knows is given to the policy, so it is an upper bound for those that have to see it.
"""

import dataclasses
from pathlib import Path

from openpi_like.config import load_run

base = load_run(Path(__file__).with_name("planner.py"))
told = load_run(Path(__file__).with_name("scene.py"))

config = dataclasses.replace(
    base,
    run_dir="runs/driving/planner_scene",
    model=dataclasses.replace(base.model, entities=told.model.entities),
    data=told.data,
)
