"""pi0.5 with knowledge insulation that writes what it is about to do, and acts by that, on three Sawyer tasks.

All but that is as in insulated.py.
"""

import dataclasses
from pathlib import Path

from openpi_like.batch import ActionTokens
from openpi_like.config import load_run

base = load_run(Path(__file__).with_name("insulated.py"))
(entry,) = base.data.entries

config = dataclasses.replace(
    base,
    run_dir="runs/studies/insulated_subtasks",
    data=dataclasses.replace(base.data, entries=(dataclasses.replace(entry, text_key="subtask"),)),
    # Answers hold the subtask and then the actions.
    model=dataclasses.replace(base.model, thought_len=16, action_tokens=ActionTokens(max_len=56, count=512, skip=0)),
)
