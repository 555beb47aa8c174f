"""When a run stops early, and which configs cannot."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest

from openpi_like.train.checkpoints.checkpoint import Keep
from openpi_like.train.early_stopping import Patience
from tests.train.run_files import run_config


def after(most: int | None, *scores: float | None) -> Patience:
    patience = Patience(most)
    for i, score in enumerate(scores):
        assert not patience.spent
        patience.look(10 * (i + 1), score)
    return patience


@pytest.mark.parametrize(
    ("most", "scores", "best", "spent"),
    [
        (2, (3.0, 2.0, 2.5, 2.0), (40, 2.0), True),  # as good is not better
        (2, (3.0, 2.0, 2.5, 1.0, 1.5), (40, 1.0), False),
        (2, (3.0, math.nan, None), (10, 3.0), True),
        (2, (None, 3.0, math.inf), (20, 3.0), False),
        (1, (math.nan,), None, True),
        (None, (1.0, *([2.0] * 50)), (10, 1.0), False),
    ],
)
def test_it_is_spent_after_so_many_validations_without_a_better_one(
    most: int | None, scores: Any, best: Any, spent: bool
) -> None:
    patience = after(most, *scores)
    assert (patience.best, patience.spent) == (best, spent)


def test_a_run_that_goes_on_knows_what_was() -> None:
    """From the metrics up to where it goes on; what a killed run did after that does not count."""
    keep = Keep(best=1, metric="action_error")
    lines = [
        {"step": 10, "split": "val", "loss/arm": 9.0, "action_error/arm": 0.5, "action_error/cart": 0.7},
        {"step": 15, "split": "train", "loss": 0.1},
        {"step": 20, "split": "val", "loss/arm": 1.0, "action_error/arm": None, "action_error/cart": 0.1},
        {"step": 30, "split": "val", "loss/arm": 1.0, "action_error/arm": 0.1, "action_error/cart": 0.1},
    ]
    patience = Patience(2)
    patience.look_back(keep, lines, until=20)
    assert (patience.best, patience.since) == ((10, pytest.approx(0.6)), 1)
    patience.look(30, 0.65)
    assert patience.spent


def test_configs_that_cannot_stop_early(tmp_path: Path, policy: Any) -> None:
    config = run_config(tmp_path, policy, save_every=10, validate_every=10, keep=Keep(best=1), patience=3)
    entry = dataclasses.replace(config.data.entries[0], val_split=None)
    data = dataclasses.replace(config.data, entries=(entry,))
    with pytest.raises(
        ValueError, match=r"need held-out episodes, .* split='train\[:90%\]', val_split='train\[90%:\]'"
    ):
        dataclasses.replace(config, data=data)
    with pytest.raises(ValueError, match=r"patience=0, expected at least 1 .*; patience ends .* unless keep.best"):
        dataclasses.replace(config, patience=0, keep=Keep())
