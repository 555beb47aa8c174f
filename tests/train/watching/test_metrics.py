"""Metrics files: one line per step whatever happened to the run; and what the lines say."""

import json
import subprocess
import sys
import types

import jax
import numpy as np
import pytest

from openpi_like.train.config import TrainConfig
from openpi_like.train.watching.metrics import MetricsWriter, read_metrics
from openpi_like.train.watching.step_log import StepLog, device_memory, host_memory, waiting_advice


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


def test_one_host_writes_for_all_and_the_others_know_what_was_written(tmp_path):
    lead = MetricsWriter(tmp_path, resume_step=0)
    for step in (1, 2, 3):
        lead.write(step, "skipped" if step > 1 else "train", {"loss": 1.0})
    before = lead.path.read_text()
    other = MetricsWriter(tmp_path, resume_step=2, active=False)
    other.write(3, "train", {"loss": 30.0})
    other.close()
    assert lead.path.read_text() == before
    assert other.before == {"train": 1, "skipped": 1}
    lead.close()
    with MetricsWriter(tmp_path, resume_step=3) as resumed:
        assert resumed.before == {"train": 1, "skipped": 2}


# ---- Log lines -------------------------------------------------------------------------------------------------------


class Clock:
    """Time and a loader, both of which stand still until told otherwise."""

    def __init__(self) -> None:
        self.now, self.wait_seconds, self.saturated = 1000.0, 5.0, 0

    def __call__(self) -> float:
        return self.now


def step_log(clock: Clock, **options: float) -> StepLog:
    return StepLog(clock, step=40, batch_size=6, schedule=lambda step: step / 100, clock=clock, **options)


def test_a_line_has_means_over_its_steps_and_parts_weighted_by_their_samples(monkeypatch):
    clock = Clock()
    log = step_log(clock, model_flops_per_sample=2e12, peak_flops=197e12)
    log.add(
        {
            "loss": 1.0,
            "grad_norm": 2.0,
            "loss/a": 4.0,
            "samples/a": 1.0,
            "loss/b": 0.5,
            "samples/b": 5.0,
            "loss/c": 0.0,
            "samples/c": 0.0,
        }
    )
    log.add(
        {
            "loss": 3.0,
            "grad_norm": 4.0,
            "loss/a": 1.0,
            "samples/a": 3.0,
            "loss/b": 1.5,
            "samples/b": 3.0,
            "loss/c": 0.0,
            "samples/c": 0.0,
        }
    )
    clock.now += 3.0
    clock.wait_seconds += 0.6
    with log.paused():
        clock.now += 100.0  # validation
        clock.wait_seconds += 7.0
    clock.now += 1.0
    clock.saturated = 7
    line = log.line(42, skipped=2)
    memory = line.pop("host_memory_gib")
    assert 0.01 < memory < 1000
    assert np.isnan(line.pop("loss/c"))
    assert line == pytest.approx(
        {
            "loss": 2.0,
            "grad_norm": 3.0,
            "loss/a": (4.0 * 1 + 1.0 * 3) / 4,
            "loss/b": (0.5 * 5 + 1.5 * 3) / 8,
            "samples/a": 4.0,
            "samples/b": 8.0,
            "samples/c": 0.0,
            "learning_rate": 0.41,
            "step_time": 2.0,
            "samples_per_s": 3.0,
            "mfu": 3 * 2e12 / 197e12,
            "data_wait": 0.15,
            "saturated": 7.0,
            "skipped": 2.0,
        }
    )


def test_every_line_begins_anew_and_says_nothing_of_a_peak_that_is_not_known():
    clock = Clock()
    log = step_log(clock, model_flops_per_sample=2e12)
    for loss in (1.0, 2.0):
        log.add({"loss": loss, "grad_norm": 1.0})
    clock.now += 10.0
    assert log.line(42, skipped=0)["loss"] == 1.5
    log.add({"loss": 9.0, "grad_norm": 1.0})
    clock.now += 4.0
    clock.wait_seconds += 1.0
    second = log.line(44, skipped=1)  # of two steps one was skipped, which has no loss and takes its time
    assert (second["loss"], second["step_time"], second["samples_per_s"], second["data_wait"]) == (9.0, 2.0, 3.0, 0.25)
    assert "mfu" not in second
    clock.now += 1.0
    nothing = log.line(45, skipped=2)
    assert np.isnan(nothing["loss"])
    assert "grad_norm" not in nothing


def test_memory_is_the_most_of_any_device_and_includes_workers(monkeypatch):
    assert device_memory() is None  # CPUs do not say
    device = lambda **stats: types.SimpleNamespace(memory_stats=lambda: stats)  # noqa: E731
    devices = [device(peak_bytes_in_use=3), device(peak_bytes_in_use=5), device(bytes_in_use=9)]
    monkeypatch.setattr(jax, "local_devices", lambda: devices)
    assert device_memory() == 5
    alone = host_memory()
    held = "x = b'1' * (200 << 20); print('held', flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", held], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as worker:
        assert worker.stdout is not None
        worker.stdout.readline()
        assert host_memory() - alone > 190 << 20
        worker.communicate(b"\n")
    assert worker.returncode == 0


# ---- Configs ---------------------------------------------------------------------------------------------------------


def test_impossible_runs_are_refused_with_all_reasons(tiny_policy):
    from openpi_like.data.config import DataConfig, MixtureEntry
    from openpi_like.robots.sawyer import SAWYER

    data = DataConfig(entries=(MixtureEntry(robot=SAWYER, path="somewhere"),))
    with pytest.raises(ValueError, match=r"steps=-1.*batch_size=0.*ema_decay=1.0.*tokenizer=None needs a warm_start"):
        TrainConfig("run", tiny_policy, data, "stats", None, batch_size=0, steps=-1, ema_decay=1.0)
    for profile in ((0, 3), (5, 4)):
        with pytest.raises(ValueError, match=r"profile=.*expected a first and a last step.*skip_bad_steps=-1"):
            TrainConfig("run", tiny_policy, data, "stats", "text", 8, 10, skip_bad_steps=-1, profile=profile)


@pytest.mark.parametrize(
    ("wait", "workers", "cores", "said"),
    [
        (0.1, 0, 16, None),
        (0.34, 0, 16, "34% of the time went by waiting for data; data.num_workers=2 decodes in more processes"),
        (0.34, 6, 16, "34% of the time went by waiting for data; data.num_workers=12 decodes in more processes"),
        (0.5, 12, 16, "50% of the time went by waiting for data; data.num_workers=15 decodes in more processes"),
        (0.5, 15, 16, "50% of the time went by waiting for data; all 16 cores are in use: "),
        (0.5, 0, 1, "50% of the time went by waiting for data; all 1 cores are in use: "),
    ],
)
def test_a_run_that_waits_for_data_is_told_what_to_set(wait, workers, cores, said):
    advice = waiting_advice({"data_wait": wait}, workers=workers, cores=cores)
    assert advice is None if said is None else advice is not None and advice.startswith(said)
