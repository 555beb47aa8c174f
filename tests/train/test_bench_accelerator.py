"""The accelerator bench at its smallest size: that it measures what it says, and loses nothing when a part fails."""

import json
import math
import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from openpi_like.models.attention import VARIANTS

PROGRAM = Path(__file__).resolve().parents[1] / "bench" / "bench_accelerator.py"


@pytest.fixture(scope="module")
def bench() -> SimpleNamespace:
    return SimpleNamespace(**runpy.run_path(str(PROGRAM)))


def _rows(bench: SimpleNamespace, part: str) -> list[dict[str, Any]]:
    return json.loads(json.dumps(list(bench.run_part(bench.Args(size="tiny"), part))))


@pytest.mark.parametrize("weights", ["int8", "float8_e4m3fn"])
def test_sampling_in_fewer_bits(bench, weights):
    one, three = _rows(bench, f"sampling, {weights}")
    assert [(row["cameras"], row["batch"], row["weights"]) for row in (one, three)] == [
        (1, 1, weights),
        (3, 1, weights),
    ]
    for row in (one, three):
        assert 0 < row["p50_ms"] <= row["p95_ms"]
        assert row["calls"] >= 5
        assert row["gib"] > 0


def test_training_with_lora_and_where_its_steps_go(bench):
    *attention, row, where = _rows(bench, "training, LoRA on int8")
    assert {r["what"] for r in attention} == {"attention in training, LoRA on int8"}
    assert "failed" not in row
    assert row["samples_per_s"] == pytest.approx(row["batch"] / row["step_ms"] * 1e3)
    assert math.isfinite(row["loss"])
    assert row["mfu"] is None  # the peak of a CPU is not known
    # What is recomputed is no work of the model: 29 layers' products, forward and backward, on 3 x 4 patches.
    assert 0 < row["model_tflop_a_sample"] < 1e-3
    # The trace holds the work of its steps, not only their dispatch.
    assert where["step_ms"] > 0.4 * row["step_ms"]
    assert where["idle_ms"] < 0.8 * where["step_ms"]
    parts = {k: v for k, v in where.items() if ", " in k}
    assert sum(parts.values()) <= where["step_ms"]
    assert {"vlm", "siglip"} <= {name.partition(",")[0] for name in parts}


def test_tokens_and_attention(bench):
    (row,) = _rows(bench, "pi0-FAST")
    assert row["first_token_ms"] > 0
    assert row["token_ms"] is None or (row["token_ms"] > 0 and row["chunk_ms"] > row["first_token_ms"])
    rows = _rows(bench, "attention")
    assert {row["what"] for row in rows} == {"attention in sampling, batch 1"}
    assert {row["fastest"] for row in rows} <= set(VARIANTS)


def test_parts_are_processes_whose_failure_costs_no_other(bench, tmp_path, monkeypatch):
    out = tmp_path / "out.json"
    monkeypatch.setitem(bench.main.__globals__["PARTS"], "no such part", 1)
    status = bench.main(bench.Args(size="tiny", out=out, only=("no such part", "attention")))
    result = json.loads(out.read_text())
    assert status == 1
    assert set(result["problems"]) == {"no such part"}
    assert "KeyError" in result["problems"]["no such part"]
    assert len(result["rows"]) > 2
    assert (result["platform"], result["size"]) == ("cpu", "tiny")
    with pytest.raises(SystemExit, match="got only=\\['attentoin'\\]"):
        bench.main(bench.Args(only=("attentoin",)))
