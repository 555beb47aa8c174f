"""OpenDriveVLA, stage 1: says in words what the tokens of cameras, vehicles and lines are.

    python train/train.py configs/driving/stage1_alignment.py

A row of the table in stages.py.
"""

from pathlib import Path

from openpi_like.config import load_run

config = load_run(f"{Path(__file__).with_name('stages.py')}:stage1_alignment")
