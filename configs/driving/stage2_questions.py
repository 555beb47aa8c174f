"""OpenDriveVLA, stage 2: answers questions about the scene, from the weights of stage 1.

    python train/train.py configs/driving/stage2_questions.py

A row of the table in stages.py.
"""

from pathlib import Path

from openpi_like.config import load_run

config = load_run(f"{Path(__file__).with_name('stages.py')}:stage2_questions")
