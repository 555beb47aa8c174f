"""A language model that drives: the plan in plain digits, `[(0.02,1.50),...,(0.31,9.80)]`, in metres.

    python data/stats.py --config configs/driving/text.py
    python train/train.py configs/driving/text.py

All but policy and statistics is that of flow.py. The plan is not normalised, so statistics are of all its points
together, and in a directory of their own; only those of the state, which stands in the prompt, are used.
"""

import dataclasses
from pathlib import Path

from openpi_like.config import load_run
from openpi_like.models.text_waypoints import TextWaypointsConfig
from openpi_like.robots.ego_vehicle import EGO_VEHICLE_METRES

base = load_run(Path(__file__).with_name("flow.py"))
(entry,) = base.data.entries
robot = dataclasses.replace(EGO_VEHICLE_METRES, normalization="quantile")
same = ("cameras", "image_size", "state_dim", "action_dim", "action_horizon", "vocab_size")

config = dataclasses.replace(
    base,
    run_dir="runs/driving/text",
    model=TextWaypointsConfig.tiny(**{name: getattr(base.model, name) for name in same}, prompt_len=96),
    data=dataclasses.replace(base.data, entries=(dataclasses.replace(entry, robot=robot),)),
    stats="runs/driving/stats_pooled",
)
