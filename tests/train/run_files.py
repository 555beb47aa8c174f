"""Small runs on disk, and how to damage them."""

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp

from openpi_like.data.config import DataConfig, MixtureEntry
from openpi_like.models.arrays import OrbaxArrays
from openpi_like.models.lora import Lora, LoraRule
from openpi_like.models.weights import unflatten
from openpi_like.robots.sawyer import SAWYER
from openpi_like.train.checkpoints.checkpoint import Keep
from openpi_like.train.config import TrainConfig
from openpi_like.train.state import Trainable

ORDER = {"seed": 3, "group_episodes": None, "entries": [{"robot": "sawyer_sim", "frames": 7}]}
LORA = Lora((LoraRule("^(vlm|expert)/layers/down$", rank=2, alpha=6.0),))
LORA_BASE = {"kept": Trainable(LORA, frozen_dtype="int8"), "noted": Trainable(LORA)}
KEEP = Keep(newest=1, best=1, every=20)


def run_config(run_dir: Path, policy: Any, **changes: Any) -> TrainConfig:
    data = DataConfig((MixtureEntry(SAWYER, "data"),))
    options: dict[str, Any] = {
        "stats": "stats",
        "tokenizer": "t",
        "batch_size": 8,
        "steps": 30,
        "keep": KEEP,
        **changes,
    }
    return TrainConfig(str(run_dir), policy, data, **options)


def shapes(item: Path) -> dict[str, tuple[int, ...]]:
    return OrbaxArrays(item).shapes


def read(item: Path) -> dict[str, np.ndarray]:
    arrays = OrbaxArrays(item)
    return {name: arrays.read(name) for name in arrays.shapes}


def rewrite(item: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    weights = read(item)
    change(weights)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(item, unflatten(weights), force=True)


def edit(step: Path, change: Callable[[dict[str, Any]], Any], *, sign: bool = False) -> None:
    path = step / "contract" / "metadata"
    record = json.loads(path.read_text())
    change(record)
    if sign:
        record["hash"] = hashlib.sha256(json.dumps(record["contract"], sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps(record))


def lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if re.match("step [0-9]+, ", line)]
