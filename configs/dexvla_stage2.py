"""DexVLA, stage 2: Qwen2-VL-2B in front of the expert of stage 1, on one robot, writing its reasoning.

    python train/train.py configs/dexvla_stage2.py mesh.fsdp=16

`data/aloha` has a text field "reasoning" at every step: what is done next and why, about every five seconds another.
`weights/qwen2-vl-2b` holds Qwen/Qwen2-VL-2B-Instruct. From stage 1 comes the expert; what it was told by stays behind.
The image tower is frozen, its merger is not; 2e-5 throughout, as published (arXiv 2502.05855, table 1).
"""

import dataclasses
from pathlib import Path

from openpi_like.config import load_run
from openpi_like.data.augment import Augment
from openpi_like.data.config import DataConfig
from openpi_like.data.prompts import ChatPrompt
from openpi_like.models.dexvla import DexVlaConfig
from openpi_like.models.dexvla_stage1 import LEFT_BEHIND
from openpi_like.models.qwen_vl import QwenVlConfig
from openpi_like.train.checkpoints.warm_start import WarmStart
from openpi_like.train.state import Trainable

before = load_run(Path(__file__).with_name("dexvla_stage1.py"))
entry = dataclasses.replace(before.data.entries[0], text_key="reasoning", weight=1.0)
same = ("expert", "state_dim", "action_dim", "action_horizon", "robots", "diffusion", "dtype", "remat")
TOLD = r"^expert/(combine_\d|condition_in)/"

config = dataclasses.replace(
    before,
    run_dir="runs/dexvla_stage2",
    model=DexVlaConfig(
        **{name: getattr(before.model, name) for name in same},
        backbone=QwenVlConfig.qwen2_vl_2b(),
        cameras=("base", "wrist_left", "wrist_right"),
        image_size=(252, 308),
        image_slots=(15, 17, 19),
        prompt_len=80,
        prompt_format=ChatPrompt(ask="{text}"),
        vocab_size=151_936,
        thought_len=80,
    ),
    data=DataConfig(entries=(entry,), drop_cameras=("base_1",), augment=Augment.openpi(), num_threads=16),
    tokenizer="weights/qwen2-vl-2b",
    warm_start=WarmStart(
        "weights/qwen2-vl-2b",
        reinitialize=("^(expert|fusion)/",),
        beside=WarmStart("runs/dexvla_stage1", reinitialize=("^fusion/", TOLD), drop=LEFT_BEHIND),
    ),
    trainable=Trainable(frozen=("^vision/(patch$|layers/)",)),
    steps=100_000,
    optimizer=dataclasses.replace(before.optimizer, peak_lr=2e-5, end_lr=2e-5, decay_steps=100_000),
)
