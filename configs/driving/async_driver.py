"""A slow part that says what to do, and a fast one that plans: pi0.5 with knowledge insulation that writes a subtask.

    python train/train.py configs/driving/async_driver.py
    python serve/policy_server.py runs/driving/async_driver --think-every 4

The language model writes what the car is about to do ("give way"), the expert samples a plan that reads it. The server
keeps what was written for four plans, two seconds; then it is written anew. A client asks for another one at once with
`think: true`. All else is as in insulated.py.
"""

import dataclasses
from pathlib import Path

from openpi_like.batch import ActionTokens
from openpi_like.config import load_run

base = load_run(Path(__file__).with_name("insulated.py"))
(entry,) = base.data.entries

config = dataclasses.replace(
    base,
    run_dir="runs/driving/async_driver",
    data=dataclasses.replace(base.data, entries=(dataclasses.replace(entry, text_key="subtask"),)),
    # Answers hold the subtask and then the plan.
    model=dataclasses.replace(base.model, thought_len=16, action_tokens=ActionTokens(max_len=40, count=512, skip=0)),
)
