"""How many episodes help: success at a new task by the number of its demonstrations, fine-tuned and from nothing.

    python train/study.py configs/studies/learning_curve.py --run runs/studies/learning_curve

The data that pi0 is pretrained with is that of policies.py. That of the new task, once:

    python data/make_demos.py --robot sawyer --out runs/studies/new_task_data --episodes-per-task 50 \\
        --val-episodes-per-task 8 --tasks window-open
"""

from openpi_like.train.study import Arm, Study, learning_curve

NEW = "configs/studies/new_task.py"

study = Study(
    arms={
        "pretrained": Arm("configs/studies/pi0.py", driven=False),
        **learning_curve(NEW, name="{} episodes", start="pretrained"),
        **learning_curve(NEW, name="{} episodes, from scratch", set=("warm_start=None",)),
    },
    robot="sawyer",
    tasks=("window-open",),
    episodes=20,
    varies=("data",),
)
