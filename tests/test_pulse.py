"""The whole chain through its public entry points, at two training steps; and a run killed in the middle of it."""

import contextlib
import itertools
import json
import re
import signal
import socket
import subprocess
import sys
import warnings
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from PIL import Image

from openpi_like.config import load_run, override
from openpi_like.job import SHALLOW
from openpi_like.robots.sims.sawyer import SawyerSim
from openpi_like.serve.evaluation import read_episodes
from openpi_like.train.checkpoints.warm_start import base_plan, open_weights
from openpi_like.train.state import ModelDef
from openpi_like.train.watching.metrics import read_metrics
from tests.compile_flags import IN_A_HURRY
from tests.conftest import REPOSITORY
from tests.programs import ENVIRONMENT, PULSE, program


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Path:
    """A finished demo of the smallest scale, compiled in a hurry; the runs below are optimised as those of users."""
    run = tmp_path_factory.mktemp("demo") / "run"
    done = program("train/demo.py", *PULSE, "--run", str(run), XLA_FLAGS=IN_A_HURRY)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return run


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_demo_reports_every_task_and_policy(demo):
    report = json.loads((demo / "report.json").read_text())
    rows = {(row["robot"], row["task"], row["policy"]): row for row in report["success"]}
    before = {("pusht", "push-t")} | {("sawyer", task) for task in _tasks(demo)}
    new = {("metaworld_fetch", task) for task in ("drawer-open", "faucet-open")}
    assert len(_tasks(demo)) == 2
    driven = {(*task, policy) for task in before | new for policy in ("trained", "expert")}
    assert set(rows) == driven | {(*task, "untrained") for task in before} | {(*task, "scratch") for task in new}
    for row in rows.values():
        expected = {0: (0.0, 0.7935), 1: (0.2065, 1.0)}[row["successes"]]  # Wilson at 0 and 1 of 1
        assert row["episodes"] == 1
        np.testing.assert_allclose((row["wilson_low"], row["wilson_high"]), expected, atol=1e-4)
    assert sum(rows["sawyer", task, "expert"]["successes"] for task in _tasks(demo)) == len(_tasks(demo))
    assert all(seconds > 0 for seconds in report["seconds"].values())
    html = (demo / "report.html").read_text()
    assert "data:image/gif;base64," in html
    assert not re.search(r"https?:(?!//www\.w3\.org/)", html)  # in base64 "http" alone may stand


def _tasks(demo: Path) -> list[str]:
    metadata = json.loads((demo / "data" / "sawyer_sim" / "1.0.0" / "metadata.json").read_text())
    assert set(metadata["tasks"]) <= set(SawyerSim.tasks)
    return metadata["tasks"]


def test_ways_to_produce_actions_are_compared(demo):
    """FAST tokens and subtasks beside flow, insulated: tokenisers fitted, trained, served, driven."""
    data = f"{demo}/data/sawyer_sim/1.0.0"
    task, files = (
        _tasks(demo)[0],
        [f"data.entries.0.path={data}", f"stats={demo}/quantiles", f"tokenizer={demo}/text_fast.model"],
    )
    fit = ["data/fit_text.py", "--data", data, "--out", f"{demo}/text_fast.model", "--state-in-prompt", "--vocab-size"]
    fit[1:1] = ["--keys", "language_instruction", "subtask"]
    fast = ["data/fit_fast.py", "configs/studies/fast.py", "--out", f"{demo}/fast", "--vocab-size", "512"]
    (demo / "study.py").write_text(
        "import dataclasses, runpy\n"
        "of = runpy.run_path('configs/studies/action_tokens.py')['study']\n"
        "arms = {n: dataclasses.replace(of.arms[n], "
        f"set=('action_tokenizer={demo}/fast',)) for n in ('insulated_subtasks',)}}\n"
        f"study = dataclasses.replace(of, arms=arms, tasks=({task!r},), episodes=1)\n"
    )
    for command in (
        ["data/stats.py", "--robot", "sawyer", "--data", data, "--out", f"{demo}/quantiles/sawyer.json"],
        [*fit, "1024"],
        [*fast, "--set", *files],
        ["train/study.py", f"{demo}/study.py", "--run", f"{demo}/study", "--set", *files, "steps=2", "batch_size=8"],
    ):
        done = program(*command, XLA_FLAGS=IN_A_HURRY)
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    results = json.loads((demo / "study" / "results.json").read_text())
    assert [(row["arm"], row["episodes"]) for row in results["rows"]] == [("insulated_subtasks", 1)]
    (episode,) = read_episodes(demo / "study" / "insulated_subtasks.jsonl")
    assert episode.thoughts[0][0] == 0
    (wrote,) = results["thoughts"]
    assert wrote["thoughts"].startswith(f"0: {episode.thoughts[0][1]}")
    assert f"| insulated_subtasks | {task} | {wrote['thoughts']} | " in (demo / "study" / "study.md").read_text()
    assert all(now != later for (_, now), (_, later) in itertools.pairwise(episode.thoughts))
    assert all(of["step_ms"] > 0 and of["weights"] > 5e5 for of in results["measured"].values())


def test_fine_tuning_says_what_was_loaded_and_what_was_not(demo):
    rows = json.loads((demo / "finetune_metaworld_fetch" / "load_report.json").read_text())
    assert {row["from"] for row in rows} == {"checkpoint"}
    # The robots of DEMO_SCALE=full have smaller patches; one is known, and the other of another size.
    rows = {robot: _plan(demo, robot) for robot in ("aloha", "pusht")}
    patches = {"vision/patch/kernel", "vision/position"}
    assert {row["weight"] for row in rows["pusht"] if row["from"] == "fresh"} == patches
    fresh = {row["weight"]: row["why"] for row in rows["aloha"] if row["from"] == "fresh"}
    assert set(fresh) == patches | {"action_in/kernel", "action_out/kernel", "action_out/bias", "state_in/kernel"}
    assert (
        fresh["state_in/kernel"] == "asked by '^state_in/kernel': state_in/kernel: got shape (4, 64), expected (14, 64)"
    )
    assert len(rows["aloha"]) > 40


def _plan(demo: Path, robot: str) -> list[dict[str, str]]:
    """What fine-tuning to a robot starts from, as its run prints it."""
    config = override(load_run(f"configs/demo_finetune_{robot}.py"), SHALLOW)
    assert config.warm_start is not None
    return base_plan(config.warm_start, ModelDef(config.model), open_weights(demo / "pretrain")).report


def test_a_finished_demo_is_not_done_again(demo):
    before = json.loads((demo / "demo.json").read_text())["seconds"]
    again = program("train/demo.py", *PULSE, "--run", str(demo))
    assert again.returncode == 0
    assert again.stdout.count("done before") == len(before)
    assert json.loads((demo / "demo.json").read_text())["seconds"] == before


def _train(demo: Path, name: str, *, config: str = "configs/demo_pretrain.py") -> list[str]:
    paths = [f"data.entries.{i}.path={demo}/data/{robot}_sim/1.0.0" for i, robot in enumerate(("sawyer", "pusht"))]
    often = [*SHALLOW, "steps=30", "log_every=1", "save_every=5", "validate_every=100"]
    files = [f"run_dir={demo}/{name}", f"stats={demo}/stats", f"tokenizer={demo}/text.model"]
    return ["train/train.py", config, *files, *paths, *often]


def _arrays(step: Path) -> dict[str, np.ndarray]:
    arrays = {}
    for item in ("params", "ema", "opt_state"):
        with ocp.PyTreeCheckpointer() as checkpointer, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the sharding is read from the file
            for path, leaf in jax.tree_util.tree_leaves_with_path(checkpointer.restore(step / item)):
                arrays[item + jax.tree_util.keystr(path)] = np.asarray(leaf)
    return arrays


# Everything that is drawn for a sample, and an order in groups of episodes.
AUGMENTED = """
import dataclasses
from openpi_like.config import load_run
from openpi_like.data.augment import Augment

config = load_run("configs/demo_pretrain.py")
data = dataclasses.replace(config.data, augment=Augment.octo(), camera_dropout=0.2, group_episodes=2)
config = dataclasses.replace(config, data=data)
"""


@pytest.mark.slow
def test_a_run_killed_and_resumed_ends_bit_for_bit_like_one_that_was_not(demo):
    config = demo / "augmented.py"
    config.write_text(AUGMENTED)
    whole = program(*_train(demo, "whole", config=str(config)), "profile=(20,22)")
    assert whole.returncode == 0, whole.stdout[-2000:] + whole.stderr[-2000:]
    _watched(demo / "whole", whole.stdout)

    metrics = demo / "killed" / "metrics.jsonl"
    process = subprocess.Popen(
        [sys.executable, *_train(demo, "killed", config=str(config))],
        cwd=REPOSITORY,
        env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    checkpoints = demo / "killed" / "checkpoints"
    # Until one is complete (renamed into place), so that there is something to resume.
    while not any(p.name.isdigit() for p in checkpoints.glob("*")):
        assert process.poll() is None, "the run ended before it could be killed"
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (checkpoints / "30").exists()

    resumed = program(*_train(demo, "killed", config=str(config)))
    assert resumed.returncode == 0, resumed.stdout[-2000:] + resumed.stderr[-2000:]
    assert "resumed at step" in resumed.stdout
    expected, got = (_arrays(demo / name / "checkpoints" / "30") for name in ("whole", "killed"))
    assert len(expected) > 100
    assert expected.keys() == got.keys()
    for name in expected:
        np.testing.assert_array_equal(got[name], expected[name], err_msg=name)
    steps = [line["step"] for line in read_metrics(metrics) if line["split"] == "train"]
    assert steps == list(range(1, 31))

    # In groups of three episodes a position stands for another sample.
    changed = program(*_train(demo, "killed", config=str(config)), "data.group_episodes=3")
    assert changed.returncode != 0
    assert "group_episodes: 2 -> 3" in changed.stderr
    accepted = program(*_train(demo, "killed", config=str(config)), "data.group_episodes=3", "accept_changed_data=True")
    assert accepted.returncode == 0, accepted.stdout[-2000:] + accepted.stderr[-2000:]
    assert "the order of samples has changed: group_episodes: 2 -> 3" in accepted.stdout


def _watched(run: Path, said: str) -> None:
    """What a run of 30 steps tells of itself."""
    with Image.open(run / "first_batch.png") as picture:
        assert picture.size[0] > 500
    lines = [line for line in read_metrics(run / "metrics.jsonl") if line["split"] == "train"]
    every = {"loss", "grad_norm", "learning_rate", "step_time", "samples_per_s", "data_wait", "saturated", "skipped"}
    for line in lines:
        assert every | {"host_memory_gib", "loss/sawyer", "loss/pusht"} <= line.keys()
        assert line["samples_per_s"] == pytest.approx(8 / line["step_time"])
        assert 0 <= line["data_wait"] <= 1
    compiling = re.search(r"compiled in (\d+) s", said)
    assert compiling
    assert lines[0]["step_time"] < max(float(compiling[1]), 1) / 2  # the first step does not compile
    where = program("train/step_time.py", str(run))
    assert where.returncode == 0, where.stderr
    assert "3 steps on 1 devices" in where.stdout
    rows = {line[:40].strip() for line in where.stdout.splitlines()}
    assert {"siglip", "vlm", "expert", "augment", "optimizer", "ema", "matmul", "idle", "device_wait"} <= rows


@pytest.mark.slow
def test_a_dagger_round_and_that_it_is_not_done_again(demo):
    """The policy acts, the expert corrects it, and its steps are trained on, all by the programs themselves."""
    task, data = _tasks(demo)[0], [f"data.entries.0.path={demo}/data/sawyer_sim/1.0.0", f"stats={demo}/stats"]
    sets = ["--set", *data, f"data.entries.1.path={demo}/data/pusht_sim/1.0.0", *SHALLOW]
    few = ["--steps", "2", "--episodes", "1", "--corrected", "1", "--workers", "1", "--no-control", "--tasks", task]
    command = ["train/dagger.py", "configs/demo_pretrain.py", "--start", str(demo / "pretrain"), "--robot", "sawyer"]
    command += ["--run", str(demo / "dagger"), "--takeover.late", "0.1", *few, *sets, "log_every=1"]
    first = program(*command, XLA_FLAGS=IN_A_HURRY)
    assert first.returncode == 0, first.stdout[-3000:] + first.stderr[-3000:]
    results = json.loads((demo / "dagger" / "results.json").read_text())
    assert [row["arm"] for row in results["rows"]] == ["before", "round_1"]
    assert (results["corrected"], results["rescued"]) == (1, 1)
    lines = [x for x in read_metrics(demo / "dagger" / "trained_1" / "metrics.jsonl") if x["split"] == "train"]
    assert len(lines) == 2
    assert all(np.isfinite(line["loss/sawyer, corrected"]) for line in lines)
    assert 0 < sum(line["samples/sawyer, corrected"] for line in lines) < 16
    again = program(*command)
    assert again.returncode == 0
    assert again.stdout.count("done before") == 5
    other = program(*command, "--share", "0.5")
    assert other.returncode != 0
    assert "train_1.py is of other options; remove" in other.stderr


@pytest.mark.slow
def test_a_run_skips_losses_that_are_not_finite_then_stops_and_names_the_samples(demo):
    diverging = ["optimizer.peak_lr=1e30", "optimizer.warmup_steps=0", "skip_bad_steps=2"]
    done = program(*_train(demo, "diverged"), *diverging, XLA_FLAGS=IN_A_HURRY)
    assert done.returncode != 0
    assert "expected finite numbers; 2 such steps were skipped before" in done.stderr
    assert re.search(r"sawyer: sawyer_sim/1.0.0\S* .*episode \d+, step \d+ \(\S*tfrecord\S*, record \d+\)", done.stderr)
    lines = read_metrics(demo / "diverged" / "metrics.jsonl")
    first, second = (line["step"] for line in lines if line["split"] == "skipped")
    assert [line["skipped"] for line in lines if line["split"] == "train"][first - 1 :] == [1, 2][: second - first + 1]
    (kept,) = (demo / "diverged").glob("nonfinite_step*.npz")
    batch = np.load(kept)
    assert batch["images/base"].shape == (8, 64, 64, 3)
    assert batch["action_mask"].shape == (8, 8, 4)


@pytest.mark.slow
def test_a_run_of_two_processes_saves_at_the_same_step_and_keeps_others_out(demo):
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"localhost:{server.getsockname()[1]}"
    devices = f"--xla_force_host_platform_device_count=2 {IN_A_HURRY}"
    command = [sys.executable, *_train(demo, "hosts"), "steps=1000", f"hosts.coordinator={address}", "hosts.count=2"]
    logs = [demo / f"host{rank}.log" for rank in range(2)]
    with contextlib.ExitStack() as stack:
        both = []
        for rank, log in enumerate(logs):
            files = {"stdout": stack.enter_context(log.open("w")), "stderr": subprocess.STDOUT}
            arguments = [*command, f"hosts.rank={rank}"]
            both.append(subprocess.Popen(arguments, cwd=REPOSITORY, env=ENVIRONMENT | {"XLA_FLAGS": devices}, **files))
            stack.callback(both[-1].wait)
            stack.callback(both[-1].kill)
        while len(read_metrics(demo / "hosts" / "metrics.jsonl")) < 3:
            assert [process.poll() for process in both] == [None, None], [log.read_text()[-2000:] for log in logs]
            with contextlib.suppress(subprocess.TimeoutExpired):
                both[0].wait(timeout=0.05)
        second = program(*_train(demo, "hosts"))
        assert second.returncode == 1
        (line,) = second.stderr.splitlines()
        assert f"hosts is in use by another run (host {socket.gethostname()}, pid {both[0].pid}, since " in line
        both[1].send_signal(signal.SIGTERM)
        assert [process.wait(timeout=120) for process in both] == [143, 143], [log.read_text()[-2000:] for log in logs]
    (stopped,) = re.findall(r"stopped by SIGTERM at step (\d+), saved in", logs[0].read_text().replace("\n", " "))
    assert max(int(p.name) for p in (demo / "hosts" / "checkpoints").iterdir() if p.name.isdigit()) == int(stopped)
    steps = [line["step"] for line in read_metrics(demo / "hosts" / "metrics.jsonl")]
    assert steps == list(range(1, int(stopped) + 1))
    assert "stopped" not in logs[1].read_text()  # the lead prints


def test_a_run_says_what_is_wrong_with_its_inputs(demo):
    missing = program(*_train(demo, "wrong"), "data.entries.0.path=/nowhere/sawyer_sim/1.0.0")
    assert missing.returncode != 0
    assert "/nowhere/sawyer_sim/1.0.0" in missing.stderr
    typo = program(*_train(demo, "wrong"), "data.entires.0.weight=1")
    assert typo.returncode != 0
    assert "did you mean 'entries'" in typo.stderr
