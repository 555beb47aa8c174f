"""Whether OpenDriveVLA's stages are worth their steps: planning after all of them, after some, and from nothing; and
what is lost where it has to see what the simulator tells it otherwise.

    python train/study.py configs/driving/open_drive_vla.py --run runs/driving/open_drive_vla

What it needs is made as policies.py says. "from nothing" has the steps of stage 3, "from nothing, as many steps" those
of all stages together. "all stages, perceived" is driven without being told of vehicles and lines.
"""

from openpi_like.driving.scenarios import PROMPTS
from openpi_like.train.study import Arm, Study

PLANNING, SINGLE = "configs/driving/stage3_planning.py", "configs/driving/single_stage.py"
SHORTER = ("steps=1500", "optimizer.decay_steps=1500")
PERCEIVED = "configs/driving/stages.py:perceived_"

study = Study(
    arms={
        "stage 1": Arm("configs/driving/stage1_alignment.py", driven=False),
        "stage 2": Arm("configs/driving/stage2_questions.py", start="stage 1", driven=False),
        "stage 2b": Arm("configs/driving/stage2b_forecasting.py", start="stage 2", driven=False),
        "all stages": Arm(PLANNING, start="stage 2b"),
        "without forecasting": Arm(PLANNING, start="stage 2"),
        "from nothing": Arm(SINGLE, SHORTER),
        "from nothing, as many steps": Arm(SINGLE),
        "perception": Arm("configs/driving/stages.py:perception", driven=False),
        "perceived stage 1": Arm(f"{PERCEIVED}stage1_alignment", start="perception", driven=False),
        "perceived stage 2": Arm(f"{PERCEIVED}stage2_questions", start="perceived stage 1", driven=False),
        "perceived stage 2b": Arm(f"{PERCEIVED}stage2b_forecasting", start="perceived stage 2", driven=False),
        "all stages, perceived": Arm(f"{PERCEIVED}stage3_planning", start="perceived stage 2b"),
    },
    robot="ego_vehicle",
    tasks=tuple(PROMPTS),
    episodes=10,
    varies=("steps",),
)
