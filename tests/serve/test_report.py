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
    for name, robot in (("pretrain", "arm"), ("finetune_aloha", "aloha"), ("scratch_aloha", "aloha")):
        (tmp_path / name).mkdir()
        train = [{"step": s, "split": "train", "loss": 2 / s, "step_time": 0.2, "data_wait": 0.25} for s in (1, 2, 4)]
        val = {"step": 4, "split": "val", f"loss/{robot}": 0.125, f"action_mae/{robot}/hand_0 [m]": 0.0421}
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in [*train, val]))
    weights = [
        {"weight": "a", "shape": "(2,)", "from": "checkpoint", "why": "same"},
        {"weight": "b<script>", "shape": "(3,)", "from": "fresh", "why": "asked"},
    ]
    (tmp_path / "finetune_aloha" / "load_report.json").write_text(json.dumps(weights))
    demo = {"seconds": {"one": 60.0, "two": 30.0}, "commands": {"one": "python a.py", "two": "python b.py"}}
    demo.update({"hardware": {"cpu": "abacus", "cores": 2, "python": "3.11.7"}, "date": "2026-11-21"})
    (tmp_path / "demo.json").write_text(json.dumps(demo))
    (tmp_path / "rollouts").mkdir()
    for policy, wins in (("trained", 9), ("scratch", 3), ("untrained", 0), ("expert", 10)):
        for seed in range(10):
            latency = () if policy == "expert" else (float(seed),) * 2
            said = {"trained": ((0, "go <there>"), (4, "grasp it")), "scratch": ((0, "wander"),)}
            thoughts = said.get(policy, ()) if seed > 7 else ()
            episode = Episode("arm", "lift", policy, seed, seed < wins, 5, "raycast", latency, thoughts=thoughts)
            append_episode(tmp_path / "rollouts" / f"arm_{policy}.jsonl", episode)
    (tmp_path / "frames").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "frames" / "arm_lift.gif")
    return tmp_path


def test_numbers_are_those_of_the_run(run, capsys):
    REPORT["main"](REPORT["Args"](run))
    numbers = json.loads((run / "report.json").read_text())
    counts = {r["policy"]: (r["successes"], r["episodes"]) for r in numbers["success"]}
    assert counts == {"trained": (9, 10), "scratch": (3, 10), "untrained": (0, 10), "expert": (10, 10)}
    assert numbers["seconds"] == {"one": 60.0, "two": 30.0}
    assert numbers["latency_ms"]["arm"]["requests"] == 20
    assert numbers["latency_ms"]["arm"]["p50"] == 4.5
    assert numbers["training"]["pretrain"]["loss_last"] == 0.5
    assert numbers["training"]["finetune_aloha"]["action_mae"] == {"aloha/hand_0 [m]": 0.0421}
    assert list(numbers["training"]) == ["pretrain", "finetune_aloha", "scratch_aloha"]
    assert numbers["weights"]["finetune_aloha"]["loaded"] == 1
    said = "0: go <there>; 4: grasp it"
    assert numbers["thoughts"] == [{"robot": "arm", "task": "lift", "success": True, "thoughts": said}]


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
        "3/10  [0.11, 0.60]",
        "0: go &lt;there&gt;; 4: grasp it",
        "<td>fine-tuning to aloha</td>",
        "<td>from scratch on aloha</td>",
    ):
        assert text in page
    assert "http:" not in page  # "http" alone may stand in base64
    assert "https:" not in page
    assert "<script" not in page  # texts are escaped
    assert page.count("data:image/png;base64,") == 3
    assert page.count("data:image/gif;base64,") == 1


def test_everything_that_is_missing_is_listed(tmp_path):
    with pytest.raises(SystemExit) as e:
        REPORT["main"](REPORT["Args"](tmp_path))
    for part in (
        "demo.json",
        "pretrain",
        "finetune_ROBOT",
        "rollouts",
    ):
        assert part in str(e.value)
