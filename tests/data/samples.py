"""Batches taken apart into samples."""

import numpy as np

from openpi_like.batch import Batch


def flatten(batch: Batch) -> dict[str, np.ndarray]:
    flat = {f"images/{k}": v for k, v in batch["images"].items()}
    flat |= {f"image_mask/{k}": v for k, v in batch["image_mask"].items()}
    return flat | {k: v for k, v in batch.items() if isinstance(v, np.ndarray)}


def rows(batches: list[Batch]) -> list[tuple[bytes, ...]]:
    """Every sample as bytes, pixels included."""
    flat = [flatten(b) for b in batches]
    return [tuple(f[k][i].tobytes() for k in sorted(f)) for f in flat for i in range(len(f["state"]))]
