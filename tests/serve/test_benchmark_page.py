"""The benchmark page: every number is that of the results, says where it comes from, and is missed when it moves."""

import copy
import json
import runpy
from pathlib import Path
from typing import Any

import pytest

from openpi_like.serve.benchmark import collect, moved
from openpi_like.serve.evaluation import Episode, append_episode
from openpi_like.serve.results import write_about
from tests.conftest import REPOSITORY

PAGE = runpy.run_path(str(REPOSITORY / "serve" / "benchmark_page.py"), run_name="benchmark_page")


def drove(run: Path, suite: str, policy: str, outcomes: dict[tuple[str, int], bool]) -> None:
    path = run / suite / f"{policy}.jsonl"
    write_about(path, {"dialect": "own", "server": {"contract": "abc"}}, REPOSITORY)
    for (task, seed), success in outcomes.items():
        append_episode(path, Episode("arm", task, policy, seed, success, 9, "egl", (5.0, 7.0, 9.0)))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    layouts = [(task, seed) for task in ("lift", "stack") for seed in range(10)]
    drove(tmp_path, "fetch", "pi0", {(t, s): s < (8 if t == "lift" else 4) for t, s in layouts})
    drove(tmp_path, "fetch", "deaf", {(t, s): s < 2 for t, s in layouts})
    drove(tmp_path, "fetch", "expert", {(t, s): t == "lift" or s < 5 for t, s in layouts})
    drove(tmp_path, "pusht", "pi0", {("push-t", s): s < 3 for s in range(10)})
    return tmp_path


def test_the_page_has_the_numbers_and_where_they_come_from(run: Path, tmp_path: Path, capsys: Any) -> None:
    PAGE["main"](PAGE["Args"](run, tmp_path / "docs"))
    text = (tmp_path / "docs" / "benchmarks.md").read_text()
    # Of the expert's: (0.8 + 0.4) / (1.0 + 0.5).
    assert "| pi0 | 12/20 [0.39, 0.78] | 0.60 | 80% | 7.0 |" in text
    assert "| expert | 15/20 [0.53, 0.89] | 0.75 |  | 7.0 |" in text
    assert "| arm stack | 2/10 | 4/10 | 5/10 |" in text
    assert "| deaf | pi0 | 20 | 0.0078 |" in text  # eight layouts that only the one did: 2 / 2^8
    assert text.count("`python ") == 4 + text.split("## ")[0].count("`python ")
    for suite in ("fetch", "pusht"):
        assert (tmp_path / "docs" / "benchmarks" / f"{suite}.svg").stat().st_size > 1000
        assert f"](benchmarks/{suite}.svg)" in text
    stored = json.loads((tmp_path / "docs" / "benchmarks.json").read_text())
    assert stored == json.loads(json.dumps(collect(run)))
    before = {p: p.read_bytes() for p in (tmp_path / "docs").rglob("*.*")}
    PAGE["main"](PAGE["Args"](run, tmp_path / "docs"))
    assert {p: p.read_bytes() for p in before} == before
    with pytest.raises(SystemExit) as ended:
        PAGE["main"](PAGE["Args"](run, compare=tmp_path / "docs" / "benchmarks.json"))
    assert (ended.value.code, "no number has moved" in capsys.readouterr().out) == (0, True)


def test_numbers_that_move_are_said(run: Path) -> None:
    published, now = collect(run), collect(run)
    assert moved(published, now) == []
    row = now["suites"]["pusht"]["policies"]["pi0"]
    row |= {"successes": 8, "interval": (0.49, 0.94)}  # touches [0.11, 0.60]
    assert moved(published, now) == []
    row |= {"successes": 9, "interval": (0.61, 0.98)}
    (line,) = moved(published, now)
    assert line == "pusht, pi0, all tasks: 3/10 [0.11, 0.60] was published, now 9/10 [0.61, 0.98]"
    less = copy.deepcopy(now)
    del less["suites"]["pusht"]
    assert moved(published, less) == moved(less, published) == []


def test_results_without_an_origin_are_refused(run: Path, tmp_path: Path) -> None:
    (run / "fetch" / "pi0.json").unlink()
    (run / "pusht" / "pi0.jsonl").write_text("{}\n")
    with pytest.raises(
        ValueError, match=r"no .*fetch/pi0.json, which says how pi0 was driven.*pi0.jsonl, line 1: not an"
    ):
        collect(run)
    (tmp_path / "empty").mkdir()
    for nothing in (tmp_path / "empty", tmp_path / "none"):
        with pytest.raises(ValueError, match=r"no results in .*: expected SUITE/POLICY.jsonl"):
            collect(nothing)
