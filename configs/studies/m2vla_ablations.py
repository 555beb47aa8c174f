"""M2-VLA with and without its mixture of layers and its memory (arXiv 2604.24182, ablation on LIBERO), at tiny size.

    python train/study.py configs/studies/m2vla_ablations.py --run runs/studies/m2vla_ablations

The data is that of policies.py. There is no tiny pretrained vision-language model; what stands for one has learned to
say chunks of the same data (prismatic.py), and is frozen in the arms after it. Without the mixture, the head is that of
VLA-Adapter. In the last arm it is that of the paper, which predicts noise.
"""

from openpi_like.train.study import Arm, Study

FRESH = ("^(queries|state_|norm_in|map_in|head|skill)",)
NOISE = ("^(queries|state_|norm_in|map_in|head|skill|action_|step_)",)

study = Study(
    arms={
        "OFT, all trained": Arm("configs/studies/prismatic.py"),
        "neither": Arm("configs/studies/vla_adapter.py", ("model.skills=None",), "OFT, all trained", FRESH),
        "mixture": Arm("configs/studies/m2vla.py", ("model.skills=None",), "OFT, all trained", FRESH),
        "memory": Arm("configs/studies/vla_adapter.py", (), "OFT, all trained", FRESH),
        "mixture and memory": Arm("configs/studies/m2vla.py", (), "OFT, all trained", FRESH),
        "both, predicting noise": Arm("configs/studies/m2vla_noise.py", (), "OFT, all trained", NOISE),
    },
    robot="sawyer",
    tasks=("button-press", "drawer-open", "window-close"),
    episodes=20,
)
