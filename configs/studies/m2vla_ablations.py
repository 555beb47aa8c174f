"""M2-VLA with and without its mixture of layers and its memory (arXiv 2604.24182, ablation on LIBERO), at tiny size.

    python train/study.py configs/studies/m2vla_ablations.py --run runs/studies/m2vla_ablations

The data is that of policies.py. There is no tiny pretrained vision-language model; what stands for one has learned to
say chunks of the same data (prismatic.py), and is frozen in the four arms after it. Without the mixture, the head is
that of VLA-Adapter.
"""

from openpi_like.train.study import Arm, Study

FRESH = ("^(queries|state_|norm_in|map_in|head|skill)",)

study = Study(
    arms={
        "OFT, all trained": Arm("configs/studies/prismatic.py"),
        "neither": Arm("configs/studies/vla_adapter.py", ("model.skills=None",), "OFT, all trained", FRESH),
        "mixture": Arm("configs/studies/m2vla.py", ("model.skills=None",), "OFT, all trained", FRESH),
        "memory": Arm("configs/studies/vla_adapter.py", (), "OFT, all trained", FRESH),
        "mixture and memory": Arm("configs/studies/m2vla.py", (), "OFT, all trained", FRESH),
    },
    robot="sawyer",
    tasks=("button-press", "drawer-open", "window-close"),
    episodes=20,
)
