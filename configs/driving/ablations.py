"""What a planner plans by: flow.py, without the car's state, without cameras, with one scale for all waypoints, and
with a perfect perception.

    python data/stats.py --config configs/driving/no_state.py
    python data/stats.py --config configs/driving/pooled.py
    python train/study.py configs/driving/ablations.py --run runs/driving/ablations

All else that it needs is made as policies.py says.
"""

from openpi_like.driving.scenarios import PROMPTS
from openpi_like.train.study import Arm, Study

study = Study(
    arms={name: Arm(f"configs/driving/{name}.py") for name in ("flow", "no_state", "no_vision", "pooled", "scene")},
    robot="ego_vehicle",
    tasks=tuple(PROMPTS),
    episodes=10,
    varies=("data",),  # what is read of the steps, and how it is normalised
)
