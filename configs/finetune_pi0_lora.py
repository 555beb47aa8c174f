"""Fine-tunes the released pi0 with LoRA on one chip of 16 GB: the base is held in 8 bits and not trained.

    python data/stats.py --robot widowx --data data/bridge_dataset/1.0.0 --out stats/widowx.json
    python train/train.py configs/finetune_pi0_lora.py
    python train/convert.py runs/pi0_widowx_lora weights/pi0_widowx --to openpi

Everything else is as in `finetune_pi0_widowx.py`. The overlay is 0.92 % of the base, and so are its checkpoints. The
run is served, and converted, merged; `--keep-lora` writes the overlay as openpi has it. Other maps, ranks and scales:
`LoraRule`. Without `frozen_dtype` the base is held in bfloat16, for 2.6 GiB more.
"""

import dataclasses
from pathlib import Path

from openpi_like.config import load_run
from openpi_like.train import presets

full = load_run(Path(__file__).with_name("finetune_pi0_widowx.py"))

config = dataclasses.replace(
    full,
    run_dir="runs/pi0_widowx_lora",
    trainable=presets.lora(full.model, frozen_dtype="int8"),
    batch_size=8,
    optimizer=dataclasses.replace(full.optimizer, peak_lr=2e-4, end_lr=2e-5),
)
