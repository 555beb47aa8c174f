"""The benchmark page: every number is that of the results, says where it comes from, and is missed when it moves."""

import copy
import dataclasses
import json
import re
import runpy
from pathlib import Path
from typing import Any

import pytest

from openpi_like.provenance import commit, provenance
from openpi_like.robots.sims.suites import SUITES
from openpi_like.serve.benchmark import collect, compare
from openpi_like.serve.evaluation import Episode, append_episode
from openpi_like.serve.results import write_about
from openpi_like.train.scaling import Run, fit
from tests.conftest import REPOSITORY

PAGE = runpy.run_path(str(REPOSITORY / "serve" / "benchmark_page.py"), run_name="benchmark_page")


def drove(run: Path, suite: str, policy: str, outcomes: dict[tuple[str, int], bool]) -> None:
    """Drives layouts of a suite of ours, counted from its first, or of another one."""
    path, of = run / suite / f"{policy}.jsonl", SUITES.get(suite)
    robot, first = ("arm", 0) if of is None else (next(iter(of.tasks)), of.first_seed)
    took = {"seconds": 90.0, "cores": 2, "steps": 3_000, "batch_size": 32, "weights": 1_250_000, "memory_mb": None}
    about = {"dialect": "own", "server": {"contract": "abc"}, **({"training": took} if policy == "pi0" else {})}
    write_about(path, about, len(outcomes), REPOSITORY)
    for (task, seed), success in outcomes.items():
        measures = {"wrong_cube": float(not success)} if policy == "deaf" else {}
        about_it = (robot, task, policy, first + seed, success, 9, "egl", (5.0, 7.0, 9.0))
        append_episode(path, Episode(*about_it, measures=measures))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    layouts = [(task, seed) for task in ("lift", "stack") for seed in range(10)]
    drove(tmp_path, "theirs", "pi0", {(t, s): s < (8 if t == "lift" else 4) for t, s in layouts})
    drove(tmp_path, "theirs", "deaf", {(t, s): s < 2 for t, s in layouts})
    drove(tmp_path, "theirs", "expert", {(t, s): t == "lift" or s < 5 for t, s in layouts})
    drove(tmp_path, "pusht", "pi0", {("push-t", s): s < 15 for s in range(50)})
    drove(tmp_path, "pusht", "stopped", {("push-t", s): True for s in range(3)})
    return tmp_path


def test_the_page_has_the_numbers_and_where_they_come_from(run: Path, tmp_path: Path, capsys: Any) -> None:
    PAGE["main"](PAGE["Args"](run, out=tmp_path / "docs"))
    text = (tmp_path / "docs" / "benchmarks.md").read_text()
    # Of the expert's: (0.8 + 0.4) / (1.0 + 0.5).
    assert "| pi0 | 12/20 [0.39, 0.78] | 0.60 | 80% | 7.0 |" in text
    assert "| expert | 15/20 [0.53, 0.89] | 0.75 |  | 7.0 |" in text
    assert "| arm stack | 2/10 | 4/10 | 5/10 |" in text
    assert "| mean of episodes | wrong_cube |\n| --- | --- |\n| deaf | 0.800 |\n| pi0 |  |" in text
    assert "| deaf | pi0 | 20 | 0.0078 |" in text  # eight layouts that only the one did: 2 / 2^8
    assert text.count("| pi0 | 1.5 | 2 | 3,000 | 32 | 1.25 M |  |  |") == 2
    assert "| stopped | unfinished: 3 of 50 layouts |  |  |  |" in text
    assert len(re.findall(r"\| `python [^`]*` \| ([0-9a-f]{8}( and changes)?|unknown) \|", text)) == 4
    for suite in ("theirs", "pusht"):
        assert (tmp_path / "docs" / "benchmarks" / f"{suite}.svg").stat().st_size > 1000
        assert f"](benchmarks/{suite}.svg)" in text
    stored = json.loads((tmp_path / "docs" / "benchmarks.json").read_text())
    results = tmp_path / "results"
    results.mkdir()
    for suite in ("theirs", "pusht"):
        (run / suite).rename(results / suite)
    assert stored == json.loads(json.dumps(collect(results)))
    before = {p: p.read_bytes() for p in (tmp_path / "docs").rglob("*.*")}
    PAGE["main"](PAGE["Args"](results, out=tmp_path / "docs"))
    assert {p: p.read_bytes() for p in before} == before
    compare = PAGE["Args"](results, compare=tmp_path / "docs" / "benchmarks.json")
    with pytest.raises(SystemExit) as ended:
        PAGE["main"](compare)
    assert (ended.value.code, "0 of 10 numbers have moved" in capsys.readouterr().out) == (0, True)
    (results / "pusht" / "pi0.jsonl").unlink()
    drove(results, "pusht", "pi0", {("push-t", s): s < 30 for s in range(50)})
    with pytest.raises(SystemExit) as ended:
        PAGE["main"](compare)
    assert ended.value.code == 3


def test_studies_and_a_scaling_curve_stand_on_the_page(run: Path, tmp_path: Path) -> None:
    origin = {**provenance(REPOSITORY), "commits": ["01234567", "unknown"], "seconds": {}}
    tasks = dict.fromkeys("abcd")
    row = {"arm": "pi0", "successes": 30, "episodes": 60, "interval": [0.38, 0.62], "tasks": tasks}
    whole = "30/60 [0.38, 0.62]"
    helps = {
        "file": "configs/studies/helps.py",
        "about": "What helps.",
        "table": [["policy", *tasks, "all"], ["pi0", *[whole] * 5]],
        "rows": [row],
    }
    sizes = {f"run {i}": Run(10**5 * (1 + i % 3), 20 * (1 + i % 4), 10**4 * (1 + i), 1 / (1 + i)) for i in range(9)}
    said = {"of": "run 8", "loss": 0.12, "interval": [0.1, 0.2], "curve": dataclasses.asdict(fit(list(sizes.values())))}
    runs = {name: dataclasses.asdict(of) for name, of in sizes.items()}
    scaling = {
        "file": "configs/studies/scaling.py",
        "about": "More.",
        "table": [["run", "loss"], ["run 8", "0.1"]],
        "runs": runs,
        "prediction": said,
    }
    for name, of in (("helps", helps), ("scaling", scaling)):
        (tmp_path / "studies" / name).mkdir(parents=True)
        (tmp_path / "studies" / name / "results.json").write_text(json.dumps({**of, **origin}))
    results = tmp_path / "results"
    results.mkdir()
    (run / "pusht").rename(results / "pusht")
    folders = (tmp_path / "studies" / "helps", tmp_path / "studies" / "scaling")
    PAGE["main"](PAGE["Args"](results, folders, tmp_path / "docs"))
    text = (tmp_path / "docs" / "benchmarks.md").read_text()
    title = "## studies/helps\n\nWhat helps.\n\n![studies/helps](benchmarks/studies_helps.svg)"
    assert f"{title}\n\n| policy | a | b | c | d | all |" in text
    assert f"| pi0 | 30/60 | 30/60 | 30/60 | 30/60 | {whole} |" in text
    assert "| run 8 | 0.1 |" in text
    assert re.search(r"\| studies/helps \|  \|  \| `python [^`]*` \| 01234567, unknown \| 20", text)
    assert (tmp_path / "docs" / "benchmarks" / "studies_scaling.svg").stat().st_size > 1000
    (tmp_path / "studies" / "helps" / "results.json").write_text(json.dumps({"about": "Old.", "table": []}))
    with pytest.raises(ValueError, match=r"helps.*: no file, command, commits; run train/study.py"):
        collect(results, folders)


def test_every_run_of_a_policy_is_named_and_one_that_drove_nothing_is_not(run: Path) -> None:
    path, how = run / "pusht" / "pi0.jsonl", {"dialect": "own", "server": {"contract": "abc"}}
    write_about(path, how, 0, REPOSITORY)
    write_about(path, how, 20, REPOSITORY)
    runs = collect(run)["suites"]["pusht"]["policies"]["pi0"]["about"]["runs"]
    assert [r["episodes"] for r in runs] == [50, 20]
    assert commit({"commit": None}) == "unknown"
    assert commit({"commit": "0123456789", "changed": True}) == "01234567 and changes"


def test_numbers_that_move_are_said(run: Path) -> None:
    published, now = collect(run), collect(run)
    assert compare(published, now).lines() == ["0 of 10 numbers have moved beyond their intervals"]
    outcomes = now["suites"]["pusht"]["policies"]["pi0"]["outcomes"]["pusht push-t"]
    for seed in range(10_015, 10_017):
        outcomes[str(seed)] = 1
    assert compare(published, now).moved == ()  # two of fifty
    for seed in range(10_015, 10_025):
        outcomes[str(seed)] = 1
    (line,) = compare(published, now).moved
    assert line.startswith("pusht, pi0, all tasks: 15/50 was published, now 25/50: [+0.")
    less = copy.deepcopy(now)
    del less["suites"]["pusht"]
    assert compare(now, less).lines()[-1] == "not driven now: pusht, pi0"
    assert compare(less, now).lines()[-1] == "not published: pusht, pi0"
    assert compare(less, now).moved == compare(now, less).moved == ()
    many = dataclasses.replace(compare(now, less), compared=44).lines()
    assert many[0] == "0 of 44 numbers have moved beyond their intervals; by chance alone about 2 would"
    with pytest.raises(ValueError, match="nothing to compare"):
        compare({"suites": {}}, now)


def test_results_without_an_origin_are_refused(run: Path, tmp_path: Path) -> None:
    (run / "theirs" / "pi0.json").unlink()
    with pytest.raises(ValueError, match=r"has episodes, and no pi0.json says how they were driven"):
        write_about(run / "theirs" / "pi0.jsonl", {}, 1, REPOSITORY)
    (run / "pusht" / "pi0.jsonl").write_text("{}\n")
    with pytest.raises(
        ValueError, match=r"pi0.jsonl, line 1: not an episode.*no .*theirs/pi0.json, which says how pi0"
    ):
        collect(run)
    (tmp_path / "empty").mkdir()
    for nothing in (tmp_path / "empty", tmp_path / "none"):
        with pytest.raises(ValueError, match=r"no results in .*: expected SUITE/POLICY.jsonl"):
            collect(nothing)


def test_without_git_the_commit_is_not_known(monkeypatch: Any) -> None:
    monkeypatch.setenv("PATH", "")
    assert (provenance(REPOSITORY)["commit"], provenance(REPOSITORY)["changed"]) == (None, False)
