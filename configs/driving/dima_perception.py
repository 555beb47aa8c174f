"""DiMA whose planner sees other vehicles and the map in its images, as the data's annotations have them.

    python train/train.py configs/driving/dima_perception.py

The data is of the simulator that says what is around the car; a car that is driven by this needs to be told nothing.
"""

import dataclasses
from pathlib import Path

from openpi_like.batch import EntityTokens
from openpi_like.config import load_run
from openpi_like.models.scene_decoder import SceneDecoderConfig
from openpi_like.models.scene_perception import PerceptionConfig
from openpi_like.robots.ego_vehicle import EGO_VEHICLE_SCENE, ENTITIES

base = load_run(Path(__file__).with_name("dima.py"))
(entry,) = base.data.entries

config = dataclasses.replace(
    base,
    run_dir="runs/driving/dima_perception",
    model=dataclasses.replace(
        base.model,
        entities=tuple(EntityTokens(things.name, things.count, things.size) for things in ENTITIES),
        perception=PerceptionConfig(decoder=SceneDecoderConfig.tiny()),
    ),
    data=dataclasses.replace(base.data, entries=(dataclasses.replace(entry, robot=EGO_VEHICLE_SCENE),)),
)
