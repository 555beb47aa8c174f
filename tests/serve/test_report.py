"""The report of a run with known numbers, and of one with nothing in it."""

import json
import runpy
from pathlib import Path

import pytest
from PIL import Image

from openpi_like.serve.evaluation import Episode, append_episode

REPORT = runpy.run_path(str(Path(__file__).resolve().parents[2] / "serve" / "report.py"))


@pytest.fixture
def run(tmp_path):
    for name, robot in (("pretrain", "arm"), ("finetune", "aloha")):
        (tmp_path / name).mkdir()
        train = [{"step": s, "split": "train", "loss": 2 / s, "step_time": 0.2, "data_wait": 0.25} for s in (1, 2, 4)]
        val = {"step": 4, "split": "val", f"loss/{robot}": 0.125, f"action_mae/{robot}/hand_0 [m]": 0.0421}
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in [*train, val]))
    for kind, wins in (("flow", 3), ("fast", 2), ("insulated", 4)):
        (tmp_path / f"compare_{kind}").mkdir()
        line = {"step": 7, "split": "train", "loss": 1.0, "step_time": 0.125, "data_wait": 0.0}
        val = {"step": 7, "split": "val", "loss/arm": 0.5, "action_mae/arm/hand_0 [m]": 0.01 * wins}
        (tmp_path / f"compare_{kind}" / "metrics.jsonl").write_text(json.dumps(line) + "\n" + json.dumps(val) + "\n")
        for seed in range(5):
            episode = Episode("sawyer", "lift", "trained", seed, seed < wins, 5, "raycast", (float(wins),))
            (tmp_path / "compared").mkdir(exist_ok=True)
            append_episode(tmp_path / "compared" / f"{kind}.jsonl", episode)
    weights = [
        {"weight": "a", "shape": "(2,)", "from": "checkpoint", "why": "same"},
        {"weight": "b<script>", "shape": "(3,)", "from": "fresh", "why": "asked"},
    ]
    (tmp_path / "finetune" / "load_report.json").write_text(json.dumps(weights))
    demo = {"seconds": {"one": 60.0, "two": 30.0}, "commands": {"one": "python a.py", "two": "python b.py"}}
    demo.update({"hardware": {"cpu": "abacus", "cores": 2, "python": "3.11.7"}, "date": "2026-11-21"})
    (tmp_path / "demo.json").write_text(json.dumps(demo))
    (tmp_path / "rollouts").mkdir()
    for policy, wins in (("trained", 9), ("untrained", 0), ("expert", 10)):
        for seed in range(10):
            latency = () if policy == "expert" else (float(seed),) * 2
            episode = Episode("arm", "lift", policy, seed, seed < wins, 5, "raycast", latency)
            append_episode(tmp_path / "rollouts" / f"arm_{policy}.jsonl", episode)
    (tmp_path / "frames").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "frames" / "arm_lift.gif")
    return tmp_path


def test_numbers_are_those_of_the_run(run, capsys):
    REPORT["main"](REPORT["Args"](run))
    numbers = json.loads((run / "report.json").read_text())
    counts = {r["policy"]: (r["successes"], r["episodes"]) for r in numbers["success"]}
    assert counts == {"trained": (9, 10), "untrained": (0, 10), "expert": (10, 10)}
    assert numbers["seconds"] == {"one": 60.0, "two": 30.0}
    assert numbers["latency_ms"]["arm"]["requests"] == 20
    assert numbers["latency_ms"]["arm"]["p50"] == 4.5
    assert numbers["training"]["pretrain"]["loss_last"] == 0.5
    assert numbers["training"]["finetune"]["action_mae"] == {"aloha/hand_0 [m]": 0.0421}
    assert numbers["weights"]["loaded"] == 1
    fast = numbers["compared"]["fast"]
    assert (fast["steps"], fast["successes"], fast["episodes"], fast["ms_per_step"]) == (7, 2, 5, 125.0)
    assert (fast["latency_ms"]["p50"], fast["action_mae"]) == (2.0, {"arm/hand_0 [m]": 0.02})


def test_the_page_is_one_file_that_shows_them(run):
    REPORT["main"](REPORT["Args"](run))
    page = (run / "report.html").read_text()
    for text in (
        "9/10  [0.60, 0.98]",
        "0.0421",
        "abacus, 2 cores",
        "1.5 min",
        "python a.py",
        "1 of 1",
        "25.0%",
        "4.5",
        "2/5  [0.12, 0.77]",
    ):
        assert text in page
    assert "http" not in page
    assert "<script" not in page  # texts are escaped
    assert page.count("data:image/png;base64,") == 3
    assert page.count("data:image/gif;base64,") == 1


def test_everything_that_is_missing_is_listed(tmp_path):
    with pytest.raises(SystemExit) as e:
        REPORT["main"](REPORT["Args"](tmp_path))
    for part in (
        "demo.json",
        "load_report.json",
        "pretrain",
        "finetune",
        "rollouts",
        "compare_fast",
        "insulated.jsonl",
    ):
        assert part in str(e.value)
