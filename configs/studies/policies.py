"""Policies of the field on the same data for the same steps: three Sawyer tasks, tiny backbones from nothing.

    python train/study.py configs/studies/policies.py --run runs/studies/policies

Data, statistics and tokenisers, once:

    python data/make_demos.py --robot sawyer --out runs/studies/data --episodes-per-task 60 --val-episodes-per-task 4 \\
        --tasks button-press drawer-open window-close
    python data/stats.py --robot sawyer --data runs/studies/data/sawyer_sim/1.0.0 --out runs/studies/stats/sawyer.json
    python data/fit_text.py --data runs/studies/data/sawyer_sim/1.0.0 --out runs/studies/text.model \\
        --keys language_instruction subtask --state-in-prompt --vocab-size 1024
    python data/fit_fast.py configs/studies/fast.py --out runs/studies/fast_tokens --vocab-size 512
"""

from openpi_like.train.study import Arm, Study

study = Study(
    arms={name: Arm(f"configs/studies/{name}.py") for name in ("pi0", "smolvla", "vlm4vla", "openvla", "openvla_oft")},
    robot="sawyer",
    tasks=("button-press", "drawer-open", "window-close"),
    episodes=20,
)
