"""What a teacher is worth that is not there at the end (DiMA): a small planner trained with a large one and without,
and the large one itself; told the nearest vehicles and lines beside six cameras.

    python train/study.py configs/driving/distillation.py --run runs/driving/distillation

What it needs is made as policies.py says. Latencies are in the report: `python serve/driving_report.py RUN`.
"""

from openpi_like.driving.scenarios import PROMPTS
from openpi_like.train.study import Arm, Study

SHORTER = ("steps=1500", "optimizer.decay_steps=1500", "validate_every=500", "save_every=500")

study = Study(
    arms={
        "planner": Arm("configs/driving/scenes.py:planner", SHORTER),
        "dima": Arm("configs/driving/scenes.py:dima", SHORTER, driven=False),
        "planner that was taught": Arm("configs/driving/scenes.py:dima_student", start="dima"),
        "its teacher": Arm("configs/driving/scenes.py:dima_teacher", start="dima"),
    },
    robot="ego_vehicle",
    tasks=tuple(PROMPTS),
    episodes=10,
    also=(
        *("serve/open_loop.py", "--data", "runs/driving/data/ego_vehicle_sim/1.0.0"),
        *("--label", "{arm}", "--out", "{folder}/open_loop/{arm}.jsonl"),
    ),
)
