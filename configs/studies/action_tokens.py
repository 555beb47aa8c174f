"""Ways to produce actions, on the same data for the same steps: flow matching, FAST tokens, both with knowledge
insulation, and that once more with a subtask written before it acts.

    make compare

makes the data, statistics and tokenisers that policies.py names, and runs this study.
"""

from openpi_like.train.study import Arm, Study

study = Study(
    arms={name: Arm(f"configs/studies/{name}.py") for name in ("pi0", "fast", "insulated", "insulated_subtasks")},
    robot="sawyer",
    tasks=("button-press", "drawer-open", "window-close"),
    episodes=20,
    varies=("data",),  # the last reads a text of its steps too
)
