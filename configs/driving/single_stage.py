"""What OpenDriveVLA's stages are compared with: planning alone, from nothing, for the steps of all of them.

    python train/train.py configs/driving/single_stage.py

See stages.py.
"""

from pathlib import Path

from openpi_like.config import load_run

config = load_run(f"{Path(__file__).with_name('stages.py')}:single_stage")
