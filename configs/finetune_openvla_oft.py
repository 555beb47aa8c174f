"""Fine-tunes OpenVLA-7B to the WidowX of Bridge V2 as OpenVLA-OFT does: LoRA on all linear maps, a fresh L1 head.

    python data/stats.py --robot configs/finetune_openvla_oft.py:ROBOT --data data/bridge_dataset/1.0.0 \\
        --out stats/widowx.json
    python train/train.py configs/finetune_openvla_oft.py mesh.fsdp=8

`weights/openvla-7b` holds the released safetensors, and Llama's SentencePiece model as `tokenizer.model`. The recipe is
the published one (arXiv 2502.19645 and openvla-oft's own options): rank 32, alpha 16, batch 64, 5e-4 for 100,000 steps
(then 50,000 more at a tenth of it); the base is held in bfloat16 and not trained. One camera and the state; others
are names in `cameras`, and as many ones in `image_slots`. For language that is followed more closely there is
`PrismaticConfig.openvla(film=True)`, with "film/" among the patterns of FRESH.
"""

import dataclasses

from openpi_like.data.augment import Augment
from openpi_like.data.config import DataConfig, MixtureEntry
from openpi_like.data.prompts import OpenVlaPrompt
from openpi_like.models.lora import Lora, LoraRule
from openpi_like.models.openvla_oft import OpenVlaOftConfig
from openpi_like.models.prismatic import PrismaticConfig
from openpi_like.robots.widowx import WIDOWX
from openpi_like.train.checkpoints.warm_start import WarmStart
from openpi_like.train.config import TrainConfig
from openpi_like.train.optimizer import OptimizerConfig
from openpi_like.train.state import Trainable

ROBOT = dataclasses.replace(WIDOWX, normalization="quantile")
FRESH = (r"^action_head/", r"^state_")
MAPS = r"^vlm/layers/(q|kv|out|gate_up|down)$|^(dino|siglip)/layers/\w+/kernel$|^projector/\w+/kernel$"

config = TrainConfig(
    run_dir="runs/openvla_oft_widowx",
    model=OpenVlaOftConfig(
        backbone=PrismaticConfig.openvla(),
        vocab_size=32_064,
        cameras=("base",),
        image_size=(224, 224),
        image_slots=(1,),
        prompt_len=48,
        prompt_format=OpenVlaPrompt(),
        eos=2,
        state_dim=ROBOT.state_size,
        action_dim=ROBOT.action_size,
        action_horizon=8,
        dtype="bfloat16",
        remat="nothing_saveable",
    ),
    data=DataConfig(
        entries=(MixtureEntry(robot=ROBOT, path="data/bridge_dataset/1.0.0"),),
        drop_cameras=("base_1", "base_2"),
        augment=Augment.openpi(),
        num_threads=8,
    ),
    stats="stats",
    tokenizer="weights/openvla-7b/tokenizer.model",
    warm_start=WarmStart("weights/openvla-7b", reinitialize=FRESH),
    trainable=Trainable(Lora((LoraRule(MAPS, rank=32, alpha=16.0),), also_train=FRESH), frozen_dtype="bfloat16"),
    batch_size=64,
    steps=100_000,
    optimizer=OptimizerConfig(peak_lr=5e-4, end_lr=5e-4, warmup_steps=1, decay_steps=100_000, weight_decay=0.0),
    ema_decay=None,
    validate_every=5_000,
    save_every=5_000,
)
