"""Flow matching that turns the wheel: two seconds of acceleration and steering at 10 Hz in the place of waypoints.

    python data/stats.py --config configs/driving/controls.py
    python train/train.py configs/driving/controls.py

All but the robot and its demonstrations is as in flow.py.
"""

import dataclasses
from pathlib import Path

from openpi_like.config import load_run
from openpi_like.data.config import MixtureEntry
from openpi_like.robots.ego_vehicle import EGO_CONTROLS

base = load_run(Path(__file__).with_name("flow.py"))
entry = MixtureEntry(robot=EGO_CONTROLS, path="runs/driving/data/ego_controls_sim/1.0.0")

config = dataclasses.replace(
    base,
    run_dir="runs/driving/controls",
    data=dataclasses.replace(base.data, entries=(entry,)),
    model=dataclasses.replace(base.model, action_horizon=EGO_CONTROLS.action_horizon),
)
