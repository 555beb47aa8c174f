"""Success rates and their intervals against published numbers, and results that survive a kill."""

import dataclasses
import json

import pytest

from openpi_like.serve.evaluation import Episode, append_episode, read_episodes, success_rows, wilson


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"), [(45, 50, 0.786, 0.957), (0, 24, 0.0, 0.138), (20, 20, 0.839, 1.0)]
)
def test_wilson_interval(successes, n, low, high):
    assert wilson(successes, n) == pytest.approx((low, high), abs=5e-4)


def test_wilson_interval_of_nothing_is_refused():
    for successes, n in ((0, 0), (-1, 5), (6, 5)):
        with pytest.raises(ValueError, match="expected 0 <= successes <= n"):
            wilson(successes, n)


def _episode(**changes) -> Episode:
    values = {"robot": "arm", "task": "lift", "policy": "trained", "seed": 1, "success": True, "steps": 9}
    return Episode(**{**values, "renderer": "egl", "latency_ms": (1.5, 2.0), "thoughts": ((0, "go"),), **changes})


def test_results_survive_a_kill_in_the_middle_of_a_line(tmp_path):
    path = tmp_path / "results.jsonl"
    episodes = [_episode(), _episode(seed=2, success=False)]
    for episode in episodes:
        append_episode(path, episode)
    assert read_episodes(path) == episodes
    path.write_text(path.read_text() + '{"robot": "ar')
    assert read_episodes(path) == episodes
    append_episode(path, _episode(seed=3))  # the cut line is gone, so this one is whole
    assert read_episodes(path) == [*episodes, _episode(seed=3)]


def test_results_of_before_policies_thought_are_read(tmp_path):
    old = {k: v for k, v in dataclasses.asdict(_episode()).items() if k != "thoughts"}
    (tmp_path / "results.jsonl").write_text(json.dumps(old) + "\n")
    assert read_episodes(tmp_path / "results.jsonl") == [_episode(thoughts=())]


def test_a_line_that_is_no_episode_is_named(tmp_path):
    path = tmp_path / "results.jsonl"
    append_episode(path, _episode())
    path.write_text(path.read_text() + '{"robot": "arm"}\n')
    with pytest.raises(ValueError, match="line 2: not an episode"):
        read_episodes(path)
    for line in ("5", "[]", "null", '"x"'):
        path.write_text(line + "\n")
        with pytest.raises(ValueError, match="line 1: not an episode"):
            read_episodes(path)
    assert read_episodes(tmp_path / "none.jsonl") == []


def test_rows_count_by_robot_task_and_policy():
    episodes = [_episode(seed=s, success=s < 3) for s in range(4)] + [_episode(policy="expert"), _episode(task="drop")]
    rows = success_rows(episodes)
    assert [(r["task"], r["policy"], r["successes"], r["episodes"]) for r in rows] == [
        ("drop", "trained", 1, 1),
        ("lift", "expert", 1, 1),
        ("lift", "trained", 3, 4),
    ]
    assert (rows[2]["wilson_low"], rows[2]["wilson_high"]) == wilson(3, 4)
