"""The program that records demonstrations: complete, repeatable, and safe to kill."""

import collections
import importlib.util
import itertools
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from openpi_like.robots.sims.sim import HELD_OUT_SEED

REPOSITORY = Path(__file__).resolve().parents[2]
if any(importlib.util.find_spec(p) is None for p in ("metaworld", "tensorflow")):
    pytest.skip("needs the sim and rlds extras", allow_module_level=True)
# OpenGL cannot live in one process with TensorFlow, which reads the datasets here.
os.environ.setdefault("OPENPI_LIKE_RENDERER", "raycast")
pytestmark = pytest.mark.filterwarnings("ignore")  # TensorFlow and TFDS warn of their own future


def start(out, *options):
    command = [sys.executable, "data/make_demos.py", "--robot", "sawyer", "--out", str(out), *options]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    return subprocess.Popen(
        command, cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(out, *options):
    process = start(out, *options)
    output, _ = process.communicate(timeout=300)
    return process.returncode, output


def read(out):
    """Split -> episodes as {task, seed, ..., state, action, image}."""
    import tensorflow_datasets as tfds

    builder = tfds.builder_from_directory(out / "sawyer_sim" / "1.0.0")
    episodes = collections.defaultdict(list)
    for split in builder.info.splits:
        for record in builder.as_dataset(split=split):
            steps = list(record["steps"].as_numpy_iterator())
            arrays = {
                "state": np.stack([s["observation"]["state"] for s in steps]),
                "action": np.stack([s["action"] for s in steps]),
                "subtask": np.array([s["subtask"].decode() for s in steps]),
                "image": np.stack([s["observation"]["image"] for s in steps]),
            }
            episodes[split].append({k: v.numpy() for k, v in record["episode_metadata"].items()} | arrays)
    return builder, episodes


OPTIONS = ["--tasks", "handle-press", "coffee-button", "--episodes-per-task", "3", "--val-episodes-per-task", "1"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    code, output = finish(out, *OPTIONS)
    assert code == 0, output
    return out, output


def test_dataset_is_complete(whole):
    out, output = whole
    builder, episodes = read(out)
    assert {k: len(v) for k, v in episodes.items()} == {"train": 6, "val": 2}
    everything = [e for split in episodes.values() for e in split]
    assert {(e["task"], sum(x["task"] == e["task"] for x in everything)) for e in everything} == {
        (b"handle-press", 4),
        (b"coffee-button", 4),
    }
    assert all(e["success"] for e in everything)
    runs = {(e["task"], tuple(name for name, _ in itertools.groupby(e["subtask"].tolist()))) for e in everything}
    assert (b"coffee-button", ("go to the button", "press it in")) in runs
    assert runs <= {  # the hand may begin above the handle
        (b"coffee-button", ("go to the button", "press it in")),
        (b"handle-press", ("go above the handle", "push down")),
        (b"handle-press", ("push down",)),
    }
    # No layout twice within a task, and none that evaluation uses.
    assert len({(e["task"], int(e["seed"])) for e in everything}) == 8
    assert max(int(e["seed"]) for e in everything) < 10_000
    assert len({e["file_path"] for e in everything}) == 8
    assert all(np.abs(e["action"]).max() <= 1.0 for e in everything)
    assert builder.info.metadata["renderer"] == everything[0]["renderer"].decode()
    assert builder.info.metadata["tasks"] == ["handle-press", "coffee-button"]
    assert "expert failures" in output
    assert [p.name for p in (out / "sawyer_sim").iterdir()] == ["1.0.0"]


def test_recorded_actions_are_clean(whole):
    """Where noise was added, the recorded action still is what the expert does in the recorded state."""
    from openpi_like.robots.sims import make_sim

    sim = make_sim("sawyer")
    _, episodes = read(whole[0])
    for episode in episodes["train"] + episodes["val"]:
        sim.reset(episode["task"].decode(), int(episode["seed"]))
        observation = sim.observe()
        np.testing.assert_array_equal(observation["images"]["base"], episode["image"][0])
        np.testing.assert_array_equal(observation["state"], episode["state"][0])
        np.testing.assert_array_equal(sim.expert(np.random.default_rng(), 0.0).act(), episode["action"][0])


def test_finished_dataset_is_left_alone(whole):
    out, _ = whole
    files = {p: p.stat().st_mtime_ns for p in (out / "sawyer_sim" / "1.0.0").iterdir()}
    code, output = finish(out, *OPTIONS)
    assert code == 0
    assert "nothing to do" in " ".join(output.split())  # a long path wraps the line anywhere
    assert {p: p.stat().st_mtime_ns for p in files} == files
    code, output = finish(out, *OPTIONS, "--seed", "1")
    assert code == 1
    assert "was made with other settings (there, wanted): {'seed': (0, 1)}" in output
    metadata = out / "sawyer_sim" / "1.0.0" / "metadata.json"
    now = metadata.read_text()
    metadata.write_text(json.dumps({k: v for k, v in json.loads(now).items() if k != "texts"}))
    code, output = finish(out, *OPTIONS)
    metadata.write_text(now)
    assert code == 0
    assert "made before demonstrations had subtasks" in " ".join(output.split())


def test_killed_run_goes_on_and_gives_the_same_episodes(whole, tmp_path):
    process = start(tmp_path, *OPTIONS, "--workers", "1")
    parts = tmp_path / "sawyer_sim" / "parts"
    while not list(parts.glob("*.npz")):
        try:
            process.wait(0.02)
        except subprocess.TimeoutExpired:
            continue
        pytest.fail(f"ended before it could be killed: {process.communicate()[0]}")
    process.kill()
    process.communicate()
    assert not (tmp_path / "sawyer_sim" / "1.0.0").exists()
    kept = {p.name: p.stat().st_mtime_ns for p in parts.glob("*.npz")}
    code, output = finish(tmp_path, *OPTIONS)
    assert code == 0, output
    assert kept
    (_, before), (_, after) = read(whole[0]), read(tmp_path)
    for split, episodes in before.items():
        for a, b in zip(episodes, after[split], strict=True):
            for key, value in a.items():
                np.testing.assert_array_equal(value, b[key], err_msg=key)


@pytest.mark.parametrize(("train", "layouts"), [(10, 5), (1_996, 5), (1_997, 4), (3_329, 3)])
def test_episodes_share_no_layout_however_many_there_are(train, layouts):
    """The fewer layouts each has to try, of 10,000 for a task."""
    make = runpy.run_path(str(REPOSITORY / "data" / "make_demos.py"))
    args = make["Args"](robot="pusht", out=Path("unused"), episodes_per_task=train, val_episodes_per_task=4)
    jobs = make["_jobs"](args, ("push-t",))
    assert {len(job.seeds) for job in jobs} == {layouts}
    used = [seed for job in jobs for seed in job.seeds]
    assert len(used) == len(set(used)) == layouts * (train + 4)
    assert max(used) < HELD_OUT_SEED


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tasks", "handle-pres", "coffee"], "has no task 'handle-pres', did you mean 'handle-press'"),
        (["--episodes-per-task", "5000"], r"episodes per task: train 5000, val 4; expected 1 .. 3333 in all"),
        (["--episodes-per-task", "0", "--val-episodes-per-task", "0"], "train 0, val 0"),
    ],
)
def test_errors(tmp_path, options, message):
    code, output = finish(tmp_path, *options)
    assert code == 1
    assert message in " ".join(output.split())
    assert "Traceback" not in output
    assert not list(tmp_path.rglob("*.npz"))
