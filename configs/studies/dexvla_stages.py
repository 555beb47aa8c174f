"""DexVLA's expert learned before there is a vision-language model in front of it, and from nothing (arXiv 2502.05855,
its ablation of the stages), at tiny size.

    python train/study.py configs/studies/dexvla_stages.py --run runs/studies/dexvla_stages

The data is that of policies.py, for every arm. Stage 2 takes the expert of stage 1, without what it was told by, and
its backbone begins from nothing, as there is no tiny one that was published; stage 3 goes on from stage 2 along another
cosine. "from nothing" has the steps of stage 2, "from nothing, as many steps" those of all three.
"""

from openpi_like.models.dexvla_stage1 import LEFT_BEHIND
from openpi_like.train.study import Arm, Study

DEXVLA, STARTED = "configs/studies/dexvla.py", "configs/studies/dexvla_started.py"
# What stage 1 does not hand over.
FRESH = (r"^(dino|siglip|projector|vlm|fusion)/", r"^expert/(combine_\d|condition_in)/")
LONGER = ("steps=4500", "optimizer.decay_steps=4500")

study = Study(
    arms={
        "stage 1": Arm("configs/studies/dexvla_stage1.py"),
        "stage 2": Arm(STARTED, (f"warm_start.drop={LEFT_BEHIND!r}",), start="stage 1", reinitialize=FRESH),
        "stage 3": Arm(STARTED, start="stage 2"),
        "from nothing": Arm(DEXVLA),
        "from nothing, as many steps": Arm(DEXVLA, LONGER),
    },
    robot="sawyer",
    tasks=("button-press", "drawer-open", "window-close"),
    episodes=20,
    varies=("steps", "data"),  # all but stage 1 read the subtasks of the steps too
)
