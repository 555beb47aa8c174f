"""flow.py without the state of the car: neither how fast it goes nor where it was.

    python data/stats.py --config configs/driving/no_state.py
    python train/train.py configs/driving/no_state.py

In open loop, the state alone explains most of a plan (OpenDriveVLA's table 5: UniAD's mean distance is 0.68 m with it,
1.34 m without). The policy keeps its size: its state token is masked. Its plans are not relative to the velocity, which
would say how fast the car goes.
"""

import dataclasses
from pathlib import Path

from openpi_like.config import load_run
from openpi_like.robots.ego_vehicle import EGO_VEHICLE, EGO_VEHICLE_METRES

base = load_run(Path(__file__).with_name("flow.py"))
(entry,) = base.data.entries
robot = dataclasses.replace(EGO_VEHICLE, state=(), action=EGO_VEHICLE_METRES.action)

config = dataclasses.replace(
    base,
    run_dir="runs/driving/no_state",
    data=dataclasses.replace(base.data, entries=(dataclasses.replace(entry, robot=robot),)),
    stats="runs/driving/stats_no_state",
)
