"""What of a vision-language model matters to VLM4VLA (arXiv 2601.03309, tables 4, 7 and 8), at tiny size.

    python train/study.py configs/studies/vlm4vla_ablations.py --run runs/studies/ablations

The data is that of policies.py. There is no tiny pretrained vision-language model; what stands for one has learned to
write FAST tokens of the same data. So freezing its image tower (published: much worse), or its table of tokens (no
difference), and beginning from nothing (worse) can be compared. A tower frozen as it was drawn is the worst case.
"""

from openpi_like.train.study import Arm, Study

STARTED = "configs/studies/vlm4vla_started.py"
HEAD = ("^action_",)

study = Study(
    arms={
        "fast": Arm("configs/studies/fast.py", driven=False),
        "from fast": Arm(STARTED, start="fast", reinitialize=HEAD),
        "from fast, vision frozen": Arm(STARTED, ("trainable.frozen=('^vision/',)",), "fast", HEAD),
        "from fast, embeddings frozen": Arm(STARTED, ("trainable.frozen=('^vlm/embedding$',)",), "fast", HEAD),
        "from scratch": Arm("configs/studies/vlm4vla.py"),
        "from scratch, vision frozen": Arm("configs/studies/vlm4vla.py", ("trainable.frozen=('^vision/',)",)),
    },
    robot="sawyer",
    tasks=("button-press", "drawer-open", "window-close"),
    episodes=20,
)
