"""Metrics files: one line per step whatever happened to the run."""

import json

import pytest

from openpi_like.train.config import TrainConfig
from openpi_like.train.metrics import MetricsWriter, read_metrics


def test_resuming_removes_what_the_checkpoint_does_not_contain(tmp_path):
    writer = MetricsWriter(tmp_path, resume_step=0)
    for step in (1, 2, 3):
        writer.write(step, "train", {"loss": float(step)})
    writer.close()
    with (tmp_path / "metrics.jsonl").open("a") as f:
        f.write('{"step": 4, "spl')  # killed in the middle of a line
    writer = MetricsWriter(tmp_path, resume_step=2)
    writer.write(3, "train", {"loss": 30.0})
    writer.close()
    assert [(line["step"], line["loss"]) for line in read_metrics(tmp_path / "metrics.jsonl")] == [
        (1, 1),
        (2, 2),
        (3, 30),
    ]


def test_a_new_run_starts_a_new_file(tmp_path):
    for loss in (1.0, 2.0):
        writer = MetricsWriter(tmp_path, resume_step=0)
        writer.write(1, "train", {"loss": loss})
        writer.close()
    assert [line["loss"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [2.0]


def test_values_that_are_not_finite_are_null_because_json_has_no_nan(tmp_path):
    writer = MetricsWriter(tmp_path, resume_step=0)
    writer.write(1, "val", {"a": float("nan"), "b": float("inf"), "c": 0.5})
    writer.close()
    line = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert line == {"step": 1, "split": "val", "a": None, "b": None, "c": 0.5}


def test_tensorboard_is_written_when_asked_for(tmp_path):
    writer = MetricsWriter(tmp_path, resume_step=0, tensorboard=True)
    writer.write(1, "train", {"loss": 1.0})
    writer.close()
    assert list((tmp_path / "tensorboard").glob("events.*"))


def test_impossible_runs_are_refused_with_all_reasons(tiny_policy):
    from openpi_like.data.loader import DataConfig, MixtureEntry
    from openpi_like.robots.sawyer import SAWYER

    data = DataConfig(entries=(MixtureEntry(robot=SAWYER, path="somewhere"),))
    with pytest.raises(ValueError, match=r"steps=-1.*batch_size=0.*ema_decay=1.0.*tokenizer=None needs a warm_start"):
        TrainConfig("run", tiny_policy, data, "stats", None, batch_size=0, steps=-1, ema_decay=1.0)
