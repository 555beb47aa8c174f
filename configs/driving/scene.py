"""Flow matching with a perfect perception: cameras, and the nearest vehicles and lines of the map in numbers.

    python train/train.py configs/driving/scene.py

What the simulator knows is given to the policy, so it is an upper bound for the others. All else is as in flow.py.
"""

import dataclasses
from pathlib import Path

from openpi_like.config import load_run

told = load_run(f"{Path(__file__).with_name('scenes.py')}:flow")

config = dataclasses.replace(told, run_dir="runs/driving/scene")
