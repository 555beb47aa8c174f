"""DexVLA at tiny size on three Sawyer tasks: it writes the subtask, and acts by that. See dexvla_stages.py.

All but that and the policy is as in pi0.py.
"""

import dataclasses
from pathlib import Path

from openpi_like.config import load_run
from openpi_like.data.prompts import OpenVlaPrompt
from openpi_like.models.dexvla import DexVlaConfig

base = load_run(Path(__file__).with_name("pi0.py"))
(entry,) = base.data.entries
same = ("cameras", "state_dim", "action_dim", "action_horizon", "vocab_size")

config = dataclasses.replace(
    base,
    run_dir="runs/studies/dexvla",
    data=dataclasses.replace(base.data, entries=(dataclasses.replace(entry, text_key="subtask"),)),
    model=DexVlaConfig.tiny(
        **{name: getattr(base.model, name) for name in same},
        prompt_format=OpenVlaPrompt(),
        prompt_len=40,
        thought_len=16,
    ),
)
