"""One of three policies on the same data for the same steps: pi0, which samples actions by flow matching.

    python train/train.py configs/demo_compare_flow.py

The others are demo_compare_fast.py and demo_compare_insulated.py. What is not said here is as in demo_pretrain.py.
`make demo` makes the data, statistics and tokenisers, and runs all three; two CPU cores: about 2 minutes.
"""

import dataclasses
from pathlib import Path

from openpi_like.config import load_run

pretrain = load_run(Path(__file__).with_name("demo_pretrain.py"))
# By quantiles, as FAST tokens want it.
entries = tuple(
    dataclasses.replace(e, robot=dataclasses.replace(e.robot, normalization="quantile")) for e in pretrain.data.entries
)

config = dataclasses.replace(
    pretrain,
    run_dir="runs/demo/compare_flow",
    model=dataclasses.replace(pretrain.model, vocab_size=1536),
    data=dataclasses.replace(pretrain.data, entries=entries),
    tokenizer="runs/demo/text_fast.model",
    steps=1_500,
    optimizer=dataclasses.replace(pretrain.optimizer, decay_steps=1_500),
    validate_every=750,
    save_every=750,
)
