"""Whether OpenDriveVLA's stages are worth their steps: planning after all of them, after some, and from nothing.

    python train/study.py configs/driving/open_drive_vla.py --run runs/driving/open_drive_vla

What it needs is made as policies.py says. "from nothing" has the steps of stage 3, "from nothing, as many steps" those
of all stages together.
"""

from openpi_like.driving.scenarios import PROMPTS
from openpi_like.train.study import Arm, Study

PLANNING, SINGLE = "configs/driving/stage3_planning.py", "configs/driving/single_stage.py"
SHORTER = ("steps=1500", "optimizer.decay_steps=1500")

study = Study(
    arms={
        "stage 1": Arm("configs/driving/stage1_alignment.py", driven=False),
        "stage 2": Arm("configs/driving/stage2_questions.py", start="stage 1", driven=False),
        "stage 2b": Arm("configs/driving/stage2b_forecasting.py", start="stage 2", driven=False),
        "all stages": Arm(PLANNING, start="stage 2b"),
        "without forecasting": Arm(PLANNING, start="stage 2"),
        "from nothing": Arm(SINGLE, SHORTER),
        "from nothing, as many steps": Arm(SINGLE),
    },
    robot="ego_vehicle",
    tasks=tuple(PROMPTS),
    episodes=10,
    varies=("steps",),
)
