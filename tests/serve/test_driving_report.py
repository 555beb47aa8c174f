"""The report of driving: its numbers by hand, the page that shows them, and all that is missing at once."""

import dataclasses
import json
import runpy
from pathlib import Path

import pytest
from PIL import Image

from openpi_like.driving.closed_loop import policy_rows
from openpi_like.driving.open_loop import Judged
from openpi_like.driving.open_loop_scores import BASELINES, FrameResult, append_frame
from openpi_like.robots.sims.sim import HELD_OUT_SEED
from openpi_like.serve.evaluation import Episode, append_episode

REPORT = runpy.run_path(str(Path(__file__).resolve().parents[2] / "serve" / "driving_report.py"))
TASKS = ("merge", "roundabout-left")


def drive(task, policy, seed, success, **measures):
    """A drive that arrives after 12 s, or leaves the road after 5 s and half of the way; seed: counted from the first
    for evaluation."""
    values = {"progress": 1.0, "collided": 0.0, "off_road": 0.0, "seconds": 12.0}
    values |= {"acceleration": 2.0, "lateral": 1.0, "jerk": 6.0}
    if not success:
        values |= {"progress": 0.5, "off_road": 1.0, "seconds": 5.0}
    seed += HELD_OUT_SEED
    return Episode("ego_vehicle", task, policy, seed, success, 24, "raycast", measures={**values, **measures})


def drives(policy, wins, **changes):
    """Ten drives of each task; the first so many succeed."""
    return [dataclasses.replace(drive(t, policy, s, s < wins), **changes) for t in TASKS for s in range(10)]


def frame(step, label, away, hit=False, **changes):
    """A frame at which a policy is `away` m to the right of the truth, and baselines 2 m; it collides at 3 s."""
    answer = lambda x, hit: Judged(((x, 0.0),) * 6, (False,) * 5 + (hit,), (False,) * 6)  # noqa: E731
    answers = {name: answer(2.0, False) for name in BASELINES} | ({label: answer(away, hit)} if label else {})
    about = {"data": "d", "label": label, "episode": step // 5, "step": step, "task": "merge", "against": "driven"}
    return FrameResult(**{**about, **changes}, valid=(True,) * 6, truth=answer(0.0, False), answers=answers)


@pytest.fixture
def run(tmp_path):
    for folder in ("rollouts", "open_loop", "frames/flow"):
        (tmp_path / folder).mkdir(parents=True)
    # By name, the expert is neither first nor last.
    files = {"a": drives("trained", 2), "driver": drives("expert", 10), "flow": drives("trained", 8)}
    said = ((0, "go <there>"), *((k, f"step {k}") for k in range(1, 8)))
    files["flow"][3] = dataclasses.replace(files["flow"][3], thoughts=said, latency_ms=(4.0, 6.0))
    for name, episodes in files.items():
        for e in episodes:
            append_episode(tmp_path / "rollouts" / f"{name}.jsonl", e)
    for name, label in (("flow", "flow"), ("base", "")):
        for step in range(10):
            append_frame(tmp_path / "open_loop" / f"{name}.jsonl", frame(step, label, 0.5, hit=step < 2))
    Image.new("RGB", (8, 8)).save(tmp_path / "frames" / "ego_vehicle_merge.gif")
    Image.new("RGB", (8, 8)).save(tmp_path / "frames" / "flow" / "ego_vehicle_merge.gif")
    return tmp_path


def test_numbers_are_those_of_the_run(run):
    REPORT["main"](REPORT["Args"](run))
    numbers = json.loads((run / "report.json").read_text())
    closed = {row["policy"]: row for row in numbers["closed_loop"]}
    assert list(closed) == ["driver", "a", "flow"]
    flow = closed["flow"]
    assert (flow["successes"], flow["episodes"], flow["off_road"], flow["collided"]) == (16, 20, 4, 0)
    assert flow["progress"] == pytest.approx((16 + 4 * 0.5) / 20)
    assert (flow["seconds"], flow["latency_ms"]) == (12.0, 5.0)
    assert flow["tasks"]["merge"]["successes"] == 8
    # Of 20 pairs the expert alone succeeds in 4: twice the chance of 4 heads of 4.
    assert (flow["beside"], flow["paired"], flow["better"], flow["worse"]) == ("driver", 20, 0, 4)
    assert flow["p"] == pytest.approx(2 / 2**4)
    assert closed["a"]["p"] == pytest.approx(2 / 2**16)
    assert "p" not in closed["driver"]
    (group,) = numbers["open_loop"]
    assert [row["name"] for row in group["rows"]] == ["flow", *BASELINES]
    assert (group["frames"], group["drives"], group["truth_collides"]) == (10, 2, 0)
    of = group["rows"][0]["table"]
    assert of["uniad"]["l2"]["avg"] == [0.5, 0.5, 0.5]
    assert of["uniad"]["collision"]["3s"][0] == 20.0
    assert of["stp3"]["collision"]["3s"][0] == pytest.approx(20.0 / 6)
    (thought,) = numbers["thoughts"]
    assert (thought["policy"], thought["task"], thought["thoughts"][0]) == ("flow", "merge", [0, "go <there>"])


def test_the_page_is_one_file_that_shows_them(run):
    REPORT["main"](REPORT["Args"](run))
    page = (run / "report.html").read_text()
    for text in (
        "16/20  [0.58, 0.92]",
        "8/10  [0.49, 0.94]",
        "<td>0.125</td><td>0 / 4</td>",
        "<td>90%</td>",
        "20.00 [5.67, 50.98]",
        "constant velocity",
        "driver&#x27;s plan",
        "against what was driven",
        "0: go &lt;there&gt; | 1: step 1",
        "... 3 more",
        "flow: merge</figure>",
        "repeat(3, 1fr)",
    ):
        assert text in page, text
    assert "http:" not in page
    assert "https:" not in page
    assert "<there>" not in page  # texts are escaped
    assert page.count("data:image/png;base64,") == 2
    assert page.count("data:image/gif;base64,") == 2


def test_comfort_is_counted_by_drives():
    """Of four drives, three are below 3 m/s^2 ahead, one is aside."""
    values = [(2.0, 3.5), (2.9, 2.9), (3.0, 3.0), (1.0, 4.0)]
    of = [drive("merge", "trained", s, True, acceleration=a, lateral=b) for s, (a, b) in enumerate(values)]
    (row,) = policy_rows({"flow": of})
    assert (row["gentle"], row["gentle_aside"]) == (0.75, 0.25)
    assert row["largest"] == pytest.approx({"acceleration": 8.9 / 4, "lateral": 13.4 / 4, "jerk": 6.0})


def test_only_drives_of_the_same_layouts_are_paired():
    ours, theirs = drives("trained", 4)[:10], drives("trained", 6)[5:15]
    _, row = policy_rows({"a": ours, "b": theirs})
    assert (row["beside"], row["paired"], row["better"], row["worse"], row["p"]) == ("a", 5, 1, 0, 1.0)
    _, apart = policy_rows({"a": ours, "b": drives("trained", 6)[10:]})
    assert (apart["paired"], apart["p"]) == (0, None)


def test_nobody_arrives(run):
    (run / "rollouts" / "flow.jsonl").unlink()
    for e in drives("trained", 0):
        append_episode(run / "rollouts" / "flow.jsonl", e)
    REPORT["main"](REPORT["Args"](run))
    flow = json.loads((run / "report.json").read_text())["closed_loop"][-1]
    assert (flow["successes"], flow["seconds"], flow["latency_ms"]) == (0, None, None)


def test_frames_that_differ_are_not_in_one_table(run):
    append_frame(run / "open_loop" / "other.jsonl", frame(3, "other", 1.0, against="plan"))
    REPORT["main"](REPORT["Args"](run))
    groups = json.loads((run / "report.json").read_text())["open_loop"]
    assert [[g["against"], g["rows"][0]["name"], len(g["rows"])] for g in groups] == [
        ["driven", "flow", 4],
        ["plan", "other", 4],
    ]
    assert groups[1]["rows"][0]["horizon"][0] == [1.0, None, None]
    assert "against the driver&#x27;s own plan" in (run / "report.html").read_text()


def test_everything_that_is_missing_is_listed(tmp_path):
    with pytest.raises(SystemExit) as e:
        REPORT["main"](REPORT["Args"](tmp_path))
    for part in ("no drives in", "rollouts", "no frames in", "open_loop", "no films in", "--frames-dir"):
        assert part in str(e.value)
    assert not (tmp_path / "report.html").exists()


def test_everything_that_is_wrong_is_listed(run):
    bare = dataclasses.replace(drive("merge", "trained", 0, True), measures={"progress": 1.0})
    for name, e in (("bare", bare), ("twice", drive("merge", "trained", 0, True))):
        for _ in range(1 + (name == "twice")):
            append_episode(run / "rollouts" / f"{name}.jsonl", e)
    append_episode(run / "rollouts" / "seen.jsonl", drive("merge", "trained", 3 - HELD_OUT_SEED, True))
    (run / "rollouts" / "empty.jsonl").write_text("")
    (run / "rollouts" / "broken.jsonl").write_text("{}\n")
    (run / "open_loop" / "none.jsonl").write_text("")
    (run / "open_loop" / "odd.jsonl").write_text("[]\n")
    append_frame(run / "open_loop" / "mixed.jsonl", frame(0, "x", 1.0))
    append_frame(run / "open_loop" / "mixed.jsonl", frame(1, "y", 1.0))
    append_frame(run / "open_loop" / "flow_again.jsonl", frame(0, "flow", 1.0))
    with pytest.raises(SystemExit) as e:
        REPORT["main"](REPORT["Args"](run))
    for part in (
        "bare: no measure acceleration, collided, jerk",
        "twice: ('merge', 10000) was driven twice",
        "seen: layout 3 is one for demonstrations, expected 10000 or more",
        "empty: no drives",
        "broken.jsonl, line 1: not an episode",
        "none: no frames",
        "odd.jsonl, line 1: not a frame",
        "mixed: frames of several policies, ['x', 'y']",
        "flow: two files in",
    ):
        assert part in str(e.value)
