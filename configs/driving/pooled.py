"""flow.py with one scale for all waypoints: half a second ahead is then a small number, and three seconds a large one.

python data/stats.py --config configs/driving/pooled.py
python train/train.py configs/driving/pooled.py
"""

import dataclasses
from pathlib import Path

from openpi_like.config import load_run
from openpi_like.robots.ego_vehicle import EGO_VEHICLE
from openpi_like.robots.plan import Plan

base = load_run(Path(__file__).with_name("flow.py"))
(entry,) = base.data.entries
robot = dataclasses.replace(EGO_VEHICLE, plan=Plan(known="plan_known", scale="pooled"))

config = dataclasses.replace(
    base,
    run_dir="runs/driving/pooled",
    data=dataclasses.replace(base.data, entries=(dataclasses.replace(entry, robot=robot),)),
    stats="runs/driving/stats_one_scale",
)
