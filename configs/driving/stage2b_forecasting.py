"""OpenDriveVLA, stage 2.5: says where another vehicle will be, as waypoints in its own frame.

    python train/train.py configs/driving/stage2b_forecasting.py

A row of the table in stages.py; it begins with the weights of stage 2.
"""

from pathlib import Path

from openpi_like.config import load_run

config = load_run(f"{Path(__file__).with_name('stages.py')}:stage2b_forecasting")
