"""The policies of this folder, each told the nearest vehicles and lines of the map in numbers: `scenes.py:fast` is
fast.py, told of them.

    python train/train.py configs/driving/scenes.py:fast

What the simulator knows is given to the policies, so they are upper bounds for those that have to see it. All else is
as in the files of their names. `scene.py` is `scenes.py:flow`.
"""

import dataclasses
from pathlib import Path

from openpi_like.batch import EntityTokens
from openpi_like.config import load_run
from openpi_like.robots.ego_vehicle import ENTITIES
from openpi_like.train.config import TrainConfig

NAMES = (
    *("flow", "fast", "text", "query", "insulated", "senna", "emma", "async_driver"),
    *("planner", "dima", "dima_student", "dima_teacher"),
)


def told(name: str) -> TrainConfig:
    """Returns the run of a file of this folder, told of entities."""
    base = load_run(Path(__file__).with_name(f"{name}.py"))
    start = base.warm_start
    if start is not None:
        start = dataclasses.replace(start, checkpoint=f"{start.checkpoint}_scene")
    entries = tuple(
        dataclasses.replace(entry, robot=dataclasses.replace(entry.robot, entities=ENTITIES))
        for entry in base.data.entries
    )
    return dataclasses.replace(
        base,
        run_dir=f"runs/driving/{name}_scene",
        model=dataclasses.replace(base.model, entities=tuple(EntityTokens(e.name, e.count, e.size) for e in ENTITIES)),
        data=dataclasses.replace(base.data, entries=entries),
        warm_start=start,
    )


configs = {name: told(name) for name in NAMES}
