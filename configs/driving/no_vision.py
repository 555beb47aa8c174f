"""flow.py without cameras: state and command alone, which is a strong planner in open loop.

    python train/train.py configs/driving/no_vision.py

No camera of the car is read, and the one slot of the policy is a camera that no car has, so it is masked always.
"""

import dataclasses
from pathlib import Path

from openpi_like.config import load_run
from openpi_like.robots.ego_vehicle import VIEWS

base = load_run(Path(__file__).with_name("flow.py"))

config = dataclasses.replace(
    base,
    run_dir="runs/driving/no_vision",
    data=dataclasses.replace(base.data, drop_cameras=VIEWS),
    model=dataclasses.replace(base.model, cameras=("none",)),
)
