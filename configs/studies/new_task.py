"""pi0 on a Sawyer task that it was not trained on, from a policy that knows three others: what an arm of
learning_curve.py is.

Steps and policy are those of pi0.py; the best step by the error of sampled actions on held-out episodes is kept.
"""

import dataclasses
from pathlib import Path

from openpi_like.config import load_run
from openpi_like.data.augment import Augment
from openpi_like.data.config import DataConfig, MixtureEntry
from openpi_like.train.checkpoints.checkpoint import Keep
from openpi_like.train.checkpoints.warm_start import WarmStart

base = load_run(Path(__file__).with_name("pi0.py"))

config = dataclasses.replace(
    base,
    run_dir="runs/studies/new_task",
    data=DataConfig(
        entries=(MixtureEntry(base.data.entries[0].robot, "runs/studies/new_task_data/sawyer_sim/1.0.0"),),
        augment=Augment.octo(),
    ),
    warm_start=WarmStart("runs/studies/pi0"),
    keep=Keep(best=1, metric="action_error"),
    validate_every=250,
    save_every=250,
    patience=4,
)
