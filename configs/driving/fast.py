"""pi0-FAST that drives: the plan as action tokens, written behind cameras, state and command.

    python data/fit_fast.py configs/driving/fast.py --out runs/driving/fast_tokens --vocab-size 512 --scale 30
    python train/train.py configs/driving/fast.py

All but the policy is that of flow.py, whose statistics it takes: here they bring numbers to [-1, 1].
"""

import dataclasses
from pathlib import Path

from openpi_like.batch import ActionTokens
from openpi_like.config import load_run
from openpi_like.models.pi0_fast import Pi0FastConfig
from openpi_like.robots.ego_vehicle import EGO_VEHICLE

base = load_run(Path(__file__).with_name("flow.py"))
(entry,) = base.data.entries
robot = dataclasses.replace(EGO_VEHICLE, normalization="quantile")
same = ("cameras", "image_size", "state_dim", "action_dim", "action_horizon")

config = dataclasses.replace(
    base,
    run_dir="runs/driving/fast",
    model=Pi0FastConfig.tiny(
        **{name: getattr(base.model, name) for name in same},
        prompt_len=96,
        vocab_size=1536,  # the text's 1024, and behind them those of actions
        action_tokens=ActionTokens(max_len=24, count=512, skip=0),
    ),
    data=dataclasses.replace(base.data, entries=(dataclasses.replace(entry, robot=robot),)),
    action_tokenizer="runs/driving/fast_tokens",
)
