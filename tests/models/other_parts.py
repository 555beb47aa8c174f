"""Batches that differ in one part of what a policy sees."""

import copy
from typing import Any

import numpy as np

PARTS = ("images", "prompt", "state")


def with_other(batch: Any, part: str) -> Any:
    """Returns a copy of a batch with another content in the valid entries of one of `PARTS`."""
    changed = copy.deepcopy(batch)
    if part == "images":
        changed["images"]["base"] = 255 - changed["images"]["base"]
    elif part == "prompt":
        changed["prompt"] = np.where(changed["prompt_mask"], 9, 0).astype(np.int32)
    else:
        changed["state"] = changed["state"] + 1
    return changed
