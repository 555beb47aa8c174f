"""The planner of planner.py, told the nearest vehicles and lines of the map: no language model, nothing is sampled.

    python train/train.py configs/driving/planner_scene.py

What the simulator knows is given to the policy, so it is an upper bound for those that have to see it.
"""

from pathlib import Path

from openpi_like.config import load_run

config = load_run(f"{Path(__file__).with_name('scenes.py')}:planner")
