"""Reads the toy dataset in a process that a test may kill: prints the position and a digest of every sample.

python -m tests.data.reader TOY TOKENIZER STATS START '{"num_threads": 2}'
"""

import dataclasses
import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

from openpi_like.batch import Batch
from openpi_like.data.config import DataConfig, MixtureEntry
from openpi_like.data.loader import Loader, make_loader
from openpi_like.data.stats import load_normalization
from openpi_like.data.text import TextTokenizer, read_tokenizer
from tests.data.toy import CART, SOME, TOLD, Shapes

BATCH = 8


def digests(batch: Batch) -> list[str]:
    """A digest of all arrays of each sample, pixels and masks included."""
    leaves = []
    for _, of in sorted(batch.items()):
        leaves += [of[camera] for camera in sorted(of)] if isinstance(of, dict) else [np.asarray(of)]
    return [hashlib.sha256(b"".join(x[i].tobytes() for x in leaves)).hexdigest() for i in range(len(leaves[0]))]


def read(toy: Path, tokenizer: Path, stats: Path, start: int, **options: Any) -> Loader:
    """Returns a loader of a mixture with everything that is drawn; close it."""
    config = DataConfig(
        (
            MixtureEntry(TOLD, str(toy), weight=3.0, selection=SOME),
            MixtureEntry(CART, str(toy), split="val", val_split=None),
        ),
        seed=5,
        camera_dropout=0.3,
        group_episodes=3,
    )
    return make_loader(
        dataclasses.replace(config, **options),
        batch_size=BATCH,
        policy=Shapes(),
        tokenizer=TextTokenizer(read_tokenizer(tokenizer), Shapes().prompt_len),
        normalizations={r.name: load_normalization(stats / f"{r.name}.json", r) for r in (TOLD, CART)},
        start=start,
    )


if __name__ == "__main__":
    toy, tokenizer, stats, start, options = sys.argv[1:]
    sys.stdout, lines = sys.stderr, os.fdopen(os.dup(1), "w", buffering=1)  # the loader prints, too
    loader = read(Path(toy), Path(tokenizer), Path(stats), int(start), **json.loads(options))
    position = int(start)
    for batch in loader:
        for digest in digests(batch):
            lines.write(f"{position} {digest}\n")
            position += 1
