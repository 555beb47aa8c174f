"""Flow matching with a perfect perception: cameras, and the nearest vehicles and lines of the map in numbers.

    python train/train.py configs/driving/scene.py

What the simulator knows is given to the policy, so it is an upper bound for the others. All else is as in flow.py.
"""

import dataclasses
from pathlib import Path

from openpi_like.batch import EntityTokens
from openpi_like.config import load_run
from openpi_like.robots.ego_vehicle import EGO_VEHICLE_SCENE, ENTITIES

base = load_run(Path(__file__).with_name("flow.py"))
(entry,) = base.data.entries

config = dataclasses.replace(
    base,
    run_dir="runs/driving/scene",
    data=dataclasses.replace(base.data, entries=(dataclasses.replace(entry, robot=EGO_VEHICLE_SCENE),)),
    model=dataclasses.replace(base.model, entities=tuple(EntityTokens(e.name, e.count, e.size) for e in ENTITIES)),
)
