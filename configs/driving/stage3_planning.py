"""OpenDriveVLA, stage 3: writes the plan of the car, with the image tower frozen.

    python train/train.py configs/driving/stage3_planning.py

A row of the table in stages.py; it begins with the weights of stage 2.5.
"""

from pathlib import Path

from openpi_like.config import load_run

config = load_run(f"{Path(__file__).with_name('stages.py')}:stage3_planning")
